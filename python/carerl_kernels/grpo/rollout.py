"""From domains to a judged batch: draw prompts, sample completions, score them, turn scores into advantages."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import GRPOConfig
from .domain import Domain, Example, RewardError
from .sampling import Rollout, sample
from .statistics import reward_statistics
from .text import SpecialTokens, decode, encode_prompts


@dataclass
class Batch:
    """B judged completions; completions of one prompt are adjacent.

    Attributes:
        rollout: Tokens and log-probabilities.
        texts: B decoded completions.
        rewards: [B] float64; NaN where the reward is None. Such rows have advantage 0 and are in no statistic.
        group_ids: [B] number of the prompt.
        advantages: [B] float32.
        domains: B domain names.
    """

    rollout: Rollout
    texts: list[str]
    rewards: Tensor
    group_ids: Tensor
    advantages: Tensor
    domains: list[str]

    @property
    def domain(self) -> str | None:
        """The domain of the batch, None when it mixes several."""
        return self.domains[0] if len(set(self.domains)) == 1 else None

    @property
    def judged(self) -> Tensor:
        """[B] bool: which rows have a reward."""
        return ~self.rewards.isnan()

    def statistics(self) -> dict[str, dict[str, float]]:
        """Mean reward, reward variance within prompts and share of completions, per domain."""
        return reward_statistics(self.domains, self.rewards.tolist(), self.group_ids.tolist())


def prompt_counts(own: Sequence[str], earlier: Sequence[str], total: int, replay: float, step: int) -> dict[str, int]:
    """How many of a step's prompts each domain gets.

    `round(replay * total)` go to earlier domains (none before there are any), the rest to the stage's own; each share
    is split evenly, and what does not divide rotates with `step`.
    """
    replayed = round(replay * total) if earlier else 0
    counts: dict[str, int] = {}
    for names, share in ((own, total - replayed), (earlier, replayed)):
        for j in range(share):
            name = names[(step * share + j) % len(names)]
            counts[name] = counts.get(name, 0) + 1
    return counts


def rollout(
    model: Any,
    tokenizer: Any,
    tokens: SpecialTokens,
    domains: Mapping[str, Domain],
    counts: Mapping[str, int],
    config: GRPOConfig,
    *,
    rng: random.Random,
    generator: torch.Generator | None = None,
    phase: Callable[[str], AbstractContextManager[Any]] | None = None,
) -> Batch:
    """Draw prompts, sample `config.group_size` completions each, score and compare them.

    Args:
        model: Policy.
        tokenizer: Its tokenizer.
        tokens: Padding, end and banned ids.
        domains: By name.
        counts: Prompts per domain name.
        config: Sampling and advantage settings.
        rng: Draws prompts.
        generator: Samples tokens; on the model's device.
        phase: Context manager factory timing the phases "sample" and "reward".

    Raises:
        RewardError: A verifier returned something else than a finite number or None, or None for every completion.
    """
    examples: list[Example] = []
    names: list[str] = []
    for name, count in counts.items():
        examples += domains[name].draw(rng, count)
        names += [name] * count
    with _phase(phase, "sample"):
        sampled = sample(
            model,
            encode_prompts(tokenizer, [e.prompt for e in examples]),
            tokens,
            num_samples=config.group_size,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            generator=generator,
        )
    with _phase(phase, "reward"):
        texts = decode(tokenizer, sampled.completions())
        owners = [i for i in range(len(examples)) for _ in range(config.group_size)]
        rewards = _rewards(domains, [names[i] for i in owners], [examples[i] for i in owners], texts)
    device = sampled.completion_ids.device
    reward_tensor = torch.tensor([math.nan if r is None else r for r in rewards], dtype=torch.float64, device=device)
    group_ids = torch.tensor(owners, device=device)
    domain_ids = torch.tensor([list(counts).index(names[i]) for i in owners], device=device)
    return Batch(
        rollout=sampled,
        texts=texts,
        rewards=reward_tensor,
        group_ids=group_ids,
        advantages=torch.ops.carerl.group_advantages(reward_tensor, group_ids, domain_ids, config.advantage_mode),
        domains=[names[i] for i in owners],
    )


def _rewards(
    domains: Mapping[str, Domain], names: Sequence[str], examples: Sequence[Example], texts: Sequence[str]
) -> list[float | None]:
    """One reward a completion, asked for once per domain."""
    rewards: list[float | None] = [None] * len(texts)
    for name in dict.fromkeys(names):
        rows = [i for i, owner in enumerate(names) if owner == name]
        values = domains[name].score_batch([examples[i] for i in rows], [texts[i] for i in rows])
        for i, value in zip(rows, values, strict=True):
            rewards[i] = value
    if all(reward is None for reward in rewards):
        raise RewardError(
            f"expected a reward for at least one of {len(texts)} completions, found None for all of them "
            f"(domains {', '.join(dict.fromkeys(names))}): the judge cannot be reached or rejects everything; "
            f"see its log, then resume the run"
        )
    return rewards


def _phase(phase: Callable[[str], AbstractContextManager[Any]] | None, name: str) -> AbstractContextManager[Any]:
    return nullcontext() if phase is None else phase(name)
