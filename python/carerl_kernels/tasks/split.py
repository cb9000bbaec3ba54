"""Domains of examples: some to train on, of which a few are stored, and others that are held out."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Literal

from ..task import BatchReward, Domain, Example

Reward = Callable[[Example, str], float | None] | BatchReward
EvalMode = Literal["sampled", "exact"]


def domain_of(
    name: str,
    train: Sequence[Example],
    held_out: Sequence[Example],
    reward: Reward,
    mode: EvalMode = "sampled",
    stored: int = 0,
) -> Domain:
    """A domain that trains on some examples and is evaluated on others.

    Args:
        train: Drawn from with replacement.
        held_out: For evaluation.
        mode: How the domain is evaluated, see `Domain`.
        stored: The first so many of `train` are stored as well, for probes, rehearsal and replay.

    Raises:
        ValueError: There is not as much to store.
    """
    if stored > len(train):
        raise ValueError(f"domain {name!r}: expected at most {len(train)} stored examples, found probes: {stored}")
    return Domain(
        name,
        lambda rng, n: rng.choices(train, k=n),
        reward,
        eval_examples=held_out,
        eval_mode=mode,
        probe_examples=train[:stored],
    )


def split_domain(
    name: str,
    examples: Sequence[Example],
    reward: Reward,
    held_out: int,
    seed: int,
    mode: EvalMode = "sampled",
    stored: int = 0,
) -> Domain:
    """As `domain_of`, with `held_out` of the examples, chosen by name and seed, kept out of training."""
    shuffled = list(examples)
    random.Random(f"{name}-{seed}").shuffle(shuffled)
    if len(shuffled) <= held_out:
        raise ValueError(
            f"domain {name!r}: expected more than eval_size={held_out} examples, found {len(examples)}; lower eval_size, or "
            "give evaluation a file of its own"
        )
    return domain_of(name, shuffled[held_out:], shuffled[:held_out], reward, mode, stored)
