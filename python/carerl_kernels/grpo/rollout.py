"""From domains to a judged batch: draw prompts, sample completions, score them, turn scores into advantages."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from statistics import pvariance
from typing import Any

import torch
from torch import Tensor

from ..task import Domain, Example, RewardError
from ..text import SpecialTokens, decode, encode_prompts
from .config import GRPOConfig
from .parallel import Ranks
from .sampling import ModelSampler, Rollout, Sampler, held, joined


@dataclass
class Judged:
    """What B completions earned; completions of one prompt are adjacent."""

    texts: list[str]  # B decoded completions
    rewards: Tensor  # [B] float64; NaN where the reward is None. Such rows have advantage 0 and are in no statistic
    group_ids: Tensor  # [B] number of the prompt
    advantages: Tensor  # [B] float32
    domains: list[str]  # B domain names

    @property
    def domain(self) -> str | None:
        """The domain of the batch, None when it mixes several."""
        return self.domains[0] if len(set(self.domains)) == 1 else None

    @property
    def judged(self) -> Tensor:
        """[B] bool: which rows have a reward."""
        return ~self.rewards.isnan()

    def select(self, rows: Sequence[int]) -> Judged:
        """Some rows."""
        values = (getattr(self, field.name) for field in fields(Judged))
        some: list[Any] = [v[list(rows)] if isinstance(v, Tensor) else [v[i] for i in rows] for v in values]
        return Judged(*some)


@dataclass
class Batch(Judged):
    """The completions that this process sampled, and what those of all processes earned."""

    rollout: Rollout  # tokens and log-probabilities
    rows: list[int]  # their row numbers in `whole`
    whole: Judged  # the step's completions of all processes, alike in each of them; the same rows when there is one process
    # [B] rewards of what was drawn first, before prompts whose rewards all agreed gave way to others: those say how good the
    # policy is, `whole` says what it learns from
    drawn: Tensor
    redrawn: dict[str, int]  # prompts drawn anew, per domain
    prompts: list[Example] = field(default_factory=list)  # what was asked, by group id

    @property
    def mixed(self) -> bool:
        """Whether the step is of several domains."""
        return self.whole.domain is None

    def of(self, name: str, rows: Tensor) -> Tensor:
        """Those of this process's rows that belong to a domain."""
        mine = [self.domains[i] == name for i in rows.tolist()]
        return rows[torch.tensor(mine, dtype=torch.bool, device=rows.device)]


def prompt_counts(
    own: Sequence[str],
    earlier: Sequence[str],
    total: int,
    replay: float,
    step: int,
    shares: Sequence[float] | None = None,
) -> dict[str, int]:
    """How many of a step's prompts each domain gets.

    `round(replay * total)` go to earlier domains (none before there are any), the rest to the stage's own; each share
    is split evenly, and what does not divide rotates with `step`. With `shares`, positive and one per own domain, the own
    share is split by them, exactly over many steps and nearly so in each.
    """
    replayed = round(replay * total) if earlier else 0
    counts: dict[str, int] = {}
    for names, share in ((own, total - replayed), (earlier, replayed)):
        for j in range(share):
            name = names[(step * share + j) % len(names)]
            if shares is not None and names is own:
                name = _by_share(names, shares, step * share + j)
            counts[name] = counts.get(name, 0) + 1
    return counts


def _by_share(names: Sequence[str], shares: Sequence[float], number: int) -> str:
    """The domain of the number-th prompt: a sequence that spreads evenly over the unit interval cuts it by the shares."""
    at = math.modf(number * _GOLDEN)[0] * sum(shares)
    for name, share in zip(names, shares, strict=True):
        at -= share
        if at < 0:
            return name
    return names[-1]


_GOLDEN = (math.sqrt(5) - 1) / 2


