"""Several rewards in one, and several domains in one run, without the loudest deciding.

A judge in [0, 1], a success that is 0 or 1 and a length bonus have different spreads; summed raw, the one with the largest
variance drives the gradient. Each component is therefore normalised by itself before they are weighted and summed (decoupled,
as in GDPO), optionally only where another component says the trajectory succeeded; and `domination` reports, after the fact,
which domain and which component the gradient came from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .._errors import one_of
from ..task import BatchReward, Example, checked_rewards, group_numbers
from .normalize import ROUNDING, Running, rank_in_group, standardized

Normalization = Literal["none", "group", "rank", "running"]


@dataclass
class Component:
    """One of several rewards.

    Args:
        name: The name in reports and in other components' gates.
        reward: A verifier, a scorer, anything a `Domain` takes.
        normalize: "group": by mean and standard deviation of the prompt's group. "rank": place in the group. "running": by
            the component's own running mean and standard deviation. "none": as it is.
        gate: Name of the component whose raw value must be at least `gate_at`, or this one is 0 and stays out of its
            own statistics: help that did not lead to success earns nothing, and success is compared with success.
    """

    name: str
    reward: Callable[[Example, str], float | None] | BatchReward
    weight: float = 1.0
    normalize: Normalization = "group"
    gate: str | None = None
    gate_at: float = 1.0
    running: Running = field(default_factory=Running, repr=False)

    def __post_init__(self) -> None:
        one_of(f"Component {self.name!r}: normalize", self.normalize, get_args(Normalization))
        if not math.isfinite(self.weight):
            raise ValueError(f"Component {self.name!r}: expected a finite weight, found {self.weight}")


@dataclass(frozen=True)
class Composed:
    """The composed rewards of a batch, and what each component contributes.

    Attributes:
        total: [B] float64, the weighted sum; 0 where not judged.
        parts: Per component [B], weighted and normalised; they sum to `total`.
        judged: [B] bool; False where a component has no value.
    """

    total: Tensor
    parts: dict[str, Tensor]
    judged: Tensor


class Composition:
    """A weighted sum of components, each normalised by itself; the reward of a `Domain`.

    With "group" components set `GRPOConfig(advantages="none")`: the sum has its scale already, and dividing it by the
    group's standard deviation once more would undo the weighting between groups. A completion that one component cannot
    judge is not judged at all: a sum with a hole would compare it with others on different terms.

    Args:
        components: The components, with distinct names.

    Raises:
        ValueError: Names repeat, or a gate names no component or itself.
    """

    def __init__(self, components: Sequence[Component]) -> None:
        names = [c.name for c in components]
        if not components or len(set(names)) != len(names):
            raise ValueError(f"Composition: expected components with distinct names, found {names}")
        for c in components:
            if c.gate is not None and (c.gate not in names or c.gate == c.name):
                raise ValueError(
                    f"Composition: expected the gate of {c.name!r} among the others {names}, found {c.gate!r}"
                )
        self.components = tuple(components)
        self.last: Composed | None = None
        self.__name__ = "composition"

    def compose(self, values: Mapping[str, Tensor], groups: Tensor, judged: Tensor) -> Composed:
        """The sum of given component values `[B]` each (whatever stands where `judged` is False), which running statistics
        take in."""
        parts = {}
        for c in self.components:
            v, counts = values[c.name].double(), _counts(c, values, judged)
            if c.normalize == "group":
                part = standardized(v, groups, counts)
            elif c.normalize == "rank":
                part = rank_in_group(v, groups, counts)
            elif c.normalize == "running":
                c.running.update(v[counts])
                part = c.running.normalize(v)
            else:
                part = v
            parts[c.name] = c.weight * part.where(counts, v.new_zeros(()))
        return Composed(torch.stack(list(parts.values())).sum(0), parts, judged)

    def score_batch(self, examples: Sequence[Example], completions: Sequence[str]) -> list[float | None]:
        """Normalised rewards of a batch, in the groups of `group_numbers`. `last` keeps the parts for reports."""
        values, judged = self._values(examples, completions)
        groups = torch.tensor(group_numbers(examples), dtype=torch.long)
        self.last = self.compose(values, groups, judged)
        return [t if known else None for t, known in zip(self.last.total.tolist(), judged.tolist(), strict=True)]

    def evaluate_batch(self, examples: Sequence[Example], completions: Sequence[str]) -> list[float | None]:
        """The weighted mean of the raw components, gates applied: what evaluation reports. Touches no statistic."""
        values, judged = self._values(examples, completions)
        weight = sum(abs(c.weight) for c in self.components) or 1.0
        total = torch.zeros(len(completions), dtype=torch.float64)
        for c in self.components:
            counts = _counts(c, values, judged)
            total += c.weight * values[c.name].where(counts, total.new_zeros(())) / weight
        return [t if known else None for t, known in zip(total.tolist(), judged.tolist(), strict=True)]

    def _values(self, examples: Sequence[Example], completions: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        values, judged = {}, torch.ones(len(completions), dtype=torch.bool)
        for c in self.components:
            raw = checked_rewards(c.name, c.reward, examples, completions)
            values[c.name] = torch.tensor([r or 0.0 for r in raw], dtype=torch.float64)
            judged &= torch.tensor([r is not None for r in raw], dtype=torch.bool)
        return values, judged

    @property
    def compares(self) -> bool:
        """Whether rewards come from comparing completions with one another."""
        return any(c.normalize in ("group", "rank") or getattr(c.reward, "compares", False) for c in self.components)

    def state_dict(self) -> dict[str, Any]:
        """Running statistics, for checkpoints."""
        return {c.name: c.running.state_dict() for c in self.components}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for c in self.components:
            c.running.load_state_dict(state[c.name])


def _counts(component: Component, values: Mapping[str, Tensor], judged: Tensor) -> Tensor:
    """[B] bool: judged, and let through by the component's gate."""
    return judged if component.gate is None else judged & (values[component.gate] >= component.gate_at)


