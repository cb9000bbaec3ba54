"""Whose gradient fills the optimizer's step: shares of the domains of one mixed batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ..subspace.shards import local
from .gradients import GradientKeeper, gradient_gram


class StepBudget(GradientKeeper):
    """Keeps the gradient of every domain of a batch until the optimizer has stepped, and says what share of the step is whose.

    Costs while kept: N numbers per domain, and a backward pass of each, which only looks.

    Args:
        model: a module, or pairs of name and parameter.

    Attributes:
        directions: per domain, a tensor per parameter of what its gradient makes of the step; see :meth:`measure`.
    """

    def __init__(self, model: nn.Module | Iterable[tuple[str, nn.Parameter]]) -> None:
        super().__init__(model)
        self._optimizer: torch.optim.Optimizer | None = None
        self.directions: dict[str, list[Tensor]] = {}

    def around_part(self, name: str, optimizer: torch.optim.Optimizer | None) -> AbstractContextManager[None]:
        """Around the backward pass of one domain's part of the loss; what `p.grad` held is put back. With the optimizer
        whose step follows, gradients are compared as it scales them."""
        self._optimizer = optimizer
        return self.around(name, training=False)

    @torch.no_grad()
    def measure(self) -> dict[str, dict[str, float]]:
        """Shares that add up to 1, of squared norms; to be called after the optimizer's step, which made its second moments.

        Returns:
            "gradient": of the gradients. "step", where the optimizer is Adam's kind: of the gradients divided, as Adam does, by
            the root of its second moments: an update's worth of each domain. `directions` holds these (without second
            moments the gradients), pointing downhill.
        """
        kept, self.kept = self.kept, {}
        names, gradients = list(kept), list(kept.values())
        shares = {"gradient": self._shares(names, gradients)}
        if (scales := self._scales()) is not None:
            for gradient in gradients:
                torch._foreach_div_(gradient, scales)
            shares["step"] = self._shares(names, gradients)
        for gradient in gradients:
            torch._foreach_neg_(gradient)
        self.directions, self._optimizer = dict(zip(names, gradients, strict=True)), None
        return shares

    def _shares(self, names: Sequence[str], gradients: Sequence[Sequence[Tensor]]) -> dict[str, float]:
        squares = gradient_gram(gradients, self.shards).diagonal().clamp_min(0).tolist()
        total = sum(squares)
        return {name: square / total if total > 0 else 0.0 for name, square in zip(names, squares, strict=True)}

    def _scales(self) -> list[Tensor] | None:
        """What Adam divides each parameter's first moment by; None where one has no second moment of its own shape."""
        if self._optimizer is None:
            return None
        groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        out = []
        for p in self.parameters:
            state, group = self._optimizer.state.get(p, {}), groups.get(id(p), {})
            second = state.get("exp_avg_sq")
            if not isinstance(second, Tensor) or second.shape != p.shape or "step" not in state:
                return None
            known = 1 - group["betas"][1] ** float(state["step"])
            out.append((local(second) / known).sqrt_().add_(group["eps"]))
        return out
