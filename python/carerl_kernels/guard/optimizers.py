"""What a guard has to know of optimizers: which parameters they move, and whether they keep the weights elsewhere, too."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..subspace.shards import local
from .build import named_parameters

# These keep float32 masters, or averages that replace the parameters later, so an edit of the parameters would be lost.
ELSEWHERE = (
    "BF16_Optimizer",
    "DeepSpeedZeroOptimizer",
    "DeepSpeedZeroOptimizer_Stage3",
    "DistributedOptimizer",
    "FP16_Optimizer",
    "Float16OptimizerWithFloat16Params",
    "Lookahead",
)
ALIKE = 0.5
"""State closer than this to its parameter, relative to the parameter's norm, is a copy of it: moments are orders smaller."""


def real_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside of wrappers (accelerate's and others'), where hooks work. TypeError: it is none, or one that
    keeps the weights elsewhere; says what to do."""
    while True:
        for name in {c.__name__ for c in type(optimizer).__mro__} & set(ELSEWHERE):
            raise TypeError(
                f"{name} keeps the weights elsewhere and overwrites the parameters from there: an edit would be lost; build the "
                "guard over its master parameters, use an optimizer that updates the parameters in place, or confine finished "
                "checkpoints (carerl confine)"
            )
        if not hasattr(optimizer, "optimizer"):
            break
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"expected a torch.optim.Optimizer, found {type(optimizer).__name__}")
    return optimizer


_STEP = torch.optim.Optimizer.profile_hook_step(lambda optimizer: None).__code__


def inside_another_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether hooks run once more within one step: torch calls them for a subclass's step and for `super().step()` in it.

    Only the stack knows: a count of begun steps would be off for good after one that raised.
    """
    frame, found = sys._getframe(1), 0
    while frame is not None:
        found += frame.f_code is _STEP and frame.f_locals.get("self") is optimizer
        frame = frame.f_back  # type: ignore[assignment]
    return found > 1


def second_weights(
    optimizers: Iterable[torch.optim.Optimizer], parameters: Sequence[nn.Parameter]
) -> list[Tensor] | None:
    """Another copy of the weights that has to be confined with the parameters: the fast sequence z of schedule-free optimizers.

    Their parameters are an average of it while training and another one in `optimizer.eval()`; both stay inside the box when
    both sequences do.

    Returns:
        The local part of every parameter's copy; of one without, that of the parameter itself. None where there is none.
    """
    states = {
        p: state for o in optimizers if hasattr(o, "eval") and hasattr(o, "train") for p, state in o.state.items()
    }
    if not any("z" in state for state in states.values()):
        return None
    return [local(states[p]["z"]) if "z" in states.get(p, {}) else local(p) for p in parameters]


def refuse_copies(
    optimizers: Iterable[torch.optim.Optimizer], parameters: Sequence[nn.Parameter], supported: bool
) -> None:
    """Looks at the state of the largest parameter after its first step for a copy of the weights, other than a "z" of
    schedule-free optimizers where that is supported; a RuntimeError names it, and what to do."""
    for optimizer in optimizers:
        with_state = [p for p in parameters if p in optimizer.state]
        if not with_state:
            continue
        largest = max(with_state, key=lambda p: p.numel())
        here = local(largest).detach()
        for key, state in optimizer.state[largest].items():
            if not isinstance(state, Tensor) or state.shape != largest.shape or (supported and key == "z"):
                continue
            apart = (local(state).float() - here.float()).norm()
            if bool(apart < ALIKE * here.float().norm()):
                raise RuntimeError(
                    f"{type(optimizer).__name__} keeps another copy of the weights in its state ({key!r}), which a correction of "
                    "the parameters does not reach; use an optimizer that updates the parameters in place, or confine finished "
                    "checkpoints (carerl confine)"
                )


class Census:
    """Which parameters of the optimizers are guarded. Whatever is not is named, once, with the reason.

    Args:
        covered: names of those that directions exist for.
        module: the model as it is; None where the guard was built from pairs.
    """

    def __init__(self, guarded: Mapping[str, nn.Parameter], covered: Iterable[str], module: nn.Module | None):
        self._guarded, self.covered, self._module = dict(guarded), set(covered), module
        self._ids = {id(p) for p in guarded.values()}
        self._looked_at: frozenset[int] = frozenset()
        # what moves freely, by reason: number of parameters, and of their elements
        self.free: dict[str, dict[str, int]] = {}

    def look(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Looks whether the optimizers have parameters that were not there before; warns of those that are not guarded."""
        held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        ids = frozenset(map(id, held))
        if ids == self._looked_at:
            return
        fresh, self._looked_at = [p for p in held if id(p) not in self._looked_at], self._looked_at | ids
        names = {} if self._module is None else {id(p): name for name, p in named_parameters(self._module)}
        new, strangers = set(map(id, fresh)), {}  # type: set[int], dict[str, list[str]]
        for p in fresh:
            if id(p) in self._ids:
                continue
            name = names.get(id(p))
            if name is None:
                reason, name = "not a parameter of the guarded model", f"{list(p.shape)}"
            elif name in self._guarded:
                reason = "it took the place of a guarded one (resize_token_embeddings, a replaced layer)"
            else:
                reason = "it was frozen or not there when the guard was built"
            strangers.setdefault(reason, []).append(name)
            self._count(reason, p)
        for name, p in self._guarded.items():
            if id(p) in new and name not in self.covered:
                self._count("not a weight matrix that directions exist for", p)
        for reason, found in strangers.items():
            some = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
            warnings.warn(
                f"the optimizer moves parameters that are not guarded: {some} ({reason}); build the guard, and attach it, when "
                "the model and the optimizer have all the parameters that will be trained",
                stacklevel=3,
            )

    def check_model(self) -> None:
        """Refuses a model whose guarded parameters are not those any more, naming the first of them (RuntimeError)."""
        if self._module is None:
            return
        for name, p in named_parameters(self._module):
            if name in self._guarded and self._guarded[name] is not p:
                raise RuntimeError(
                    f"parameter {name!r} was replaced since the guard was built (resize_token_embeddings?): expected the guarded "
                    "tensor, found another one; build a new guard from the model as it is now"
                )

    def _count(self, reason: str, p: nn.Parameter) -> None:
        found = self.free.setdefault(reason, {"parameters": 0, "elements": 0})
        found["parameters"] += 1
        found["elements"] += p.numel()
