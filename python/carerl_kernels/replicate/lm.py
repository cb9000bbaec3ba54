"""Cells of the demonstration's language model: its tasks in sequence, or mixed with shares and noisy rewards."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..demo import tasks
from ..grpo import Domain, Example, GRPOConfig, GRPOTrainer, Stage, answer_loss, special_tokens
from ..guard import CapabilityGuard
from ..guard.validate import validate
from ..monitor import DriftMonitor
from ..monitor.controller import Controller
from .grid import Cell, GridError, Method, Setting
from .methods import Shown, editor_of, guard_of

Scores = list[float]


def run(cell: Cell, cache: Path, report: Callable[[Any], None]) -> dict[str, Any]:
    """Train one cell.

    Args:
        cell: Of a setting of kind "lm".
        cache: Keeps the warm-up checkpoint that all methods of a setting and seed start from.
        report: Called with the number of steps done.

    Returns:
        scores (per stage end, the start first, a list over domains: exact success probability at temperature 1), touched,
        displacement, validity and guard_share, as `cells.Record` has them.
    """
    setting, method, seed = cell.setting, cell.method, cell.seed
    if method.alone:
        return alone(cell, cache, report)
    tokenizer = tasks.character_tokenizer(setting.domains)
    model = start_model(cell, tokenizer, cache)
    pools = Pools(setting.groups, setting.steps)
    domains = tasks.demo_domains(seed, setting.domains)
    shown = shown_by(domains, tokenizer, method.shown)  # once, right after a stage: out of all that its domain has
    domains = [pools.limit(judged(d, setting, seed), method.stored) for d in domains]
    config = config_of(cell, setting.lr * cell.lr)
    guard = guard_of(method, model, seed, setting.k, shown)
    validity = Validity(None if setting.pooled else guard, model, tokenizer, domains)

    def on_step(line: dict[str, Any]) -> None:
        if line["stage_step"] == 1:
            validity.look(again=False)
        report(line["step"])

    trainer = GRPOTrainer(
        model,
        tokenizer,
        domains,
        config,
        guard=guard,
        monitor=monitor_of(config, setting.domains),
        editor="guard" if method.editor == "guard" else editor_of(method, model, seed),
        on_step=on_step,
    )
    pools.follow(trainer)
    history = trainer.run([Stage(group, setting.steps, shares=shares_of(cell, group)) for group in setting.groups])
    validity.look(again=True)
    return {
        **({"lowest": lowest_of(history, setting)} if setting.pooled else {}),
        "scores": scores_of(history, setting.domains),
        "validity": validity.shares,
        **guard_figures(guard, trainer),
    }


def alone(cell: Cell, cache: Path, report: Callable[[Any], None]) -> dict[str, Any]:
    """Every domain of a pooled setting by itself from the start that all share, with the samples it has in the pooled run:
    in whole batches, so in fewer steps.

    Args:
        cell, cache, report: As for `run`.

    Returns:
        scores and lowest, each domain's of its own run.
    """
    setting = cell.setting
    (group,) = setting.groups
    shares = shares_of(cell, group) or (1.0,) * len(group)
    config = config_of(cell, setting.lr * cell.lr)
    before, after, lowest = [], [], []
    for domain, share in zip(group, shares, strict=True):
        tokenizer = tasks.character_tokenizer(setting.domains)
        model = start_model(cell, tokenizer, cache)
        domains = [judged(d, setting, cell.seed) for d in tasks.demo_domains(cell.seed, [domain])]
        trainer = GRPOTrainer(model, tokenizer, domains, config, on_step=lambda line: report(line["step"]))
        history = trainer.run([Stage(domain, max(1, round(setting.steps * share / sum(shares))))])
        (start,), (end,) = scores_of(history, [domain])
        before.append(start)
        after.append(end)
        lowest += lowest_of(history, setting, [domain])
    return {"scores": [before, after], "lowest": lowest}


def config_of(cell: Cell, lr: float) -> GRPOConfig:
    """How the demonstration's model is trained."""
    return GRPOConfig(
        **{
            "max_new_tokens": tasks.MAX_NEW_TOKENS,
            "lr": lr,
            "eval_batch_size": 512,
            "record_last": False,
            "seed": cell.seed,
            "progress": False,
            "plots": False,
            **cell.setting.train,
            **cell.method.train,
        }
    )


