"""Clipped policy-gradient losses: grpo, dr_grpo, dapo, gspo, with an optional KL term.

All four share the ratio r = exp(logp - old) and the pessimistic min(r A, clip(r, 1-low, 1+high) A); they differ in
where the ratio lives and what the sum is divided by:

    grpo     per token, mean over a sequence's tokens, then over sequences          (arXiv:2402.03300)
    dr_grpo  per token, sum / (B * L_max): no weight on sequences for being short   (arXiv:2503.20783)
    dapo     per token, mean over all tokens of the batch; use clip_high > clip_low (arXiv:2503.14476)
    gspo     one ratio per sequence, exp of its mean token log-ratio, mean over sequences (arXiv:2507.18071)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from .._errors import one_of
from .config import LossKind


@dataclass
class LossStats:
    """Sums over a (micro-)batch, so that several add up exactly; divide by `tokens` or `units` to report.

    Attributes:
        tokens: Completion tokens.
        units: Places a ratio lives: tokens, or sequences for gspo.
        clipped: Units whose gradient the clip removed.
        kl: Sum of the k3 estimates over tokens (0 without reference).
    """

    tokens: float = 0.0
    units: float = 0.0
    clipped: float = 0.0
    kl: float = 0.0

    def add(self, other: LossStats) -> None:
        self.tokens += other.tokens
        self.units += other.units
        self.clipped += other.clipped
        self.kl += other.kl


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Unbiased, non-negative estimate of KL(policy || reference) per sampled token: e^d - d - 1, d = ref - logp."""
    delta = ref_logp - logp
    return torch.expm1(delta) - delta


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    kind: LossKind = "grpo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    max_tokens: int | None = None,
    ref_logp: Tensor | None = None,
    kl_beta: float = 0.0,
    total_sequences: int | None = None,
    total_tokens: float | None = None,
) -> tuple[Tensor, LossStats]:
    """Loss to minimise for a batch, or one micro-batch's exact share of it.

    Args:
        logp: [B, L] log-probabilities of the sampled tokens, with gradient.
        old_logp: [B, L] the same under the policy that the ratio compares with; detached here.
        advantages: [B].
        mask: [B, L] 1 on completion tokens (the end-of-sequence token included), 0 on padding. Values under 0 are
            ignored, so padding may hold anything finite or not.
        kind: Which loss, see the module's text.
        clip_low: The ratio is clipped below 1 - clip_low ...
        clip_high: ... and above 1 + clip_high.
        max_tokens: L_max of dr_grpo, the sampler's limit; required there.
        ref_logp: [B, L] log-probabilities under the frozen reference; required when kl_beta > 0.
        kl_beta: Weight of the KL term, aggregated over tokens as the policy term is (per sequence for gspo).
        total_sequences: Sequences of the whole batch when this is one micro-batch; defaults to B.
        total_tokens: Completion tokens of the whole batch when this is one micro-batch; defaults to mask.sum().
            With both given, the losses (and gradients) of the micro-batches add up to those of the batch.

    Returns:
        Scalar loss and sums for reporting.

    Raises:
        ValueError: Shapes that do not belong together, an unknown kind, or a missing argument of this kind.
    """
    alike = old_logp.shape == mask.shape == logp.shape and advantages.shape == logp.shape[:1]
    if logp.dim() != 2 or not alike:
        raise ValueError(
            "policy_loss: expected logp, old_logp, mask [B, L] and advantages [B], found "
            f"{tuple(logp.shape)}, {tuple(old_logp.shape)}, {tuple(mask.shape)}, {tuple(advantages.shape)}"
        )
    one_of("policy_loss: kind", kind, get_args(LossKind))
    if kind == "dr_grpo" and (max_tokens is None or max_tokens < 1):
        raise ValueError(f"policy_loss: dr_grpo divides by B * L_max and needs max_tokens >= 1, found {max_tokens!r}")
    if kl_beta > 0 and (ref_logp is None or ref_logp.shape != logp.shape):
        found = None if ref_logp is None else tuple(ref_logp.shape)
        raise ValueError(f"policy_loss: kl_beta={kl_beta} needs ref_logp of shape {tuple(logp.shape)}, found {found}")

    on = mask.bool()
    weight = on.to(logp.dtype)  # [B, L]
    lengths = weight.sum(1).clamp(min=1)  # [B]
    sequences = total_sequences if total_sequences is not None else max(logp.shape[0], 1)
    tokens = total_tokens if total_tokens is not None else float(weight.sum())
    # masked_fill before exp: 0 * inf from padding would be NaN in the backward even under a zero weight
    log_ratio = (logp - old_logp.detach()).masked_fill(~on, 0.0)
    per_token = advantages.to(logp.dtype)[:, None]  # [B, 1]

    if kind == "gspo":
        sequence_ratio = (log_ratio * weight).sum(1, keepdim=True) / lengths[:, None]  # [B, 1]
        objective, clipped = _clipped(sequence_ratio, per_token, clip_low, clip_high)
        live = on.any(1, keepdim=True)
        policy = -(objective * live).sum() / sequences
        units, clipped_units = float(live.sum()), float((clipped & live).sum())
    else:
        objective, clipped = _clipped(log_ratio, per_token, clip_low, clip_high)  # [B, L]
        policy = -_aggregate(objective, weight, lengths, kind, sequences, tokens, max_tokens)
        units, clipped_units = float(weight.sum()), float((clipped & on).sum())

    stats = LossStats(tokens=float(weight.sum()), units=units, clipped=clipped_units)
    if ref_logp is not None and kl_beta > 0:
        kl = kl_k3(logp.masked_fill(~on, 0.0), ref_logp.detach().masked_fill(~on, 0.0))
        stats.kl = float(kl.detach().sum())
        policy = policy + kl_beta * _aggregate(kl, weight, lengths, kind, sequences, tokens, max_tokens)
    return policy, stats


def _clipped(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """min(r A, clip(r) A) and where the clipped branch was the smaller one (no gradient flows there)."""
    ratio = log_ratio.exp()
    unclipped = ratio * advantages
    bounded = ratio.clamp(1 - low, 1 + high) * advantages
    return torch.minimum(unclipped, bounded), bounded < unclipped


def _aggregate(
    values: Tensor, weight: Tensor, lengths: Tensor, kind: str, sequences: int, tokens: float, max_tokens: int | None
) -> Tensor:
    """Reduce [B, L] token values to the scalar this kind of loss prescribes."""
    if kind == "dapo":
        return (values * weight).sum() / max(tokens, 1.0)
    if kind == "dr_grpo":
        assert max_tokens is not None
        return (values * weight).sum() / (sequences * max_tokens)
    return ((values * weight).sum(1) / lengths).sum() / sequences
