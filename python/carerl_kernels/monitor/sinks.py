"""Where records go: JSON lines, TensorBoard, Weights & Biases, trackio, behind one interface.

The libraries are optional and imported by the sink that needs them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from .._errors import require
from .._files import json_line, lines_up_to, write_bytes_atomically
from .domain import Alert


class Sink(Protocol):
    """Takes what a monitor says; what a subclass leaves out is nothing to do for it. Give sinks to one process only (rank 0)."""

    def begin(self) -> None:
        """A new run begins: not called where `resume` is.

        Raises:
            FileExistsError: another run is there, which the new one would make unreadable.
        """
        return

    def log(self, step: int, line: Mapping[str, Any]) -> None:
        """One step: metrics as they were given (tensors of one number as that number), "eval" and "monitor" added."""

    def alert(self, alert: Alert) -> None:
        """A domain fell; its alert is in the step's line, too."""
        return

    def resume(self, step: int) -> None:
        """The run goes on after this step: whatever was logged later is void."""
        return

    def close(self) -> None:
        """Nothing more will come."""


class JsonLines(Sink):
    """One JSON object per step, in the format of the trainer's metrics.jsonl: `carerl report` reads its directory.

    Args:
        path: file, appended to; conventionally metrics.jsonl in a directory of the run's own. It must be new or empty, unless the
            monitor goes on from a saved state.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def begin(self) -> None:
        if self.path.exists() and self.path.stat().st_size:
            raise FileExistsError(
                f"{self.path}: expected no file or an empty one for a new run, found an earlier run's; give every run a "
                "directory of its own, move the file away, or go on with that run (monitor.load_state_dict before the first step)"
            )

    def log(self, step: int, line: Mapping[str, Any]) -> None:
        with open(self.path, "a") as file:
            file.write(json_line({"step": step, **line}))

    def resume(self, step: int) -> None:
        write_bytes_atomically(self.path, "".join(map(json_line, lines_up_to(self.path, step))).encode())


class TensorBoard(Sink):
    """Scalars and alerts (as text) for TensorBoard, which tells runs in one directory apart by their event files.

    Args:
        directory: event files go there.

    Raises:
        ImportError: tensorboard is missing.
    """

    def __init__(self, directory: Path | str) -> None:
        require("tensorboard", "this sink", "tensorboard")
        self.directory = str(directory)
        self._open(None)

    def _open(self, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(self.directory, purge_step=purge_step)

    def log(self, step: int, line: Mapping[str, Any]) -> None:
        for name, value in scalars(line).items():
            self._writer.add_scalar(name, value, step)

    def alert(self, alert: Alert) -> None:
        self._writer.add_text("alerts", str(alert), alert.step)
        self._writer.flush()

    def resume(self, step: int) -> None:
        self._writer.close()
        self._open(step + 1)

    def close(self) -> None:
        self._writer.close()


class WandB(Sink):
    """Weights & Biases. Goes on in the run that is active, else starts one.

    A resumed run of theirs (`id=...`, `resume="must"`) ignores steps that it has seen already: nothing is logged twice.

    Args:
        settings: Those of `wandb.init`: project, name, mode="offline", ...

    Raises:
        ImportError: wandb is missing.
    """

    def __init__(self, **settings: Any) -> None:
        require("wandb", "this sink", "wandb")
        import wandb

        self._own = wandb.run is None
        self.run: Any = wandb.init(**settings) if self._own else wandb.run

    def log(self, step: int, line: Mapping[str, Any]) -> None:
        self.run.log(scalars(line), step=step)

    def alert(self, alert: Alert) -> None:
        self.run.alert(title=f"{alert.domain} fell", text=str(alert))

    def close(self) -> None:
        if self._own:
            self.run.finish()


class Trackio(Sink):
    """trackio, local first and without an account. Nothing can be taken back there: steps that are run again appear twice.

    Args:
        project: their name of a group of runs.
        settings: Those of `trackio.init`: name, space_id, ...

    Raises:
        ImportError: trackio is missing.
    """

    def __init__(self, project: str, **settings: Any) -> None:
        require("trackio", "this sink", "trackio")
        import trackio

        self._warn = trackio.AlertLevel.WARN
        self.run: Any = trackio.init(project=project, **settings)

    def log(self, step: int, line: Mapping[str, Any]) -> None:
        self.run.log(scalars(line), step=step)

    def alert(self, alert: Alert) -> None:
        self.run.alert(title=f"{alert.domain} fell", text=str(alert), level=self._warn)

    def close(self) -> None:
        self.run.finish()


def scalars(line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers of nested dictionaries, under names joined by "/"; texts, lists and None are left out."""
    out: dict[str, float] = {}
    for key, value in line.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            out |= scalars(value, f"{name}/")
        elif isinstance(value, (bool, int, float)) and math.isfinite(value) and name != "step":
            out[name] = float(value)
    return out
