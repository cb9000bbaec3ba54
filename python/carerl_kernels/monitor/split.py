"""Conflict or curvature: what a displacement of the weights does to a loss, split into its odd and its even part.

With losses L+ and L- at theta + Delta and theta - Delta,

    odd  = (L+ - L-) / 2        = g . Delta + terms of third order:          the directions pull against each other (conflict)
    even = (L+ + L-) / 2 - L0   = Delta' H Delta / 2 + terms of fourth order: any step this long does damage (curvature)

and odd + even = L+ - L0 is all that happened to the loss. Cosines of gradients know the first alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..grpo.parallel import Ranks, reshard
from ..grpo.rundir import load_tensors, save_tensors
from ..guard.build import trainable
from ..subspace.shards import Shards, local

_log = logging.getLogger(__name__)

Named = nn.Module | Iterable[tuple[str, nn.Parameter]]
Losses = Callable[[], Mapping[str, float]]
"""Gives the loss of every domain under the present weights, on the same examples every time."""


@dataclass(frozen=True)
class LossSplit:
    """What one displacement did to every domain's loss.

    Attributes:
        odd, even: per domain, in units of the loss (nats a token where it is a cross-entropy); above 0 the loss rose.
        norm: Euclidean length of the displacement.
    """

    odd: dict[str, float]
    even: dict[str, float]
    norm: float


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
        self._ready()
        for parameter, kept in self._pairs():
            parameter.copy_(kept)

    @torch.no_grad()
    def mirror(self) -> float:
        """Moves the weights to kept - (present - kept); returns the norm of present - kept."""

        def offsets() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            for parameter, kept in self._pairs():
                yield parameter, kept, wide(parameter) - wide(kept)

        return self._move(offsets(), -1.0)

    @torch.no_grad()
    def go(self, offset: Sequence[Tensor], scale: float) -> float:
        """Moves the weights to kept + scale * offset (a tensor per parameter); returns the norm of the offset."""
        number = iter(offset)
        return self._move(((p, kept, wide(next(number))) for p, kept in self._pairs()), scale)

    def drop(self) -> None:
        """Forgets them; a file is deleted."""
        self._kept = {}
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _ready(self) -> None:
        if self._module is not None:
            reshard(self._module)

    def _move(self, offsets: Iterator[tuple[Tensor, Tensor, Tensor]], scale: float) -> float:
        self._ready()
        square = torch.zeros((), dtype=torch.float64)
        for parameter, kept, offset in offsets:
            square += offset.double().square().sum().cpu()
            parameter.copy_(wide(kept).add(offset, alpha=scale))
        place = next(iter(self._parameters.values())).device if self._shards.sharded else square.device
        return math.sqrt(float(self._shards.sum_(square.to(place))))

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Parameter and what is kept of it, this process's parts."""
        if self.path is None:
            for name, p in self._parameters.items():
                yield local(p), self._kept[name]
            return
        kept: list[tuple[Tensor, Tensor]] = []
        load_tensors(self.path, self._parameters, lambda name, value: kept.append((self._parameters[name], value)))
        for parameter, value in kept:
            yield local(parameter), value.to(local(parameter).device)


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least: differences of rounded weights are no rounded numbers."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def split_since(start: KeptWeights, now: KeptWeights, losses: Losses, at_start: Mapping[str, float]) -> LossSplit:
    """What the steps from ``start`` to ``now`` did, ``now`` being the weights in the model; they are there again afterwards.

    Two evaluations of the losses: here, and at the mirrored point.

    Args:
        start, now: kept weights.
        losses: see :data:`Losses`.
        at_start: what it gave at ``start``.
    """
    plus = dict(losses())
    with _restored(now):
        norm = start.mirror()
        minus = dict(losses())
    return _split(plus, minus, at_start, norm)


