"""Seconds per named part of a run, of a guard, of a monitor."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Wall-clock seconds per part (those named at once are told even before any time was spent on them). Host time: GPU
    work counts where the host waits for it."""

    def __init__(self, *parts: str) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(parts, 0.0)  # since the beginning
        self._fresh: dict[str, float] = {}  # since the last drain

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Counts the time inside as this part's."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.spend(part, time.perf_counter() - started)

    def spend(self, part: str, seconds: float) -> None:
        """Counts seconds that were measured elsewhere."""
        for counted in (self.seconds, self._fresh):
            counted[part] = counted.get(part, 0.0) + seconds

    def drain(self) -> dict[str, float]:
        """Seconds per part since the last drain."""
        fresh, self._fresh = self._fresh, {}
        return fresh
