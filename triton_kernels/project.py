"""Pass 1: coefficients c = U g, in two deterministic stages."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _ops
from . import _blocks
from ._bases import Bases
from ._plan import Work, launch, plan
from ._tiles import chunk_of, load_gradients, load_rows


@triton.jit
def products(
    lanes, pointer, b, some, stride, bases, scales, row, inside, n, blocks, shift, column, start, count,
    CODES: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """lanes plus g u of one tile: `[R, WIDTH]` for one gradient, `[BT, R, WIDTH]` for several."""
    g = load_gradients(pointer, b, some, stride, start, count, WIDTH, TAIL)
    u = load_rows(bases, scales, row, inside, n, blocks, shift, column, start, count, CODES, WIDTH, TAIL)
    if len(lanes.shape) == 2:  # in two dimensions all stays in the registers that it was loaded into
        value = lanes + g * u
    else:
        value = lanes + g[:, None, :] * u[None, :, :]
    return value


@triton.jit
def no_products(BATCH: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    if BATCH == 1:
        lanes = tl.zeros([ROWS, WIDTH], tl.float32)
    else:
        lanes = tl.zeros([BATCH, ROWS, WIDTH], tl.float32)
    return lanes


@triton.jit
def summed(lanes, BATCH: tl.constexpr, ROWS: tl.constexpr):
    """Lanes to sums `[BT, R]` in fp64."""
    return tl.reshape(tl.sum(lanes, axis=len(lanes.shape) - 1), [BATCH, ROWS]).to(tl.float64)


@triton.jit
def project_kernel(
    grads, bases, scales, table, partials, n, rows, batch, stride, length, blocks, shift,
    LIST: tl.constexpr, ALIGNED: tl.constexpr, CODES: tl.constexpr,
    BATCH: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Partial sums `[chunks, B, K]` fp64. Programs of a chunk are neighbours: what they share comes from L2 after the first."""
    row_groups, batch_groups = tl.cdiv(rows, ROWS), tl.cdiv(batch, BATCH)
    group = tl.program_id(0) // batch_groups
    chunk = group // row_groups
    row = group % row_groups * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(0) % batch_groups * BATCH + tl.arange(0, BATCH)
    some, inside = b < batch, row < rows
    pointer, column, count, _ = chunk_of(chunk, grads, table, n, length, LIST, ALIGNED)
    full = count // WIDTH * WIDTH
    NARROW: tl.constexpr = WIDTH // 4  # of the tail, whose masks and narrow loads take registers

    total = tl.zeros([BATCH, ROWS], tl.float64)
    for begin in range(0, full, FOLD):
        lanes = no_products(BATCH, ROWS, WIDTH)
        for start in range(begin, tl.minimum(begin + FOLD, full), WIDTH):
            lanes = products(
                lanes, pointer, b, some, stride, bases, scales, row, inside, n, blocks, shift, column, start, count,
                CODES, WIDTH, False,
            )  # fmt: skip
        total += summed(lanes, BATCH, ROWS)
    lanes = no_products(BATCH, ROWS, NARROW)
    for start in range(full, count, NARROW):
        lanes = products(
            lanes, pointer, b, some, stride, bases, scales, row, inside, n, blocks, shift, column, start, count,
            CODES, NARROW, True,
        )  # fmt: skip
    total += summed(lanes, BATCH, ROWS)
    at = (tl.cast(chunk, tl.int64) * batch + b)[:, None] * rows + row[None, :]
    tl.store(partials + at, total, mask=some[:, None] & inside[None, :])


@triton.jit
def totals_kernel(
    partials, first, out, chunks, columns, PER_TENSOR: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Sums `[chunks, columns]` over the chunks of every group, in an order that depends on nothing but their number."""
    group = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    if PER_TENSOR:
        begin, end = tl.load(first + group), tl.load(first + group + 1)
    else:
        begin, end = tl.cast(0, tl.int64), tl.cast(chunks, tl.int64)
    total = tl.zeros([HEIGHT, WIDTH], tl.float64)
    for start in range(begin, end, HEIGHT):
        chunk = start + tl.arange(0, HEIGHT)
        mask = (chunk < end)[:, None] & (column < columns)[None, :]
        total += tl.load(partials + chunk[:, None] * columns + column[None, :], mask=mask, other=0.0)
    value = tl.sum(total, axis=0).to(out.dtype.element_ty)
    tl.store(out + group * columns + column, value, mask=column < columns)


def total(partials: Tensor, work: Work, out: Tensor, columns: int) -> None:
    """Stage 2: partial sums `[chunks, columns]` into `out [groups, columns]`."""
    width = min(max(_blocks.power_of_two(columns), 16), 64)
    launch(
        totals_kernel, (-(-columns // width), work.groups), out,
        partials, work.first, out, work.chunks, columns, work.per_tensor, 2048 // width, width,
    )  # fmt: skip


def plan_projection(grads, offsets, per_tensor: bool, bases: Bases) -> Work:
    batch = grads.shape[0] if isinstance(grads, Tensor) and grads.dim() == 2 else 1
    return plan(grads, offsets, per_tensor, batch * bases.rows)


def coefficients(work: Work, bases: Bases, dtype: torch.dtype) -> Tensor:
    """Coefficients `[sets, K]`."""
    out = torch.empty(work.sets, bases.rows, dtype=dtype, device=bases.data.device)
    if out.numel() == 0:
        return out
    if work.chunks == 0:
        return out.zero_()
    columns = work.batch * bases.rows
    partials = torch.empty(work.chunks, columns, dtype=torch.float64, device=out.device)
    batch, width = _blocks.batch_tile(work.batch), _blocks.width(bases.data.dtype)
    rows = _blocks.rows_tile(width, batch, bases.rows)
    launch(
        project_kernel, (work.chunks * -(-bases.rows // rows) * -(-work.batch // batch),), out,
        work.grads, bases.data, bases.scales, work.table, partials,
        bases.n, bases.rows, work.batch, work.stride, work.length, bases.blocks, bases.shift,
        work.is_list, work.aligned, bases.codes, batch, rows, width, max(_blocks.FOLD, width),
    )  # fmt: skip
    total(partials, work, out, columns)
    return out


def project(grads, bases, scales=None, out_dtype=torch.float32):
    _ops.check_project(grads, bases, scales, out_dtype)
    rows = Bases.of(bases, scales)
    work = plan_projection(grads, (), False, rows)
    return coefficients(work, rows, out_dtype).view(work.shape + tuple(bases.shape[:2]))


def project_list(grads, bases, offsets, scales=None, out_dtype=torch.float32, per_tensor=False):
    _ops.check_project(grads, bases, scales, out_dtype, offsets)
    rows = Bases.of(bases, scales)
    work = plan_projection(grads, offsets, per_tensor, rows)
    return coefficients(work, rows, out_dtype).view(work.shape + tuple(bases.shape[:2]))


KERNELS = {"project": project, "project.list": project_list}
