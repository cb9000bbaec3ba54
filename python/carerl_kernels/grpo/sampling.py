"""Batched sampling from any transformers causal LM: uneven prompts, KV cache, one prefill per prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .._errors import PlainError
from ..logprobs import evaluating
from ..text import SpecialTokens, decoding, left_pad, position_ids
from .parallel import gathered


@dataclass
class Rollout:
    """Prompts with sampled completions, rows of one prompt adjacent.

    Attributes:
        prompt_ids: [B, P] left-padded.
        prompt_mask: [B, P].
        completion_ids: [B, L] right-padded; the end-of-sequence token belongs to the completion.
        completion_mask: [B, L] 1 up to and including the end of sequence.
        logps: [B, L] log-probabilities of the sampled tokens at the sampling temperature, before top-p; 0 on padding.
        entropy: [B, L] entropy in nats of the distribution each token was drawn from; 0 on padding.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    logps: Tensor
    entropy: Tensor

    @property
    def input_ids(self) -> Tensor:
        return torch.cat([self.prompt_ids, self.completion_ids], 1)  # [B, P+L]

    @property
    def attention_mask(self) -> Tensor:
        return torch.cat([self.prompt_mask, self.completion_mask], 1)  # [B, P+L]

    @property
    def tokens(self) -> int:
        """Sampled tokens without padding."""
        return int(self.completion_mask.sum())

    def completions(self) -> list[list[int]]:
        """Token ids of each completion without padding."""
        lengths = self.completion_mask.sum(1).tolist()
        return [row[:n] for row, n in zip(self.completion_ids.tolist(), lengths, strict=True)]

    def select(self, rows: Tensor) -> Rollout:
        """Some rows, with columns that are padding in all of them trimmed off."""
        prompt_mask, completion_mask = self.prompt_mask[rows], self.completion_mask[rows]
        first = prompt_mask.shape[1] - int(prompt_mask.sum(1).max())
        last = int(completion_mask.sum(1).max())
        prompts, completions = slice(first, None), slice(None, last)
        return Rollout(
            **{n: t[rows][:, prompts if n.startswith("prompt") else completions] for n, t in vars(self).items()}
        )


