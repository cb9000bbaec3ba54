"""Domains: where prompts come from, what a completion is worth, and how learning is measured."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Messages = tuple[Mapping[str, str], ...]


class RewardError(ValueError):
    """A verifier returned something that is no finite number."""


@dataclass(frozen=True)
class Example:
    """One task.

    Args:
        prompt: Text fed to the tokenizer as it is, or chat messages ({"role", "content"}) for its chat template.
        answer: The right completion where there is a single one (exact evaluation and probes need it), else None.
        info: Whatever else the verifier wants to see.
    """

    prompt: str | Messages
    answer: str | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.prompt, list):
            object.__setattr__(self, "prompt", tuple(self.prompt))
        if not isinstance(self.prompt, (str, tuple)) or not self.prompt:
            raise ValueError(f"Example: expected a non-empty prompt (text or chat messages), found {self.prompt!r}")
        if self.answer is not None and not isinstance(self.answer, str):
            raise ValueError(f"Example {self.prompt!r}: expected answer to be text or None, found {self.answer!r}")


@dataclass
class Domain:
    """A verifiable skill.

    Args:
        name: Names the domain in stages, metrics, guard and file names.
        sample: `sample(rng, n)` draws n training examples using nothing random but `rng`: resuming replays it.
        reward: `reward(example, completion)` judges the decoded completion; any finite number.
        eval_examples: Held-out examples measured at every evaluation; none: the domain is not evaluated.
        eval_mode: "sampled": mean reward of sampled completions. "exact": the probability at temperature 1 that the
            policy writes `example.answer` and stops, by teacher forcing: no sampling noise, but only a lower bound
            where several completions are right.
        probe_examples: A few stored examples with answers; guards with the rule "probed" read the gradient of their
            cross-entropy while later domains are trained.

    Raises:
        ValueError: Empty name, or examples without the answers that their use needs.
    """

    name: str
    sample: Callable[[random.Random, int], Sequence[Example]]
    reward: Callable[[Example, str], float]
    eval_examples: Sequence[Example] = ()
    eval_mode: Literal["sampled", "exact"] = "sampled"
    probe_examples: Sequence[Example] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or "/" in self.name or "+" in self.name:
            raise ValueError(
                f"Domain: expected a non-empty name without '/' and '+' (it names files), found {self.name!r}"
            )
        if self.eval_mode not in ("sampled", "exact"):
            raise ValueError(f"Domain {self.name!r}: expected eval_mode 'sampled' or 'exact', found {self.eval_mode!r}")
        if self.eval_mode == "exact":
            self._require_answers(
                "eval_examples", self.eval_examples, "use eval_mode='sampled' where no single answer exists"
            )
        self._require_answers("probe_examples", self.probe_examples, "probes read the loss of the right answer")

    def _require_answers(self, what: str, examples: Sequence[Example], remedy: str) -> None:
        missing = sum(e.answer is None for e in examples)
        if missing:
            raise ValueError(
                f"Domain {self.name!r}: expected an answer in each of {len(examples)} {what}, "
                f"{missing} have none; {remedy}"
            )

    def draw(self, rng: random.Random, n: int) -> list[Example]:
        """n training examples.

        Raises:
            ValueError: `sample` returned another number of examples, or something else than examples.
        """
        examples = list(self.sample(rng, n))
        if len(examples) != n or not all(isinstance(e, Example) for e in examples):
            raise ValueError(
                f"Domain {self.name!r}: expected sample(rng, {n}) to return {n} Example objects, "
                f"found {len(examples)} of {sorted({type(e).__name__ for e in examples})}"
            )
        return examples

    def score(self, example: Example, completion: str) -> float:
        """The verifier's reward, checked.

        Raises:
            RewardError: Not a finite number; names domain, value and completion.
        """
        value = self.reward(example, completion)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise RewardError(
                f"domain {self.name!r}: expected a finite number from the reward function, found {value!r} "
                f"for completion {completion!r}; return 0.0 for a completion that cannot be judged"
            )
        return number


def domain_table(domains: Sequence[Domain]) -> dict[str, Domain]:
    """Domains by name, in order.

    Raises:
        ValueError: Two domains share a name, or there is none.
    """
    table = {d.name: d for d in domains}
    if not table or len(table) != len(domains):
        raise ValueError(f"expected one or more domains with distinct names, found {[d.name for d in domains]}")
    return table
