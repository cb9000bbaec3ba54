"""Easy verifiable tasks on pairs of words, for a pretrained model; the first line of a completion counts."""

from __future__ import annotations

import random
from collections.abc import Callable

from ..task import Domain, Example
from .split import domain_of

WORDS = (  # of five letters or so, each one or two tokens
    "river stone house cloud bread chair table light music water green paper plant horse tiger apple grape lemon olive onion "
    "pearl piano queen radio salad scarf shark sheep shirt skirt snake spoon storm sugar sword toast tower train truck uncle "
    "video voice wagon watch whale wheat wheel woman world youth beach berry blade brain brick bride brush cabin camel candy "
    "chain chalk cheek chest child clock coach coast couch cream crown dance dress drink eagle earth field flame floor fruit "
    "ghost glass glove grass guard heart honey hotel juice knife ladder"
)
TASKS: dict[str, Callable[[str, str], str]] = {
    "first": lambda a, b: a,
    "second": lambda a, b: b,
    "swap": lambda a, b: f"{b} {a}",
    "alphabet": min,
}
PAIRS = 160
EVAL_EXAMPLES = 24


def word_domain(name: str, task: str, seed: int, stored: int, shots: int = 2) -> Domain:
    """A task on two words. Prompts begin with the name and as many solved examples as `shots`; without any, prompts of several
    tasks differ by the name alone.

    Args:
        name: Of the domain.
        task: A key of `TASKS`.
        seed: Of the pairs.
        stored: How many of the training examples are stored.
        shots: Solved examples in every prompt.

    Raises:
        ValueError: There is no such task, or not as much to store.
    """
    if task not in TASKS:
        raise ValueError(f"domain {name!r}: expected task {', '.join(TASKS)}, found {task!r}")
    rng, words, answer = random.Random(f"{name}-{seed}"), WORDS.split(), TASKS[task]
    pairs = [rng.sample(words, 2) for _ in range(PAIRS)]
    shown = "".join(f"{name}: {a} {b} -> {answer(a, b)}\n" for a, b in pairs[:shots])
    examples = [Example(f"{shown}{name}: {a} {b} ->", f" {answer(a, b)}") for a, b in pairs[shots:]]
    held_out = examples[:EVAL_EXAMPLES]
    shown_there = {example.prompt for example in held_out}
    train = [example for example in examples[EVAL_EXAMPLES:] if example.prompt not in shown_there]
    return domain_of(name, train, held_out, _first_line, stored=stored)


def _first_line(example: Example, text: str) -> float:
    return float(text.strip().split("\n")[0].strip() == (example.answer or "").strip())


_first_line.verifies = True  # type: ignore[attr-defined]