def joined(parts: Sequence[Rollout], pad: int) -> Rollout:
    """Rollouts one after another, padded to common widths."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.prompt_ids.shape[1] for part in parts)
    length = max(part.completion_ids.shape[1] for part in parts)

    def padded(name: str, tensor: Tensor) -> Tensor:
        gap = (width if name.startswith("prompt") else length) - tensor.shape[1]
        sides = (gap, 0) if name.startswith("prompt") else (0, gap)
        return torch.nn.functional.pad(tensor, sides, value=pad if name.endswith("_ids") else 0)

    return Rollout(**{name: torch.cat([padded(name, vars(part)[name]) for part in parts]) for name in vars(parts[0])})


def tempered_log_softmax(logits: Tensor, temperature: float, banned: Sequence[int]) -> Tensor:
    """Log-probabilities [..., V] in fp32 (at least) of the policy: logits / temperature, banned ids removed.

    A banned id gets the lowest finite number instead of -inf: its probability is 0 all the same, but p * log p stays
    0 instead of NaN.
    """
    scaled = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if temperature != 1.0:
        scaled = scaled / temperature
    if banned:
        index = torch.tensor(banned, device=logits.device)
        scaled = scaled.index_fill(-1, index, torch.finfo(scaled.dtype).min)
    return scaled.log_softmax(-1)


def nucleus(logp: Tensor, top_p: float) -> Tensor:
    """Log-probabilities [B, V] with everything outside the smallest set of mass >= top_p at -inf (not renormalised)."""
    if top_p >= 1.0:
        return logp
    ordered, order = logp.sort(-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()  # mass of strictly likelier tokens; the first is always kept
    drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
    return logp.masked_fill(drop, -torch.inf)


@torch.no_grad()
def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    tokens: SpecialTokens,
    *,
    num_samples: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
) -> Rollout:
    """Sample `num_samples` completions of every prompt.

    Prompts are prefilled once each and their cache repeated, then all rows decode in lockstep until every row has
    ended or reached the limit. The model is in eval mode meanwhile and back in its own mode afterwards.

    A prompt's completions depend on the prompt, its seed and the weights, not on what else is in the batch or on the process
    that samples them (up to rounding: other batches make other matrix products, and a token changes when its random number
    falls within that of the border between two tokens).

    Args:
        model: Causal LM whose output has `logits` and a key-value cache.
        prompts: Token ids, lengths may differ.
        tokens: Padding, end and banned ids.
        num_samples: Completions per prompt; row i*num_samples+j is the j-th of prompt i.
        max_new_tokens: Limit L on the completion, its end-of-sequence token included.
        temperature: 0 takes the likeliest token (log-probabilities are then those at temperature 1).
        top_p: Nucleus.
        seeds: One per prompt; None draws them from torch's global generator.

    Returns:
        The completions with the log-probabilities they were sampled at.

    Raises:
        ValueError: No prompt, an empty prompt, another number of seeds, or numbers out of range.
        FloatingPointError: The model's logits are not finite.
    """
    if not prompts or not all(len(p) for p in prompts):
        raise ValueError("sample: expected one or more prompts of at least one token each")
    if num_samples < 1 or max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            "sample: expected num_samples >= 1, max_new_tokens >= 1, temperature >= 0 and 0 < top_p <= 1, "
            f"found {num_samples}, {max_new_tokens}, {temperature}, {top_p}"
        )
    if seeds is None:
        seeds = torch.randint(2**62, (len(prompts),)).tolist()
    if len(seeds) != len(prompts):
        raise ValueError(f"sample: expected one seed per prompt, found {len(seeds)} for {len(prompts)} prompts")
    device = next(model.parameters()).device
    # [B, L] in [0, 1): everything random about the batch. Made on the CPU, so that every device draws the same.
    drawn = [
        torch.rand(num_samples, max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for seed in seeds
    ]
    with evaluating(model):
        return _decode(model, prompts, tokens, num_samples, temperature, top_p, torch.cat(drawn).to(device))


class SamplerError(PlainError):
    """An engine cannot be reached, or does not give what training needs; says which and what to do."""


class Sampler(Protocol):
    """Where completions come from: the model itself (`ModelSampler`), or an engine that serves a copy of it."""

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
    ) -> Rollout:
        """As `sample`."""
        ...


class ModelSampler:
    """Samples from the model that is trained; under FSDP2 inside `held` alone."""

    def __init__(self, model: Any, tokens: SpecialTokens) -> None:
        self.model, self.tokens = model, tokens

    def __call__(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], **settings: Any) -> Rollout:
        return sample(self.model, prompts, self.tokens, seeds=seeds, **settings)


@contextmanager
def held(sampler: Sampler) -> Iterator[Sampler]:
    """A sampler of whose calls every process may make a different number: under FSDP2 each holds all parameters meanwhile."""
    with gathered(sampler.model) if isinstance(sampler, ModelSampler) else nullcontext():
        yield sampler


def choose(logp: Tensor, uniform: Tensor) -> Tensor:
    """The token [B] where the cumulated probability of logp [B, V] passes `uniform` [B] float64 in [0, 1). Probabilities
    need not be normalised; tokens of probability 0 are never chosen."""
    cumulated = logp.exp().double().cumsum(-1)  # [B, V]
    total = cumulated[:, -1]
    # rounding could make the product the total itself, which lies beyond every token
    at = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulated, at[:, None], right=True)[:, 0]


def _decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    tokens: SpecialTokens,
    num_samples: int,
    temperature: float,
    top_p: float,
    uniform: Tensor,
) -> Rollout:
    device, max_new_tokens = uniform.device, uniform.shape[1]
    prompt_ids, prompt_mask = left_pad(prompts, tokens.pad, device)  # [P0, P]
    step, positions = decoding(model), position_ids(prompt_mask)
    logits, cache = step(prompt_ids, prompt_mask, positions, None)
    if not bool(torch.isfinite(logits).all()):
        # one check per batch: a diverged model would otherwise surface as an obscure multinomial error, or not at all
        raise FloatingPointError("sample: the model's logits are not finite; its weights have diverged or are corrupt")
    if num_samples > 1:
        cache.batch_repeat_interleave(num_samples)
        prompt_ids, prompt_mask, positions, logits = (
            t.repeat_interleave(num_samples, 0) for t in (prompt_ids, prompt_mask, positions, logits)
        )

    rows = prompt_ids.shape[0]  # B
    eos = torch.tensor(tokens.eos, device=device)
    alive = torch.ones(rows, dtype=torch.bool, device=device)
    position = positions[:, -1]
    mask = prompt_mask
    ids_out, mask_out, logp_out, entropy_out = [], [], [], []
    for t in range(max_new_tokens):
        logp = tempered_log_softmax(logits, temperature or 1.0, tokens.banned)  # [B, V]
        chosen = logp.argmax(-1) if temperature == 0 else choose(nucleus(logp, top_p), uniform[:, t])
        chosen_logp = logp.gather(-1, chosen[:, None])[:, 0]
        ids_out.append(torch.where(alive, chosen, tokens.pad))
        mask_out.append(alive)
        logp_out.append(torch.where(alive, chosen_logp, 0.0))
        entropy_out.append(torch.where(alive, -(logp.exp() * logp).sum(-1), 0.0))
        alive = alive & ~torch.isin(chosen, eos)
        if t + 1 == max_new_tokens or not bool(alive.any()):
            break
        # rows that have ended keep decoding padding nobody attends to: cheaper than compacting the cache
        mask = torch.cat([mask, mask_out[-1].long()[:, None]], 1)
        position = position + 1
        logits, cache = step(ids_out[-1][:, None], mask, position[:, None], cache)
    ids, written, logps, entropy = (torch.stack(steps, 1) for steps in (ids_out, mask_out, logp_out, entropy_out))
    return Rollout(prompt_ids, prompt_mask, ids, written.long(), logps, entropy)
