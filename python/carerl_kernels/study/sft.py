"""Cells of SmolLM2-135M, supervised: what it could before, in nats a token, while it learns tasks on lists of words.

Scores are minus nats: higher is better, as everywhere in the study. The stage `text` is not trained; the model comes with it.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from .._files import write_bytes_atomically
from ..grpo.parallel import Ranks
from ..grpo.rundir import load_tensors, save_tensors
from ..guard import CapabilityGuard
from ..tasks import texts
from ..tasks.smollm2 import load_smollm2
from ..tasks.texts import HELD_OUT, TEXT, Batch, Pair, loss
from ..train import recipe
from ..train.models import add_lora
from ..train.run import build_guard
from .acting import Actor
from .grid import Cell

SCALED = "scale"
BATCH = 8


class Train(recipe.Section):
    """The learning rate, and where a stage ends between its start and its end, from the second one on."""

    lr: float = Field(gt=0)
    stage_interpolation: float = Field(default=1.0, gt=0, le=1)


class Recipe(recipe.Section):
    """A supervised run.

    Args:
        stages: "text", which the model comes with, or tasks on lists of words.
        steps: Of every stage that is trained.
        train: How.
        lora: Adapters; None: all parameters are trained.
        guard: From the second stage on, of shown examples of the ones before.
        scale: Of the learning rate from the second stage on: before it there is nothing to lose.
        refresh: After the last stage the tasks before it are trained again, for this share of their steps, in turn.
        seed: Of the examples, and of adapters.
    """

    stages: tuple[Literal["text", "backwards", "shortest"], ...] = Field(min_length=1)
    steps: int = Field(ge=1)
    train: Train
    lora: recipe.Lora | None = None
    guard: recipe.GuardSpec | None = None
    scale: float = Field(default=1.0, gt=0)
    refresh: float = Field(default=0.0, ge=0)
    seed: int = 0

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if len(set(self.stages)) < len(self.stages) or TEXT in self.stages[1:]:
            raise ValueError(f"stages: expected each once, and text first, found {', '.join(self.stages)}")
        if self.guard is not None and (not self.guard.shown or self.guard.history):
            raise ValueError("guard: expected shown examples, and no history, found shown: 0 or a history")
        return self


def run(cell: Cell, cache: Path, report: Callable[[Any], None]) -> dict[str, Any]:
    """Train one cell of a setting of kind "sft".

    Args:
        cell: Its method acts from the second stage on.
        cache: Keeps ends of plain stages, which methods that look at finished checkpoints share.
        report: Called with the number of steps done.

    Returns:
        stages, scores and extras, as `cells.Record` has them.
    """
    bed, domains = Bed(cell, cache, report), cell.recipe.stages
    stages = [[domain] for domain in domains]
    measured = [bed.measure()]
    for index, domain in enumerate(domains):
        if domain != TEXT:
            bed.stage(index, domain)
        measured.append(bed.measure() if domain != TEXT else measured[-1])
        if domain != domains[-1]:
            bed.remember(domain)
    if cell.recipe.refresh:
        stages.append([domain for domain in domains[:-1] if domain != TEXT])
        bed.refresh(stages[-1])
        measured.append(bed.measure())
    return bed.found(stages, measured)


class Bed:
    """A model, what it is trained on and what is measured of it.

    Args:
        cell, cache, report: As for `run`.
    """

    def __init__(self, cell: Cell, cache: Path, report: Callable[[Any], None]) -> None:
        self.recipe: Recipe = cell.recipe
        self.seed = cell.seed
        self.cache, self.report = cache, report
        model, self.tokenizer = pretrained()
        self.model = deepcopy(model)
        if self.recipe.lora is not None:
            self.model = add_lora(self.model, self.recipe.lora, cell.seed)
        self.model.eval()  # no dropout anywhere
        self.trained: dict[str, nn.Parameter] = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        tasks = [d for d in self.recipe.stages if d != TEXT]
        self.pairs = {d: list(islice(texts.task_pairs(d, "held out"), HELD_OUT)) for d in tasks}
        self.further = texts.general(self.tokenizer)
        self.held_out: dict[str, Batch] = {TEXT: self.further.pop(TEXT)}
        self.held_out |= {d: texts.pairs_batch(self.tokenizer, pairs) for d, pairs in self.pairs.items()}
        self.guard: CapabilityGuard | None = None
        if self.recipe.guard is not None:
            added = cell.added
            options = added.guard_defaults(cell.seed)
            self.guard = build_guard(self.model, self.recipe.guard, added.guard_class(), **options)
        self.actor = cell.added.actor(self)
        self.seconds = 0.0
        # What was measured of the weights as they are; None where a method had a hand in them.
        self.known: Path | None = cache / "sft" / "start.json"
        self.plainly: tuple[
            str, ...
        ] = ()  # the stages that led to these weights, while nothing else had a hand in them

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Minus nats a token of every domain, of documentation and facts; exact answers of every task."""
        found: dict[str, float] = json.loads(self.known.read_bytes()) if self.known and self.known.exists() else {}
        before = len(found)
        for name, batch in (self.held_out | self.further).items():
            if name not in found:
                found[name] = -float(loss(self.model, batch))
            if name in self.pairs and f"exact {name}" not in found:
                found[f"exact {name}"] = exact(self.model, batch)
        if self.known and len(found) > before:
            self.known.parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomically(self.known, json.dumps(found).encode())
        wanted = [*self.held_out, *self.further, *(f"exact {task}" for task in self.pairs)]
        return {name: found[name] for name in wanted}

    def remember(self, domain: str) -> None:
        """Show the guard examples of a domain whose stage has ended, or give it what they showed before."""
        guard, spec, path = self.guard, self.recipe.guard, None
        if guard is None or spec is None:
            return
        if self.known is not None and self.recipe.lora is None:  # of weights that other cells come to as well
            what = (
                f"{domain}-{spec.shown}{'' if spec.answers else '-prompts'}-{guard.layout.k}-{guard.settings.energy:g}"
            )
            path = self.known.with_name(f"{self.known.stem}-shown-{what}.safetensors")
        if path is not None and path.exists():
            guard.add(path)
        else:
            guard.protect(domain, self.shown(domain, spec), path, progress=False)

    def shown(self, domain: str, spec: recipe.GuardSpec) -> Iterator[dict[str, Tensor]]:
        """What the model is called with on text of another source, or on fresh prompts and their answers; 16 at a time."""
        batch = self.stored(domain, spec.shown)
        inputs = batch.inputs
        if not spec.answers and domain != TEXT:
            inputs["attention_mask"] = inputs["attention_mask"] * ~batch.scored
        for start in range(0, spec.shown, 16):
            yield {name: tensor[start : start + 16] for name, tensor in inputs.items()}

    def nats(self, domain: str, n: int) -> Iterator[Callable[[], Tensor]]:
        """Minus the log-probability of each of those answers, or pieces of text, by itself."""
        batch = self.stored(domain, n)

        def nats(i: int) -> Tensor:
            one = Batch(batch.ids[i : i + 1], batch.mask[i : i + 1], batch.scored[i : i + 1])
            return loss(self.model, one) * one.scored.sum()

        return (functools.partial(nats, i) for i in range(n))

    def stored(self, domain: str, n: int) -> Batch:
        """Text of another source, or answers to fresh prompts."""
        if domain == TEXT:
            return texts.text_batch(self.tokenizer, texts.documentation(shown=True), n, seed=1)
        examples = texts.task_pairs(domain, "shown", apart=self.pairs[domain])
        return texts.pairs_batch(self.tokenizer, islice(examples, n))

    def stage(self, index: int, domain: str) -> None:
        """Train a stage, with what the method does from the second one on."""
        start = self.weights()
        part = self.recipe.train.stage_interpolation
        guarded = self.guard is not None and self.guard.settings.every < self.recipe.steps
        if index == 0 or not (guarded or self.actor):
            self.plain(domain, self.rate(index))
        else:
            if self.actor is not None:
                self.actor.turn(self.recipe.stages[index - 1])
            self.train([domain], self.rate(index), guard=self.guard, actor=self.actor)
            self.known = None
        if index and self.guard is not None:
            self.guard.confine_()
            self.known = None
        if index and part != 1:
            with torch.no_grad():
                for n, p in self.trained.items():
                    p.copy_(torch.lerp(start[n], p, part))
            self.known = None

    def found(self, stages: list[list[str]], measured: list[dict[str, float]]) -> dict[str, Any]:
        """What a cell returns, of what was measured before everything and at the end of every stage."""
        domains = self.recipe.stages
        return {
            **self.figures(),
            "stages": stages,
            "scores": [[at[d] for d in domains] for at in measured],
            "extras": {name: [at[name] for at in measured] for name in measured[0] if name not in domains},
        }

    def figures(self) -> dict[str, Any]:
        """Seconds of the guard over those of the training that it guarded, nothing where it looked at checkpoints alone; or
        what an actor says of itself."""
        if self.actor is not None:
            return self.actor.figures()
        if self.guard is None or not self.seconds:
            return {}
        return {"guard_share": self.guard.seconds["act"] / self.seconds}

    def alone(self) -> Iterator[str]:
        """Every task; the model has meanwhile learned it from the start, and nothing else, and in the end is as at the start."""
        start, known = self.weights(), self.known
        for domain in self.recipe.stages:
            self.plain(domain, self.recipe.train.lr)
            yield domain
            self.load(start)
            self.known, self.plainly = known, ()

    def weights(self) -> dict[str, Tensor]:
        """A copy of what is trained."""
        return {n: p.detach().clone() for n, p in self.trained.items()}

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Give the model weights that are not known to be those of a plain run."""
        for n, p in self.trained.items():
            p.copy_(weights[n])
        self.known = None

    def plain(self, domain: str, lr: float) -> None:
        """Train a stage with nothing else, or load what that came to from weights that were trained plainly."""
        if self.known is None:
            self.train([domain], lr)
            return
        recipe = self.recipe
        self.plainly = *self.plainly, f"{domain}@{lr:g}"
        adapters = "" if recipe.lora is None else f"-lora{recipe.lora.r}"
        name = f"{'-'.join(self.plainly)}{adapters}-{recipe.steps}-{recipe.seed}.safetensors"
        path = self.cache / "sft" / name
        self.known = path.with_suffix(".json")
        if path.exists():
            load_tensors(path, self.trained)
            return
        self.train([domain], lr)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, self.trained, Ranks.of(self.model))

    def refresh(self, domains: list[str]) -> None:
        """A short further stage on these tasks in turn."""
        self.train(domains, self.rate(1), steps=max(1, round(self.recipe.refresh * self.recipe.steps * len(domains))))
        self.known = None

    def rate(self, index: int) -> float:
        """A stage's learning rate: the cell's scales all but the first's, before which there is nothing to lose."""
        return self.recipe.train.lr * (self.recipe.scale if index else 1.0)

    def train(
        self,
        domains: Sequence[str],
        lr: float,
        *,
        steps: int | None = None,
        guard: CapabilityGuard | None = None,
        actor: Actor | None = None,
        loss_of: Callable[[str, list[Pair]], Tensor] | None = None,
    ) -> None:
        """Steps on tasks in turn; the learning rate falls linearly to a tenth.

        Args:
            domains: The tasks.
            lr: Of the first step.
            steps: How many; None: as many as a stage has.
            guard, actor: What has a hand in them.
            loss_of: Of a task and a batch of its examples; None: cross-entropy on their answers.
        """
        started = time.perf_counter()
        steps = steps or self.recipe.steps
        loss_of = loss_of or self.answer_loss
        optimizer = torch.optim.AdamW(self.trained.values(), lr=lr, weight_decay=0.0, fused=True)
        examples = {d: texts.task_pairs(d, str(self.recipe.seed), apart=self.pairs[d]) for d in domains}
        if guard is not None:
            guard.attach(optimizer)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * (1 - 0.9 * step / steps)
            domain = domains[step % len(domains)]
            loss_of(domain, list(islice(examples[domain], BATCH))).backward()
            if actor is not None:
                actor.before(optimizer)
            optimizer.step()
            if actor is not None:
                actor.after(optimizer)
            optimizer.zero_grad()
            self.report(step + 1)
        if guard is not None:
            guard.detach()
            self.seconds += time.perf_counter() - started

    def answer_loss(self, domain: str, pairs: list[Pair]) -> Tensor:
        """Mean nats of the answers."""
        return loss(self.model, texts.pairs_batch(self.tokenizer, pairs))


@functools.cache
def pretrained() -> tuple[nn.Module, Any]:
    """The model and its tokenizer, read once: its file's numbers take a while to unpack."""
    return load_smollm2()


def exact(model: nn.Module, batch: Batch) -> float:
    """Share of examples of which every scored token is the likeliest."""
    right = model(**batch.inputs).logits[:, :-1].argmax(-1) == batch.ids[:, 1:]
    return float((right | ~batch.scored[:, 1:]).all(1).float().mean())
