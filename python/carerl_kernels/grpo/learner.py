"""One training step: rollouts, losses, probes, and the optimizer step inside the guard."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .advantages import informative_fraction
from .config import GRPOConfig
from .domain import Domain
from .logprobs import answer_loss
from .losses import LossStats
from .progress import PhaseClock
from .rollout import Batch, rollout
from .text import special_tokens
from .update import accumulate_gradients, frozen_logprobs
from .watch import Monitor, show_gradients


class Guard(Protocol):
    """What the trainer asks of a guard (`carerl_kernels.CapabilityGuard` provides it)."""

    def add(self, basis: Any) -> Any: ...
    def attach(self, optimizer: torch.optim.Optimizer) -> Any: ...
    def detach(self) -> Any: ...
    def stage(self, name: str, path: Any = None) -> AbstractContextManager[Any]: ...
    def domain(self, name: str | None) -> AbstractContextManager[Any]: ...
    def probe(self, name: str) -> AbstractContextManager[Any]: ...
    def probes_due(self) -> bool: ...
    def report(self) -> dict[str, Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Any) -> Any: ...

    @property
    def history(self) -> list[str]: ...

    @property
    def seconds(self) -> Mapping[str, float]: ...


class Learner:
    """Model, sampler and random state of a run; turns prompt counts into one update.

    Args:
        model: Policy.
        tokenizer: Its tokenizer.
        domains: By name.
        config: Settings.
        guard: Or None.
        monitor: Or None.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        domains: Mapping[str, Domain],
        config: GRPOConfig,
        guard: Guard | None,
        monitor: Monitor | None = None,
    ) -> None:
        self.model, self.tokenizer, self.domains, self.config, self.guard = model, tokenizer, domains, config, guard
        self.monitor = monitor
        self.tokens = special_tokens(tokenizer, model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("expected a model with parameters to train, found every requires_grad False")
        self.device = self.parameters[0].device
        self.rng = random.Random(config.seed)
        self.generator = torch.Generator(device=self.device).manual_seed(config.seed)
        self.reference: nn.Module | None = None
        self.clock = PhaseClock()

    def step(self, optimizer: torch.optim.Optimizer, counts: Mapping[str, int], owner: str) -> dict[str, Any]:
        """Sample a batch and take every optimizer step on it.

        Args:
            optimizer: Over this model's parameters, learning rate set.
            counts: Prompts per domain name.
            owner: Whose steps these are to the guard: the stage's name, also where some prompts are replayed from
                earlier domains, for the stage records its own steps and every other domain's directions act on them.

        Returns:
            Metrics of the step (without timings; those are in `clock`).
        """
        config = self.config
        batch = rollout(
            self.model,
            self.tokenizer,
            self.tokens,
            self.domains,
            counts,
            config,
            rng=self.rng,
            generator=self.generator,
            phase=self.clock,
        )
        with self.clock("loss"):
            old_logp, ref_logp = self._fixed_logprobs(batch)
        losses: list[float] = []
        norms: list[float] = []
        gap, skipped, stats = 0.0, 0, LossStats()
        for _ in range(config.inner_epochs):
            for rows in self._minibatches(len(batch.texts)):
                with self.clock("loss"):
                    optimizer.zero_grad(set_to_none=True)
                    loss, part, part_gap = accumulate_gradients(
                        self.model, batch, rows, self.tokens, config, old_logp=old_logp, ref_logp=ref_logp
                    )
                    norm = float(nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm or math.inf))
                losses.append(loss)
                norms.append(norm)
                stats.add(part)
                gap += part_gap
                if math.isfinite(norm):
                    if self.monitor is not None and self.monitor.gradients_due():
                        with self.clock("monitor"):
                            show_gradients(self.monitor, self.model, self.tokenizer, self.tokens, self.domains)
                    self._optimizer_step(optimizer, owner)
                else:  # one poisoned batch must not reach weights, moments or bases
                    skipped += 1
        optimizer.zero_grad(set_to_none=True)
        return self._metrics(batch, losses, norms, stats, gap, skipped)

    def _minibatches(self, rows: int) -> tuple[Tensor, ...]:
        """Row numbers of each optimizer step of one pass; shuffled when there are several."""
        order = list(range(rows))
        if self.config.minibatches > 1:
            self.rng.shuffle(order)
        return torch.tensor(order, device=self.device).tensor_split(self.config.minibatches)

    def _fixed_logprobs(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """What ratios compare with (None: the policy itself) and the reference's log-probabilities."""
        old: Tensor | None = None
        if self.config.old_logprobs == "sampler":
            old = batch.rollout.logps
        elif self.config.updates_per_step > 1:
            old = frozen_logprobs(self.model, batch.rollout, self.tokens, self.config)
        ref: Tensor | None = None
        if self.reference is not None:
            ref = frozen_logprobs(self.reference, batch.rollout, self.tokens, self.config)
        return old, ref

    def _optimizer_step(self, optimizer: torch.optim.Optimizer, owner: str) -> None:
        guard = self.guard
        if guard is None:
            with self.clock("step"):
                optimizer.step()
            return
        if guard.probes_due():
            with self.clock("probe"):
                self._probe(guard)
        before = sum(guard.seconds.values())
        start = time.perf_counter()
        with guard.domain(owner):
            optimizer.step()
        wall, own = time.perf_counter() - start, sum(guard.seconds.values()) - before
        self.clock.add("guard", own)
        self.clock.add("step", max(wall - own, 0.0))

    def _probe(self, guard: Guard) -> None:
        """Show the guard which way each earlier domain's own loss falls now, on its stored examples.

        The guard keeps the training gradients aside inside `probe`, so this may come between backward and step.
        """
        for name in guard.history:
            parts = name.split("+")  # a mixed stage is probed on the examples of all its domains
            examples = [e for part in parts if part in self.domains for e in self.domains[part].probe_examples]
            if not examples:
                raise ValueError(
                    f"the guard wants a probe of domain {name!r}: expected a Domain of that name with probe_examples "
                    f"(about 32 with answers), found none stored; add them, or choose a rule that needs no stored data"
                )
            with guard.probe(name):
                answer_loss(self.model, self.tokenizer, examples, self.tokens).backward()

    def _metrics(
        self, batch: Batch, losses: list[float], norms: list[float], stats: LossStats, gap: float, skipped: int
    ) -> dict[str, Any]:
        sampled = batch.rollout
        tokens = sampled.tokens
        ended = torch.isin(sampled.completion_ids, torch.tensor(self.tokens.eos, device=self.device))
        ended &= sampled.completion_mask.bool()
        return {
            "domain": batch.domain,
            "loss": sum(losses) / len(losses),
            "reward": float(batch.rewards[batch.judged].mean()),
            **batch.statistics(),
            "excluded": 1.0 - float(batch.judged.double().mean()),
            "informative": informative_fraction(batch.rewards[batch.judged], batch.group_ids[batch.judged]),
            "kl": stats.kl / max(stats.tokens, 1.0),
            "clip_fraction": stats.clipped / max(stats.units, 1.0),  # of units with a gradient
            "entropy": float(sampled.entropy.double().sum()) / max(tokens, 1),
            "grad_norm": sum(norms) / len(norms),
            "sampler_gap": gap / max(stats.tokens, 1.0),
            "tokens": tokens,
            "length": tokens / len(batch.texts),
            "truncated": 1.0 - float(ended.any(1).double().mean()),
            "skipped": skipped,
        }
