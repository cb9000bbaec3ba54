"""A hash of parameter values that does not depend on how they are spread over processes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .shards import Shards

_CHUNK = 1 << 20
_INT_OF = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# odd 64-bit constants (splitmix64, Steele et al. 2014), as signed numbers
_MULTIPLIERS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
_STEP = -0x61C8864680B583EB


def hash_parameters(tensors: Iterable[Tensor], shards: Shards | None = None) -> str:
    """Hash of parameter values, to chain checkpoints: this stage's start is an earlier stage's end.

    A sum over elements of mixed (position, bits): every process adds up its own elements, and the sums are added over processes.
    It tells apart states of one training run; it is no protection against forgery.

    Args:
        tensors: local parts, in order.
        shards: where they belong; None when they are whole.

    Returns:
        32 hexadecimal digits.
    """
    total: Tensor | None = None
    for number, tensor in enumerate(tensors):
        flat = tensor.detach().reshape(-1)
        first = shards.pieces[number].start if shards is not None else 0
        bits = flat.view(_INT_OF[flat.element_size()])
        for at in range(0, max(flat.numel(), 1), _CHUNK):
            part = bits[at : at + _CHUNK].long()
            place = torch.arange(first + at, first + at + part.numel(), device=part.device)
            mixed = _mix((place + (number << 40)) * _STEP + part)
            sums = torch.stack([mixed.sum(), _mix(mixed + _STEP).sum()])  # wraps around, as it should
            total = sums if total is None else total + sums.to(total.device)
    if total is None:
        return "0" * 32
    if shards is not None:
        shards.sum_(total)
    low, high = (int(v) & (1 << 64) - 1 for v in total)
    return f"{low:016x}{high:016x}"


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser; int64 arithmetic wraps, the shift is arithmetic instead of logical, which mixes as well."""
    x = (x ^ (x >> 30)) * _MULTIPLIERS[0]
    x = (x ^ (x >> 27)) * _MULTIPLIERS[1]
    return x ^ (x >> 31)
