"""Who watches a run: live progress on a terminal, and what is asked of a drift monitor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars of transformers inside; as before afterwards."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class StageProgress(Progress):
    """A progress bar per stage; shows nothing when turned off."""

    def __init__(self, enabled: bool) -> None:
        columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        super().__init__(*columns, TextColumn("{task.fields[note]}"), disable=not enabled)

    def begin(self, name: str, total: int, done: int) -> None:
        """Open the bar of a stage of which `done` steps are behind us."""
        self._stage = self.add_task(name, total=total, completed=done, note="")

    def step(self, line: Mapping[str, Any]) -> None:
        """One step further; shows its reward and the latest evaluation."""
        note = f"reward {line['reward']:.3f}"
        if "eval" in line:
            note += "  " + "  ".join(f"{d} {v:.3f}" for d, v in line["eval"].items())
        self.update(self._stage, advance=1, note=note)


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