def split_along(
    now: KeptWeights, offset: Sequence[Tensor], length: float, losses: Losses, here: Mapping[str, float]
) -> LossSplit:
    """What a displacement of this length along ``offset`` would do from the present weights, which are there again afterwards.

    Args:
        now: the weights in the model.
        offset: a tensor per parameter (of sharded ones the local parts), not zero.
        length: Euclidean.
        losses: see :data:`Losses`.
        here: what it gave at ``now``.
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
    )


class Windows:
    """Splits what the steps between evaluations did, from one snapshot of the weights to the next.

    Costs: a snapshot of the trainable weights and, while measuring, another one; two evaluations of the losses a window, and two
    more per domain of a mixed batch whose direction is known.

    Args:
        model: a module, or pairs of name and parameter.
        every: evaluations of a window.
        folder: of the snapshots' files, safetensors; None: in memory, and a resumed run begins a window anew.
        keep: saved states whose snapshots stay on the disk.

    Attributes:
        at_start: the losses where the present window began.
    """

    def __init__(self, model: Named, every: int, folder: Path | None = None, keep: int = 3) -> None:
        self.every, self.folder, self.keep = every, folder, keep
        self._model = model if isinstance(model, nn.Module) else list(model)
        self._start: KeptWeights | None = None
        self._since, self._looks = 0, 0
        self.at_start: dict[str, float] = {}
        self._acting: list[str] = []
        self._needed: list[int] = []  # steps of the snapshots that the last saved states go on from

    def acts(self, name: str | None) -> None:
        """A step of this domain or stage was taken."""
        if name is not None and name not in self._acting[-1:]:
            self._acting.append(name)

    @property
    def due(self) -> bool:
        """Whether the next evaluation ends a window."""
        return self._start is not None and (self._looks + 1) % self.every == 0

    def look(
        self,
        step: int,
        losses: Losses,
        directions: Mapping[str, Sequence[Tensor]] | None = None,
        shares: Mapping[str, float] | None = None,
    ) -> dict[str, Any] | None:
        """An evaluation: begins the first window, or ends one where it is due; the weights are as before afterwards.

        Args:
            step: of the run.
            losses: see :data:`Losses`.
            directions, shares: per domain of a mixed batch, what its gradient makes of a step, and its share of the step.

        Returns:
            Of the window: "since", "acting" (whose steps), "norm" of the displacement, "odd" and "even" per domain; with
            directions "by": per acting domain the same for a displacement along its direction, whose square is its share of
            the window's. None where no window ended.
        """
        self._looks += self._start is not None
        if self._start is not None and self._looks % self.every:
            return None
        now = KeptWeights(self._model, self._path(step)).take()
        if self._start is None:
            self._begin(now, step, dict(losses()))
            return None
        here: dict[str, float] = {}

        def remembered() -> dict[str, float]:
            found = dict(losses())
            here.update({} if here else found)  # the first call is at the present weights
            return found

        found = split_since(self._start, now, remembered, self.at_start)
        record: dict[str, Any] = {"since": self._since, "acting": ", ".join(self._acting), **_plain(found)}
        if directions and found.norm > 0:
            record["by"] = {}
            for name, direction in directions.items():
                length = found.norm * math.sqrt((shares or {}).get(name, 0.0))
                if length > 0:
                    record["by"][name] = _plain(split_along(now, direction, length, losses, here))
        self._drop(self._start, self._since)
        self._begin(now, step, here)
        return record

    def _begin(self, now: KeptWeights, step: int, losses: dict[str, float]) -> None:
        self._start, self._since, self.at_start, self._acting = now, step, losses, []

    def _path(self, step: int) -> Path | None:
        return None if self.folder is None else self.folder / f"step-{step:08d}.safetensors"

    def _drop(self, kept: KeptWeights, step: int) -> None:
        if step not in self._needed:
            kept.drop()

    def state_dict(self) -> dict[str, Any]:
        """Plain Python values; the snapshot is its file. Those of the last ``keep`` states stay."""
        if self.folder is not None and self._start is not None:
            kept = [*(s for s in self._needed if s != self._since), self._since]
            self._needed = kept[-self.keep :]
            for step in kept[: -self.keep]:
                KeptWeights(self._model, self._path(step)).drop()
        return {
            "looks": self._looks,
            "since": None if self._start is None or self.folder is None else self._since,
            "losses": dict(self.at_start),
            "acting": list(self._acting),
            "needed": list(self._needed),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from :meth:`state_dict`; where the snapshot is gone, a window begins anew, and a warning says so."""
        self._looks, self._needed = state["looks"], list(state["needed"])
        self._start, self._acting = None, list(state["acting"])
        path = None if state["since"] is None else self._path(state["since"])
        if path is None or not path.is_file():
            where = "snapshots are in memory" if path is None else f"{path} is gone"
            _log.warning("the split of losses begins anew: %s; give snapshots= a folder that stays", where)
            self._looks = self._looks // self.every * self.every
            return
        self._since, self.at_start = state["since"], dict(state["losses"])
        self._start = KeptWeights(self._model, path)


def _plain(found: LossSplit) -> dict[str, Any]:
    return {"norm": found.norm, "odd": found.odd, "even": found.even}
