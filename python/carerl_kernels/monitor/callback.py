"""The monitor in transformers' Trainer and everything built on it, TRL's trainers among them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from .._files import write_bytes_atomically
from .monitor import DriftMonitor

STATE = "monitor.json"


class MonitorCallback(TrainerCallback):
    """Steps a monitor along with a Trainer: ``trainer.add_callback(MonitorCallback(monitor))``.

    The monitor evaluates before the first step and then every ``monitor.every`` optimizer steps, with the weights after that
    step; what the trainer logged at a step goes to the sinks with it. Checkpoints of the trainer hold the monitor's state, and a
    resumed run goes on with it.

    Args:
        monitor: with ``evaluate``, which every process has to call alike; give sinks to rank 0 only.
        losses: per domain, its loss on stored examples; where ``monitor.gradients_due()``, their gradients are compared with
            the batch's own.
    """

    def __init__(self, monitor: DriftMonitor, losses: Mapping[str, Callable[[], Tensor]] | None = None) -> None:
        self.monitor, self.losses = monitor, dict(losses or {})
        self._logs: dict[str, Any] = {}
        self._next = 0  # first step that the monitor has not seen

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE
            if path.is_file():
                self.monitor.load_state_dict(json.loads(path.read_text()))
                self._next = state.global_step + 1
            else:
                warnings.warn(f"{path} is missing: the monitor starts here, with a new baseline", stacklevel=2)
                self._next = state.global_step
        self._observe(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self._logs |= dict(logs or {})

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.losses and self.monitor.gradients_due():
            self.monitor.keep_gradients("batch")
            for name, loss in self.losses.items():
                with self.monitor.gradients(name, training=False):
                    loss().backward()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._observe(state.global_step)  # the step before, whose logs are there by now

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._observe(state.global_step)
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE
        if state.is_world_process_zero:
            write_bytes_atomically(path, json.dumps(self.monitor.state_dict()).encode())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._observe(state.global_step)

    def _observe(self, step: int) -> None:
        if step >= self._next:
            logs, self._logs = self._logs, {}
            self.monitor.step(step, logs)
            self._next = step + 1
