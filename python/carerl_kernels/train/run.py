"""From a recipe to a trainer that is ready to run, on this process or on all of torchrun's."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..grpo.config import Stage, stage_names
from ..grpo.endpoint import EndpointSampler
from ..grpo.parallel import Ranks, process_group, shard
from ..grpo.trainer import GRPOTrainer
from ..guard import CapabilityGuard
from ..task import Domain
from ..text import special_tokens
from .domains import Characters
from .memory import StoredReplay, fresh_examples, show_instead
from .models import load_model
from .recipe import GuardSpec, Recipe, RecipeError


@dataclass
class Run:
    """A trainer that is ready to run, and the stages that it trains."""

    trainer: GRPOTrainer
    stages: list[Stage]

    def train(self, *, resume: bool = False) -> list[dict[str, Any]]:
        """The metrics of the run; see `GRPOTrainer.run`."""
        return self.trainer.run(self.stages, resume=resume)


@contextmanager
def open_run(
    recipe: Recipe,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    *,
    start: Path | None = None,
    device: str | None = None,
    guard_class: type[CapabilityGuard] = CapabilityGuard,
    **guard_defaults: Any,
) -> Iterator[Run]:
    """Builds everything a recipe names; under torchrun inside its process group.

    Args:
        recipe: The recipe from `load_recipe`.
        on_step: See `GRPOTrainer`.
        start: File of the warmed-up weights, for runs that share them; see `load_model`.
        device: Where the model lies; None: on a GPU if there is one.
        guard_class: What the recipe's guard is one of.
        guard_defaults: Options of the guard that the recipe may change.

    Raises:
        ValueError, OSError, ImportError: Something in it cannot be had; the message names it.
    """
    with process_group():
        run_dir = recipe.run_dir
        domains = [
            spec.build(name, recipe.folder, None if run_dir is None else run_dir / f"{name}.judge.sqlite")
            for name, spec in recipe.domains.items()
        ]
        tasks = [spec.task or name for name, spec in recipe.domains.items() if isinstance(spec, Characters)]
        model, tokenizer = load_model(recipe.model, domains, tasks, start)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 or recipe.model.precision == "bf16":
            shard(model, recipe.model.precision, device)
        else:
            model.to(device)
        guard = None
        if recipe.guard is not None:
            guard = build_guard(model, recipe.guard, guard_class, **guard_defaults)
            if recipe.guard.shown:
                show_instead(guard, fresh_examples(domains, tokenizer, recipe.guard.shown, recipe.guard.answers))
        replay = StoredReplay(recipe.stages)
        kept = [replay.limit(d) if recipe.domains[d.name].replay == "stored" else d for d in domains]
        monitor = _monitor(recipe, model, domains, guard)
        try:
            trainer = GRPOTrainer(
                model,
                tokenizer,
                kept,
                recipe.train,
                guard=guard,
                monitor=monitor,
                editor="guard" if recipe.guards_mixed else None,
                run_dir=run_dir,
                sampler=_sampler(recipe, model, tokenizer),
                recipe=recipe.record(),
                on_step=on_step,
            )
            replay.follow(trainer)
            yield Run(trainer, list(recipe.stages))
        finally:
            if monitor is not None:
                monitor.close()  # its sinks: the next run of this process has its own


def _sampler(recipe: Recipe, model: nn.Module, tokenizer: Any) -> EndpointSampler | None:
    spec = recipe.sampler
    if spec is None:
        return None
    run_dir = _needed(recipe.run_dir, "an engine that samples")
    own = f"{run_dir.name}-{hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:8]}"  # several runs may share the folder
    return EndpointSampler(
        spec.url,
        spec.model,
        special_tokens(tokenizer, model),
        folder=run_dir if spec.folder is None else spec.folder / own,
        device=next(model.parameters()).device,
        **spec.model_dump(include={"engine", "sync_every", "max_in_flight", "timeout", "max_gap"}),
        dtype=None if spec.dtype is None else getattr(torch, spec.dtype),
    )


def _needed(run_dir: Path | None, what: str) -> Path:
    if run_dir is None:
        raise RecipeError(f"run_dir: expected a directory, which {what} needs, found none")
    return run_dir


def _monitor(recipe: Recipe, model: nn.Module, domains: Sequence[Domain], guard: Any) -> Any:
    """The drift monitor over what is evaluated, with sinks in the first process."""
    spec = recipe.monitor
    if spec is None:
        return None
    from ..monitor import Controller, DriftMonitor, TensorBoard, Trackio, WandB

    sinks: list[Any] = []
    if Ranks.of(model).first:
        sinks += [TensorBoard(_needed(recipe.run_dir, "tensorboard") / "tensorboard")] if spec.tensorboard else []
        sinks += [WandB(**spec.wandb)] if spec.wandb is not None else []
        sinks += [Trackio(**spec.trackio)] if spec.trackio is not None else []
    every = recipe.train.eval_every
    looks = 1 + sum(-(-s.steps // every) if every else 1 for s in recipe.stages)
    names = [d.name for d in domains if d.eval_examples]
    snapshots = None if recipe.run_dir is None else recipe.run_dir / "snapshots"
    options = {"planned": looks, "snapshots": snapshots, **spec.options}
    if recipe.train.balance == "controller":
        options["controller"] = Controller(names, **(spec.controller or {}))
    return DriftMonitor(names, model=model, guard=guard, sinks=sinks, **options)


def build_guard(
    model: nn.Module, spec: GuardSpec, kind: type[CapabilityGuard] = CapabilityGuard, **defaults: Any
) -> CapabilityGuard:
    """The guard over a model, with the history of earlier runs.

    Args:
        defaults: Options that `spec` may change.

    Raises:
        BasisError: A basis of another model.
        ValueError: An option out of range.
    """
    options = {**defaults, **spec.options}
    if "basis_dtype" in options:
        options["basis_dtype"] = basis_dtype(spec)
    if isinstance(options.get("bound"), list):
        options["bound"] = tuple(options["bound"])
    paths = history_files(spec.history)
    return kind.load(*paths, model=model, **options) if paths else kind(model, **options)


def basis_dtype(spec: GuardSpec) -> torch.dtype:
    """Of the directions; float32 where the recipe names none."""
    name = spec.options.get("basis_dtype", "float32")
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise RecipeError(f"guard.basis_dtype: expected a torch dtype such as bfloat16, found {name!r}")
    return dtype


def history_files(history: Sequence[Path]) -> list[Path]:
    """Basis files, directories of runs replaced by those of their stages in order. RecipeError: a run that recorded
    nothing."""
    files: list[Path] = []
    for path in history:
        if path.is_file():
            files.append(path)
            continue
        try:
            recorded = json.loads((path / "config.json").read_text())
            stages = recorded["stages"]
            names = stage_names([Stage(s["domain"], 1) for s in stages])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecipeError(
                f"guard.history: expected a basis file or a run's directory, found {path} ({error})"
            ) from error
        if not recorded["config"].get("record_last", True):
            names = names[:-1]
        apart = recorded.get("editor") == "guard"  # then of mixed stages there is one file for each domain
        own: list[Path] = []
        for name, stage in zip(names, stages, strict=False):
            mixed = apart and isinstance(stage["domain"], list)
            stems = [f"{name}/{domain}" for domain in stage["domain"]] if mixed else [name]
            own += [path / "bases" / f"{stem}.safetensors" for stem in stems]
        missing = [str(p) for p in own if not p.is_file()]
        if missing:
            raise RecipeError(
                f"guard.history: run {path} has no {', '.join(missing)}: it was not guarded (guard: {{}} records), or its "
                "stages have not ended"
            )
        files += own
    return files
