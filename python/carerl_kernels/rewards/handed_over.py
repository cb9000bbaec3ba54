"""What trainers hand over, as examples: plain values, groups, and rewards that are numbers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from json import dumps
from typing import Any

from .._json import plain
from ..task import BatchReward, Example, RewardError, checked_rewards, group_numbers
from .reasoning import StripReasoning
from .reasoning import strip_reasoning as answer_of

Reward = Callable[[Example, str], "float | None"] | BatchReward
Row = tuple[Any, Any, Mapping[str, Any], Hashable]  # prompt, answer, columns, group

REMEDIES = {
    "TRL": "make per_device_train_batch_size, and the batch of evaluation, a multiple of num_generations",
    "verl": "set reward_model.reward_manager=batch, which scores a batch in one call",
    "OpenRLHF": "make micro_rollout_batch_size a multiple of n_samples_per_prompt",
    "slime": "start it with --group-rm",
    "verifiers": "have the rubric score groups (score_group), which passes prompts= and completions=",
}


def judged(
    reward: Reward, examples: Sequence[Example], completions: Sequence[str], trainer: str, strip: StripReasoning
) -> list[float | None]:
    """Checked rewards: finite numbers or None. RewardError: a reward that compares sees every prompt once."""
    if getattr(reward, "compares", False) and examples and len(set(group_numbers(examples))) == len(examples):
        raise RewardError(
            f"{name_of(reward)} compares the completions of a prompt, and {trainer} hands over one of each: all would earn 0; "
            f"{REMEDIES[trainer]}, or use components with normalize 'running' or 'none'"
        )
    # a trace that never ends has no answer: that is the policy's doing, not the judge's failure
    answers = completions if strip is False else [answer_of(text, strip) or "" for text in completions]
    return checked_rewards(name_of(reward), reward, examples, answers)


def name_of(reward: Reward) -> str:
    return str(getattr(reward, "__name__", type(reward).__name__))


def as_number(value: float | None, excluded: float | None, trainer: str) -> float:
    if value is not None:
        return value
    if excluded is None:
        raise RewardError(
            f"a completion could not be judged, and {trainer} cannot leave it out; pass excluded= the number it shall get"
        )
    return excluded


def as_text(answer: Any) -> str | None:
    """A right answer, of plain values, as text; None for none, and for what is no single one."""
    while isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    return None if answer is None or isinstance(answer, (list, dict)) else str(answer)


def examples_of(rows: Iterable[Row]) -> list[Example]:
    """The same object for equal rows: rewards that work per object do it once."""
    seen: dict[tuple[str, Hashable], Example] = {}
    out = []
    for *given, group in rows:
        prompt, answer, info = plain(given)
        key = (dumps([prompt, answer, info], sort_keys=True, default=repr), group)
        if key not in seen:
            seen[key] = Example(prompt, as_text(answer), info, group)
        out.append(seen[key])
    return out
