"""Cells of contextual bandits: an MLP policy learns one teacher after the other from rewards alone, in a second or two.

A context is 16 normal numbers and a mark of its domain; the right one of 8 actions is what the domain's linear teacher says,
and teachers share half of their variance. The policy samples 8 actions per context, and is trained with group-relative
advantages (GRPO without clipping).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..guard import CapabilityGuard
from ..guard.editors import Editor, assign, domain_gradients
from .grid import Cell
from .methods import editor_of, guard_of

CONTEXT, ACTIONS, HIDDEN = 16, 8, 96
GROUP = 8
CONTEXTS = 64
"""Per step."""
HELD_OUT = 1024


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
    """Train one cell of a setting of kind "bandit", as `lm.run` does its own."""
    setting, method = cell.setting, cell.method
    bandit = Bandit(setting.domains, cell.seed)
    policy = bandit.policy()
    guard, editor = guard_of(method, policy, cell.seed, setting.k), editor_of(method, policy, cell.seed)
    options = {**setting.train, **method.train}
    stored = {d: bandit.draw(d, method.stored) for d in setting.domains} if method.stored else {}
    scores = [bandit.accuracy(policy)]
    displacement: dict[str, dict[str, float | None]] = {}
    for index, domain in enumerate(setting.domains):
        learner = Learner(bandit, policy, options, guard, editor, stored, setting.domains[:index])
        learner.stage(domain, setting.steps, setting.lr * cell.lr)
        scores.append(bandit.accuracy(policy))
        report((index + 1) * setting.steps)
        if guard is not None:
            rows = guard.report()["domains"]
            displacement[domain] = {d: row["net_displacement"] for d, row in rows.items() if d != domain}
    return {
        "scores": scores,
        **({} if guard is None else {"touched": guard.report()["touched_share"], "displacement": displacement}),
    }


class Learner:
    """Trains stages, with whatever the method asks for against forgetting."""

    def __init__(
        self,
        bandit: Bandit,
        policy: nn.Module,
        options: Mapping[str, Any],
        guard: CapabilityGuard | None,
        editor: Editor | None,
        stored: Mapping[str, tuple[Tensor, Tensor]],
        earlier: list[str],
    ) -> None:
        self.bandit, self.policy, self.guard, self.editor = bandit, policy, guard, editor
        self.stored, self.earlier = stored, earlier
        self.replayed = round(options.get("replay_fraction", 0.0) * CONTEXTS) if earlier else 0
        self.rehearsal = options.get("rehearsal_weight", 0.0) if earlier else 0.0
        self.interpolation, self.beta = options.get("stage_interpolation", 1.0), options.get("kl_beta", 0.0)

    def stage(self, domain: str, steps: int, lr: float) -> None:
        """Train one domain; the learning rate falls linearly to zero."""
        parameters = list(self.policy.parameters())
        start = [p.detach().clone() for p in parameters]
        reference = None
        if self.beta:
            reference = self.bandit.policy()
            reference.load_state_dict(self.policy.state_dict())
        optimizer = torch.optim.Adam(parameters, lr=lr)
        if self.guard is not None:
            self.guard.attach(optimizer)
        with self._guarded(domain):
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
                self._gradient(domain, reference)
                if self.guard is not None and self.guard.probes_due():
                    self._probe()
                optimizer.step()
            with torch.no_grad():
                for p, p0 in zip(parameters, start, strict=True):
                    p.copy_(torch.lerp(p0, p, self.interpolation))
        if self.guard is not None:
            self.guard.detach()

    def _guarded(self, domain: str) -> AbstractContextManager[Any]:
        """The guard's stage; the last one is not recorded, for nothing follows."""
        if self.guard is None:
            return nullcontext()
        last = domain == self.bandit.domains[-1]
        return self.guard.domain(domain) if last else self.guard.stage(domain)

    def _gradient(self, domain: str, reference: nn.Module | None) -> None:
        counts = {domain: CONTEXTS - self.replayed}
        for i in range(self.replayed):
            name = self.earlier[i % len(self.earlier)]
            counts[name] = counts.get(name, 0) + 1
        batches = {d: self._draw(d, n) if d != domain else self.bandit.draw(d, n) for d, n in counts.items()}

        def loss_of(name: str) -> Callable[[], Tensor]:
            # the editors take the mean over domains: a domain's gradient is D times its share of the batch's
            share = counts[name] / CONTEXTS * len(counts)
            return lambda: share * self.bandit.loss(self.policy, reference, self.beta, *batches[name])

        if self.editor is not None:
            assign(self.policy, self.editor.combine(domain_gradients(self.policy, {d: loss_of(d) for d in counts})))
        else:
            self.policy.zero_grad(set_to_none=True)
            x, right = (torch.cat(parts) for parts in zip(*batches.values(), strict=True))
            self.bandit.loss(self.policy, reference, self.beta, x, right).backward()
        if self.rehearsal:
            x, right = (torch.cat(parts) for parts in zip(*(self.stored[d] for d in self.earlier), strict=True))
            (self.rehearsal * nn.functional.cross_entropy(self.policy(x), right)).backward()

    def _draw(self, domain: str, n: int) -> tuple[Tensor, Tensor]:
        """Contexts of an earlier domain: of the stored ones, where not all are kept."""
        if domain not in self.stored:
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
