"""Cells of contextual bandits: an MLP policy learns one teacher after the other from rewards alone, in a second or two.

A context is 16 normal numbers and a mark of its domain; the right one of 8 actions is what the domain's linear teacher says,
and teachers share half of their variance. The policy samples 8 actions per context, and is trained with group-relative
advantages (GRPO without clipping).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..guard.editors import EDITORS, assign, domain_gradients
from ..train import recipe
from ..train.run import build_guard
from .grid import Cell

SCALED = "train.lr"
CONTEXT, ACTIONS, HIDDEN = 16, 8, 96
GROUP = 8
BATCH = 64
"""Contexts per step."""
HELD_OUT = 1024


class Contexts(recipe.Section):
    """A domain: how many contexts with their answers are stored, and what replay draws from, as in `DomainSpec`."""

    probes: int = Field(default=0, ge=0)
    replay: Literal["all", "stored"] = "all"


class Train(recipe.Section):
    """What the trainer does, as in `GRPOConfig`."""

    lr: float = Field(gt=0)
    replay_fraction: float = Field(default=0.0, ge=0, lt=1)
    rehearsal_weight: float = Field(default=0.0, ge=0)
    stage_interpolation: float = Field(default=1.0, gt=0, le=1)
    kl_beta: float = Field(default=0.0, ge=0)
    kl_reference: Literal["stage"] = "stage"
    editor: Literal["pcgrad", "modular_surgery"] | None = None


class Recipe(recipe.Section):
    """A run: domains in the order in which they are learned, for `steps` each."""

    domains: dict[str, Contexts] = Field(min_length=1)
    steps: int = Field(ge=1)
    train: Train
    guard: recipe.GuardSpec | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        recipe.check_memory(self.domains, len(self.domains), self.train, self.guard)
        if self.guard is not None and (self.guard.shown or self.guard.history):
            raise ValueError("guard: expected one that records stages of its own, found shown or history")
        return self


class Bandit:
    """Domains' contexts and right answers.

    Args:
        domains: Names.
        seed: Of the teachers and of everything drawn.
    """

    def __init__(self, domains: list[str], seed: int) -> None:
        self.domains = domains
        self.generator = torch.Generator().manual_seed(seed)
        shared = torch.randn(ACTIONS, CONTEXT, generator=self.generator)
        self.teachers = {d: shared + torch.randn(ACTIONS, CONTEXT, generator=self.generator) for d in domains}
        self.held_out = {d: self.draw(d, HELD_OUT) for d in domains}

    def draw(self, domain: str, n: int) -> tuple[Tensor, Tensor]:
        """Contexts [n, 16 + D] and right actions [n]."""
        x = torch.randn(n, CONTEXT, generator=self.generator)
        mark = torch.zeros(n, len(self.domains))
        mark[:, self.domains.index(domain)] = 2.0
        return torch.cat([x, mark], 1), (x @ self.teachers[domain].T).argmax(1)

    def policy(self) -> nn.Module:
        """A fresh MLP."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=self.generator)))
            width = CONTEXT + len(self.domains)
            return nn.Sequential(
                nn.Linear(width, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, ACTIONS)
            )

    def loss(self, policy: nn.Module, reference: nn.Module | None, beta: float, x: Tensor, right: Tensor) -> Tensor:
        """Policy-gradient loss of sampled actions, with the exact KL to a reference where there is one."""
        logp = policy(x).log_softmax(1)
        actions = torch.multinomial(logp.detach().exp(), GROUP, replacement=True, generator=self.generator)
        rewards = (actions == right[:, None]).float()
        advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
        loss = -(advantages * logp.gather(1, actions)).mean()
        if reference is not None:
            with torch.no_grad():
                other = reference(x).log_softmax(1)
            loss = loss + beta * (logp.exp() * (logp - other)).sum(1).mean()
        return loss

    @torch.no_grad()
    def accuracy(self, policy: nn.Module) -> list[float]:
        """Per domain the mean probability of the right action on held-out contexts."""
        return [float(policy(x).softmax(1).gather(1, y[:, None]).mean()) for x, y in self.held_out.values()]


def run(cell: Cell, cache: Path, report: Callable[[Any], None]) -> dict[str, Any]:
    """Train one cell of a setting of kind "bandit", as `grpo.run` does its own."""
    learner = Learner(cell)
    guard, steps = learner.guard, cell.recipe.steps
    scores = [learner.bandit.accuracy(learner.policy)]
    displacement: dict[str, dict[str, float | None]] = {}
    for index, domain in enumerate(cell.recipe.domains):
        learner.stage(index, domain)
        scores.append(learner.bandit.accuracy(learner.policy))
        report((index + 1) * steps)
        if guard is not None:
            rows = guard.report()["domains"]
            displacement[domain] = {d: row["net_displacement"] for d, row in rows.items() if d != domain}
    found = {"stages": [[d] for d in cell.recipe.domains], "scores": scores}
    return (
        found if guard is None else {**found, "touched": guard.report()["touched_share"], "displacement": displacement}
    )


