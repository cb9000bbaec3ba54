"""Cells of `carerl train`'s recipes: tasks in sequence, or mixed, from a start that all methods of a setting and seed share."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..grpo import GRPOTrainer, answer_loss, special_tokens
from ..grpo.rundir import save_weights
from ..guard.validate import validate
from ..tasks import texts
from ..train.recipe import Recipe
from ..train.run import Run, open_run
from .grid import Cell

__all__ = ["SCALED", "Recipe", "run"]

SCALED = "train.lr"
"""The place in a recipe that a cell's learning rate scales."""
Line = dict[str, Any]


def run(cell: Cell, cache: Path, report: Callable[[Any], None]) -> dict[str, Any]:
    """Train one cell.

    Args:
        cell: Of a setting of kind "grpo". One whose recipe writes checkpoints goes on where an interrupted one stopped.
        cache: Keeps the checkpoint that all methods of a setting and seed start from.
        report: Called with the number of steps done.

    Returns:
        stages, scores (per stage end, the start first, a list over domains), lowest, validity, touched, guard_share,
        displacement and, of a pretrained model in sequence, extras, as `cells.Record` has them.
    """
    run_dir = cell.kept or (cache / "runs" / cell.key if cell.recipe.train.checkpoint_every else None)
    stages = [list(stage.domains) for stage in cell.recipe.stages]
    names = list(dict.fromkeys(name for stage in stages for name in stage))
    pooled = len(stages) == 1 and len(names) > 1
    validity: list[Validity] = []
    general: list[General] = []

    def on_step(line: Line) -> None:
        for one in validity if line["stage_step"] == 1 else ():
            one.look(again=False)
        for other in general if "eval" in line else ():
            other.look(line["stage"])
        report(line["step"])

    with opened(cell, cell.recipe, start_of(cell, cache), on_step, run_dir) as ready:
        validity += [] if pooled or cell.kept else [Validity(ready.trainer)]
        # Not of a run that may be resumed: what its model could before would be measured again in the middle of it.
        looked = cell.recipe.model.path == "smollm2" and run_dir is None and not pooled
        general += [General(ready.trainer)] if looked else []
        with cell.added.during(ready) as figures:
            history = ready.train(resume=run_dir is not None)
        for one in validity:
            one.look(again=True)
        found = {"stages": stages, "scores": scores_of(history, names), **guard_figures(ready.trainer), **figures}
    if run_dir is not None and cell.kept is None:
        shutil.rmtree(run_dir)  # the record is what stays: the cell run again starts anew
    if pooled:
        found["lowest"] = lowest_of(history, cell, names)
    for one in validity:
        found["validity"] = one.shares
    for other in general:
        found["extras"] = other.extras
    return found


@contextmanager
def opened(
    cell: Cell, recipe: Recipe, start: Path | None, on_step: Callable[[Line], None], run_dir: Path | None = None
) -> Iterator[Run]:
    """A recipe, ready to be trained without a word, on the CPU, as every recorded cell was.

    The recipe is the cell's own or one made of it; the cell says what its method adds. The rest is as for `open_run`.
    """
    train = recipe.train.model_copy(update={"progress": False, "plots": False})
    added = cell.added
    with open_run(
        recipe.model_copy(update={"train": train, "run_dir": run_dir}),
        on_step,
        start=start,
        device="cpu",
        guard_class=added.guard_class(),
        track_energy=True,
        **added.guard_defaults(cell.seed),
    ) as ready:
        yield ready


def start_of(cell: Cell, cache: Path) -> Path | None:
    """File of the weights that all methods of a setting and seed start from, after the setting's run before everything.

    Args:
        cell: One of them.
        cache: Keeps the file. What is not there yet is trained, warm-ups by whoever opens a run first.
    """

    def path(recipe: Recipe, *parts: str) -> Path:
        content = recipe.model_dump_json(include=set(parts), exclude_defaults=True)
        return cache / "starts" / f"{hashlib.sha256(content.encode()).hexdigest()[:12]}-{cell.seed}.safetensors"

    start = path(cell.plain, "model", "domains") if cell.plain.model.warm_up else None
    if cell.earlier is None:
        return start
    end = path(cell.earlier, *Recipe.model_fields)
    if not end.exists():
        with opened(cell, cell.earlier, start, lambda line: None) as ready:
            ready.train()
            end.parent.mkdir(parents=True, exist_ok=True)
            save_weights(end, ready.trainer.model)
    return end


