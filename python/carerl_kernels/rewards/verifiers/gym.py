"""Procedural tasks with verifiers, from reasoning-gym, as domains."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from ...grpo.domain import Domain, Example

# Ready mixtures: what a small model can begin to learn, by skill.
GYM_DOMAINS: dict[str, tuple[str, ...]] = {
    "arithmetic": ("chain_sum", "basic_arithmetic", "products", "gcd", "lcm"),
    "algebra": ("simple_equations", "polynomial_equations", "simple_integration"),
    "logic": ("syllogism", "knights_knaves", "propositional_logic", "zebra_puzzles"),
    "text": ("letter_counting", "word_sorting", "spell_backward", "caesar_cipher", "letter_jumble"),
    "data": ("number_sorting", "number_filtering", "base_conversion", "count_bits"),
    "time": ("calendar_arithmetic", "time_intervals"),
}

ASK = "{question}\n\nGive the final answer between <answer> and </answer>."


def gym_domain(
    name: str,
    tasks: Sequence[str] | None = None,
    *,
    seed: int = 0,
    train_size: int = 10_000,
    eval_size: int = 64,
    ask: Callable[[str], str] | None = None,
    options: dict[str, dict[str, Any]] | None = None,
) -> Domain:
    """A domain of reasoning-gym tasks.

    Training and evaluation examples come from different seeds. The reward is the task's own score of what stands between
    the last answer tags, in [0, 1]; 0 without them.

    Args:
        name: Of the domain; one of `GYM_DOMAINS` unless `tasks` are given.
        tasks: Names of reasoning-gym data sets, drawn from evenly.
        seed: Of the tasks.
        train_size: Different training examples per task.
        eval_size: Held-out examples altogether, split over the tasks.
        ask: Turns a question into the prompt; by default it asks for the answer between tags.
        options: Settings per task, passed to reasoning-gym ({"chain_sum": {"max_terms": 3}}).

    Raises:
        ImportError: reasoning-gym is missing; says what to install.
        ValueError: An unknown name or task.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
        from reasoning_gym.utils import extract_answer
    except ImportError as error:
        raise ImportError("gym domains need reasoning-gym: pip install 'carerl-kernels[verifiers]'") from error
    if tasks is None:
        if name not in GYM_DOMAINS:
            raise ValueError(f"gym_domain: expected one of {', '.join(GYM_DOMAINS)}, or tasks, found {name!r}")
        tasks = GYM_DOMAINS[name]
    unknown = [t for t in tasks if t not in DATASETS]
    if unknown or not tasks:
        raise ValueError(f"gym_domain: reasoning-gym has no tasks {unknown}; see reasoning_gym.factory.DATASETS")
    settings = options or {}
    each = math.ceil(eval_size / len(tasks))
    train = {t: reasoning_gym.create_dataset(t, size=train_size, seed=seed, **settings.get(t, {})) for t in tasks}
    held = {t: reasoning_gym.create_dataset(t, size=each, seed=seed + 2**20, **settings.get(t, {})) for t in tasks}

    def example(task: str, entry: dict[str, Any]) -> Example:
        prompt = ask(entry["question"]) if ask else ASK.format(question=entry["question"])
        answer = entry["answer"]
        return Example(prompt, None if answer is None else str(answer), {"task": task, "entry": entry})

    def sample(rng: random.Random, n: int) -> list[Example]:
        drawn = []
        for _ in range(n):
            task = rng.choice(list(train))
            drawn.append(example(task, train[task][rng.randrange(train_size)]))
        return drawn

    def reward(given: Example, completion: str) -> float:
        answer = extract_answer(completion)
        if answer is None:
            return 0.0
        return float(train[given.info["task"]].score_answer(answer, given.info["entry"]))

    evaluation = [example(task, held[task][i]) for i in range(each) for task in tasks][:eval_size]
    return Domain(name, sample, reward, eval_examples=evaluation)
