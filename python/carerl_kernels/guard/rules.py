"""The rules that decide step by step how much of each component passes. Float64, `[T, K]`, no host synchronisation.

    instant         sign of this minibatch's coefficient. One reading of CARE-RL; its sign is mostly minibatch
                    noise, which the rule rectifies into a drift. Kept for comparison.
    integrated      acts on P, the displacement accumulated since the stage began: a step applies `f(P_new) - f(P_old)`,
                    f(P) = w P with w = aligned for P > 0 and conflict for P < 0, so that noise averages out
    probed          a direction counts as aligned when it lowers the earlier domain's loss *now*, by a recent probe gradient;
                    one without a probe that can be trusted is held as by "bounded"
    remove          of gradients: nothing along historical directions passes (GPM)

Of parameters, "bounded" and "remove" decide nothing step by step: they are a projection, :mod:`carerl_kernels.guard.box`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .frames import Frame

Rule = Literal["instant", "integrated", "bounded", "remove", "probed"]
RULES: tuple[Rule, ...] = get_args(Rule)
MEMORY: dict[Rule, tuple[str, ...]] = {"integrated": ("p",), "probed": ("p", "probe")}
"""What rules remember between steps, all `[T, K]` float64. p: raw displacement accumulated since the stage began (gradient
convention), before any edit. probe: sign of the last probe gradient's coefficient; 0 where none arrived."""


@dataclass(frozen=True)
class RuleParams:
    """Numbers of a rule, `[K]` float64 so that domains may differ.

    Attributes:
        aligned, conflict: weights of components along and against prior learning.
        lower, upper: bounds of "bounded", as fractions of the recorded displacement.
    """

    aligned: Tensor
    conflict: Tensor
    lower: Tensor
    upper: Tensor


def _by_sign(sign: Tensor, params: RuleParams) -> Tensor:
    """Weights from a sign per row: positive is aligned, negative conflicting, zero passes."""
    one = torch.ones((), dtype=sign.dtype, device=sign.device)
    return torch.where(sign > 0, params.aligned, torch.where(sign < 0, params.conflict, one))


def beyond(D: Tensor, params: RuleParams, reach: Tensor, displacement: Tensor) -> Tensor:
    """What of the components of a displacement lies outside of the box of "bounded"."""
    size = displacement * reach
    return D - torch.minimum(torch.maximum(D, -params.lower * size), params.upper * size)


def decide(
    rule: Rule,
    c: Tensor,
    active: Tensor,
    state: Mapping[str, Tensor],
    params: RuleParams,
    frame: Frame,
    displacement: Tensor,
    finite: Tensor | None = None,
    fallback: Tensor | None = None,
    floor: Tensor | float = 0.0,
) -> Tensor:
    """The correction of one step, and the rule's memory moved on (docs/math.md, "reading of signs").

    Args:
        rule: "instant", "integrated", "probed" or "remove".
        c: raw coefficients of this step `[T, K]` in the gradient convention (positive repeats prior learning).
        active: `[K]` bool, the rows that act: those of every domain but the batch's own.
        state: see :data:`MEMORY`; changed in place, on active rows only, and only when every c is finite.
        displacement: h `[T, K]`, the recorded stages' displacement along each row.
        finite: 0-d bool, whether every c is; None looks at c, which sees this process's rows only.
        fallback: `[K]` bool, rows that rule "probed" treats as "bounded" does, because their signs cannot be trusted.
        floor: 0-d or `[T, 1]`, smallest |c| of which the sign means anything: stored directions are rounded.

    Returns:
        x `[T, K]`: the step `g` (gradient, or negated parameter change) becomes `g - A^T x`.
    """
    acting = active & (c.isfinite().all() if finite is None else finite)
    c = torch.where(active, c, 0.0)
    if rule == "remove":
        return frame.root(frame.root(c))
    if rule == "instant":
        sign = torch.where(c.abs() > floor, c, 0.0)
        return frame.root((1 - _by_sign(sign, params)) * frame.root(c))
    inside, before = frame.root(torch.stack([c, state["p"]]))  # both at once: the map may be large
    after = before + inside
    state["p"].copy_(torch.where(acting, state["p"] + c, state["p"]))
    if rule == "integrated":
        change = (after - _by_sign(after, params) * after) - (before - _by_sign(before, params) * before)
        return frame.root(change)
    change = (1 - _by_sign(c * state["probe"], params)) * inside
    if fallback is not None:
        out = beyond(after, params, frame.reach, displacement) - beyond(before, params, frame.reach, displacement)
        change = torch.where(fallback, out, change)
    return frame.root(change)
