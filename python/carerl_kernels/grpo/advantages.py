"""Group-relative advantages come from `torch.ops.carerl.group_advantages`; here is how much they have to say."""

from __future__ import annotations

import torch
from torch import Tensor


def informative_fraction(rewards: Tensor, group_ids: Tensor) -> float:
    """Share of groups with at least two different rewards, the only ones that move the policy."""
    groups = torch.unique(group_ids)
    if groups.numel() == 0:
        return 0.0
    differing = [bool((rewards[group_ids == g] != rewards[group_ids == g][0]).any()) for g in groups]
    return sum(differing) / len(differing)