VALIDATED = 64
"""Held-out examples behind each look at validity, in four gradients."""


class Validity:
    """Whether recorded directions still explain their domain's gradients, on examples that were never trained on.

    Args:
        trainer: Without a guard there is nothing to look at; nor are there examples of domains without single right answers.

    Attributes:
        shares: As `Record.validity`.
    """

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.model, self.tokenizer, self.guard = trainer.model, trainer.tokenizer, trainer.guard
        self.examples = {n: d.eval_examples[:VALIDATED] for n, d in trainer.domains.items() if d.eval_mode == "exact"}
        self.tokens = special_tokens(self.tokenizer, self.model)
        self.shares: dict[str, list[float]] = {}

    def look(self, again: bool) -> None:
        """Measure the domains with history, those known already too where `again`."""
        guard: Any = self.guard
        for name in [] if guard is None else guard.history:
            if name in self.examples and (again or name not in self.shares):
                found = validate(guard.basis(name), self.model, self._losses(name))
                self.shares.setdefault(name, []).append(found.explained)
                if again:
                    self.shares[name].append(found.random)

    def _losses(self, name: str) -> Iterator[Callable[[], Tensor]]:
        size = VALIDATED // 4
        for start in range(0, VALIDATED, size):
            part = self.examples[name][start : start + size]
            yield partial(answer_loss, self.model, self.tokenizer, part, self.tokens)


class General:
    """What a pretrained model could before, now and at the end of every stage: text of two sources, and facts.

    Args:
        trainer: Of a model that has not been trained yet.
    """

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.model, self.batches = trainer.model, texts.general(trainer.tokenizer)
        self.found: dict[str, dict[str, float]] = {}
        self.look("start")

    @torch.no_grad()
    def look(self, stage: str) -> None:
        """Measure minus nats a token; what a stage's end came to stays, of several looks in it."""
        self.found[stage] = {name: -float(texts.loss(self.model, batch)) for name, batch in self.batches.items()}

    @property
    def extras(self) -> dict[str, list[float]]:
        """As `Record.extras`."""
        return {name: [at[name] for at in self.found.values()] for name in self.batches}


def scores_of(history: Sequence[Line], domains: Sequence[str]) -> list[list[float]]:
    """Accuracy per domain before everything and at the end of every stage, out of the trainer's lines."""
    last = {line["stage"]: line["eval"] for line in history if "eval" in line}
    return [[scores[d] for d in domains] for scores in last.values()]


def lowest_of(history: Sequence[Line], cell: Cell, domains: Sequence[str]) -> list[float]:
    """The lowest accuracy per domain after the start, at the setting's evaluations: a method may ask for more of them."""
    every = cell.plain.train.eval_every
    looks = [line for line in history if "eval" in line and line["step"] > 0]
    own = [line["eval"] for line in looks if line is looks[-1] or (every and line["step"] % every == 0)]
    return [min(look[d] for look in own) for d in domains]


def guard_figures(trainer: GRPOTrainer) -> dict[str, Any]:
    """What the guard did: nothing to say without one."""
    guard: Any = trainer.guard
    if guard is None:
        return {}
    return {
        "touched": guard.report()["touched_share"],
        "guard_share": guard_share(trainer.history),
        "displacement": {
            stage: {d: row["net_displacement"] for d, row in report["domains"].items() if d != stage}
            for stage, report in trainer.guard_reports.items()
        },
    }


def guard_share(history: Sequence[Line]) -> float:
    """Share of a run's time that went to the guard; of the lines and not of a process, for the run may have been resumed."""
    whole = sum(sum(line["seconds"].values()) for line in history)
    return sum(line["seconds"].get(phase, 0.0) for line in history for phase in ("guard", "probe")) / whole
