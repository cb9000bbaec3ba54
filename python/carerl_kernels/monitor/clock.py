"""What monitoring costs: seconds per part, beside those of the run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from .._clock import Clock


class MonitorClock(Clock):
    """Counts the seconds of a monitor's parts; its state goes on in a resumed run."""

    def __init__(self) -> None:
        super().__init__()
        self._started: float | None = None
        self._wall_before = 0.0
        self._last_line = time.perf_counter()

    def start(self) -> None:
        """The run begins, unless it has begun already."""
        self._started = self._started or time.perf_counter()

    def cost(self) -> dict[str, Any]:
        """Seconds per part, wall-clock seconds since the run began, and the share of the parts in them."""
        wall = self._wall_before + (0.0 if self._started is None else time.perf_counter() - self._started)
        total = sum(self.seconds.values())
        return {"seconds": dict(self.seconds), "wall": wall, "share": min(1.0, total / wall) if wall > 0 else 0.0}

    def since_last_line(self) -> dict[str, float]:
        """Wall-clock seconds since the last call: the monitor's own, and everything else."""
        wall, own = time.perf_counter() - self._last_line, sum(self.drain().values())
        self._last_line += wall
        return {"other": max(0.0, wall - own), "monitor": own}

    def state_dict(self) -> dict[str, Any]:
        found = self.cost()
        return {"seconds": found["seconds"], "wall": found["wall"]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seconds, self._wall_before = dict(state["seconds"]), state["wall"]
