"""Pass 1 of the streaming PCA: H = [U; G] [U; G]^T in fp64, in two deterministic stages.

Products and sums are fp64: the update of the PCA divides by what nearly dependent rows leave of each other, and fp32 sums
cost it orthonormality. Data centre GPUs multiply fp64 matrices as fast as fp32 ones; others take 64 times as long, and are
bound by arithmetic here. Tensor cores on fp32 or 16-bit values would truncate the sums.
"""

import torch
import triton
import triton.language as tl

from .. import _ops
from . import _blocks
from ._bases import Bases
from ._plan import Work, launch, plan
from ._tiles import chunk_of, load_gradients, load_rows
from .project import total


@triton.jit
def load_stack(
    row, rows, batch, pointer, stride, bases, scales, n, blocks, shift, column, start, count,
    CODES: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Rows of [U; G] `[R, WIDTH]`: each comes from one of two masked loads, the other one fetches nothing."""
    u = load_rows(bases, scales, row, row < rows, n, blocks, shift, column, start, count, CODES, WIDTH, TAIL)
    of_batch = (row >= rows) & (row < rows + batch)
    g = load_gradients(pointer, tl.where(of_batch, row - rows, 0), of_batch, stride, start, count, WIDTH, TAIL)
    return tl.where(of_batch[:, None], g, u)


@triton.jit
def gram_kernel(
    grads, bases, scales, table, partials, n, rows, batch, stride, length, blocks, shift, tiles,
    LIST: tl.constexpr, ALIGNED: tl.constexpr, CODES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Partial sums `[chunks, K+B, K+B]` fp64 of a square tile above or on the diagonal, and of its mirror image."""
    pairs = tiles * tiles
    chunk = tl.program_id(0) // pairs
    first, second = tl.program_id(0) % pairs // tiles, tl.program_id(0) % tiles
    if first <= second:
        i, j = first * ROWS + tl.arange(0, ROWS), second * ROWS + tl.arange(0, ROWS)
        pointer, column, count, _ = chunk_of(chunk, grads, table, n, length, LIST, ALIGNED)
        full = count // WIDTH * WIDTH
        total = tl.zeros([ROWS, ROWS], tl.float64)
        # Every turn multiplies what the turn before has loaded. That overlaps loading and multiplying, and Triton 3.8
        # aborts where it sees an fp64 product of 8 or 16 bit loads ("fp64 don't support largeK MMA"); carried over, it
        # sees none.
        a = tl.zeros([ROWS, WIDTH], tl.float32)
        b = tl.zeros([ROWS, WIDTH], tl.float32)
        for start in range(0, full, WIDTH):
            total = tl.dot(a.to(tl.float64), tl.trans(b.to(tl.float64)), total, out_dtype=tl.float64)
            a = load_stack(
                i, rows, batch, pointer, stride, bases, scales, n, blocks, shift, column, start, count,
                CODES, WIDTH, False,
            )  # fmt: skip
            b = load_stack(
                j, rows, batch, pointer, stride, bases, scales, n, blocks, shift, column, start, count,
                CODES, WIDTH, False,
            )  # fmt: skip
        for start in range(full, full + 2 * WIDTH, WIDTH):  # the tail, which may be empty, and nothing
            total = tl.dot(a.to(tl.float64), tl.trans(b.to(tl.float64)), total, out_dtype=tl.float64)
            a = load_stack(
                i, rows, batch, pointer, stride, bases, scales, n, blocks, shift, column, start, count,
                CODES, WIDTH, True,
            )  # fmt: skip
            b = load_stack(
                j, rows, batch, pointer, stride, bases, scales, n, blocks, shift, column, start, count,
                CODES, WIDTH, True,
            )  # fmt: skip
        size = rows + batch
        out = partials + tl.cast(chunk, tl.int64) * size * size
        inside = (i < size)[:, None] & (j < size)[None, :]
        tl.store(out + i[:, None] * size + j[None, :], total, mask=inside)
        if first != second:
            tl.store(out + j[None, :] * size + i[:, None], total, mask=inside)


def _gram(work: Work, bases: Bases):
    size = bases.rows + work.batch
    shape = (work.groups, size, size) if work.per_tensor else (size, size)
    out = torch.empty(shape, dtype=torch.float64, device=bases.data.device)
    if work.chunks == 0 or size == 0:
        return out.zero_()
    partials = torch.empty(work.chunks, size * size, dtype=torch.float64, device=out.device)
    rows, width = _blocks.gram_tile(size, bases.codes)
    tiles = -(-size // rows)
    launch(
        gram_kernel, (work.chunks * tiles * tiles,), out,
        work.grads, bases.data, bases.scales, work.table, partials,
        bases.n, bases.rows, work.batch, work.stride, work.length, bases.blocks, bases.shift, tiles,
        work.is_list, work.aligned, bases.codes, rows, width,
    )  # fmt: skip
    total(partials, work, out, size * size)
    return out


def gram(bases, grads, scales=None):
    rows, batch = _ops.check_gram(bases, grads, scales)
    return _gram(plan(grads, (), False, (rows + batch) ** 2), Bases.of(bases, scales))


def gram_list(bases, grads, offsets, scales=None, per_tensor=False):
    rows, _ = _ops.check_gram(bases, grads, scales, offsets)
    return _gram(plan(grads, offsets, per_tensor, (rows + 1) ** 2), Bases.of(bases, scales))


KERNELS = {"gram": gram, "gram.list": gram_list}
