"""The gradient of a mixed batch: on each domain's part of it the directions of all others act (docs/math.md, "mixed batches").

Parts accumulate in `p.grad` as always. After each the coefficients of the sum are looked at once, and their growth is what this
domain has added: no gradient is ever copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._clock import Clock
from .following import Following
from .memory import Memory
from .recording import Recording
from .rows import RowWatch
from .statistics import energies, squared_norm


class MixedGradient:
    """One step's gradient, told domain by domain; see :meth:`CapabilityGuard.mixed`. `known` is called with every name."""

    def __init__(
        self,
        memory: Memory,
        following: Following,
        recording: Recording,
        clock: Clock,
        known: Callable[[str], None],
    ):
        rule, limit = memory.settings.rule, memory.max_grad_norm
        if rule not in ("bounded", "remove"):
            raise ValueError(
                f"mixed batches: expected rule 'bounded' or 'remove', found {rule!r}; what others' directions hold "
                "is removed from each domain's gradient, and no sign is asked for"
            )
        if limit is not None:
            raise ValueError(f"mixed batches: expected max_grad_norm=None, found {limit}; clip as usual after finish()")
        if recording.active:
            names = ", ".join(recorder.domain for recorder in recording.active)
            raise ValueError(
                f"mixed batches: expected no recording in progress, found one of {names}; a step of several domains is no "
                "domain's own. Record each with guard.protect(name, its prompts), before or afterwards"
            )
        module = recording.module
        self._memory, self._following, self._clock, self._known = memory, following, clock, known
        self._watch = None if module is None else RowWatch.of(memory.stack, module, following.parameters)
        self._seen: list[Tensor] | None = None  # coefficients of what was in the gradients when last looked at
        self._out: list[Tensor] | None = None  # what is to be taken out

    @torch.no_grad()
    def gained(self, domain: str) -> None:
        """What gradients have gained since the last call (the first: all that is in them) is this domain's."""
        self._known(domain)
        stack = self._memory.stack
        if not len(stack):
            return
        with self._clock.timed("act"):
            seen = stack.seen(self._following.gradients())
            gain = seen if self._seen is None else torch._foreach_sub(seen, self._seen)
            out = stack.along(gain, domain)
            if self._out is None:
                self._out = out
            else:
                torch._foreach_add_(self._out, out)
            self._seen = seen

    @property
    def takes_rows(self) -> bool:
        """Whether :meth:`rows` can be tried: a model whose weights live here whole, in linear layers and embeddings."""
        return self._watch is not None

    @contextmanager
    def rows(self, domains: Sequence[str]) -> Iterator[None]:
        """One forward and backward pass over a batch inside, row i of which is `domains[i]`'s: instead of passes domain by
        domain and :meth:`gained`. Enter it once for every micro-batch, then ask :meth:`complete`."""
        assert self._watch is not None
        for name in dict.fromkeys(domains):
            self._known(name)
        with self._watch.watching(list(domains)):
            yield

    @torch.no_grad()
    def complete(self) -> bool:
        """Whether what was seen row by row is all of the gradient. If not (a weight that is used in another way), drop the
        gradient and pass the domains backward one by one."""
        assert self._watch is not None
        with self._clock.timed("act"):
            complete = self._watch.agrees(self._following.gradients())
        self._out = self._watch.out if complete else None
        return complete

    def average_(self, group: Any) -> None:
        """Gradients were gathered in every process of a group by itself, and the next backward pass averages them: so does
        this what is known of them. Collective.
        """
        for part in (*(self._seen or ()), *(self._out or ())):
            dist.all_reduce(part, group=group)
            part.div_(dist.get_world_size(group))

    @torch.no_grad()
    def finish(self) -> None:
        """Takes out of the gradients what lies along other domains' directions; the optimizer steps next."""
        self._following.edited = True
        memory, stack = self._memory, self._memory.stack
        if self._out is None:
            return
        with self._clock.timed("act"):
            gradients = self._following.gradients()
            if memory.settings.track_energy:
                self._count(gradients)
            stack.remove_(gradients, self._out)
            self._seen = self._out = None

    def _count(self, gradients: list[Tensor]) -> None:
        """Energies of the step's whole gradient, and what of it is taken out."""
        stack = self._memory.stack
        assert self._out is not None
        total, c = squared_norm(stack, gradients), stack.project(gradients)
        taken = [torch.zeros_like(g) for g in gradients]
        stack.remove_(taken, self._out)
        self._memory.statistics.count(stack, stack.column_sums(energies(c)), squared_norm(stack, taken), total)
