"""Domains: where prompts come from, what a completion is worth, and how learning is measured."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

MAX_NAME = 100  # bytes of a domain's name; most file systems take 255 with all that is added to it
Messages = tuple[Mapping[str, str], ...]


class RewardError(ValueError):
    """A verifier returned something that is neither a finite number nor None, or judged nothing of a whole batch."""


@runtime_checkable
class BatchReward(Protocol):
    """A reward that wants to see many completions at once: a judge with many calls in flight, a group normaliser.

    If it also has `evaluate_batch` (same arguments), evaluation uses that: a normalised reward says nothing about how good
    the policy is, and looking must not change running statistics. If it has `state_dict` and `load_state_dict`, its state
    is in the trainer's checkpoints.
    """

    def score_batch(self, examples: Sequence[Example], completions: Sequence[str]) -> Sequence[float | None]: ...


@dataclass(frozen=True)
class Example:
    """One task.

    Args:
        prompt: Text fed to the tokenizer as it is, or chat messages ({"role", "content"}) for its chat template.
        answer: The right completion where there is a single one (exact evaluation and probes need it), else None.
        info: Whatever else the verifier wants to see.
        group: The trainer's own name of the group of completions that are compared; None: those of one prompt and answer.
    """

    prompt: str | Messages
    answer: str | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    group: Hashable = None

    def __post_init__(self) -> None:
        if isinstance(self.prompt, list):
            object.__setattr__(self, "prompt", tuple(self.prompt))
        if not isinstance(self.prompt, (str, tuple)) or not self.prompt:
            raise ValueError(f"Example: expected a non-empty prompt (text or chat messages), found {self.prompt!r}")
        if self.answer is not None and not isinstance(self.answer, str):
            raise ValueError(f"Example {self.prompt!r}: expected answer to be text or None, found {self.answer!r}")


def group_numbers(examples: Sequence[Example]) -> list[int]:
    """The group of every example, numbered by their first places: that of its `group`, else of its prompt and answer."""
    first: dict[Hashable, int] = {}
    known: dict[int, int] = {}  # the same object, as a trainer repeats it, needs no second look
    out = []
    for i, e in enumerate(examples):
        if id(e) not in known:
            prompt = e.prompt if isinstance(e.prompt, str) else json.dumps(e.prompt, sort_keys=True, default=repr)
            key = ("group", e.group) if e.group is not None else ("prompt", type(e.prompt), prompt, e.answer)
            known[id(e)] = first.setdefault(key, i)
        out.append(known[id(e)])
    return out


def name_problem(name: object) -> str | None:
    """Why a name cannot be that of a domain, which names files in the run's directory; None if it can."""
    if not isinstance(name, str) or not name:
        return "a non-empty name"
    if any(c in "/\\+" for c in name):
        return "a name without '/', '\\' and '+' (it names files)"
    if not name.isprintable() or name != name.strip() or name.startswith("."):
        return "a name of printable characters that begins with no dot and has no blanks at its ends (it names files)"
    if len(name.encode(errors="replace")) > MAX_NAME:
        return f"a name of at most {MAX_NAME} bytes (it names files)"
    return None


def checked_rewards(
    name: str,
    reward: Callable[[Example, str], float | None] | BatchReward,
    examples: Sequence[Example],
    completions: Sequence[str],
    *,
    training: bool = True,
) -> list[float | None]:
    """Rewards of completions, example i belonging to completion i: finite numbers, or None for what could not be judged.

    Args:
        name: The name of what is judged, for messages.
        examples, completions: As many of one as of the other; completions are decoded.
        training: False asks for the reward's `evaluate_batch` where it has one.

    Raises:
        RewardError: One is neither a finite number nor None, or their number is wrong.
    """
    if not isinstance(reward, BatchReward):
        values = [reward(example, text) for example, text in zip(examples, completions, strict=True)]
    else:
        judge: Callable[..., Sequence[Any]] = reward.score_batch
        if not training:
            judge = getattr(reward, "evaluate_batch", judge)
        values = list(judge(examples, completions))
        if len(values) != len(completions):
            raise RewardError(
                f"domain {name!r}: expected {len(completions)} rewards from score_batch, found {len(values)}"
            )
    return [_checked(name, value, text) for value, text in zip(values, completions, strict=True)]


