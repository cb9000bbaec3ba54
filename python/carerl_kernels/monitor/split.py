"""Conflict or curvature: what a displacement of the weights does to a loss, split into its odd and its even part.

With losses L+ and L- at theta + Delta and theta - Delta,

    odd  = (L+ - L-) / 2        = g . Delta + terms of third order:          the directions pull against each other (conflict)
    even = (L+ + L-) / 2 - L0   = Delta' H Delta / 2 + terms of fourth order: any step this long does damage (curvature)

and odd + even = L+ - L0 is all that happened to the loss. Cosines of gradients know the first alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from torch import Tensor

from ..grpo.frozen import KeptWeights

Losses = Callable[[], Mapping[str, float]]
"""Gives the loss of every domain under the present weights, on the same examples every time."""


@dataclass(frozen=True)
class LossSplit:
    """What one displacement did to every domain's loss.

    Attributes:
        odd, even: per domain, in units of the loss (nats a token where it is a cross-entropy); above 0 the loss rose.
        norm: Euclidean length of the displacement.
        after: the losses at theta + Delta.
    """

    odd: dict[str, float]
    even: dict[str, float]
    norm: float
    after: dict[str, float]


def split_since(start: KeptWeights, now: KeptWeights, losses: Losses, at_start: Mapping[str, float]) -> LossSplit:
    """What the steps from `start` to `now` did, `now` being the weights in the model; they are there again afterwards.

    Two evaluations of the losses: here, and at the mirrored point.

    Args:
        at_start: what `losses` gave at `start`.
    """
    plus = dict(losses())
    with ExitStack() as afterwards:
        afterwards.callback(now.put_back)
        norm = start.mirror()
        minus = dict(losses())
    return _split(plus, minus, at_start, norm)


def split_along(
    now: KeptWeights, offset: Sequence[Tensor], length: float, losses: Losses, here: Mapping[str, float]
) -> LossSplit:
    """What a displacement of this length along `offset` would do from the present weights, which are there again afterwards.

    Args:
        now: the weights in the model.
        offset: a tensor per parameter (of sharded ones the local parts), not zero.
        here: what `losses` gave at `now`.
    """
    with ExitStack() as afterwards:
        afterwards.callback(now.put_back)
        norm = now.go(offset, 0.0)  # of the offset; the weights do not move
        scale = length / norm
        now.go(offset, scale)
        plus = dict(losses())
        now.go(offset, -scale)
        minus = dict(losses())
    return _split(plus, minus, here, length)


def _split(plus: Mapping[str, float], minus: Mapping[str, float], zero: Mapping[str, float], norm: float) -> LossSplit:
    names = [name for name in plus if name in minus and name in zero]
    return LossSplit(
        {name: (plus[name] - minus[name]) / 2 for name in names},
        {name: (plus[name] + minus[name]) / 2 - zero[name] for name in names},
        norm,
        dict(plus),
    )
