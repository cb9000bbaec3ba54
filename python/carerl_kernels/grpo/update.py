"""From a judged batch to gradients: log-probabilities in micro-batches, losses that add up exactly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .config import GRPOConfig
from .logprobs import completion_logprobs
from .losses import LossStats, policy_loss
from .rollout import Batch
from .sampling import Rollout
from .text import SpecialTokens


def micro_batches(rows: Tensor, size: int) -> Iterator[Tensor]:
    """`rows` in consecutive pieces of at most `size` (0: one piece)."""
    yield from rows.split(size or max(len(rows), 1))


def rollout_logprobs(model: Any, rollout: Rollout, tokens: SpecialTokens, config: GRPOConfig) -> Tensor:
    """Log-probabilities [B, L] of the sampled tokens at the sampling temperature, with gradient."""
    return completion_logprobs(
        model,
        rollout.input_ids,
        rollout.attention_mask,
        rollout.completion_ids.shape[1],
        temperature=config.temperature,
        banned=tokens.banned,
    )


@torch.no_grad()
def frozen_logprobs(model: Any, rollout: Rollout, tokens: SpecialTokens, config: GRPOConfig) -> Tensor:
    """The same [B, L] in micro-batches and without gradient; 0 on padding."""
    out = torch.zeros(rollout.completion_ids.shape, dtype=torch.float32, device=rollout.completion_ids.device)
    for rows in micro_batches(torch.arange(out.shape[0], device=out.device), config.micro_batch_size):
        part = rollout.select(rows)
        out[rows, : part.completion_ids.shape[1]] = rollout_logprobs(model, part, tokens, config).float()
    return out.masked_fill(rollout.completion_mask == 0, 0.0)


def accumulate_gradients(
    model: Any,
    batch: Batch,
    rows: Tensor,
    tokens: SpecialTokens,
    config: GRPOConfig,
    *,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    of: Tensor | None = None,
) -> tuple[float, LossStats, float]:
    """Forward and backward over the `rows` of one optimizer step, in micro-batches.

    Rows whose advantage is exactly 0 (their whole group agreed) have zero loss and zero gradient, so without a KL term
    they are left out of both passes; they still count in every normaliser. When that leaves no row, gradients are zeros.

    Args:
        model: Policy; gradients accumulate in its parameters.
        batch: Judged completions.
        rows: [b] row numbers of this minibatch.
        tokens: Padding, end and banned ids.
        config: Loss settings.
        old_logp: [B, L] what ratios compare with; None: the policy itself, right for the only update of a batch.
        ref_logp: [B, L] of the frozen reference, or None.
        of: [b'] rows whose number normalises the loss, where `rows` are only some of them; None: `rows`.

    Returns:
        The loss, sums for reporting, and the summed |log-probability in training - in sampling| over the tokens that
        went through the model (`stats.tokens`).
    """
    mask = batch.rollout.completion_mask
    of = rows if of is None else of
    total_tokens = float(mask[of].sum())
    live = rows if config.kl_beta > 0 else rows[batch.advantages[rows] != 0]
    loss_sum, gap, stats = 0.0, 0.0, LossStats()
    if not len(live):
        for p in model.parameters():
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)
        return loss_sum, stats, gap
    for part_rows in micro_batches(live, config.micro_batch_size):
        part = batch.rollout.select(part_rows)
        width = part.completion_ids.shape[1]
        logp = rollout_logprobs(model, part, tokens, config)
        old = logp.detach() if old_logp is None else old_logp[part_rows, :width]
        loss, part_stats = policy_loss(
            logp,
            old,
            batch.advantages[part_rows],
            part.completion_mask,
            kind=config.loss,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            max_tokens=config.max_new_tokens,
            ref_logp=None if ref_logp is None else ref_logp[part_rows, :width],
            kl_beta=config.kl_beta,
            total_sequences=len(of),
            total_tokens=total_tokens,
        )
        loss.backward()
        loss_sum += float(loss.detach())
        stats.add(part_stats)
        gap += float((logp.detach() - part.logps).abs().masked_fill(part.completion_mask == 0, 0.0).sum())
    return loss_sum, stats, gap
