"""Cells of merged experts: one model a domain, all trained from one start, then summed; a cell's @LR is the scale of the sum."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pydantic import Field, model_validator

from ..grpo import success_probability
from ..grpo.rundir import load_weights, model_tensors, save_weights
from ..guard.checkpoints import merge
from ..guard.sums import task_arithmetic, ties
from ..text import special_tokens
from ..train import recipe
from ..train.memory import fresh_examples
from ..train.run import Run, build_guard
from .grid import Cell
from .grpo import opened, start_of

SCALED = "scale"


class Recipe(recipe.Recipe):
    """Every stage trains an expert from the start.

    Args:
        scale: Of the sum of changes.
        ties: Experts are merged by TIES, with this share of every change; None: their changes are summed, and confined off the
            inputs of the other domains' shown examples where there is a guard.
    """

    scale: float = Field(default=1.0, gt=0)
    ties: float | None = Field(default=None, gt=0, le=1)

    @model_validator(mode="after")
    def _one_merge(self) -> Recipe:
        if any(stage.mixed for stage in self.stages):
            raise ValueError("stages: expected an expert of one domain each, found a mixed stage")
        if self.train.replay_fraction or self.train.rehearsal_weight:
            raise ValueError(
                "train: expected nothing of earlier domains, which experts have not, found replay or rehearsal"
            )
        if self.guard is not None and (not self.guard.shown or self.ties):
            raise ValueError("guard: expected shown examples of every domain, and a sum instead of ties")
        return self


def run(cell: Cell, cache: Path, report: Callable[[Any], None]) -> dict[str, Any]:
    """Train the experts, unless `cache` has them, and merge them.

    Returns:
        stages and scores as `cells.Record` has them: of the start, of every expert, of the merge.
    """
    plain: Recipe = cell.recipe.model_copy(update={"guard": None, "ties": None, "scale": 1.0})
    names = [stage.name for stage in plain.stages]
    start = start_of(cell, cache)
    experts = trained_alone(cell, plain, start, cache)
    with opened(cell, plain, start, lambda line: None) as bed, TemporaryDirectory() as folder:
        first = Path(folder) / "start.safetensors"
        model: Any = bed.trainer.model
        save_weights(first, model)
        out = [scores(bed, names)]
        for path in experts.values():
            load_weights(path, model)
            out.append(scores(bed, names))
        if cell.recipe.guard is not None:
            confine(cell, bed, first, experts)
        else:
            add(cell.recipe, model, first, experts)
        out.append(scores(bed, names))
    return {"stages": [*([name] for name in names), names], "scores": out}


def trained_alone(cell: Cell, plain: recipe.Recipe, start: Path | None, cache: Path) -> dict[str, Path]:
    """Files of experts, one a stage of the recipe, by domain; those that `cache` has not are trained."""
    experts: dict[str, Path] = {}
    for stage in plain.stages:
        content = plain.model_dump_json(exclude={"stages"}, exclude_defaults=True) + str(stage)
        name = f"{stage.name}-{hashlib.sha256(content.encode()).hexdigest()[:12]}.safetensors"
        experts[stage.name] = path = cache / "experts" / name
        if not path.exists():
            with opened(cell, plain.model_copy(update={"stages": (stage,)}), start, lambda line: None) as expert:
                expert.train()
                path.parent.mkdir(parents=True, exist_ok=True)
                save_weights(path, expert.trainer.model)
    return experts


def scores(bed: Run, names: list[str]) -> list[float]:
    """Exact probability of the right answers, per domain."""
    trainer = bed.trainer
    model, tokenizer, length = trainer.model, trainer.tokenizer, trainer.config.max_new_tokens
    tokens = special_tokens(tokenizer, model)
    examples = [list(trainer.domains[name].eval_examples) for name in names]
    return [float(success_probability(model, tokenizer, e, tokens, max_new_tokens=length).mean()) for e in examples]


def confine(cell: Cell, bed: Run, start: Path, experts: dict[str, Path]) -> None:
    """Give the model the sum of the experts' changes, each confined off the inputs of the other domains' examples."""
    model, spec = bed.trainer.model, cell.recipe.guard
    added = cell.added
    guard = build_guard(model, spec, added.guard_class(), **added.guard_defaults(cell.seed))
    batches = fresh_examples(list(bed.trainer.domains.values()), bed.trainer.tokenizer, spec.shown, spec.answers)
    for name, path in experts.items():
        load_weights(path, model)
        guard.protect(name, batches(name), progress=False)
    merged = start.parent / "merged"
    bases = [guard.basis(name) for name in experts]
    merge(start, experts, bases, merged, scale=cell.recipe.scale, room=guard.settings.room)
    load_weights(merged / start.name, model)


@torch.no_grad()
def add(plan: Recipe, model: Any, start: Path, experts: dict[str, Path]) -> None:
    """Give the model the sum of the experts' changes, as others make it."""
    own = model_tensors(model)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in own}
    for path in (start, *experts.values()):
        load_weights(path, model)
        for name, tensor in own.items():
            found[name].append(tensor.clone())
    for name, tensor in own.items():
        first, *others = found[name]
        if plan.ties is None:
            tensor.copy_(task_arithmetic(first, others, plan.scale))
        else:
            tensor.copy_(ties(first, others, plan.scale, plan.ties))
