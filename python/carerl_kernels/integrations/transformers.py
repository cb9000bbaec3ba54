"""A callback that guards any transformers `Trainer`, TRL's included: stage, domain of the step, probes, logs, resume."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..guard import CapabilityGuard
from ..guard.report import flat_numbers
from ..subspace.batches import shown_rows
from .state import load_state, save_state

try:
    from transformers import TrainerCallback
except ImportError as e:
    raise ImportError(
        f"carerl_kernels.integrations.transformers needs transformers ({e}): pip install 'carerl-kernels[trl]'"
    ) from e

MakeGuard = Callable[[nn.Module], CapabilityGuard]


class GuardCallback(TrainerCallback):
    """Puts a guard behind the optimizer of a transformers `Trainer` for the length of `train()`.

    Weights are corrected before every checkpoint and evaluation of the trainer. The guard is in every checkpoint
    (`checkpoint-N/guard*`), and a resumed run goes on with it. In grad mode the trainer's clipping moves behind the edit:
    `args.max_grad_norm` becomes the guard's for the time of the training.

    Args:
        guard: `make(model) -> CapabilityGuard`, called when training begins: the model is wrapped, sharded and has its
            adapters by then. `CapabilityGuard` itself is such a function; a guard that exists already is taken as it is.
        stage: name of the domain this training is recorded as; None records nothing.
        path: where the stage's basis goes.
        domain: whose steps these are, a name or a function that says it before every step (several names: a mixed batch's).
            None: the stage's; without a stage nobody's, so that all history acts.
        probe_loss: `probe_loss(model, name) -> loss` of an earlier domain on stored prompts, for rule "probed".
        protect: by name, what else the model shall stay able to do: rows of a data set (`prompt` and perhaps `completion`,
            `messages`, or `text`), or batches of what the model is called with. They are shown to the model once, before the
            first step (every process shows all of them), and what was seen is kept in `output_dir/bases`, where a resumed run
            finds it.
        every: corrects the weights every so many steps of the trainer instead of following its optimizer, for optimizers that
            hooks do not reach; rules "bounded" and "remove". None follows the optimizer. Nothing can be recorded then.
    """

    def __init__(
        self,
        guard: CapabilityGuard | MakeGuard,
        *,
        stage: str | None = None,
        path: Path | str | None = None,
        domain: str | Callable[[], str | Collection[str] | None] | None = None,
        probe_loss: Callable[[nn.Module, str], Tensor] | None = None,
        protect: Mapping[str, Iterable[Any]] | None = None,
        every: int | None = None,
    ):
        if every is not None and (every < 1 or stage is not None or domain is not None):
            raise ValueError(
                "every: expected at least 1 step, and no stage or domain, which need the optimizer's steps, found "
                f"every={every}, stage={stage!r}, domain={domain!r}"
            )
        if path is not None and stage is None:
            raise ValueError(f"path: expected a stage to record into it, found stage=None and path={str(path)!r}")
        self.guard: CapabilityGuard | None = guard if isinstance(guard, CapabilityGuard) else None
        self._make: MakeGuard | None = None if isinstance(guard, CapabilityGuard) else guard
        self.stage, self.path, self.probe_loss, self.every = stage, path, probe_loss, every
        if not isinstance(protect, Mapping | None):
            raise TypeError(f'protect: expected rows by name, {{"chat": rows}}, found {type(protect).__name__}')
        self.protect = dict(protect or {})
        self._domain = domain
        self.recorder: Any = None  # of the stage in progress
        self._training = ExitStack()
        self._step = ExitStack()

    # ------------------------------------------------------------------------------------------------ for the trainer

    def guarded_model(self, model: nn.Module) -> nn.Module:
        """What the guard is built from; a trainer that knows DDP's wrapper gives that."""
        return model

    def clips(self) -> bool:
        """Whether the trainer's clipping has to wait for the guard's edit."""
        return self.guard is not None and self.guard.apply_to == "grad"

    def metrics(self) -> dict[str, float]:
        """The guard's report as flat numbers for a log."""
        return {} if self.guard is None else flat_numbers(self.guard.report())

    def abandon(self) -> None:
        """Training ended by an exception: leaves the optimizer alone; a stage in progress does not become history."""
        error = RuntimeError("training did not end")
        for stack in (self._step, self._training):
            stack.__exit__(RuntimeError, error, None)

    # ---------------------------------------------------------------------------------------------------------- events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Builds, attaches, opens the stage; a resumed run gets its state back."""
        self.abandon()  # an interrupted training before this one has not said that it ended
        model, optimizer = self.guarded_model(kwargs["model"]), kwargs["optimizer"]
        if self._make is not None:
            self.guard = self._make(model)
        guard = self.guard
        if not isinstance(guard, CapabilityGuard):
            raise TypeError(f"guard: expected a CapabilityGuard or a function that makes one, found {guard!r}")
        _same_everywhere(guard)
        if self.clips() and args.max_grad_norm and guard.max_grad_norm is None:
            self._training.callback(setattr, args, "max_grad_norm", args.max_grad_norm)
            self._training.callback(setattr, guard, "max_grad_norm", None)
            guard.max_grad_norm, args.max_grad_norm = args.max_grad_norm, 0.0
        self._protect(guard, Path(args.output_dir) / "bases", state.global_step, kwargs.get("processing_class"))
        if self.every is None:
            guard.attach(optimizer)
            self._training.callback(guard.detach)
        else:
            guard.rebase()
        if self.stage is not None:
            self.recorder = self._training.enter_context(guard.stage(self.stage, path=self.path))
            self._training.callback(setattr, self, "recorder", None)
        if state.global_step:
            load_state(guard, Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Probes that are due, then the step's domain."""
        guard = self.guard
        assert guard is not None
        if guard.probes_due():
            if self.probe_loss is None:
                raise ValueError(
                    "rule 'probed' reads the gradient of earlier domains on stored prompts: expected probe_loss="
                    "function(model, name) -> loss, found None; give one, or choose a rule that needs no stored data"
                )
            for name in guard.history:
                with guard.probe(name):
                    self.probe_loss(kwargs["model"], name).backward()
        if self._domain is not None:
            domain = self._domain() if callable(self._domain) else self._domain
            self._step.enter_context(guard.domain(domain))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Corrects the weights where the optimizer is not followed, and before they are saved or evaluated."""
        if self.every is not None and self.guard is not None and state.global_step % self.every == 0:
            self.guard.confine_()
        self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Corrects what waits before the weights are saved or evaluated: transformers' own callback came first and decided it."""
        if self.guard is not None and (control.should_save or control.should_evaluate):
            self.guard.settle() if self.every is None else self.guard.confine_()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step is over."""
        self._step.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Adds the guard's numbers to the line just logged. Reporters that came before this callback have written theirs."""
        if logs is not None and "loss" in logs:
            numbers = self.metrics()
            logs.update(numbers)
            state.log_history[-1].update(numbers)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the guard's state beside the model's."""
        if self.guard is not None and not args.save_only_model:
            save_state(self.guard, Path(args.output_dir) / f"checkpoint-{state.global_step}", args.should_save)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Closes the stage, which becomes history and a file, and detaches."""
        self._training.close()
        if self.every is not None and self.guard is not None:
            self.guard.confine_()

    # ----------------------------------------------------------------------------------------------------------- state

    def _protect(self, guard: CapabilityGuard, folder: Path, step: int, tokenizer: Any) -> None:
        """What the model could do before the first step; a resumed run has it from its files."""
        for name, rows in self.protect.items():
            path = folder / f"{name}.safetensors"
            if step and not path.exists():
                raise FileNotFoundError(
                    f"resuming at step {step}: expected what was seen of {name!r} before training in {path}, found none; the "
                    "model is another one by now. Resume in the output_dir of this training, or start from its first weights"
                )
            if step:
                guard.add(path)
            elif name not in guard.history:
                guard.protect(name, shown_rows(rows, tokenizer), path=path, tokenizer=tokenizer)


def _same_everywhere(guard: CapabilityGuard) -> None:
    """Refuses what would make replicated processes decide differently."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_world_size() == 1:
        return
    if guard.layout.kind == "input" and guard.data_group is None:
        raise ValueError(
            "basis 'input' averages what all processes feed forward: expected a guard built from the DDP-wrapped model, found "
            "one built from the model inside; use carerl_kernels.integrations.trl.CareGRPOTrainer, or another basis"
        )
