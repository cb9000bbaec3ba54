"""Between text and tokens: prompts, answers, and the token ids with a role of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ._wrapped import forward_accepts
from .task import Messages


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids with a role."""

    pad: int  # fills ragged batches
    eos: tuple[int, ...]  # ids that end a completion
    # ids the policy never writes; masked out of the distribution in sampling AND loss, since a token that is sampled but
    # carries no gradient would drift freely
    banned: tuple[int, ...] = ()
    vocabulary: int | None = None  # size of the policy's output layer; None: unknown


def special_tokens(tokenizer: Any, model: Any) -> SpecialTokens:
    """Roles from the tokenizer and the model's generation config; pad defaults to eos and is banned unless it is one.

    Raises:
        ValueError: No end-of-sequence token anywhere.
    """
    eos: list[int] = []
    for owner in (tokenizer, getattr(model, "generation_config", None)):
        source = getattr(owner, "eos_token_id", None)
        for token in source if isinstance(source, (list, tuple)) else [source]:
            if token is not None and int(token) not in eos:
                eos.append(int(token))
    if not eos:
        raise ValueError(
            "expected an end-of-sequence token, found eos_token_id None in tokenizer and generation config; "
            "set tokenizer.eos_token"
        )
    pad = getattr(tokenizer, "pad_token_id", None)
    pad = eos[0] if pad is None else int(pad)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    return SpecialTokens(pad, tuple(eos), () if pad in eos else (pad,), vocabulary)


def encode_prompts(tokenizer: Any, prompts: Sequence[str | Messages]) -> list[list[int]]:
    """Token ids of prompts: texts as they are, messages through the chat template with the assistant's turn opened.

    Raises:
        ValueError: A prompt has no tokens; messages, and there is no template.
    """
    texts = [p for p in prompts if isinstance(p, str)]
    if len(texts) < len(prompts) and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "prompts are chat messages: expected a tokenizer with a chat template, found one without; give texts"
        )
    encoded = iter(tokenizer(texts)["input_ids"] if texts else [])  # one call: many small ones cost more than sampling
    rows = []
    for prompt in prompts:
        if isinstance(prompt, str):
            ids = next(encoded)
        else:
            messages = [dict(m) for m in prompt]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)[
                "input_ids"
            ]
        if not len(ids):
            raise ValueError(f"expected at least one token, the tokenizer made none of prompt {prompt!r}")
        rows.append([int(i) for i in ids])
    return rows


def encode_answers(tokenizer: Any, answers: Sequence[str], eos: int) -> list[list[int]]:
    """Token ids of right completions, each ended. One tokenisation of possibly several that read the same."""
    if not answers:
        return []
    return [[*map(int, ids), eos] for ids in tokenizer(list(answers), add_special_tokens=False)["input_ids"]]


def decode(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    """Completions as the verifiers see them: without special tokens."""
    return list(tokenizer.batch_decode(rows, skip_special_tokens=True))


def left_pad(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, P] and mask [B, P] with the text at the right edge, so that every row continues in the same column."""
    width = max(len(r) for r in rows)
    ids = torch.tensor([[pad] * (width - len(r)) + list(r) for r in rows], dtype=torch.long, device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], dtype=torch.long, device=device)
    return ids, mask


def right_pad(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, L] and mask [B, L] with the text at the left edge."""
    width = max(len(r) for r in rows)
    ids = torch.tensor([list(r) + [pad] * (width - len(r)) for r in rows], dtype=torch.long, device=device)
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows], dtype=torch.long, device=device)
    return ids, mask


def position_ids(mask: torch.Tensor) -> torch.Tensor:
    """Positions counted from each row's first real token; padding gets 0 (its keys are masked anyway)."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def decoding(model: Any) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Any], tuple[torch.Tensor, Any]]:
    """One step of decoding: `step(ids, mask, positions, cache)` gives logits [B, V] behind the last column and the new cache."""
    fixed: dict[str, Any] = {"logits_to_keep": 1} if forward_accepts(model, "logits_to_keep") else {}
    with_positions = forward_accepts(model, "position_ids")
    kept = "cache" if forward_accepts(model, "cache") else "past_key_values"  # the first from transformers 5.24 on

    def step(ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        given = fixed | {kept: cache} | ({"position_ids": positions} if with_positions else {})
        out = model(input_ids=ids, attention_mask=mask, use_cache=True, **given)
        return out.logits[:, -1], getattr(out, kept)

    return step
