"""Values on one scale: within their group, by their rank, or by what the stream has held so far."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

ROUNDING = 1e-12  # relative: below it a spread is that of arithmetic


def rank_in_group(values: Tensor, groups: Tensor, judged: Tensor | None = None) -> Tensor:
    """Place among the group's values in [-1, 1], ties at their mean place: no outlier counts more than its rank.

    Args:
        values: [B] rewards.
        groups: [B] integers, the group of each.
        judged: [B] bool, which rewards there are; False rows get 0 and take no place.

    Returns:
        [B] float64 with mean 0 in every group; 0 for a group of one.
    """
    v = values.double()
    alike = groups[:, None] == groups[None, :]  # [B, B]
    if judged is not None:
        alike &= judged[None, :] & judged[:, None]
    below = (alike & (v[None, :] < v[:, None])).sum(1)
    above = (alike & (v[None, :] > v[:, None])).sum(1)
    others = (alike.sum(1) - 1).clamp(min=1)
    return (below - above).double() / others


class Running:
    """Mean and standard deviation of a stream, exponentially weighted: a scale that does not jump from batch to batch.

    A value further than `LIMIT` standard deviations away counts as one at that distance: a single outlier does not set the
    scale, and a stream whose scale does change is followed at a quarter per batch. An outlier that came before there was any
    scale to measure it by is forgotten once `STRANGE` batches in a row spread a hundred times less.

    Args:
        decay: Weight of what was before, per batch. The average is unbiased from the first batch on.
    """

    LIMIT = 8.0
    STRANGE = 10

    def __init__(self, decay: float = 0.99) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"Running: expected decay in (0, 1), found {decay}")
        self.decay, self.weight, self.mean, self.std, self.strange = decay, 0.0, 0.0, 0.0, 0

    def update(self, values: Tensor) -> None:
        """Takes in a batch [n] of finite values; an empty one changes nothing."""
        if not values.numel():
            return
        v = values.double()
        centre = float(v.median())
        apart = (v - centre).abs().clamp(max=torch.finfo(torch.float64).max)
        own = moments(v)[1]
        self.strange = self.strange + 1 if own < self.std / 100 else 0 if own else self.strange
        if own and self.strange >= self.STRANGE:
            self.weight, self.std, self.strange = 0.0, 0.0, 0
        scale = max(self.std, 1.4826 * float(apart.median()))  # of a normal distribution, from its median distance
        if scale > 0:
            from_ = self.mean if self.weight else centre
            v = v.clamp(from_ - self.LIMIT * scale, from_ + self.LIMIT * scale)
        before = self.decay * self.weight
        self.weight = before + 1 - self.decay
        old, new = before / self.weight, (1 - self.decay) / self.weight
        mean, spread = moments(v)
        # variance of the mixture, without squaring what may be 1e200
        self.std = math.hypot(
            math.sqrt(old) * self.std, math.sqrt(new) * spread, math.sqrt(old * new) * (mean - self.mean)
        )
        self.mean = old * self.mean + new * mean

    def normalize(self, values: Tensor) -> Tensor:
        """(values - mean) / std, at most `LIMIT` either way; zeros while everything seen was equal."""
        if self.std <= ROUNDING * abs(self.mean):
            return torch.zeros_like(values, dtype=torch.float64)
        return ((values.double() - self.mean) / self.std).clamp(-self.LIMIT, self.LIMIT)

    def state_dict(self) -> dict[str, float]:
        return {n: getattr(self, n) for n in ("weight", "mean", "std", "strange")}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        for name in self.state_dict():
            setattr(self, name, state[name])


def moments(values: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of finite values, however large; the latter is 0 where they differ by rounding alone."""
    size = float(values.abs().max()) or 1.0
    spread = float((values / size).std(correction=0))
    return float((values / size).mean()) * size, spread * size if spread > ROUNDING else 0.0


def standardized(values: Tensor, groups: Tensor, judged: Tensor) -> Tensor:
    """(value - mean) / standard deviation within each group, whatever the size and the spread of its values; `[B]` float64,
    0 in a group whose values differ by rounding alone. Arguments as :func:`rank_in_group`.

    `group_advantages` adds a constant to the standard deviation, under which small spreads would shrink, and squares,
    under which large values overflow; so each group is first brought to the range [-1, 1].
    """
    v = values.double()
    place = torch.unique(groups, return_inverse=True)[1]  # [B]
    limit = torch.finfo(torch.float64).max
    high = v.new_full((len(v),), -limit).scatter_reduce(0, place, v.where(judged, v.new_tensor(-limit)), "amax")[place]
    low = v.new_full((len(v),), limit).scatter_reduce(0, place, v.where(judged, v.new_tensor(limit)), "amin")[place]
    half = high / 2 - low / 2  # [B] of its group
    equal = half <= ROUNDING * torch.maximum(high.abs(), low.abs())
    scaled = ((v - (high / 2 + low / 2)) / half).masked_fill(equal, 0.0).masked_fill(~judged, math.nan)
    return torch.ops.carerl.group_advantages(scaled, groups, eps=ROUNDING).double()