def _checked(name: str, value: Any, completion: str) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        found = repr(value) if not isinstance(value, int) or abs(value) < 2**64 else "an integer that no float holds"
        raise RewardError(
            f"domain {name!r}: expected a finite number from the reward function, found {found[:200]} "
            f"for completion {completion[:200]!r}; return None for a completion that cannot be judged"
        )
    return number


@dataclass
class Domain:
    """A verifiable skill.

    Args:
        name: Names the domain in stages, metrics, guard and file names.
        sample: `sample(rng, n)` draws n training examples using nothing random but `rng`: resuming replays it.
        reward: `reward(example, completion)` judges the decoded completion: any finite number, or None for a completion
            that could not be judged; it then counts neither for nor against its group. An object with
            `score_batch(examples, completions)` gets the domain's share of a batch in one call.
        eval_examples: Held-out examples measured at every evaluation; none: the domain is not evaluated.
        eval_mode: "sampled": mean reward of sampled completions. "exact": the probability at temperature 1 that the
            policy writes `example.answer` and stops, by teacher forcing: no sampling noise, but only a lower bound
            where several completions are right.
        probe_examples: A few stored examples with answers; guards with the rule "probed" read the gradient of their
            cross-entropy while later domains are trained.
        verify: Which completions are right, so that the run may rehearse them (`self_rehearsal_weight`): `verify(example,
            completion) -> bool`; or a number, from which on a reward counts as right whoever gave it, a judge too. None: a
            reward of 1 where the reward is a verifier (`reward.verifies`); nothing that anything else says.

    Raises:
        ValueError: A name that no file can have, or examples without the answers that their use needs.
    """

    name: str
    sample: Callable[[random.Random, int], Sequence[Example]]
    reward: Callable[[Example, str], float | None] | BatchReward
    eval_examples: Sequence[Example] = ()
    eval_mode: Literal["sampled", "exact"] = "sampled"
    probe_examples: Sequence[Example] = ()
    verify: Callable[[Example, str], bool] | float | None = None

    def __post_init__(self) -> None:
        problem = name_problem(self.name)
        if problem is not None:
            raise ValueError(f"Domain: expected {problem}, found {str(self.name)[:100]!r}")
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

    @property
    def verifies(self) -> bool:
        """Whether something says which completions are right."""
        return self.verify is not None or bool(getattr(self.reward, "verifies", False))

    def right(self, example: Example, completion: str, reward: float | None) -> bool:
        """Whether a completion with this reward is right, by what may say so."""
        if not self.verifies or reward is None:
            return False
        if callable(self.verify):
            return bool(self.verify(example, completion))
        return reward >= (1.0 if self.verify is None else self.verify)

    def score(self, example: Example, completion: str) -> float | None:
        """The reward of one completion, checked; None if it could not be judged.

        Raises:
            RewardError: Neither a finite number nor None; names domain, value and completion.
        """
        return self.score_batch([example], [completion])[0]

    def score_batch(
        self, examples: Sequence[Example], completions: Sequence[str], *, training: bool = True
    ) -> list[float | None]:
        """The rewards of several completions, see :func:`checked_rewards`; `group_numbers` says which are one group."""
        return checked_rewards(self.name, self.reward, examples, completions, training=training)


def domain_table(domains: Sequence[Domain]) -> dict[str, Domain]:
    """Domains by name, in order; there has to be one, and no name twice."""
    table = {d.name: d for d in domains}
    if not table or len(table) != len(domains):
        raise ValueError(f"expected one or more domains with distinct names, found {[d.name for d in domains]}")
    return table
