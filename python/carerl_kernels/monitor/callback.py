"""The monitor in transformers' Trainer and everything built on it, TRL's trainers among them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from .._files import write_json
from ..grpo.parallel import Ranks
from .monitor import DriftMonitor

STATE = "monitor.json"
OF_DOMAIN = {
    "reward": "rewards",
    "frac_reward_zero_std": "agreed",
    "share": "batch_share",
    "step_share": "step_share",
    "weight": "weight",
}
"""Figures of one domain as `CareGRPOTrainer` logs them, and their names in the record that report and diagnosis read."""


class MonitorCallback(TrainerCallback):
    """Steps a monitor along with a Trainer: `trainer.add_callback(MonitorCallback(monitor))`.

    The monitor evaluates before the first step and then every `monitor.every` optimizer steps, with the weights after that
    step; what the trainer logged at a step goes to the sinks with it. Checkpoints of the trainer hold the monitor's state, and a
    resumed run goes on with it: the first process reads it, for all. One callback watches one run.

    Args:
        monitor: A monitor with `evaluate`, which every process has to call alike; give sinks to rank 0 only.
        losses: per domain, its loss on stored examples; where `monitor.gradients_due()`, their gradients are compared with
            the batch's own, and with `split_every` they are what is split into conflict and curvature (without dropout then).
        domain: what all steps train, where the trainer logs no domains (SFT): records then say so, and `carerl diagnose` knows
            whose steps the others suffered from.
        resume_from_checkpoint: what `trainer.train` is given under this name, where that lies outside of `args.output_dir`: a
            callback is not told. `args.resume_from_checkpoint` is looked at, too.

    Raises:
        RuntimeError: when training begins anew, at a step that the monitor has seen.
        FileNotFoundError: when it goes on, the checkpoint named here holds no monitor's state.
        ValueError: the checkpoint named here is of another step; or see :meth:`DriftMonitor.load_state_dict`.
        PeerError: one of these, in the first process.
    """

    def __init__(
        self,
        monitor: DriftMonitor,
        losses: Mapping[str, Callable[[], Tensor]] | None = None,
        resume_from_checkpoint: Path | str | None = None,
        domain: str | None = None,
    ) -> None:
        self.monitor, self.losses, self.domain = monitor, dict(losses or {}), domain
        self.resume_from_checkpoint = resume_from_checkpoint
        self._logs: dict[str, Any] = {}
        self._next = 0  # first step that the monitor has not seen

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        processes = Ranks(dist.group.WORLD if dist.is_available() and dist.is_initialized() else None)
        saved = processes.on_first(lambda: self._saved(args, step)) if step else None
        if saved is not None:
            self.monitor.load_state_dict(saved)
            self._logs, self._next = {}, step + 1
        elif step < self._next:
            raise RuntimeError(
                f"MonitorCallback: expected training to begin after step {self._next - 1}, which the monitor has seen, found "
                f"step {step}; steps count over one run: for another one add a new callback with a new DriftMonitor "
                "(trainer.remove_callback takes this one out), or go on from a checkpoint"
            )
        elif step:
            warnings.warn(
                f"no {STATE} of step {step} under {args.output_dir}: the monitor starts here, with a new baseline; for a "
                "checkpoint elsewhere give MonitorCallback(..., resume_from_checkpoint=...)",
                stacklevel=2,
            )
            self.monitor.resume_sinks(step - 1)
            self._next = step
        self._observe(step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        for key, value in (logs or {}).items():
            start, _, rest = key.partition("/")
            domain, _, figure = rest.rpartition("/")
            if start == "domain" and domain and figure in OF_DOMAIN:
                self._logs.setdefault(OF_DOMAIN[figure], {})[domain] = value
            else:
                self._logs[key] = value

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
            write_json(path, self.monitor.state_dict(), indent=None)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._observe(state.global_step)

    def _saved(self, args: Any, step: int) -> dict[str, Any] | None:
        """The state that a checkpoint of this step holds, if there is one."""
        own = Path(args.output_dir) / f"checkpoint-{step}"
        told = self.resume_from_checkpoint or getattr(args, "resume_from_checkpoint", None)
        for folder in [Path(told), own] if isinstance(told, (str, Path)) else [own]:
            named, path = folder == Path(self.resume_from_checkpoint or ""), folder / STATE
            if not path.is_file():
                if named:
                    raise FileNotFoundError(
                        f"{path}: expected the state of a monitor in the checkpoint, found no such file"
                    )
                continue
            saved: dict[str, Any] = json.loads(path.read_text())
            if saved["step"] == step:
                return saved
            if named:
                raise ValueError(
                    f"{path}: expected the state of step {step}, where training goes on, found {saved['step']}"
                )
        return None

    @torch.no_grad()
    def _values(self) -> dict[str, float]:
        return {name: float(loss()) for name, loss in self.losses.items()}

    def _observe(self, step: int) -> None:
        if step >= self._next:
            logs, self._logs = self._logs, {}
            acting = self.domain if step else None  # nothing was trained before the first one
            if acting is not None:
                logs = {"stage": acting, "batch_share": {acting: 1.0}} | logs
            self.monitor.step(step, logs, acting=acting, losses=self._values if self.losses else None)
            self._next = step + 1
