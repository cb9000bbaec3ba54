"""One training step: rollouts, losses, probes, and the optimizer step inside the guard."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .._clock import Clock
from ..guard import CapabilityGuard
from ..guard.editors import Editor, assign_combined, spread_editor
from ..guard.gradients import local_gradients
from ..logprobs import answer_loss
from ..task import Domain
from ..text import special_tokens
from .balance import Mixture
from .config import GRPOConfig
from .frozen import KeptWeights
from .losses import LossStats
from .own_answers import OwnAnswers
from .parallel import Ranks, whole
from .progress import Monitor
from .rollout import Batch, informative_fraction, reward_statistics, rollout
from .rundir import rng_state, set_rng_state
from .sampling import ModelSampler, Sampler
from .update import accumulate_gradients, frozen_logprobs


class Learner:
    """Model, sampler and random state of a run; turns prompt counts into one update."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        domains: Mapping[str, Domain],
        config: GRPOConfig,
        guard: CapabilityGuard | None,
        monitor: Monitor | None = None,
        editor: Editor | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        self.model, self.tokenizer, self.domains, self.config = model, tokenizer, domains, config
        self.guard, self.monitor, self.editor = guard, monitor, editor
        self.by_domain = False  # the guard acts on each domain's part of a batch, with the directions of the others
        # one backward pass over a mixed batch is tried, until it turns out that the model uses weights in another way
        self.takes_rows = True
        self.tokens = special_tokens(tokenizer, model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("expected a model with parameters to train, found every requires_grad False")
        if editor is not None:
            spread_editor(editor, model)
        self.device = self.parameters[0].device
        self.ranks = Ranks.training(model)
        if self.ranks.size > config.prompts_per_step:
            raise ValueError(
                f"expected at least one prompt per process and step, found prompts_per_step={config.prompts_per_step} for "
                f"{self.ranks.size} processes; raise it or start fewer processes"
            )
        self.sampler = sampler or ModelSampler(model, self.tokens)
        self.rng = random.Random(config.seed)
        self.reference: KeptWeights | None = None
        self.recorder: Any = None  # of the guard's stage in progress: told what every step is made of
        self.mixture = Mixture(config, monitor, self.ranks, norms_known=editor is not None)
        self.clock = Clock()
        self.own_answers = OwnAnswers(self)

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        counts: Mapping[str, int],
        owner: str,
        earlier: Sequence[str] = (),
        *,
        mixed: bool = False,
        evaluated: bool = False,
    ) -> dict[str, Any]:
        """Sample a batch and take every optimizer step on it.

        Args:
            owner: The domain whose steps these are to the guard: the stage's name, also where some prompts are replayed from
                earlier domains, for the stage records its own steps and every other domain's directions act on them.
            earlier: Names of the domains of earlier stages, whose stored answers are rehearsed.
            mixed: Whether it is a step of a mixed stage, whose advantages have a default of their own.

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
            sampler=self.sampler,
            ranks=self.ranks,
            phase=self.clock.timed,
            advantages=config.advantage_mode(mixed),
        )
        with self.clock.timed("reward"):
            self.own_answers.see(batch)
        self.mixture.weigh(batch)
        with self.clock.timed("loss"):
            old_logp, ref_logp = self._fixed_logprobs(batch)
        losses: list[float] = []
        norms: list[float] = []
        gap, skipped, stats = 0.0, 0, LossStats()
        for _ in range(config.inner_epochs):
            for rows in self._minibatches(batch):
                with self.clock.timed("loss"):
                    optimizer.zero_grad(set_to_none=True)
                    loss, part, part_gap = self._gradients(batch, rows, old_logp, ref_logp)
                    self._rehearse(earlier)
                    self.own_answers.rehearse()
                    norm = float(whole(nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm or math.inf)))
                    loss, part_gap, *sums = self.ranks.sum([loss, part_gap, *vars(part).values()])
                losses.append(loss)
                norms.append(norm)
                stats.add(LossStats(*sums))
                gap += part_gap
                if math.isfinite(norm):
                    if self.monitor is not None:
                        with self.clock.timed("monitor"):
                            self._show(batch, rows, optimizer, evaluated, old_logp=old_logp, ref_logp=ref_logp)
                    if self.recorder is not None:
                        sampled = batch.rollout.select(rows)
                        self.recorder.see({"input_ids": sampled.input_ids, "attention_mask": sampled.attention_mask})
                    self._optimizer_step(optimizer, owner, norm)
                else:  # one poisoned batch must not reach weights, moments or bases
                    skipped += 1
        optimizer.zero_grad(set_to_none=True)
        return self._metrics(batch, losses, norms, stats, gap, skipped)

    def _show(
        self, batch: Batch, rows: Tensor, optimizer: torch.optim.Optimizer, evaluated: bool, **fixed: Tensor | None
    ) -> None:
        """Between backward and step: the gradients that the monitor wants to see, which it keeps until its next step: that of the
        batch, and those of the domains' losses on their stored examples. The step's own stay where they are, and random numbers
        (of dropout) are drawn again by what follows: watched or not, training is the same."""
        monitor = self.monitor
        assert monitor is not None
        domains_due = batch.mixed and monitor.domains_due(evaluated)
        if not (domains_due or monitor.gradients_due()):
            return
        kept = rng_state()
        for name in dict.fromkeys(batch.whole.domains) if domains_due else ():
            with monitor.domain(name, optimizer):
                more: dict[str, Any] = {**fixed, "of": rows, "ranks": self.ranks}
                accumulate_gradients(self.model, batch, batch.of(name, rows), self.tokens, self.config, **more)
        if monitor.gradients_due():
            monitor.keep_gradients("batch")
            for name, domain in self.domains.items():
                if domain.probe_examples:
                    with monitor.gradients(name, training=False):
                        answer_loss(self.model, self.tokenizer, domain.probe_examples, self.tokens).backward()
        set_rng_state(kept)

    def _gradients(
        self, batch: Batch, rows: Tensor, old_logp: Tensor | None, ref_logp: Tensor | None
    ) -> tuple[float, LossStats, float]:
        """Gradients of one minibatch; where the guard or an editor wants it, one domain at a time.

        An editor gets D times each domain's share of the minibatch's gradient, so that their mean is the gradient of the whole.
        """
        fixed: dict[str, Any] = {"old_logp": old_logp, "ref_logp": ref_logp, "ranks": self.ranks}
        parts = self.guard.mixed() if self.by_domain and self.guard is not None else None
        if parts is not None and parts.takes_rows and self.takes_rows:
            done = accumulate_gradients(self.model, batch, rows, self.tokens, self.config, **fixed, watch=parts.rows)
            self.takes_rows = parts.complete()
            if self.takes_rows:
                parts.finish()
                return done
            for p in self.parameters:
                p.grad = None
        if self.editor is None and parts is None:
            return accumulate_gradients(self.model, batch, rows, self.tokens, self.config, **fixed)
        names = [batch.domains[i] for i in rows.tolist()]
        loss, gap, stats = 0.0, 0.0, LossStats()
        gradients: dict[str, list[Tensor]] = {}
        present = {name for part in self.ranks.gather(sorted(set(names))) for name in part}
        for name in [n for n in dict.fromkeys(batch.whole.domains) if n in present]:  # alike in every process
            own = batch.of(name, rows)
            for p in self.parameters if parts is None else ():
                p.grad = None
            part_loss, part, part_gap = accumulate_gradients(
                self.model, batch, own, self.tokens, self.config, of=rows, **fixed
            )
            loss, gap = loss + part_loss, gap + part_gap
            stats.add(part)
            if parts is not None:
                parts.gained(name)
                continue
            gradients[name] = local_gradients(self.parameters)
        if parts is not None:
            parts.finish()
            return loss, stats, gap
        assert self.editor is not None
        self.mixture.see(gradients)
        assign_combined(self.model, self.editor, gradients)  # what is not finite stays so, and the step is dropped
        return loss, stats, gap

    def _rehearse(self, earlier: Sequence[str]) -> None:
        """Add the gradient of the cross-entropy on some stored answers of earlier domains."""
        stored = [e for name in earlier for e in self.domains[name].probe_examples]
        if self.config.rehearsal_weight == 0 or not earlier:
            return
        if not stored:
            raise ValueError(
                f"rehearsal_weight={self.config.rehearsal_weight} of the earlier domains {', '.join(earlier)}: expected "
                "probe_examples with answers in one of them, found none stored; add them, or set rehearsal_weight=0"
            )
        drawn = self.rng.sample(stored, min(self.config.rehearsal_batch, len(stored)))
        loss = answer_loss(self.model, self.tokenizer, drawn, self.tokens)
        (self.config.rehearsal_weight * loss).backward()

    def _minibatches(self, batch: Batch) -> list[Tensor]:
        """This process's row numbers of each optimizer step of one pass; shuffled when there are several."""
        order = list(range(len(batch.whole.texts)))
        if self.config.minibatches > 1:
            self.rng.shuffle(order)
        place = {row: i for i, row in enumerate(batch.rows)}
        pieces = torch.tensor(order).tensor_split(self.config.minibatches)
        mine = ([place[row] for row in piece.tolist() if row in place] for piece in pieces)
        return [torch.tensor(rows, dtype=torch.long, device=self.device) for rows in mine]

    def _fixed_logprobs(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """What ratios compare with (None: the policy itself) and the reference's log-probabilities."""
        old: Tensor | None = None
        if self.config.old_logprobs == "sampler":
            old = batch.rollout.logps
        elif self.config.updates_per_step > 1:
            old = frozen_logprobs(self.model, batch.rollout, self.tokens, self.config)
        ref: Tensor | None = None
        if self.reference is not None:
            with self.reference.in_place():
                ref = frozen_logprobs(self.model, batch.rollout, self.tokens, self.config)
        return old, ref

    def _optimizer_step(self, optimizer: torch.optim.Optimizer, owner: str, norm: float) -> None:
        guard = self.guard
        if guard is None:
            with self.clock.timed("step"):
                optimizer.step()
            return
        if guard.probes_due():
            with self.clock.timed("probe"):
                self._probe(guard)
        before = sum(guard.seconds.values())
        start = time.perf_counter()
        guard.gradient_norm(norm)
        with nullcontext() if self.by_domain else guard.domain(owner):
            optimizer.step()
        wall, own = time.perf_counter() - start, sum(guard.seconds.values()) - before
        self.clock.spend("guard", own)
        self.clock.spend("step", max(wall - own, 0.0))

    def _probe(self, guard: CapabilityGuard) -> None:
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
        sampled, earned = batch.rollout, batch.whole
        ended = torch.isin(sampled.completion_ids, torch.tensor(self.tokens.eos, device=self.device))
        ended &= sampled.completion_mask.bool()
        sums = [sampled.tokens, float(sampled.entropy.double().sum()), float(ended.any(1).sum())]
        tokens, entropy, complete = self.ranks.sum(sums)
        judged = ~batch.drawn.isnan()
        return {
            "domain": earned.domain,
            "loss": sum(losses) / len(losses),
            "reward": float(batch.drawn[judged].mean()),
            **reward_statistics(earned.domains, batch.drawn.tolist(), earned.group_ids.tolist()),
            **self.mixture.metrics(batch),
            "excluded": 1.0 - float(judged.double().mean()),
            "informative": informative_fraction(earned.rewards[earned.judged], earned.group_ids[earned.judged]),
            "kl": stats.kl / max(stats.tokens, 1.0),
            "clip_fraction": stats.clipped / max(stats.units, 1.0),  # of units with a gradient
            "entropy": entropy / max(tokens, 1.0),
            "grad_norm": sum(norms) / len(norms),
            "sampler_gap": gap / max(stats.tokens, 1.0),
            "tokens": int(tokens),
            "length": tokens / len(earned.texts),
            "truncated": 1.0 - complete / len(earned.texts),
            "skipped": skipped,
            **self.own_answers.metrics(),
        }