class Learner:
    """Trains stages, with whatever the cell's recipe asks for against forgetting."""

    def __init__(self, cell: Cell) -> None:
        self.recipe: Recipe = cell.recipe
        self.names, train = list(self.recipe.domains), self.recipe.train
        self.bandit = Bandit(self.names, cell.seed)
        self.policy = self.bandit.policy()
        self.guard = None
        if self.recipe.guard is not None:
            added, seed = cell.added, cell.seed
            options = {"track_energy": True, **added.guard_defaults(seed)}
            self.guard = build_guard(self.policy, self.recipe.guard, added.guard_class(), **options)
        self.editor = None if train.editor is None else EDITORS[train.editor](self.policy, cell.seed)
        self.stored = {d: self.bandit.draw(d, spec.probes) for d, spec in self.recipe.domains.items() if spec.probes}

    def stage(self, index: int, domain: str) -> None:
        """Train one domain; the learning rate falls linearly to zero."""
        train, steps = self.recipe.train, self.recipe.steps
        parameters = list(self.policy.parameters())
        start = [p.detach().clone() for p in parameters]
        reference = None
        if train.kl_beta:
            reference = self.bandit.policy()
            reference.load_state_dict(self.policy.state_dict())
        optimizer = torch.optim.Adam(parameters, lr=train.lr)
        if self.guard is not None:
            self.guard.attach(optimizer)
        with self._guarded(domain):
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = train.lr * (1 - step / steps)
                self._gradient(domain, self.names[:index], reference)
                if self.guard is not None and self.guard.probes_due():
                    self._probe()
                optimizer.step()
            with torch.no_grad():
                for p, p0 in zip(parameters, start, strict=True):
                    p.copy_(torch.lerp(p0, p, train.stage_interpolation))
        if self.guard is not None:
            self.guard.detach()

    def _guarded(self, domain: str) -> AbstractContextManager[Any]:
        """The guard's stage; the last one is not recorded, for nothing follows."""
        if self.guard is None:
            return nullcontext()
        return self.guard.domain(domain) if domain == self.names[-1] else self.guard.stage(domain)

    def _gradient(self, domain: str, earlier: list[str], reference: nn.Module | None) -> None:
        train = self.recipe.train
        replayed = round(train.replay_fraction * BATCH) if earlier else 0
        counts = {domain: BATCH - replayed}
        for i in range(replayed):
            name = earlier[i % len(earlier)]
            counts[name] = counts.get(name, 0) + 1
        batches = {d: self._draw(d, n) if d != domain else self.bandit.draw(d, n) for d, n in counts.items()}

        def loss_of(name: str) -> Callable[[], Tensor]:
            # the editors take the mean over domains: a domain's gradient is D times its share of the batch's
            share = counts[name] / BATCH * len(counts)
            return lambda: share * self.bandit.loss(self.policy, reference, train.kl_beta, *batches[name])

        if self.editor is not None:
            assign(self.policy, self.editor.combine(domain_gradients(self.policy, {d: loss_of(d) for d in counts})))
        else:
            self.policy.zero_grad(set_to_none=True)
            x, right = (torch.cat(parts) for parts in zip(*batches.values(), strict=True))
            self.bandit.loss(self.policy, reference, train.kl_beta, x, right).backward()
        if train.rehearsal_weight and earlier:
            x, right = (torch.cat(parts) for parts in zip(*(self.stored[d] for d in earlier), strict=True))
            (train.rehearsal_weight * nn.functional.cross_entropy(self.policy(x), right)).backward()

    def _draw(self, domain: str, n: int) -> tuple[Tensor, Tensor]:
        """Contexts of an earlier domain: of the stored ones, where replay draws from those."""
        if self.recipe.domains[domain].replay == "all":
            return self.bandit.draw(domain, n)
        x, right = self.stored[domain]
        rows = torch.randint(len(x), (n,), generator=self.bandit.generator)
        return x[rows], right[rows]

    def _probe(self) -> None:
        assert self.guard is not None
        for name in self.guard.history:
            x, right = self.stored[name]
            with self.guard.probe(name):
                nn.functional.cross_entropy(self.policy(x), right).backward()
