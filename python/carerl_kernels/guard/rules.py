"""The rules: how much of each component of an update passes. Float64, ``[T, K]``, no host synchronisation.

Two families. *Weight* rules give each component of this step a weight w (1 passes, 0 removes):
    instant         sign of this minibatch's coefficient. The literal reading of CARE-RL; its sign is mostly minibatch
                    noise, which the rule rectifies into a drift. Kept for comparison.
    significance    sign only where ``|c| > z * sigma``, sigma from a moving average of c^2
    ema             sign of a moving average of c
    probed          a direction counts as aligned when it lowers the earlier domain's loss *now*, by a recent probe gradient;
                    without one that can be trusted, bounded
*Displacement* rules act on P, the displacement accumulated since the stage began, in the combine rule's frame: a step applies
``f(P_new) - f(P_old)``, so the net displacement always is f(P) and noise averages out instead of accumulating.
    integrated      f(P) = w P with w = aligned for P > 0, conflict for P < 0
    bounded         f(P) = clip(P, -lower, upper), bounds a fraction of the recorded stage's own displacement
    remove          f(P) = 0: nothing moves along historical directions (the limit of GPM)
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .frames import Frame

Rule = Literal["instant", "significance", "ema", "integrated", "bounded", "remove", "probed"]
RULES: tuple[Rule, ...] = get_args(Rule)
MEMORY: dict[Rule, tuple[str, ...]] = {
    "instant": (),
    "significance": ("square", "count"),
    "ema": ("mean",),
    "integrated": ("p",),
    "bounded": ("p",),
    "remove": (),
    "probed": ("p", "probe"),
}
"""What each rule remembers, see :class:`RuleState`."""


@dataclass(frozen=True)
class RuleParams:
    """Numbers of a rule; tensors are ``[K]`` float64 so that domains may differ, or ``[T, K]``.

    Attributes:
        aligned, conflict: weights of components along and against prior learning.
        lower, upper: bounds of ``bounded``, as fractions of the recorded displacement.
        z: significance level; beta: decay of the moving averages.
    """

    aligned: Tensor
    conflict: Tensor
    lower: Tensor
    upper: Tensor
    z: float
    beta: float

    def part(self, rows: slice) -> RuleParams:
        """For some coefficient rows, where numbers differ between rows."""
        by_row: dict[str, Any] = {
            f.name: v[rows] for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor) and v.dim() == 2
        }
        return replace(self, **by_row) if by_row else self


@dataclass
class RuleState:
    """What rules remember between steps, all ``[T, K]`` float64.

    Attributes:
        p: raw displacement accumulated since the stage began (gradient convention), before any edit.
        mean, square: moving averages of c and c^2, not yet bias-corrected; count: steps in them.
        probe: sign of the last probe gradient's coefficient; 0 where none arrived.
    """

    p: Tensor
    mean: Tensor
    square: Tensor
    count: Tensor
    probe: Tensor

    @classmethod
    def zeros(cls, rule: Rule, T: int, K: int, device: torch.device) -> RuleState:
        """Memory for what this rule uses; empty tensors for the rest."""

        def fresh(name: str) -> Tensor:
            return torch.zeros(T, K if name in MEMORY[rule] else 0, dtype=torch.float64, device=device)

        return cls(**{field.name: fresh(field.name) for field in fields(cls)})

    def part(self, rows: slice) -> RuleState:
        """Some coefficient rows of it, in the same memory."""
        return RuleState(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def begin_stage(self) -> None:
        for field in fields(self):
            getattr(self, field.name).zero_()


def _by_sign(sign: Tensor, params: RuleParams) -> Tensor:
    """Weights from a sign per row: positive is aligned, negative conflicting, zero passes."""
    one = torch.ones((), dtype=sign.dtype, device=sign.device)
    return torch.where(sign > 0, params.aligned, torch.where(sign < 0, params.conflict, one))


def _attained(rule: Rule, P: Tensor, params: RuleParams, reach: Tensor, displacement: Tensor) -> Tensor:
    """f(P): the net displacement that a displacement rule allows when the raw one is P."""
    if rule == "integrated":
        return _by_sign(P, params) * P
    size = displacement * reach
    return torch.minimum(torch.maximum(P, -params.lower * size), params.upper * size)


def decide(
    rule: Rule,
    c: Tensor,
    active: Tensor,
    state: RuleState,
    params: RuleParams,
    frame: Frame,
    displacement: Tensor,
    finite: Tensor | None = None,
    fallback: Tensor | None = None,
    floor: Tensor | float = 0.0,
) -> Tensor:
    """The correction of one step, and the rule's memory moved on (MATH: rules).

    Args:
        rule: one of :data:`RULES`.
        c: raw coefficients of this step ``[T, K]`` in the gradient convention (positive repeats prior learning).
        active: ``[K]`` bool, the rows that act: those of every domain but the batch's own.
        state: changed in place, on active rows only, and only when every c is finite.
        params, frame: see their classes.
        displacement: h ``[T, K]``, the recorded stages' displacement along each row.
        finite: 0-d bool, whether every c is; None looks at c, which sees this process's rows only.
        fallback: ``[K]`` bool, rows that rule "probed" treats as "bounded" does, because their signs cannot be trusted.
        floor: 0-d or ``[T, 1]``, smallest |c| of which the sign means anything: stored directions are rounded.

    Returns:
        x ``[T, K]``: the step ``g`` (gradient, or negated parameter change) becomes ``g - A^T x``.
    """
    acting = active & (c.isfinite().all() if finite is None else finite)
    c = torch.where(active, c, 0.0)
    if "p" in MEMORY[rule]:
        inside, before = frame.into(torch.stack([c, state.p]))  # both at once: the map may be large
        bounded = _by_displacement(
            "bounded" if rule == "probed" else rule, c, inside, before, acting, state, params, frame, displacement
        )
        if rule != "probed":
            return frame.out(bounded)
    else:
        inside = frame.into(c)
    if rule == "remove":  # f = 0 whatever came before: nothing to remember
        return frame.out(inside)
    if rule == "instant":
        sign = torch.where(c.abs() > floor, c, 0.0)
    elif rule == "significance":
        # sigma from the steps before this one; nothing is significant before the average has seen its own length of steps
        # (sigma of a single step would call a fifth of pure noise significant)
        sigma = (state.square / (1 - params.beta**state.count).clamp_min(1e-300)).sqrt()
        settled = state.count * (1 - params.beta) >= 1 - 1e-9
        sign = torch.where((c.abs() > params.z * sigma) & (c.abs() > floor) & settled, c, 0.0)
    elif rule == "ema":
        sign = params.beta * state.mean + (1 - params.beta) * c
    else:
        sign = c * state.probe
    for name, value in (("mean", c), ("square", c.square())):
        if name in MEMORY[rule]:
            old = getattr(state, name)
            old.copy_(torch.where(acting, params.beta * old + (1 - params.beta) * value, old))
    if "count" in MEMORY[rule]:
        state.count.add_(acting.to(state.count.dtype))
    change = (1 - _by_sign(sign, params)) * inside
    if rule == "probed" and fallback is not None:
        change = torch.where(fallback, bounded, change)
    return frame.out(change)


def _by_displacement(
    rule: Rule,
    c: Tensor,
    inside: Tensor,
    before: Tensor,
    acting: Tensor,
    state: RuleState,
    params: RuleParams,
    frame: Frame,
    displacement: Tensor,
) -> Tensor:
    """Change of components by a displacement rule, given the components of c and of p; moves p on."""
    after = before + inside
    state.p.copy_(torch.where(acting, state.p + c, state.p))
    kept = _attained(rule, after, params, frame.reach, displacement)
    kept = kept - _attained(rule, before, params, frame.reach, displacement)
    return (after - before) - kept
