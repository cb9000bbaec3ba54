"""How good the policy is in each domain, measured without disturbing training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .domain import Domain, RewardError
from .logprobs import success_probability
from .sampling import sample
from .text import SpecialTokens, decode, encode_prompts


def evaluate(model: Any, tokenizer: Any, domain: Domain, tokens: SpecialTokens, **settings: Any) -> float:
    """Mean success over `domain.eval_examples`: the mean of `example_scores` weighted by completions judged.

    Args and errors: as for `example_scores`.
    """
    return mean_score(example_scores(model, tokenizer, domain, tokens, **settings))


def example_scores(
    model: Any,
    tokenizer: Any,
    domain: Domain,
    tokens: SpecialTokens,
    *,
    max_new_tokens: int,
    num_samples: int = 1,
    temperature: float = 1.0,
    batch_size: int = 256,
    seed: int = 0,
) -> list[tuple[float, int]]:
    """Success on each of `domain.eval_examples`, in order: (sum of scores, completions judged).

    With eval_mode "exact": the probability at temperature 1 of writing the answer and stopping, as one judged completion.
    With "sampled": the rewards of `num_samples` completions per example (without those that could not be judged), drawn
    from a generator of its own so that evaluating more or less often changes nothing in training.

    Args:
        model: Causal LM.
        tokenizer: Its tokenizer.
        domain: With eval_examples.
        tokens: Padding, end and banned ids.
        max_new_tokens: The sampler's limit.
        num_samples: Completions per example (sampled mode).
        temperature: Of the sampled mode.
        batch_size: Sequences at once.
        seed: Of the sampled mode's generator.

    Raises:
        ValueError: The domain has no eval_examples.
        RewardError: None of the completions could be judged.
    """
    examples = list(domain.eval_examples)
    if not examples:
        raise ValueError(f"domain {domain.name!r} has no eval_examples; give it some to measure accuracy")
    if domain.eval_mode == "exact":
        exact: list[float] = []
        for i in range(0, len(examples), batch_size):
            chunk = examples[i : i + batch_size]
            exact += success_probability(model, tokenizer, chunk, tokens, max_new_tokens=max_new_tokens).tolist()
        return [(value, 1) for value in exact]
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    per_batch = max(1, batch_size // num_samples)
    rewards: list[float | None] = []
    for i in range(0, len(examples), per_batch):
        chunk = examples[i : i + per_batch]
        rollout = sample(
            model,
            encode_prompts(tokenizer, [e.prompt for e in chunk]),
            tokens,
            num_samples=num_samples,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            generator=generator,
        )
        texts = decode(tokenizer, rollout.completions())
        rewards += domain.score_batch([chunk[j // num_samples] for j in range(len(texts))], texts, training=False)
    judged = [[r for r in rewards[i : i + num_samples] if r is not None] for i in range(0, len(rewards), num_samples)]
    if not any(judged):
        raise RewardError(f"domain {domain.name!r}: none of the completions of its eval_examples could be judged")
    return [(sum(values), len(values)) for values in judged]


def mean_score(scores: Sequence[tuple[float, int]]) -> float:
    """Mean over all judged completions."""
    return sum(total for total, _ in scores) / sum(count for _, count in scores)
