"""Sums of experts' changes as others make them: baselines for :func:`~carerl_kernels.guard.checkpoints.merge`.

Both take one tensor of the common start and the same tensor of every expert, and give the merged one in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def task_arithmetic(start: Tensor, experts: Sequence[Tensor], scale: float = 1.0) -> Tensor:
    """`start + scale * sum(expert - start)` (Ilharco et al., "Editing models with task arithmetic", ICLR 2023); the average of
    the experts with `scale = 1 / len(experts)`."""
    return start.float() + scale * sum((expert.float() - start.float() for expert in experts), torch.zeros(()))


def ties(start: Tensor, experts: Sequence[Tensor], scale: float = 1.0, density: float = 0.2) -> Tensor:
    """TIES merging: of every change the largest numbers are kept, every element elects a sign by the sum, and those numbers that
    have it are averaged (Yadav et al., "TIES-Merging: resolving interference when merging models", NeurIPS 2023).

    Args:
        start, experts: The weights before training and those of every expert, all of one shape.
        scale: The scale of the merged change (the paper's lambda).
        density: share of every change that is kept, by size, tensor by tensor as mergekit does (the paper's k: 20 %, over all
            tensors together).

    Raises:
        ValueError: a density out of range.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density: expected 0 < density <= 1, found {density}")
    changes = torch.stack([_largest(expert.float() - start.float(), density) for expert in experts])
    sign = changes.sum(0).sign()
    agree = (changes.sign() == sign) & (changes != 0)
    mean = (changes * agree).sum(0) / agree.sum(0).clamp_min(1)
    return start.float() + scale * mean


def _largest(change: Tensor, density: float) -> Tensor:
    """The change with zeros in place of all but its largest numbers, at least one."""
    if not change.numel():
        return change
    count = max(1, round(density * change.numel()))
    flat = change.flatten()
    kept = flat.abs().topk(count).indices
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view_as(change)
