"""The rules: how much of each component of an update passes. Float64, ``[T, K]``, no host synchronisation.

Two families. *Weight* rules give each component of this step a weight w (1 passes, 0 removes):
    instant         sign of this minibatch's coefficient. The literal reading of CARE-RL; its sign is mostly minibatch
                    noise, which the rule rectifies into a drift. Kept for comparison.
    significance    sign only where ``|c| > z * sigma``, sigma from a moving average of c^2
    ema             sign of a moving average of c
    probed          a direction counts as aligned when it lowers the earlier domain's loss *now*, by a recent probe gradient
*Displacement* rules act on P, the displacement accumulated since the stage began, in the combine rule's frame: a step applies
``f(P_new) - f(P_old)``, so the net displacement always is f(P) and noise averages out instead of accumulating.
    integrated      f(P) = w P with w = aligned for P > 0, conflict for P < 0
    bounded         f(P) = clip(P, -lower, upper), bounds a fraction of the recorded stage's own displacement
    remove          f(P) = 0: nothing moves along historical directions (the limit of GPM)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..linalg import loewdin_root, pinv_power

Rule = Literal["instant", "significance", "ema", "integrated", "bounded", "remove", "probed"]
Combine = Literal["symmetric", "sum", "min_norm"]
RULES: tuple[Rule, ...] = get_args(Rule)
COMBINES: tuple[Combine, ...] = get_args(Combine)


@dataclass(frozen=True)
class Frame:
    """How coefficients of overlapping rows become components (``into``) and components become an edit (``out``).

    For active rows with overlap S: symmetric ``into = out = (S^+)^(1/2)``, sum ``into = out = I``, min_norm ``into = I,
    out = S^+`` (MATH: combine rule for overlapping bases). Inactive rows are zero in both.

    Attributes:
        into, out: ``[T, K, K]`` float64.
        root: ``[T, K, K]``, (S^+)^(1/2) whatever the combine: ``|root c|`` is the norm of the component in the span of the rows.
        reach: ``[T, K]``, ``sqrt(diag(into S into^T))``: how far a unit displacement along a row is in the frame. Duplicated
            rows share one displacement in the symmetric frame; bounds scale with this so that they count once.
    """

    into: Tensor
    out: Tensor
    root: Tensor
    reach: Tensor

    @classmethod
    def of(cls, overlap: Tensor, active: Tensor, combine: Combine) -> Frame:
        """Builds the frame of the active rows (``[K]`` bool) of an overlap ``[T, K, K]``."""
        mask = active.to(overlap.dtype)
        masked = overlap * mask * mask.unsqueeze(1)
        identity = torch.diag_embed((masked.diagonal(dim1=-2, dim2=-1) > 0).to(overlap.dtype))
        root = loewdin_root(masked)
        if combine == "symmetric":
            into = out = root
        elif combine == "sum":
            into = out = identity
        else:
            into, out = identity, pinv_power(masked, -1.0)
        reach = (into @ masked @ into.mT).diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
        return cls(into, out, root, reach)


@dataclass(frozen=True)
class RuleParams:
    """Numbers of a rule; per-row ones are ``[K]`` float64 so that domains may differ.

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
    def zeros(cls, T: int, K: int, device: torch.device) -> RuleState:
        return cls(*(torch.zeros(T, K, dtype=torch.float64, device=device) for _ in range(5)))

    def begin_stage(self) -> None:
        for name in ("p", "mean", "square", "count", "probe"):
            getattr(self, name).zero_()


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _by_sign(sign: Tensor, params: RuleParams) -> Tensor:
    """Weights from a sign per row: positive is aligned, negative conflicting, zero passes."""
    one = torch.ones((), dtype=sign.dtype, device=sign.device)
    return torch.where(sign > 0, params.aligned, torch.where(sign < 0, params.conflict, one))


def _attained(rule: Rule, P: Tensor, params: RuleParams, reach: Tensor, displacement: Tensor) -> Tensor:
    """f(P): the net displacement that a displacement rule allows when the raw one is P."""
    if rule == "remove":
        return torch.zeros_like(P)
    if rule == "integrated":
        return _by_sign(P, params) * P
    size = displacement * reach
    return torch.minimum(torch.maximum(P, -params.lower * size), params.upper * size)


def decide(
    rule: Rule, c: Tensor, active: Tensor, state: RuleState, params: RuleParams, frame: Frame, displacement: Tensor
) -> Tensor:
    """The correction of one step, and the rule's memory moved on (MATH: rules).

    Args:
        rule: one of :data:`RULES`.
        c: raw coefficients of this step ``[T, K]`` in the gradient convention (positive repeats prior learning).
        active: ``[K]`` bool, the rows that act: those of every domain but the batch's own.
        state: changed in place, on active rows only, and only when every c is finite.
        params, frame: see their classes.
        displacement: h ``[T, K]``, the recorded stages' displacement along each row.

    Returns:
        x ``[T, K]``: the step ``g`` (gradient, or negated parameter change) becomes ``g - A^T x``.
    """
    acting = active & c.isfinite().all()
    c = torch.where(active, c, 0.0)
    if rule in ("integrated", "bounded", "remove"):
        before, after = _apply(frame.into, torch.where(active, state.p, 0.0)), _apply(frame.into, c)
        after = before + after
        state.p = torch.where(acting, state.p + c, state.p)
        kept = _attained(rule, after, params, frame.reach, displacement)
        kept = kept - _attained(rule, before, params, frame.reach, displacement)
        return _apply(frame.out, (after - before) - kept)
    if rule == "instant":
        sign = c
    elif rule == "significance":
        # sigma from the steps before this one; nothing is significant before the average has seen its own length of steps
        # (sigma of a single step would call a fifth of pure noise significant)
        sigma = (state.square / (1 - params.beta**state.count).clamp_min(1e-300)).sqrt()
        sign = torch.where((c.abs() > params.z * sigma) & (state.count * (1 - params.beta) >= 1 - 1e-9), c, 0.0)
    elif rule == "ema":
        sign = params.beta * state.mean + (1 - params.beta) * c
    else:
        sign = c * state.probe
    for name, value in (("mean", c), ("square", c.square())):
        old = getattr(state, name)
        setattr(state, name, torch.where(acting, params.beta * old + (1 - params.beta) * value, old))
    state.count = torch.where(acting, state.count + 1, state.count)
    return _apply(frame.out, (1 - _by_sign(sign, params)) * _apply(frame.into, c))
