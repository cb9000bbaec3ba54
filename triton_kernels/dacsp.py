"""The sign rule in four launches: partial coefficients, totals, the K x K core, the edit. Nothing waits for the device."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _ops
from . import _blocks
from ._bases import Bases
from ._plan import Work, launch
from .edit import apply
from .project import coefficients, plan_projection


@triton.jit
def times(matrix, vector, row, rows, SIZE: tl.constexpr):
    """Rows `[SIZE]` of matrix @ vector in fp64."""
    value = tl.zeros([SIZE], tl.float64)
    for first in range(0, rows, SIZE):
        j = first + tl.arange(0, SIZE)
        v = tl.load(vector + j, mask=j < rows, other=0.0)
        mask = (row < rows)[:, None] & (j < rows)[None, :]
        m = tl.load(matrix + row[:, None] * rows + j[None, :], mask=mask, other=0.0).to(tl.float64)
        # Only products that exist: a zero beyond the edge times an infinity would be no number.
        value += tl.sum(tl.where(mask, m * v[None, :], 0.0), axis=1)
    return value


@triton.jit
def core_kernel(
    coefficients, aligned: tl.float64, conflict: tl.float64, threshold: tl.float64, aligneds, conflicts, thresholds,
    root, root_stride, middle, coeffs, classes, mix, rows,
    TENSORS: tl.constexpr, ROOTED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """`linalg.dacsp_core` for one set of coefficients: classes, and x = (w-1) c or R diag(w-1) R c."""
    group = tl.program_id(0).to(tl.int64)
    c, r = coefficients + group * rows, root + group * root_stride
    for first in range(0, rows, SIZE):
        row = first + tl.arange(0, SIZE)
        inside = row < rows
        value = tl.load(c + row, mask=inside, other=0.0)
        zero = tl.zeros([SIZE], tl.float64)
        if TENSORS:
            up = zero + tl.load(aligneds + row, mask=inside, other=1.0)
            down = zero + tl.load(conflicts + row, mask=inside, other=1.0)
            tau = zero + tl.load(thresholds + row, mask=inside, other=0.0)
        else:
            up, down, tau = zero + aligned, zero + conflict, zero + threshold
        above, below = value > tau, value < -tau
        gain = tl.where(above, up - 1.0, zero)
        gain = tl.where(below, down - 1.0, gain)
        tl.store(coeffs + group * rows + row, value.to(tl.float32), mask=inside)
        side = above.to(tl.int8) - below.to(tl.int8)
        tl.store(classes + group * rows + row, side, mask=inside)
        if ROOTED:
            tl.store(middle + group * rows + row, gain * times(r, c, row, rows, SIZE), mask=inside)
        else:
            tl.store(mix + group * rows + row, (gain * value).to(tl.float32), mask=inside)
    if ROOTED:
        tl.debug_barrier()  # the first product is in memory, written by other threads of this program
        for first in range(0, rows, SIZE):
            row = first + tl.arange(0, SIZE)
            value = times(r, middle + group * rows, row, rows, SIZE)
            tl.store(mix + group * rows + row, value.to(tl.float32), mask=row < rows)


def _apply_rule(work: Work, bases: Bases, weights, root: Tensor | None) -> tuple[Tensor, Tensor]:
    totals = coefficients(work, bases, torch.float64)
    coeffs = torch.empty(totals.shape, dtype=torch.float32, device=totals.device)
    classes = torch.empty(totals.shape, dtype=torch.int8, device=totals.device)
    mix, middle = torch.empty_like(coeffs), totals if root is None else torch.empty_like(totals)
    tensors = isinstance(weights[0], Tensor)
    scalars, vectors = ((1.0, 1.0, 0.0), weights) if tensors else (weights, (totals,) * 3)
    launch(
        core_kernel, (work.sets,) if bases.rows else (0,), totals,
        totals, *scalars, *vectors, totals if root is None else root, bases.rows**2 if work.per_tensor else 0,
        middle, coeffs, classes, mix, bases.rows,
        tensors, root is not None, min(max(_blocks.power_of_two(bases.rows), 16), 64),
    )  # fmt: skip
    if bases.rows:  # without rows there is nothing to edit, and the scale is one
        apply(work, bases, mix, torch.ones(work.sets, dtype=torch.float32, device=mix.device))
    return coeffs, classes


def dacsp_(grads, bases, aligned, conflict, threshold, root=None, scales=None):
    _ops.check_dacsp(grads, bases, aligned, conflict, threshold, root, scales)
    rows = Bases.of(bases, scales)
    work = plan_projection(grads, (), False, rows)
    shape = work.shape + tuple(bases.shape[:2])
    coeffs, classes = _apply_rule(work, rows, (aligned, conflict, threshold), root)
    return coeffs.view(shape), classes.view(shape)


def dacsp_list(grads, bases, offsets, aligned, conflict, threshold, root=None, scales=None, per_tensor=False):
    _ops.check_dacsp(grads, bases, aligned, conflict, threshold, root, scales, offsets, per_tensor)
    rows = Bases.of(bases, scales)
    work = plan_projection(grads, offsets, per_tensor, rows)
    shape = work.shape + tuple(bases.shape[:2])
    coeffs, classes = _apply_rule(work, rows, (aligned, conflict, threshold), root)
    return coeffs.view(shape), classes.view(shape)


KERNELS = {
    "dacsp_": dacsp_,
    "dacsp_.tensor": dacsp_,
    "dacsp_.list": dacsp_list,
    "dacsp_.list_tensor": dacsp_list,
}
