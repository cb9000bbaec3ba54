"""Thin products of weight matrices in plain PyTorch, batched where matrices are small and alike.

Nothing of the size of all parameters is ever allocated: matrices are stacked, or rows of a low-precision one converted, a few
megabytes at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

WORKSPACE = 32 << 20
"""Bytes of float32 copies at a time, at most."""
IN_CACHE = 1 << 20
"""The same on a CPU: a copy that leaves the caches, for pages that the kernel has to clear first, costs more than the product."""


def workspace(device: torch.device) -> int:
    """Bytes of float32 copies at a time on this device."""
    return IN_CACHE if device.type == "cpu" else WORKSPACE


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """float32 matmuls are float32 inside: no TF32, no bfloat16 passes, no autocast, whatever the training loop chose."""
    before = torch.get_float32_matmul_precision()
    cast = torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with cast:
            yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)


def _row_blocks(matrix: Tensor, copied: bool = False) -> Iterator[slice]:
    """All rows at once in float32, else (or when `copied`) as many as fit the workspace in float32."""
    m, n = matrix.shape
    whole = matrix.dtype == torch.float32 and not copied
    step = max(m, 1) if whole else max(1, workspace(matrix.device) // max(4 * n, 1))
    for start in range(0, m, step):
        yield slice(start, min(start + step, m))


def times(matrices: Sequence[Tensor], right: Tensor) -> Tensor:
    """`W V` `[c, m, q]` of c matrices `[m, n]` and V `[c, n, q]` float32."""
    if len(matrices) > 1:
        return torch.stack(list(matrices)).float() @ right
    (matrix,) = matrices
    out = right.new_empty(1, matrix.shape[0], right.shape[-1])
    for rows in _row_blocks(matrix):
        torch.mm(matrix[rows].float(), right[0], out=out[0, rows])
    return out


def times_transposed(matrices: Sequence[Tensor], left: Tensor) -> Tensor:
    """`W^T U` `[c, n, q]` of c matrices `[m, n]` and U `[c, m, q]` float32."""
    if len(matrices) > 1:
        return torch.stack(list(matrices)).float().mT @ left
    (matrix,) = matrices
    out = left.new_zeros(1, matrix.shape[1], left.shape[-1])
    for rows in _row_blocks(matrix):
        out[0].addmm_(matrix[rows].float().mT, left[0, rows])
    return out


def add_product_(matrices: Sequence[Tensor], left: Tensor, right: Tensor, moved: Tensor | None = None) -> None:
    """`W <- W + L R^T` in place; L `[c, m, q]`, R `[c, n, q]` float32; one rounding in low precision.

    `moved` `[c, m or 1, n or 1]`: what shall change; everything else keeps its bits, also of NaN and -0.
    """
    if len(matrices) > 1:
        before = torch.stack(list(matrices))
        edited = torch.baddbmm(before.float(), left, right.mT)
        if moved is not None:
            edited = torch.where(moved, edited.to(before.dtype), before)
        torch._foreach_copy_(list(matrices), list(edited.unbind()))
        return
    (matrix,) = matrices
    for rows in _row_blocks(matrix, copied=moved is not None):
        part = matrix[rows]
        if moved is not None:
            edited = torch.addmm(part.float(), left[0, rows], right[0].mT).to(part.dtype)
            part.copy_(torch.where(moved[0, rows] if moved.shape[1] > 1 else moved[0], edited, part))
        elif matrix.dtype == torch.float32:
            part.addmm_(left[0, rows], right[0].mT)
        else:
            part.copy_(torch.addmm(part.float(), left[0, rows], right[0].mT))
