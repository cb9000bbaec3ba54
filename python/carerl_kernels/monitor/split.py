"""Conflict or curvature: what a displacement of the weights does to a loss, split into its odd and its even part.

With losses L+ and L- at theta + Delta and theta - Delta,

    odd  = (L+ - L-) / 2        = g . Delta + terms of third order:          the directions pull against each other (conflict)
    even = (L+ + L-) / 2 - L0   = Delta' H Delta / 2 + terms of fourth order: any step this long does damage (curvature)

and odd + even = L+ - L0 is all that happened to the loss. Cosines of gradients know the first alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..grpo.parallel import Ranks
from ..grpo.rundir import load_tensors, save_tensors
from ..guard.build import trainable
from ..subspace.shards import Shards, local, reshard

Named = nn.Module | Iterable[tuple[str, nn.Parameter]]
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


class KeptWeights:
    """The trainable weights as they are now, to come back to bit for bit.

    Args:
        model: a module, or pairs of name and parameter; of LoRA models the adapter alone is trainable.
        path: safetensors file that holds them; None: they stay in memory (of sharded parameters this process's parts).
    """

    def __init__(self, model: Named, path: Path | None = None) -> None:
        self._module = model if isinstance(model, nn.Module) else None
        self._ready()
        self._parameters = dict(trainable(model))
        self._shards = Shards.of(list(self._parameters.items()))
        self.path = path
        self._kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self) -> KeptWeights:
        """Keeps the present weights; collective where they are sharded."""
        self._ready()
        if self.path is None:
            self._kept = {name: local(p).detach().clone() for name, p in self._parameters.items()}
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(self.path, self._parameters, Ranks.of(nn.ParameterList(self._parameters.values())))
        return self

    @torch.no_grad()
    def put_back(self) -> None:
        """The weights are those that were kept, bit for bit."""
        self._each(lambda name, parameter, kept: parameter.copy_(kept))

    @torch.no_grad()
    def mirror(self) -> float:
        """Moves the weights to kept - (present - kept); returns the norm of present - kept."""
        return self._move(lambda name, parameter, kept: wide(parameter) - wide(kept), -1.0)

    @torch.no_grad()
    def go(self, offset: Sequence[Tensor], scale: float) -> float:
        """Moves the weights to kept + scale * offset (a tensor per parameter); returns the norm of the offset."""
        offsets = dict(zip(self._parameters, offset, strict=True))
        return self._move(lambda name, parameter, kept: wide(offsets[name]), scale)

    def drop(self) -> None:
        """Forgets them; a file is deleted."""
        self._kept = {}
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _move(self, offset: Callable[[str, Tensor, Tensor], Tensor], scale: float) -> float:
        square = torch.zeros((), dtype=torch.float64)

        def move(name: str, parameter: Tensor, kept: Tensor) -> None:
            by = offset(name, parameter, kept)
            square.add_(by.double().square().sum().cpu())
            parameter.copy_(wide(kept).add(by, alpha=scale))

        self._each(move)
        place = next(iter(self._parameters.values())).device if self._shards.sharded else square.device
        return math.sqrt(float(self._shards.sum_(square.to(place))))

    def _each(self, work: Callable[[str, Tensor, Tensor], object]) -> None:
        """Calls `work(name, parameter, kept)` with this process's parts, of a file one after another."""
        self._ready()
        if self.path is None:
            for name, p in self._parameters.items():
                work(name, local(p), self._kept[name])
            return

        def read(name: str, kept: Tensor) -> None:
            parameter = local(self._parameters[name])
            work(name, parameter, kept.to(parameter.device))

        load_tensors(self.path, self._parameters, read)

    def _ready(self) -> None:
        if self._module is not None:
            reshard(self._module)


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least: differences of rounded weights are no rounded numbers."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def split_since(start: KeptWeights, now: KeptWeights, losses: Losses, at_start: Mapping[str, float]) -> LossSplit:
    """What the steps from `start` to `now` did, `now` being the weights in the model; they are there again afterwards.

    Two evaluations of the losses: here, and at the mirrored point.

    Args:
        at_start: what `losses` gave at `start`.
    """
    plus = dict(losses())
    with _restored(now):
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
    with _restored(now):
        norm = now.go(offset, 0.0)  # of the offset; the weights do not move
        scale = length / norm
        now.go(offset, scale)
        plus = dict(losses())
        now.go(offset, -scale)
        minus = dict(losses())
    return _split(plus, minus, here, length)


@contextmanager
def _restored(now: KeptWeights) -> Iterator[None]:
    try:
        yield
    finally:
        now.put_back()


def _split(plus: Mapping[str, float], minus: Mapping[str, float], zero: Mapping[str, float], norm: float) -> LossSplit:
    names = [name for name in plus if name in minus and name in zero]
    return LossSplit(
        {name: (plus[name] - minus[name]) / 2 for name in names},
        {name: (plus[name] + minus[name]) / 2 - zero[name] for name in names},
        norm,
        dict(plus),
    )
