"""Bases as the kernels see them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _ops


@dataclass(frozen=True)
class Bases:
    """Rows `[K, N]` and, of coded ones, their scales `[K, blocks]` of `2**shift` elements each.

    Attributes:
        data: the stored rows; fp8 as its bits (uint8), which every device can load.
        codes: 0 floats, 1 int8, 2 fp8.
    """

    data: Tensor
    scales: Tensor
    rows: int
    n: int
    blocks: int
    shift: int
    codes: int

    @classmethod
    def of(cls, bases: Tensor, scales: Tensor | None = None) -> "Bases":
        n = bases.shape[-1]
        rows = math.prod(bases.shape[:-1])
        if scales is None:
            return cls(bases, bases, rows, n, 0, 0, 0)
        blocks = scales.shape[-1]
        shift = _ops.block_of("triton", n, blocks).bit_length() - 1
        if bases.dtype == torch.int8:
            return cls(bases, scales, rows, n, blocks, shift, 1)
        return cls(bases.view(torch.uint8), scales, rows, n, blocks, shift, 2)
