"""What the trainer asks of a drift monitor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

Scores = Mapping[str, Sequence[float | None]]


class Monitor(Protocol):
    """`carerl_kernels.monitor.DriftMonitor` provides it."""

    def step(
        self,
        step: int,
        metrics: Any = None,
        *,
        scores: Scores | None = None,
        losses: Callable[[], Mapping[str, float]] | None = None,
        acting: str | None = None,
    ) -> dict[str, Any]: ...
    def rebase(self, domains: Sequence[str]) -> Any: ...
    def gradients_due(self) -> bool: ...
    def gradients(self, name: str, *, training: bool = True) -> AbstractContextManager[Any]: ...
    def keep_gradients(self, name: str) -> Any: ...
    def domains_due(self, evaluation: bool = False) -> bool: ...
    def domain(self, name: str, optimizer: Any = None) -> AbstractContextManager[Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Any) -> Any: ...
