"""Pass 1 of the streaming PCA: H = [U; G] [U; G]^T in fp64, in two deterministic stages.

The products are taken in fp32 on the ordinary cores: tensor cores would truncate the sums (TF32, and the accumulation of
16-bit products). So this op is bound by arithmetic for more than some 20 rows; ``carerl bench --predict`` counts that.
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
    """Rows of [U; G] ``[R, WIDTH]``: each comes from one of two masked loads, the other one fetches nothing."""
    u = load_rows(bases, scales, row, row < rows, n, blocks, shift, column, start, count, CODES, WIDTH, TAIL)
    of_batch = (row >= rows) & (row < rows + batch)
    g = load_gradients(pointer, tl.where(of_batch, row - rows, 0), of_batch, stride, start, count, WIDTH, TAIL)
    return tl.where(of_batch[:, None], g, u)


@triton.jit
def square(
    i, j, rows, batch, pointer, stride, bases, scales, n, blocks, shift, column, start, count,
    CODES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Products ``[R, R]`` fp64 of the rows i and j over one tile of columns."""
    a = load_stack(
        i, rows, batch, pointer, stride, bases, scales, n, blocks, shift, column, start, count, CODES, WIDTH, TAIL
    )  # fmt: skip
    b = load_stack(
        j, rows, batch, pointer, stride, bases, scales, n, blocks, shift, column, start, count, CODES, WIDTH, TAIL
    )  # fmt: skip
    zero = tl.zeros([ROWS, ROWS], tl.float32)
    return tl.dot(a, tl.trans(b), zero, input_precision="ieee").to(tl.float64)


@triton.jit
def gram_kernel(
    grads, bases, scales, table, partials, n, rows, batch, stride, length, blocks, shift, tiles,
    LIST: tl.constexpr, ALIGNED: tl.constexpr, CODES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Partial sums ``[chunks, K+B, K+B]`` fp64 of a square tile above or on the diagonal, and of its mirror image."""
    pairs = tiles * tiles
    chunk = tl.program_id(0) // pairs
    first, second = tl.program_id(0) % pairs // tiles, tl.program_id(0) % tiles
    if first <= second:
        i, j = first * ROWS + tl.arange(0, ROWS), second * ROWS + tl.arange(0, ROWS)
        pointer, column, count, _ = chunk_of(chunk, grads, table, n, length, LIST, ALIGNED)
        full = count // WIDTH * WIDTH
        total = tl.zeros([ROWS, ROWS], tl.float64)
        for start in range(0, full, WIDTH):
            total += square(
                i, j, rows, batch, pointer, stride, bases, scales, n, blocks, shift, column, start, count,
                CODES, ROWS, WIDTH, False,
            )  # fmt: skip
        if full < count:
            total += square(
                i, j, rows, batch, pointer, stride, bases, scales, n, blocks, shift, column, full, count,
                CODES, ROWS, WIDTH, True,
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
    rows = _ops.check_gram_list(bases, grads, offsets, scales)
    return _gram(plan(grads, offsets, per_tensor, (rows + 1) ** 2), Bases.of(bases, scales))


KERNELS = {"gram": gram, "gram.list": gram_list}