def shown_by(domains: Sequence[Domain], tokenizer: Any, n: int) -> Shown:
    """Fresh training examples of a domain with their answers, padded at their ends, 16 at a time."""
    sample = {d.name: d.sample for d in domains}

    def batches(name: str) -> Iterator[dict[str, Tensor]]:
        examples = sample[name](random.Random(f"shown-{name}"), n)
        for start in range(0, n, 16):
            rows = [tokenizer(f"{e.prompt}{e.answer}")["input_ids"] for e in examples[start : start + 16]]
            yield tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")

    return batches


VALIDATED = 64
"""Held-out examples behind each look at validity, in four gradients."""


class Validity:
    """Whether recorded directions still explain their domain's gradients, on examples that were never trained on.

    Args:
        guard: Or None, which leaves `shares` empty.
        model, tokenizer, domains: Of the run.

    Attributes:
        shares: As `Record.validity`.
    """

    def __init__(self, guard: CapabilityGuard | None, model: Any, tokenizer: Any, domains: Sequence[Domain]) -> None:
        self.guard = guard
        self.model, self.tokenizer = model, tokenizer
        self.examples = {d.name: list(d.eval_examples) for d in domains}
        self.tokens = special_tokens(tokenizer, model)
        self.shares: dict[str, list[float]] = {}

    def look(self, again: bool) -> None:
        """Measure the domains with history, those known already too where `again`."""
        for name in [] if self.guard is None else self.guard.history:
            if name not in self.examples or (name in self.shares and not again):
                continue
            assert self.guard is not None
            found = validate(self.guard.basis(name), self.model, self._losses(name))
            self.shares.setdefault(name, []).append(found.explained)
            if again:
                self.shares[name].append(found.random)

    def _losses(self, name: str) -> Iterator[Callable[[], Tensor]]:
        size = VALIDATED // 4
        for start in range(0, VALIDATED, size):
            part = self.examples[name][start : start + size]
            yield partial(answer_loss, self.model, self.tokenizer, part, self.tokens)


def scores_of(history: Sequence[dict[str, Any]], domains: Sequence[str]) -> list[Scores]:
    """Accuracy per domain before everything and at the end of every stage, out of the trainer's lines."""
    last: dict[str | None, dict[str, float]] = {}
    for line in history:
        if "eval" in line:
            last[line["stage"]] = line["eval"]
    return [[scores[d] for d in domains] for scores in last.values()]


def monitor_of(config: GRPOConfig, domains: Sequence[str]) -> DriftMonitor | None:
    """What feeds a controller of the mixture: every evaluation against the best one; None where there is none."""
    if config.balance != "controller":
        return None
    return DriftMonitor(domains, baseline="best", controller=Controller(domains))


def lowest_of(history: Sequence[dict[str, Any]], setting: Setting, domains: Sequence[str] | None = None) -> Scores:
    """The lowest accuracy per domain after the start, at the setting's evaluations: a method may ask for more of them."""
    every = setting.train.get("eval_every", 0)
    looks = [line for line in history if "eval" in line and line["step"] > 0]
    own = [line["eval"] for line in looks if line is looks[-1] or (every and line["step"] % every == 0)]
    return [min(look[d] for look in own) for d in domains or setting.domains]


def guard_figures(guard: CapabilityGuard | None, trainer: GRPOTrainer) -> dict[str, Any]:
    """What the guard did: nothing to say without one."""
    if guard is None:
        return {}
    seconds = trainer.seconds
    return {
        "touched": guard.report()["touched_share"],
        "guard_share": (seconds.get("guard", 0.0) + seconds.get("probe", 0.0)) / sum(seconds.values()),
        "displacement": {
            stage: {d: row["net_displacement"] for d, row in report["domains"].items() if d != stage}
            for stage, report in trainer.guard_reports.items()
        },
    }


