"""From a judged batch to gradients: log-probabilities in micro-batches, losses that add up exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..logprobs import completion_logprobs
from ..text import SpecialTokens
from .config import GRPOConfig
from .losses import LossStats, policy_loss
from .parallel import Ranks, gathered
from .rollout import Batch
from .sampling import Rollout


def micro_batches(rollout: Rollout, rows: Tensor, config: GRPOConfig) -> list[Tensor]:
    """`rows` in pieces that fit `micro_batch_size` sequences and `micro_batch_tokens` positions, padding included.

    With a token budget sequences of like length come together, longest first: little padding, and memory shows its worst at
    once. A sequence longer than the budget is a piece of its own.
    """
    if not config.micro_batch_tokens:
        return list(rows.split(config.micro_batch_size or max(len(rows), 1))) if len(rows) else []
    prompts, completions = rollout.prompt_mask.sum(1).tolist(), rollout.completion_mask.sum(1).tolist()
    order = sorted(rows.tolist(), key=lambda i: -(prompts[i] + completions[i]))
    pieces: list[list[int]] = []
    widest = (0, 0)
    for i in order:
        here = max(widest[0], prompts[i]), max(widest[1], completions[i])
        n = len(pieces[-1]) + 1 if pieces else 0
        full = n * sum(here) > config.micro_batch_tokens or 0 < config.micro_batch_size < n
        if not pieces or full:
            pieces.append([])
            here = prompts[i], completions[i]
        pieces[-1].append(i)
        widest = here
    return [torch.tensor(piece, device=rows.device) for piece in pieces]


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
    with gathered(model):
        for rows in micro_batches(rollout, torch.arange(out.shape[0], device=out.device), config):
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
    ranks: Ranks | None = None,
    watch: Callable[[Sequence[str]], AbstractContextManager[None]] | None = None,
) -> tuple[float, LossStats, float]:
    """Forward and backward over the `rows` of one optimizer step, in micro-batches.

    Rows whose advantage is exactly 0 (their whole group agreed) have zero loss and zero gradient, so without a KL term
    they are left out of both passes; they still count in every normaliser. When that leaves no row, gradients are zeros.

    Args:
        model, tokens: The policy, in whose parameters gradients accumulate, and its padding, end and banned ids.
        rows: [b] row numbers of this minibatch.
        old_logp: [B, L] what ratios compare with; None: the policy itself, right for the only update of a batch.
        ref_logp: [B, L] of the frozen reference, or None.
        of: [b'] rows whose number normalises the loss, where `rows` are only some of them; None: `rows`.
        ranks: Processes that share the model; every one of them runs as many forward and backward passes as the busiest.
        watch: Entered for the forward and backward pass of every micro-batch, with its rows' domains.

    Returns:
        The loss, sums for reporting, and the summed |log-probability in training - in sampling| over the tokens that
        went through the model (`stats.tokens`); this process's part of each.
    """
    ranks = ranks or Ranks()
    mask = batch.rollout.completion_mask
    of = rows if of is None else of
    total_tokens, total_sequences = ranks.sum([float(mask[of].sum()), len(of)])
    live = rows if config.kl_beta > 0 else rows[batch.advantages[rows] != 0]
    loss_sum, gap, stats = 0.0, 0.0, LossStats()
    pieces = micro_batches(batch.rollout, live, config)
    passes = ranks.most(len(pieces))
    if not passes:
        for p in model.parameters():
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)
        return loss_sum, stats, gap
    for number in range(passes):
        if number >= len(pieces):
            # the others still have some: gathering parameters and summing gradients takes everybody
            idle = batch.rollout.select(torch.zeros(1, dtype=torch.long, device=rows.device))
            (0.0 * rollout_logprobs(model, idle, tokens, config).sum()).backward()
            continue
        part_rows = pieces[number]
        part = batch.rollout.select(part_rows)
        width = part.completion_ids.shape[1]
        with nullcontext() if watch is None else watch([batch.domains[i] for i in part_rows.tolist()]):
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
                total_sequences=int(total_sequences),
                total_tokens=total_tokens,
            )
            (loss * ranks.size).backward()  # FSDP2 averages gradients, but the processes' losses are shares of one sum
        loss_sum += float(loss.detach())
        stats.add(part_stats)
        gap += float((logp.detach() - part.logps).abs().masked_fill(part.completion_mask == 0, 0.0).sum())
    return loss_sum, stats, gap
