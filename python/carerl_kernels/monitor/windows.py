"""From evaluation to evaluation: what the steps in between did to every domain's loss, by conflict and by curvature."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..grpo.frozen import KeptWeights, Named
from .split import Losses, LossSplit, split_along, split_since

_log = logging.getLogger(__name__)


class Windows:
    """Splits what the steps between evaluations did, from one snapshot of the weights to the next.

    Costs: a snapshot of the trainable weights and, while measuring, another one; two evaluations of the losses a window, and two
    more per domain of a mixed batch whose direction is known.

    Args:
        model: a module, or pairs of name and parameter.
        every: evaluations of a window.
        folder: The folder of the snapshots' files, safetensors; None: in memory, and a resumed run begins a window anew.
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
        found = split_since(self._start, now, losses, self.at_start)
        record: dict[str, Any] = {"since": self._since, "acting": ", ".join(self._acting), **_plain(found)}
        if directions and found.norm > 0:
            lengths = {name: found.norm * math.sqrt((shares or {}).get(name, 0.0)) for name in directions}
            record["by"] = {
                name: _plain(split_along(now, directions[name], length, losses, found.after))
                for name, length in lengths.items()
                if length > 0
            }
        if self._since not in self._needed:
            self._start.drop()
        self._begin(now, step, found.after)
        return record

    def _begin(self, now: KeptWeights, step: int, losses: dict[str, float]) -> None:
        self._start, self._since, self.at_start, self._acting = now, step, losses, []

    def _path(self, step: int) -> Path | None:
        return None if self.folder is None else self.folder / f"step-{step:08d}.safetensors"

    def state_dict(self) -> dict[str, Any]:
        """Plain Python values; the snapshot is its file. Those of the last `keep` states stay."""
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
        if not state["losses"]:  # saved before the first window
            return
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