def rollout(
    model: Any,
    tokenizer: Any,
    tokens: SpecialTokens,
    domains: Mapping[str, Domain],
    counts: Mapping[str, int],
    config: GRPOConfig,
    *,
    rng: random.Random,
    sampler: Sampler | None = None,
    ranks: Ranks | None = None,
    phase: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    advantages: str | None = None,
) -> Batch:
    """Draw prompts, sample `config.group_size` completions each, score and compare them.

    With `config.balance` "shares", prompts of a mixed batch whose rewards all agree give way to fresh ones of their domain, up to
    `config.balance_redraws` times; those that still agree stay.

    Args:
        model, tokenizer, tokens: The policy, its tokenizer, and its padding, end and banned ids.
        rng: Draws prompts and their seeds, alike in every process.
        sampler: Writes the completions; the model itself if None.
        ranks: Processes that share the model. Each samples its share of the prompts; the first one judges all of them, so
            that stateful rewards, caches and a judge's limits see what they see in a single process.
        phase: Context manager factory timing the phases "sample" and "reward".
        advantages: What they are divided by, as in the configuration; None: what that says of a stage of one domain.

    Raises:
        RewardError: A verifier returned something else than a finite number or None, or None for every completion.
    """
    ranks, sampler = ranks or Ranks(), sampler or ModelSampler(model, tokens)
    examples: list[Example] = []
    names: list[str] = []
    for name, count in counts.items():
        examples += domains[name].draw(rng, count)
        names += [name] * count
    size = config.group_size
    texts: list[list[str]] = [[] for _ in examples]  # per prompt
    rewards: list[list[float | None]] = [[] for _ in examples]
    parts: list[Rollout] = []
    place: dict[int, int] = {}  # of each of this process's prompts, its place in `parts` together

    def complete(chosen: list[int]) -> None:
        """Samples and judges these prompts; everybody calls it, with or without prompts of its own."""
        seeds = [rng.getrandbits(31) for _ in chosen]  # what engines take
        mine = [j for j, i in enumerate(chosen) if i % ranks.size == ranks.rank]
        own: list[list[int]] = []
        with phase("sample"), held(sampler) as draw:
            if mine:
                prompts = encode_prompts(tokenizer, [examples[chosen[j]].prompt for j in mine])
                sampled = draw(prompts, [seeds[j] for j in mine], **config.sampling)
                own = sampled.completions()
                start = sum(len(part.completion_ids) for part in parts) // size
                place.update({chosen[j]: start + n for n, j in enumerate(mine)})
                parts.append(sampled)
        with phase("reward"):
            written = decode(tokenizer, own)
            groups = [written[n * size : (n + 1) * size] for n in range(len(mine))]
            for pairs in ranks.gather([(chosen[j], group) for j, group in zip(mine, groups, strict=True)]):
                for i, group in pairs:
                    texts[i] = group
            owners = [i for i in chosen for _ in range(size)]
            flat = [text for i in chosen for text in texts[i]]
            judge = lambda: _rewards(domains, [names[i] for i in owners], [examples[i] for i in owners], flat)  # noqa: E731
            found = ranks.on_first(judge)
        for n, i in enumerate(chosen):
            rewards[i] = found[n * size : (n + 1) * size]

    everyone = list(range(len(examples)))
    complete(everyone)
    if all(reward is None for own in rewards for reward in own):
        raise RewardError(
            f"expected a reward for at least one of {size * len(examples)} completions, found None for all of them "
            f"(domains {', '.join(counts)}): the judge cannot be reached or rejects everything; see its log, then resume the run"
        )
    device = parts[0].completion_ids.device  # there are at least as many prompts as processes
    drawn = _as_tensor(rewards, device)
    redrawn = dict.fromkeys(counts, 0)
    for _ in range(config.balance_redraws if config.balance == "shares" and len(counts) > 1 else 0):
        idle = [i for i in everyone if agree(rewards[i])]
        if not idle:
            break
        for i in idle:
            examples[i] = domains[names[i]].draw(rng, 1)[0]
            redrawn[names[i]] += 1
        complete(idle)
    owners = [i for i in everyone for _ in range(size)]
    reward_tensor, group_ids = _as_tensor(rewards, device), torch.tensor(owners, device=device)
    domain_ids = torch.tensor([list(counts).index(names[i]) for i in owners], device=device)
    mode = advantages or config.advantage_mode()
    whole = Judged(
        texts=[text for own in texts for text in own],
        rewards=reward_tensor,
        group_ids=group_ids,
        advantages=torch.ops.carerl.group_advantages(reward_tensor, group_ids, domain_ids, mode),
        domains=[names[i] for i in owners],
    )
    mine = ranks.share(len(examples))
    rows = [i * size + j for i in mine for j in range(size)]
    sampled = joined(parts, tokens.pad)
    if len(parts) > 1:
        sampled = sampled.select(torch.tensor([place[i] * size + j for i in mine for j in range(size)], device=device))
    own = vars(whole.select(rows))
    return Batch(**own, rollout=sampled, rows=rows, whole=whole, drawn=drawn, redrawn=redrawn, prompts=examples)


def agree(rewards: Sequence[float | None]) -> bool:
    """Whether nothing can be learned from a group: no two judged completions earned different rewards."""
    return len({reward for reward in rewards if reward is not None}) < 2


def _as_tensor(rewards: Sequence[Sequence[float | None]], device: torch.device) -> Tensor:
    flat = [math.nan if reward is None else reward for own in rewards for reward in own]
    return torch.tensor(flat, dtype=torch.float64, device=device)


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
    return rewards


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
        variances[name] = sum(len(own) * pvariance(own) for own in by_group.values()) / count
        agreed[name] = sum(len(set(rewards)) == 1 for rewards in by_group.values()) / len(by_group)
    shares = {name: list(domains).count(name) / len(domains) for name in dict.fromkeys(domains)}
    return {"rewards": means, "reward_variance": variances, "agreed": agreed, "batch_share": shares}


def informative_fraction(rewards: Tensor, group_ids: Tensor) -> float:
    """Share of groups with at least two different rewards, the only ones that move the policy."""
    differing = [len(rewards[group_ids == g].unique()) > 1 for g in group_ids.unique()]
    return sum(differing) / len(differing) if differing else 0.0