def start_model(cell: Cell, tokenizer: Any, cache: Path) -> Any:
    """The model that all methods of a setting and seed start from, trained once: supervised warm-up, then the plain stage
    before everything where the setting has one."""
    from ..grpo.rundir import load_weights, save_weights

    setting, seed = cell.setting, cell.seed
    kinds = "-".join(sorted(setting.domains))  # whatever their order later: one checkpoint
    path = cache / "warm-up" / f"{kinds}-{setting.warm_up}-{seed}.safetensors"
    model = tasks.tiny_model(tokenizer, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        load_weights(path, model)
    else:
        domains = tasks.demo_domains(seed, sorted(setting.domains, key=list(tasks.GENERATORS).index))
        tasks.warm_up(model, tokenizer, domains, seed=seed, steps=setting.warm_up)
        save_weights(path, model)
    if not setting.earlier:
        return model
    path = path.with_stem(f"{path.stem}-{'-'.join(setting.earlier)}-{setting.earlier_steps}@{setting.lr:g}")
    if path.exists():
        load_weights(path, model)
        return model
    plain = replace(cell, method=Method(text="plain"))
    config = config_of(plain, setting.lr).model_copy(update={"eval_every": 0})
    trainer = GRPOTrainer(model, tokenizer, tasks.demo_domains(seed, setting.earlier), config)
    trainer.run([Stage(setting.earlier, setting.earlier_steps)])
    save_weights(path, model)
    return model


def shares_of(cell: Cell, group: Sequence[str]) -> tuple[float, ...] | None:
    """Shares of the batches of a stage that mixes all domains that have one; None, which is equal ones, of other stages."""
    shares = cell.setting.shares
    return None if shares is None or len(group) < len(shares) else tuple(shares[d] for d in group)


def judged(domain: Domain, setting: Setting, seed: int) -> Domain:
    """A domain whose reward has the setting's noise and scale, where it has any; evaluation stays exact."""
    spread, scale = setting.noise.get(domain.name, 0.0), setting.scale.get(domain.name, 1.0)
    if not spread and scale == 1:
        return domain
    verify, rng = domain.reward, random.Random(f"judge-{domain.name}-{seed}")
    assert callable(verify)

    def judge(example: Example, text: str) -> float:
        verdict = float(verify(example, text) or 0.0)
        return scale * (verdict + rng.gauss(0.0, spread) if spread else verdict)

    domain.reward = judge
    return domain


class Pools:
    """What of a domain's prompts there is to draw from: all in its own stage, what the method stores afterwards.

    Args:
        groups: Domains of each stage.
        steps: Of a stage.
    """

    def __init__(self, groups: Sequence[Sequence[str]], steps: int) -> None:
        self._groups, self._steps = groups, steps
        self._trainer: GRPOTrainer | None = None

    def follow(self, trainer: GRPOTrainer) -> None:
        """Whose steps tell the stage, those before it was interrupted too."""
        self._trainer = trainer

    def _now(self) -> Sequence[str]:
        done = int(self._trainer.history[-1]["step"]) if self._trainer and self._trainer.history else 0
        return self._groups[min(done // self._steps, len(self._groups) - 1)]

    def limit(self, domain: Domain, stored: int | None) -> Domain:
        """The domain, drawing from its first `stored` training examples outside of stages of its own.

        Raises:
            GridError: It has not so many to store.
        """
        everything = domain.sample
        if stored is None:
            return domain
        if len(domain.probe_examples) < stored:
            raise GridError(
                f"expected at most {len(domain.probe_examples)} stored examples of {domain.name}, found stored: {stored}"
            )
        domain.probe_examples = list(domain.probe_examples)[:stored]
        kept = domain.probe_examples

        def sample(rng: random.Random, n: int) -> Sequence[Example]:
            return everything(rng, n) if domain.name in self._now() else rng.choices(kept, k=n)

        domain.sample = sample
        return domain
