"""verl's FSDP2 engine behind a guard. The engine of verl 0.9.1 was run by itself on a CPU (examples/verl_engine.py); verl as a
whole, with ray, rollouts and GPUs, was not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..guard import CapabilityGuard
from ..guard.report import flat_numbers
from .state import load_state, save_state, state_path

MakeGuard = Callable[[nn.Module], CapabilityGuard]


def install(make_guard: MakeGuard, **options: Any) -> type:
    """Puts a guarded engine where verl's registry has its FSDP2 engine of language models; call it in every worker.

    verl keeps the first engine registered for a key, so the entry is replaced. Arguments are those of :func:`guarded`.

    Returns:
        The guarded engine.
    """
    try:
        from verl.workers.engine import EngineRegistry
    except ImportError as e:
        raise ImportError(
            f"carerl_kernels.integrations.verl needs verl ({e}): see verl's own installation guide"
        ) from e
    devices = EngineRegistry._engines["language_model"]["fsdp2"]
    for device, base in list(devices.items()):
        devices[device] = guarded(base, make_guard, **options)
    return devices[next(iter(devices))]


def guarded(
    base: type,
    make_guard: MakeGuard,
    *,
    stage: str | None = None,
    path: Path | str | None = None,
    domain: Callable[[Any], str | None] | None = None,
    protect: Mapping[str, Iterable[Any]] | None = None,
) -> type:
    """A subclass of a verl engine whose optimizer steps go through a guard.

    Args:
        base: verl's engine; it has `module`, `optimizer` and the methods of `BaseEngine`.
        make_guard: `make(model) -> CapabilityGuard` in update mode, called once the module is sharded. Engines without an
            optimizer (reference models) have no guard.
        stage: name of the domain that is recorded from now on.
        path: file of the stage. verl does not say when training ends, so it is written with every checkpoint of verl's; the
            last one is the stage. The guard's own state lies beside them ("guard" or "guard.pt" in verl's folder), and a
            resumed run goes on with it; a stage without it is refused (FileNotFoundError).
        domain: `domain(batch) -> name or None`, whose step a training batch is; None: the stage's.
        protect: by name, batches of what the model is called with, shown to it once before the first step: what it can do then
            is kept. For a run that is resumed from a checkpoint record it beforehand (`carerl basis record`) and load the file
            in `make_guard`.
    """
    if (stage is None) != (path is None):
        raise ValueError(f"expected stage and path together, found stage={stage!r} and path={path!r}")

    parent: Any = base

    class GuardedEngine(parent):
        guard: CapabilityGuard | None = None
        _batch: Any = None
        _recorder: Any = None

        def initialize(self) -> None:
            super().initialize()
            if self.optimizer is None:
                return
            _check(self)
            self.guard = make_guard(self.module)
            if self.guard.apply_to != "update":
                raise ValueError(
                    "verl clips inside optimizer_step, before any edit: expected a guard with apply_to='update', found "
                    f"{self.guard.apply_to!r}"
                )
            for name, batches in (protect or {}).items():
                self.guard.protect(name, batches)
            self.guard.attach(self.optimizer)
            self._stage = ExitStack()  # held open: verl does not say when it ends
            if stage is not None:
                self._recorder = self._stage.enter_context(self.guard.stage(stage))

        def train_batch(self, data: Any, loss_function: Any) -> Any:
            self._batch = data
            if self._recorder is not None:
                shown = {key: data[key] for key in ("input_ids", "attention_mask") if key in data}
                # packed ones are heard at the model's call
                if len(shown) == 2 and not any(t.is_nested for t in shown.values()):
                    self._recorder.discard()  # of a step that verl did not take
                    self._recorder.see(shown)
            outputs = super().train_batch(data, loss_function)
            self._batch = None
            if self.guard is not None and self.is_mp_src_rank_with_outputs():
                outputs["metrics"].update(flat_numbers(self.guard.report()))
            return outputs

        def optimizer_step(self) -> Any:
            named = self.guard is not None and domain is not None
            with self.guard.domain(domain(self._batch)) if named else nullcontext():  # type: ignore[union-attr, misc]
                return super().optimizer_step()

        def save_checkpoint(self, local_path: Any, *args: Any, **kwargs: Any) -> None:
            if self.guard is not None:
                self.guard.settle()  # any checkpoint may be the run's result: verl does not say which is the last
            super().save_checkpoint(local_path, *args, **kwargs)
            if self.guard is None:
                return
            save_state(self.guard, Path(local_path), _first())
            if path is not None:
                self.guard.recorded().save(path)

        def load_checkpoint(self, local_path: Any, *args: Any, **kwargs: Any) -> None:
            guard = self.guard if local_path is not None else None
            there = guard is not None and _has_state(guard, Path(local_path), stage)
            super().load_checkpoint(local_path, *args, **kwargs)
            if guard is not None:
                guard.rebase()  # other weights than those it was attached to
            if guard is not None and there:
                load_state(guard, Path(local_path))

    GuardedEngine.__name__ = GuardedEngine.__qualname__ = f"Guarded{base.__name__}"
    return GuardedEngine


def _first() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _has_state(guard: CapabilityGuard, folder: Path, stage: str | None) -> bool:
    """Whether the guard's state is in the folder; a stage does not go on without what was recorded of it."""
    path = state_path(guard, folder)
    if not path.exists() and stage is not None:
        raise FileNotFoundError(
            f"recording stage {stage!r}: expected the guard's state in {path}, which save_checkpoint of this engine "
            "writes, found none: the stage's file would hold the later steps only. Load a checkpoint of this stage, or "
            "start a stage from weights with model.path and without resuming"
        )
    return path.exists()


def _check(engine: Any) -> None:
    """Refuses engines under which an edit would be lost or directions would be in the wrong place."""
    if engine.is_param_offload_enabled or engine.is_optimizer_offload_enabled:
        raise ValueError(
            "expected parameters and optimizer that stay on their device, found offloading; set "
            "fsdp_config.param_offload=False and optimizer_offload=False"
        )
    if any(c.__name__ == "FullyShardedDataParallel" for c in type(engine.module).__mro__):
        raise ValueError("expected FSDP2, found FSDP1, which flattens parameters; set strategy=fsdp2")
