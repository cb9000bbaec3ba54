"""How good the policy is in each domain, measured without disturbing training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..logprobs import answer_logprobs, evaluating, success_probability
from ..task import Domain, RewardError
from ..text import SpecialTokens, decode, encode_prompts
from .parallel import Ranks, gathered
from .sampling import ModelSampler, Sampler, held


def example_scores(
    model: Any,
    tokenizer: Any,
    domain: Domain,
    tokens: SpecialTokens,
    *,
    max_new_tokens: int,
    num_samples: int = 1,
    batch_size: int = 256,
    seed: int = 0,
    sampler: Sampler | None = None,
    ranks: Ranks | None = None,
) -> list[tuple[float, int]]:
    """Success on each of `domain.eval_examples`, in order: (sum of scores, completions judged).

    With eval_mode "exact": the probability at temperature 1 of writing the answer and stopping, as one judged completion.
    With "sampled": the rewards of `num_samples` completions per example at temperature 1 (without those that cannot be judged),
    drawn with seeds of their own so that evaluating more or less often changes nothing in training.

    Args:
        model, tokenizer, tokens: The policy, its tokenizer, and its padding, end and banned ids.
        ranks: Processes that share the model: each evaluates its share of the examples, the first one judges.

    Raises:
        ValueError: The domain has no eval_examples.
        RewardError: None of the completions could be judged.
    """
    examples = list(domain.eval_examples)
    if not examples:
        raise ValueError(f"domain {domain.name!r} has no eval_examples; give it some to measure accuracy")
    ranks, sampler = ranks or Ranks(), sampler or ModelSampler(model, tokens)
    mine = ranks.share(len(examples))
    if domain.eval_mode == "exact":
        found: list[float] = []
        with gathered(model):
            for i in range(0, len(mine), batch_size):
                chunk = [examples[j] for j in mine[i : i + batch_size]]
                found += success_probability(model, tokenizer, chunk, tokens, max_new_tokens=max_new_tokens).tolist()
        return [(p, 1) for p in ranks.merge(found, len(examples))]
    per_batch = max(1, batch_size // num_samples)
    texts: list[list[str]] = []
    with held(sampler) as draw:
        for i in range(0, len(mine), per_batch):
            part = mine[i : i + per_batch]
            rollout = draw(
                encode_prompts(tokenizer, [examples[j].prompt for j in part]),
                [(seed * 1_000_003 + j) % 2**31 for j in part],
                num_samples=num_samples,
                max_new_tokens=max_new_tokens,
                temperature=1.0,
            )
            rows = decode(tokenizer, rollout.completions())
            texts += [rows[j * num_samples : (j + 1) * num_samples] for j in range(len(part))]
    written = ranks.merge(texts, len(examples))

    def judge() -> list[float | None]:
        owners = [e for e in examples for _ in range(num_samples)]
        return domain.score_batch(owners, [text for own in written for text in own], training=False)

    rewards = ranks.on_first(judge)
    judged = [[r for r in rewards[i : i + num_samples] if r is not None] for i in range(0, len(rewards), num_samples)]
    if not any(judged):
        raise RewardError(
            f"domain {domain.name!r}: expected rewards for completions of its eval_examples, found none that could be judged; "
            "repair the judge or verifier, then resume"
        )
    return [(sum(values), len(values)) for values in judged]


@torch.no_grad()
def held_out_losses(
    model: Any,
    tokenizer: Any,
    domains: Iterable[Domain],
    tokens: SpecialTokens,
    *,
    batch_size: int = 256,
    ranks: Ranks | None = None,
) -> dict[str, float]:
    """Mean negative log-likelihood per token (nats) of the right answers of every domain's eval_examples, by teacher
    forcing and in eval mode. Domains without held-out examples that have an answer are left out."""
    ranks, out = ranks or Ranks(), dict[str, float]()
    with evaluating(model), gathered(model):
        for domain in domains:
            examples = [e for e in domain.eval_examples if e.answer is not None]
            if not examples:
                continue
            loss, count, mine = 0.0, 0.0, ranks.share(len(examples))
            for i in range(0, len(mine), batch_size):
                chunk = [examples[j] for j in mine[i : i + batch_size]]
                logp, mask = answer_logprobs(model, tokenizer, chunk, tokens)
                loss -= float(logp.masked_fill(mask == 0, 0.0).double().sum())
                count += float(mask.sum())
            total, number = ranks.sum([loss, count])
            out[domain.name] = total / number
    return out


def evaluate(model: Any, tokenizer: Any, domain: Domain, tokens: SpecialTokens, **settings: Any) -> float:
    """Mean success over `domain.eval_examples`: the mean of `example_scores` weighted by completions judged.

    Args and errors: as for `example_scores`.
    """
    return mean_score(example_scores(model, tokenizer, domain, tokens, **settings))


def mean_score(scores: Sequence[tuple[float, int]]) -> float:
    """Mean over all judged completions."""
    return sum(total for total, _ in scores) / sum(count for _, count in scores)