# ------------------------------------------------------------------------------------------------------- who dominates


@dataclass(frozen=True)
class Share:
    """What one domain contributes.

    Attributes:
        samples: Share of the completions.
        energy: Share of the gradient's drive (see `domination`).
        ratio: energy / samples; 1 is proportionate.
        dominates: Whether the ratio is above the threshold.
    """

    name: str
    samples: float
    energy: float
    ratio: float
    dominates: bool


@dataclass(frozen=True)
class Domination:
    """Which domains drive the gradient; as text it is a table.

    Attributes:
        domains: Largest share first.
        effective: As many domains with equal shares of the energy would be as concentrated: 1 / sum of squared shares.
    """

    domains: tuple[Share, ...]
    effective: float

    def __str__(self) -> str:
        lines = [f"{'':>12}  samples  energy  ratio"]
        for s in self.domains:
            mark = "  dominates" if s.dominates else ""
            lines.append(f"{s.name:>12}  {s.samples:6.1%}  {s.energy:6.1%}  {s.ratio:5.2f}{mark}")
        return "\n".join([*lines, f"effective number of domains {self.effective:.2f} of {len(self.domains)}"])


def domination(
    advantages: Tensor, domains: Sequence[str], *, weights: Tensor | None = None, threshold: float = 1.5
) -> Domination:
    """Which domain's reward variance drives the gradient.

    A completion enters the policy gradient as A_i * grad log p_i, so with scores of similar size its share of the squared
    gradient is that of (w_i A_i)^2; advantages have mean 0 in a group, so that is the domain's reward variance.

    Args:
        advantages: [B]; NaN, for what was not judged, drives nothing.
        domains: B names.
        weights: [B] weight of each completion in the loss: tokens for a token mean (dapo), nothing for grpo.
        threshold: Share of energy over share of completions from which a domain is said to dominate.

    Raises:
        ValueError: Shapes differ or there is nothing.
    """
    if advantages.dim() != 1 or len(domains) != advantages.numel() or not domains:
        raise ValueError(
            f"domination: expected B >= 1 advantages and names, found {tuple(advantages.shape)}, {len(domains)}"
        )
    drive = (advantages.double() if weights is None else advantages.double() * weights.double()).nan_to_num(0.0)
    energy = (drive / (drive.abs().max() or 1.0)).square()  # shares do not depend on the scale, and 1e200 has no square
    total = float(energy.sum())
    shares = []
    for name in dict.fromkeys(domains):
        rows = torch.tensor([d == name for d in domains])
        samples = float(rows.double().mean())
        own = float(energy[rows].sum()) / total if total else 0.0
        shares.append(Share(name, samples, own, own / samples, own / samples > threshold and len(set(domains)) > 1))
    squares = sum(s.energy**2 for s in shares)
    return Domination(tuple(sorted(shares, key=lambda s: -s.energy)), 1 / squares if squares else float(len(shares)))


def attribution(composed: Composed) -> dict[str, float]:
    """Share of the composed reward's variance that each component explains: Cov(part, total) / Var(total).

    The shares sum to 1; a negative one works against the others. All zero when the total does not vary.
    """
    total = composed.total[composed.judged]
    size = float(total.abs().max()) if total.numel() > 1 else 0.0
    centred = (total / size - (total / size).mean()) if size else total
    variance = float(centred.square().sum())
    if not size or variance <= ROUNDING**2:
        return dict.fromkeys(composed.parts, 0.0)
    return {n: float((part[composed.judged] / size * centred).sum()) / variance for n, part in composed.parts.items()}
