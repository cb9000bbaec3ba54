"""Do domains pull the same way? Inner products of their gradients, without one flattened copy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..guard.build import trainable
from ..guard.gradients import gradient_gram, local_gradients, set_aside
from ..subspace.shards import Shards


class GradientKeeper:
    """A gradient per name, kept from backward until they are compared.

    Costs while kept: N numbers per name (in the gradients' dtype) beside the optimizer's own; comparing reads each once.
    """

    def __init__(self, model: nn.Module | Iterable[tuple[str, nn.Parameter]]) -> None:
        named = trainable(model)
        self.parameters = [p for _, p in named]
        self.shards = Shards.of(named)
        self.kept: dict[str, list[Tensor]] = {}

    def keep(self, name: str) -> None:
        """Copies what is in `p.grad` now."""
        self.kept[name] = self._add(name, [g.clone() for g in local_gradients(self.parameters)])

    @contextmanager
    def around(self, name: str, training: bool) -> Iterator[None]:
        """Keeps what backward passes inside add to `p.grad`; several blocks of one name before the comparison add up.

        Args:
            training: afterwards `p.grad` holds what it held before plus the new gradient; else what it held before. With one
                backward pass per block the sum is bitwise that without this. Those of several in one block are summed first
                and then added to what was there: another order, which may round differently.

        Raises:
            RuntimeError: no gradient arrived.
        """
        with set_aside(self.parameters):
            yield
            if all(p.grad is None for p in self.parameters):
                raise RuntimeError(
                    f"gradients of {name!r}: expected a gradient, found none; call loss.backward() inside the block"
                )
            # Without an earlier gradient the new one stays in p.grad, to be clipped there or zeroed: a copy is kept.
            found = local_gradients(self.parameters)
            self.kept[name] = self._add(name, [g.clone() for g in found] if training else found)
            new = [p.grad for p in self.parameters]
        for p, grad in zip(self.parameters, new, strict=True):
            if training and grad is not None:
                p.grad = grad if p.grad is None else p.grad.add_(grad)

    def compare(self) -> dict[str, Any]:
        """Cosines and norms of what was kept, which is dropped: "norm" per name, and "cosine" per name and later name, None
        where a gradient is zero or not finite."""
        names, gradients = list(self.kept), list(self.kept.values())
        self.kept = {}
        gram = gradient_gram(gradients, self.shards).tolist()
        norms = [math.sqrt(gram[i][i]) if gram[i][i] >= 0 else math.nan for i in range(len(names))]
        cosine = {
            a: {names[j]: _ratio(gram[i][j], norms[i] * norms[j]) for j in range(i + 1, len(names))}
            for i, a in enumerate(names[:-1])
        }
        return {
            "norm": {n: v if math.isfinite(v) else None for n, v in zip(names, norms, strict=True)},
            "cosine": cosine,
        }

    def _add(self, name: str, new: list[Tensor]) -> list[Tensor]:
        if name not in self.kept:
            return new
        return [a + b for a, b in zip(self.kept[name], new, strict=True)]


def _ratio(product: float, size: float) -> float | None:
    if not (math.isfinite(product) and math.isfinite(size)) or size == 0:
        return None
    return max(-1.0, min(1.0, product / size))
