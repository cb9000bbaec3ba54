"""One-sided directions of weight matrices in one launch over a list: coefficients of inputs, confinement, the sign rule.

A program takes some outputs of one matrix. It sums their coefficients over tiles of inputs, decides what they move by, and goes
over the tiles again, which L2 still holds. Outputs that do not move are not written. More than :data:`_blocks.LARGEST_INPUTS`
directions do not fit its registers: the reference serves those.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _ops, reference
from . import _blocks
from ._plan import addresses, launch
from ._tiles import finite


@triton.jit
def load_tile(pointer, output, input, outputs, inputs, output_stride, input_stride):
    """Some inputs of some outputs `[OUT, IN]` in fp32, zeros beyond the edges."""
    mask = (output < outputs)[:, None] & (input < inputs)[None, :]
    at = output.to(tl.int64)[:, None] * output_stride + input.to(tl.int64)[None, :] * input_stride
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_directions(directions, row, input, rows, inputs):
    """`[K, IN]` in fp32."""
    mask = (row < rows)[:, None] & (input < inputs)[None, :]
    return tl.load(directions + row[:, None] * inputs + input[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def coefficients(
    pointer, directions, output, row, outputs, inputs, rows, output_stride, input_stride,
    OUT: tl.constexpr, IN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """W V^T of some outputs `[OUT, K]`. Products of fp32 are fp32: no TF32."""
    sums = tl.zeros([OUT, ROWS], tl.float32)
    for first in range(0, inputs, IN):
        input = first + tl.arange(0, IN)
        w = load_tile(pointer, output, input, outputs, inputs, output_stride, input_stride)
        v = load_directions(directions, row, input, rows, inputs)
        sums += tl.dot(w, tl.trans(v), input_precision="ieee")
    return sums


@triton.jit
def input_project_kernel(
    table, like, directions, out, outputs, inputs, rows, output_stride, input_stride,
    ALIGNED: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(1).to(tl.int64)
    pointer = tl.load(table + 4 * matrix).to(like.dtype)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    output, row = tl.program_id(0) * OUT + tl.arange(0, OUT), tl.arange(0, ROWS)
    own = directions + matrix * rows * inputs
    c = coefficients(
        pointer, own, output, row, outputs, inputs, rows, output_stride, input_stride, OUT, IN, ROWS
    )  # fmt: skip
    mask = (output < outputs)[:, None] & (row < rows)[None, :]
    tl.store(out + (matrix * outputs + output.to(tl.int64)[:, None]) * rows + row[None, :], c, mask=mask)


@triton.jit
def input_edit_kernel(
    table, like, directions, anchor, lower, upper, aligned, conflict, threshold, partials,
    outputs, inputs, rows, output_stride, input_stride, blocks,
    ALIGNED: tl.constexpr, ANCHORED: tl.constexpr, LOWER: tl.constexpr, UPPER: tl.constexpr,
    OUT: tl.constexpr, IN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Edits some outputs; partials `[G, blocks]` fp64: the sum of x^2."""
    matrix = tl.program_id(1).to(tl.int64)
    pointer = tl.load(table + 4 * matrix).to(like.dtype)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    output, row = tl.program_id(0) * OUT + tl.arange(0, OUT), tl.arange(0, ROWS)
    own = directions + matrix * rows * inputs
    c = coefficients(
        pointer, own, output, row, outputs, inputs, rows, output_stride, input_stride, OUT, IN, ROWS
    )  # fmt: skip
    mask = (output < outputs)[:, None] & (row < rows)[None, :]
    if ANCHORED:
        at = (matrix * outputs + output.to(tl.int64)[:, None]) * rows + row[None, :]
        d = tl.load(anchor + at, mask=mask, other=0.0) - c
        over, under = d, d
        if UPPER:
            over = d - tl.load(upper + at, mask=mask, other=0.0)
        if LOWER:
            under = d + tl.load(lower + at, mask=mask, other=0.0)
        x = tl.where(over > 0, over, 0.0) + tl.where(under < 0, under, 0.0)
        broken = (over != over) | (under != under) | (finite(d) == 0)
    else:
        inside = row < rows
        up = tl.load(aligned + row, mask=inside, other=1.0)[None, :] - 1.0
        down = tl.load(conflict + row, mask=inside, other=1.0)[None, :] - 1.0
        tau = tl.load(threshold + row, mask=inside, other=0.0)[None, :]
        x = tl.where(c > tau, up * c, tl.where(c < -tau, down * c, 0.0))
        broken = finite(c) == 0
    x = tl.where(mask, x, 0.0)
    broken = mask & (broken | (finite(x) == 0))
    whole = tl.max(broken.to(tl.int32), axis=1) == 0
    moved = whole & (tl.max((x != 0).to(tl.int32), axis=1) != 0)
    x = tl.where(moved[:, None], x, 0.0)
    wide = x.to(tl.float64)
    tl.store(partials + matrix * blocks + tl.program_id(0), tl.sum(tl.sum(wide * wide, axis=1), axis=0))
    if tl.max(moved.to(tl.int32), axis=0) != 0:
        for first in range(0, inputs, IN):
            input = first + tl.arange(0, IN)
            v = load_directions(own, row, input, rows, inputs)
            w = load_tile(pointer, output, input, outputs, inputs, output_stride, input_stride)
            value = w + tl.dot(x, v, input_precision="ieee")
            place = output.to(tl.int64)[:, None] * output_stride + input.to(tl.int64)[None, :] * input_stride
            tl.store(pointer + place, value.to(like.dtype.element_ty), mask=moved[:, None] & (input < inputs)[None, :])


