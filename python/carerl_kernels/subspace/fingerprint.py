"""A hash of parameter values that does not depend on how they are spread over processes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .shards import Shards

_CHUNK = 1 << 15  # temporaries stay in cache, and too few elements for torch to split among threads
INT_OF = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
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
        16 hexadecimal digits.
    """
    total: Tensor | None = None
    for number, tensor in enumerate(tensors):
        flat = tensor.detach().reshape(-1)
        first = shards.pieces[number].start if shards is not None else 0
        bits = flat.view(INT_OF[flat.element_size()])
        places = torch.arange(min(_CHUNK, flat.numel()), device=flat.device) * _STEP
        for at in range(0, flat.numel(), _CHUNK):
            part = bits[at : at + _CHUNK].long()
            part += places[: part.numel()]
            part += wrapped((first + at + (number << 40)) * _STEP)
            sum_ = _mix_(part).sum()  # wraps around, as it should
            total = sum_ if total is None else total + sum_.to(total.device)
    if total is None:
        device = next(iter(tensors)).device if isinstance(tensors, list) and tensors else "cpu"
        total = torch.zeros((), dtype=torch.int64, device=device)
    if shards is not None:
        shards.sum_(total)
    return f"{int(total) & (1 << 64) - 1:016x}"


def wrapped(number: int) -> int:
    """As a signed 64-bit number."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def _mix_(x: Tensor) -> Tensor:
    """splitmix64's finaliser; int64 arithmetic wraps, the shift is arithmetic instead of logical, which mixes as well."""
    x ^= x >> 30
    x *= _MULTIPLIERS[0]
    x ^= x >> 27
    x *= _MULTIPLIERS[1]
    x ^= x >> 31
    return x
