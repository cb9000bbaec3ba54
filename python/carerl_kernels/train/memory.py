"""What a run keeps of earlier domains: stored prompts to replay, and examples that the guard is shown instead of recording."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..grpo.config import Stage
from ..grpo.trainer import GRPOTrainer
from ..guard import CapabilityGuard
from ..task import Domain, Example
from ..text import encode_prompts

Batches = Iterable[Mapping[str, Tensor]]


class StoredReplay:
    """Lets domains draw from all their prompts in stages of their own, and from the stored ones in others."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._own = [stage.domains for stage in stages for _ in range(stage.steps)]
        self._trainer: GRPOTrainer | None = None

    def follow(self, trainer: GRPOTrainer) -> None:
        """Whose steps tell the stage, those before it was interrupted too."""
        self._trainer = trainer

    def limit(self, domain: Domain) -> Domain:
        """The domain, drawing from its stored examples outside of stages of its own."""
        everything, kept = domain.sample, domain.probe_examples

        def sample(rng: random.Random, n: int) -> Sequence[Example]:
            done = int(self._trainer.history[-1]["step"]) if self._trainer and self._trainer.history else 0
            own = domain.name in self._own[min(done, len(self._own) - 1)]
            return everything(rng, n) if own else rng.choices(kept, k=n)

        return replace(domain, sample=sample)


def fresh_examples(
    domains: Sequence[Domain], tokenizer: Any, n: int, answers: bool = True
) -> Callable[[str], Iterator[Mapping[str, Tensor]]]:
    """Fresh training examples of a domain, padded at their ends, 16 at a time.

    Args:
        domains: Drawn from as they are, whatever of them is stored.
        answers: With their answers; else their prompts alone.
    """
    by_name = {domain.name: domain for domain in domains}

    def batches(name: str) -> Iterator[Mapping[str, Tensor]]:
        examples = by_name[name].draw(random.Random(f"shown-{name}"), n)
        if answers and any(example.answer is None for example in examples):
            raise ValueError(
                f"guard.shown: expected answers in domain {name!r}, found examples without; set answers: false"
            )
        for start in range(0, n, 16):
            part = examples[start : start + 16]
            rows = encode_prompts(tokenizer, [e.prompt for e in part])
            if answers:
                ends = [tokenizer(e.answer, add_special_tokens=False)["input_ids"] for e in part]
                rows = [[*prompt, *end] for prompt, end in zip(rows, ends, strict=True)]
            yield tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")

    return batches


def show_instead(guard: CapabilityGuard, batches: Callable[[str], Batches]) -> None:
    """Has the guard look at a domain's examples when its stage has ended, and record nothing before."""

    @contextmanager
    def stage(name: str, path: Any = None, *_: Any, **__: Any) -> Iterator[Any]:
        with guard.domain(name):
            yield None
        guard.settle()
        guard.protect(name, batches(name), path, progress=False)

    guard.stage = stage  # type: ignore[method-assign]
