"""Who is in a batch, what it earns, and whose rewards still vary."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def reward_statistics(
    domains: Sequence[str], rewards: Sequence[float | None], groups: Sequence[int] | None = None
) -> dict[str, dict[str, float]]:
    """Per domain, what decides how much of an update is its own.

    Args:
        domains: B names, the domain of each completion.
        rewards: B rewards; None or NaN where there is none.
        groups: B numbers, the prompt of each completion; None: a domain's completions are one group.

    Returns:
        "rewards": mean reward; "reward_variance": mean squared distance to the mean of the own group, which is all that
        group-relative advantages see; "agreed": share of the prompts whose rewards all agree, from which nothing is learned;
        "batch_share": share of the batch's completions. The first three are there for domains with a judged completion only.

    Raises:
        ValueError: Different lengths.
    """
    groups = [0] * len(rewards) if groups is None else groups
    if not len(domains) == len(rewards) == len(groups):
        raise ValueError(
            f"expected a domain, a reward and a group per completion, found {len(domains)}, {len(rewards)}, {len(groups)}"
        )
    values: dict[str, dict[int, list[float]]] = {}
    for name, group, reward in zip(domains, groups, rewards, strict=True):
        if reward is not None and not math.isnan(reward):
            values.setdefault(name, {}).setdefault(group, []).append(reward)
    means: dict[str, float] = {}
    variances: dict[str, float] = {}
    agreed: dict[str, float] = {}
    for name, by_group in values.items():
        count = sum(map(len, by_group.values()))
        means[name] = sum(map(sum, by_group.values())) / count
        squares = 0.0
        for group_rewards in by_group.values():
            center = sum(group_rewards) / len(group_rewards)
            squares += sum((r - center) ** 2 for r in group_rewards)
        variances[name] = squares / count
        agreed[name] = sum(len(set(rewards)) == 1 for rewards in by_group.values()) / len(by_group)
    shares = {name: list(domains).count(name) / len(domains) for name in dict.fromkeys(domains)}
    return {"rewards": means, "reward_variance": variances, "agreed": agreed, "batch_share": shares}


def informative_fraction(rewards: Tensor, group_ids: Tensor) -> float:
    """Share of groups with at least two different rewards, the only ones that move the policy."""
    differing = [len(rewards[group_ids == g].unique()) > 1 for g in group_ids.unique()]
    return sum(differing) / len(differing) if differing else 0.0
