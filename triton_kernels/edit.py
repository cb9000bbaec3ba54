"""Pass 2: G <- scale * (G + mix U), in place, rounded once.

A row whose mix or scale is not finite is left alone; one with mix = 0 is only scaled, and with scale = 1 not even read.
"""

import triton
import triton.language as tl
from torch import Tensor

from .. import _ops
from . import _blocks
from ._bases import Bases
from ._plan import Work, launch, plan
from ._tiles import chunk_of, finite, load_gradients, load_rows


@triton.jit
def judge(mix, scale, at, some, rows, BATCH: tl.constexpr, ROWS: tl.constexpr):
    """Of the gradients `[BT]` with coefficients in the rows `at`: scale, whether any mix is not 0, whether to write."""
    factor = tl.load(scale + at, mask=some, other=1.0)
    moving = tl.zeros([BATCH], tl.int32)
    broken = tl.where(finite(factor), 0, 1)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        m = tl.load(mix + at[:, None] * rows + row[None, :], mask=some[:, None] & (row < rows)[None, :], other=0.0)
        moving = tl.maximum(moving, tl.max((m != 0).to(tl.int32), axis=1))
        broken = tl.maximum(broken, tl.max(tl.where(finite(m), 0, 1), axis=1))
    moved = some & (moving != 0) & (broken == 0)
    return factor, moved, some & (broken == 0) & ((moving != 0) | (factor != 1.0))


@triton.jit
def edited(
    pointer, b, at, factor, moved, written, stride, bases, scales, mix, n, rows, blocks, shift, column, start, count,
    CODES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile `[BT, WIDTH]` after the edit, in fp32."""
    g = load_gradients(pointer, b, written, stride, start, count, WIDTH, TAIL)
    needed = tl.max(moved.to(tl.int32), axis=0) != 0
    value = g
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = row < rows
        m = tl.load(mix + at[:, None] * rows + row[None, :], mask=moved[:, None] & inside[None, :], other=0.0)
        u = load_rows(bases, scales, row, inside & needed, n, blocks, shift, column, start, count, CODES, WIDTH, TAIL)
        if m.shape[0] == 1:  # in two dimensions all stays in the registers that it was loaded into
            value += tl.sum(tl.trans(m) * u, axis=0)[None, :]
        else:
            value += tl.sum(m[:, :, None] * u[None, :, :], axis=1)
    return tl.where(moved[:, None], value, g) * factor[:, None]  # where: -0 + 0 is 0, and 0 * infinity no number


@triton.jit
def store_gradients(pointer, value, b, inside, stride, start, count, TAIL: tl.constexpr):
    WIDTH: tl.constexpr = value.shape[1]
    i = start + tl.arange(0, WIDTH)
    mask = inside[:, None]
    if TAIL:
        mask = mask & (i < count)[None, :]
    pointers = pointer + b.to(tl.int64)[:, None] * stride + i[None, :]
    tl.store(pointers, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def edit_kernel(
    grads, bases, scales, table, mix, scale, n, rows, batch, stride, length, blocks, shift,
    LIST: tl.constexpr, ALIGNED: tl.constexpr, CODES: tl.constexpr,
    BATCH: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    batch_groups = tl.cdiv(batch, BATCH)  # of a chunk, neighbours: rows come from L2 after the first
    b = tl.program_id(0) % batch_groups * BATCH + tl.arange(0, BATCH)
    some = b < batch
    pointer, column, count, group = chunk_of(tl.program_id(0) // batch_groups, grads, table, n, length, LIST, ALIGNED)
    at = group + b
    factor, moved, written = judge(mix, scale, at, some, rows, BATCH, ROWS)
    full = count // WIDTH * WIDTH
    for start in range(0, full, WIDTH):
        value = edited(
            pointer, b, at, factor, moved, written, stride, bases, scales, mix, n, rows, blocks, shift,
            column, start, count, CODES, ROWS, WIDTH, False,
        )  # fmt: skip
        store_gradients(pointer, value, b, written, stride, start, count, False)
    NARROW: tl.constexpr = WIDTH // 4  # of the tail, whose masks and narrow loads take registers
    for start in range(full, count, NARROW):
        value = edited(
            pointer, b, at, factor, moved, written, stride, bases, scales, mix, n, rows, blocks, shift,
            column, start, count, CODES, ROWS, NARROW, True,
        )  # fmt: skip
        store_gradients(pointer, value, b, written, stride, start, count, True)


def apply(work: Work, bases: Bases, mix: Tensor, scale: Tensor) -> None:
    """Edits with coefficients `mix [sets, K]` and `scale [sets]`."""
    batch, width = _blocks.batch_tile(work.batch), _blocks.width(bases.data.dtype, work.grads.dtype)
    rows = _blocks.rows_tile(width, batch, bases.rows)
    launch(
        edit_kernel, (work.chunks * -(-work.batch // batch),), mix,
        work.grads, bases.data, bases.scales, work.table, mix, scale,
        bases.n, bases.rows, work.batch, work.stride, work.length, bases.blocks, bases.shift,
        work.is_list, work.aligned, bases.codes, batch, rows, width,
    )  # fmt: skip


def edit_(grads, bases, mix, scale, scales=None):
    _ops.check_edit("edit_", grads, bases, mix, scale, scales)
    apply(plan(grads, (), False), Bases.of(bases, scales), mix, scale)


def edit_list(grads, bases, offsets, mix, scale, scales=None, per_tensor=False):
    _ops.check_edit("edit_", grads, bases, mix, scale, scales, offsets, per_tensor)
    apply(plan(grads, offsets, per_tensor), Bases.of(bases, scales), mix, scale)


KERNELS = {"edit_": edit_, "edit_.list": edit_list}
