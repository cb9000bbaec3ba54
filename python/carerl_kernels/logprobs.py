"""Teacher forcing: log-probabilities of given completions, with gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ._wrapped import forward_accepts
from .task import Example
from .text import SpecialTokens, encode_answers, encode_prompts, left_pad, position_ids, right_pad


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Inside, the model is in eval mode; afterwards it is in its own again."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def completion_logprobs(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    length: int,
    *,
    temperature: float = 1.0,
    banned: Sequence[int] = (),
) -> Tensor:
    """Log-probabilities of the last `length` tokens of each row.

    Args:
        input_ids: [B, P+L] left-padded prompts followed by right-padded completions.
        attention_mask: [B, P+L] 0 on both kinds of padding.
        temperature: Logits are divided by it, as in sampling.
        banned: Ids removed from the distribution, as in sampling.

    Returns:
        [B, L], differentiable; meaningless where the mask is 0.
    """
    kwargs: dict[str, Any] = {}
    if forward_accepts(model, "position_ids"):
        kwargs["position_ids"] = position_ids(attention_mask)
    if forward_accepts(model, "logits_to_keep"):
        kwargs["logits_to_keep"] = length + 1  # the token at column t is predicted at t-1
    if forward_accepts(model, "use_cache"):
        kwargs["use_cache"] = False
    logits = model(input_ids=input_ids, attention_mask=attention_mask, **kwargs).logits
    logits = logits[:, -(length + 1) :]  # [B, L+1, V]
    if banned:
        # In place: a copy would be the largest tensor of the step, and nothing needs these numbers again.
        logits = logits.index_fill_(-1, torch.tensor(banned, device=logits.device), -torch.inf)
    # The last column predicts nothing, but dropping it would copy all others; it gets any token and no gradient.
    targets = torch.nn.functional.pad(input_ids[:, -length:], (0, 1))  # [B, L+1]
    logp, _ = torch.ops.carerl.token_logprobs(logits.flatten(0, 1), targets.flatten(), temperature)
    return logp.view(targets.shape)[:, :-1]


def answer_logprobs(
    model: Any, tokenizer: Any, examples: Sequence[Example], tokens: SpecialTokens
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B, L] at temperature 1 of each example's answer and its end, and their mask [B, L].

    Raises:
        ValueError: An example has no answer.
    """
    for example in examples:
        if example.answer is None:
            raise ValueError(f"expected an answer for teacher forcing, example {example.prompt!r} has none")
    answers = encode_answers(tokenizer, [e.answer for e in examples if e.answer is not None], tokens.eos[0])
    device = next(model.parameters()).device
    prompt_ids, prompt_mask = left_pad(encode_prompts(tokenizer, [e.prompt for e in examples]), tokens.pad, device)
    ids, mask = right_pad(answers, tokens.pad, device)
    logp = completion_logprobs(
        model, torch.cat([prompt_ids, ids], 1), torch.cat([prompt_mask, mask], 1), ids.shape[1], banned=tokens.banned
    )
    return logp, mask


def answer_loss(model: Any, tokenizer: Any, examples: Sequence[Example], tokens: SpecialTokens) -> Tensor:
    """Mean negative log-likelihood per token of the right answers: the supervised and the probe loss."""
    logp, mask = answer_logprobs(model, tokenizer, examples, tokens)
    return -logp.masked_fill(mask == 0, 0.0).sum() / mask.sum()


@torch.no_grad()
def success_probability(
    model: Any, tokenizer: Any, examples: Sequence[Example], tokens: SpecialTokens, *, max_new_tokens: int | None = None
) -> Tensor:
    """Probability [B] that sampling at temperature 1 writes exactly the answer and stops.

    Args:
        examples: The examples, with answers.
        max_new_tokens: The sampler's limit: an answer of just that many tokens is cut there and needs no end token, a
            longer one cannot be written and has probability 0. None: no limit.
    """
    with evaluating(model):
        logp, mask = answer_logprobs(model, tokenizer, examples, tokens)
    limit = mask.shape[1] if max_new_tokens is None else max_new_tokens
    written = logp.masked_fill(mask == 0, 0.0)[:, :limit]
    return torch.where(mask.sum(1) - 1 > limit, 0.0, written.double().sum(1).exp())  # the end token need not be written
