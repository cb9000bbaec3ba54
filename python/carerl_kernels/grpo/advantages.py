"""Group-relative advantages: what makes one completion of a prompt better than the others of the same prompt."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    normalize_std: bool = True,
    eps: float = 1e-6,
    judged: Tensor | None = None,
) -> Tensor:
    """Rewards relative to their group's mean, optionally in units of its standard deviation.

    A_i = (r_i - mean_g) / (std_g + eps) with the unbiased std_g (as TRL and verl compute it), or r_i - mean_g.
    A group whose rewards are all equal teaches nothing and gets exact zeros, whatever the rounding of its mean;
    so does a group of one. Invariant to a shift of all rewards of a group, to permutations, and with
    `normalize_std` to a positive scale (up to eps).

    Args:
        rewards: [B] finite rewards.
        group_ids: [B] integers; equal numbers are completions of the same prompt. Need not be sorted or contiguous.
        normalize_std: False is Dr. GRPO (arXiv:2503.20783): no weight on groups for being nearly unanimous.
        eps: Added to the standard deviation; keeps groups whose rewards differ by rounding only from mattering.
        judged: [B] bool; rows that are False have no reward (whatever `rewards` holds there). They get exact zeros, and
            the other rows the advantages they would have without them. None: all are judged.

    Returns:
        [B] float32 advantages on the rewards' device.

    Raises:
        ValueError: Shapes differ, or a judged reward is not finite.
    """
    if judged is not None:
        if judged.shape != rewards.shape or judged.dtype != torch.bool:
            raise ValueError(
                f"group_advantages: expected judged bool {tuple(rewards.shape)}, "
                f"found {judged.dtype} {tuple(judged.shape)}"
            )
        if not bool(judged.all()):
            out = torch.zeros(rewards.shape, dtype=torch.float32, device=rewards.device)
            out[judged] = group_advantages(rewards[judged], group_ids[judged], normalize_std=normalize_std, eps=eps)
            return out
    if rewards.dim() != 1 or group_ids.shape != rewards.shape:
        raise ValueError(
            f"group_advantages: expected rewards and group_ids of one shape [B], "
            f"found {tuple(rewards.shape)} and {tuple(group_ids.shape)}"
        )
    if group_ids.is_floating_point() or group_ids.is_complex():
        raise ValueError(f"group_advantages: expected integer group_ids, found {group_ids.dtype}")
    r = rewards.detach().double()
    if not bool(torch.isfinite(r).all()):
        raise ValueError("group_advantages: expected finite rewards, found NaN or infinity")
    if r.numel() == 0:
        return r.float()

    _, group = torch.unique(group_ids, return_inverse=True)  # [B] in 0..G-1
    groups = int(group.max()) + 1
    zeros = r.new_zeros(groups)
    count = zeros.index_add(0, group, torch.ones_like(r))  # [G]
    mean = zeros.index_add(0, group, r) / count  # [G]
    low = zeros.scatter_reduce(0, group, r, "amin", include_self=False)
    high = zeros.scatter_reduce(0, group, r, "amax", include_self=False)
    centred = r - mean[group]
    if normalize_std:
        variance = zeros.index_add(0, group, centred.square()) / (count - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + eps)[group]
    return torch.where((high > low)[group], centred, torch.zeros_like(centred)).float()


def informative_fraction(rewards: Tensor, group_ids: Tensor) -> float:
    """Share of groups with at least two different rewards, the only ones that move the policy."""
    groups = torch.unique(group_ids)
    if groups.numel() == 0:
        return 0.0
    differing = [bool((rewards[group_ids == g] != rewards[group_ids == g][0]).any()) for g in groups]
    return sum(differing) / len(differing)