def _outline(matrices, directions: Tensor, left: bool) -> tuple[tuple[int, ...], tuple, tuple[int, int, int]]:
    """Grid, sizes and strides, and tile of a call."""
    m, n = matrices[0].shape
    outputs, inputs = (n, m) if left else (m, n)
    out, width, rows = _blocks.input_tile(directions.shape[1])
    sizes = outputs, inputs, directions.shape[1], *((1, n) if left else (n, 1))
    return (-(-outputs // out), len(matrices)), sizes, (out, width, rows)


def input_project(matrices, directions, left=False):
    shape = _ops.check_input("input_project", matrices, directions, left)
    if directions.shape[1] > _blocks.LARGEST_INPUTS:
        return reference.input_project(matrices, directions, left)
    out = directions.new_empty(shape, dtype=torch.float32)
    if out.numel() == 0:
        return out
    grid, sizes, tile = _outline(matrices, directions, left)
    table, aligned = addresses(matrices)
    launch(input_project_kernel, grid, directions, table, matrices[0], directions, out, *sizes, aligned, *tile)
    return out


def _edit(matrices, directions: Tensor, left: bool, anchor, lower, upper, weights) -> Tensor:
    grid, sizes, tile = _outline(matrices, directions, left)
    partials = directions.new_zeros((len(matrices), grid[0]), dtype=torch.float64)
    if directions.shape[1] > 0:
        table, aligned = addresses(matrices)
        launch(
            input_edit_kernel, grid, directions, table, matrices[0], directions,
            *(partials if t is None else t for t in (anchor, lower, upper)), *weights, partials, *sizes, grid[0],
            aligned, anchor is not None, lower is not None, upper is not None, *tile,
        )  # fmt: skip
    return partials.sum(1)


def input_confine_(matrices, directions, anchor, lower=None, upper=None, left=False):
    _ops.check_input_confine(matrices, directions, anchor, lower, upper, left)
    if directions.shape[1] > _blocks.LARGEST_INPUTS:
        return reference.input_confine_(matrices, directions, anchor, lower, upper, left)
    return _edit(matrices, directions, left, anchor, lower, upper, (directions,) * 3)


def input_dacsp_(matrices, directions, aligned, conflict, threshold, left=False):
    _ops.check_input_dacsp(matrices, directions, aligned, conflict, threshold, left)
    rows = directions.shape[1]
    if rows > _blocks.LARGEST_INPUTS:
        return reference.input_dacsp_(matrices, directions, aligned, conflict, threshold, left)
    weights = (
        w if isinstance(w, Tensor) else directions.new_full((rows,), w, dtype=torch.float32)
        for w in (aligned, conflict, threshold)
    )
    return _edit(matrices, directions, left, None, None, None, tuple(weights))


KERNELS = {
    "input_project": input_project,
    "input_confine_": input_confine_,
    "input_dacsp_": input_dacsp_,
    "input_dacsp_.tensor": input_dacsp_,
}
