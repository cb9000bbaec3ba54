"""Pass 2 of the streaming PCA: U <- Q [U; G], in place, one domain. A Q that is not finite leaves U as it is.

Every program holds the new rows of its columns in registers before it writes the first of them, so nothing is read after
it was overwritten.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _ops, reference
from . import _blocks
from ._bases import Bases
from ._plan import Work, launch, plan
from ._tiles import chunk_of, finite, load_gradients, load_rows, store_rows


@triton.jit
def is_finite(q, kept, size, ROWS: tl.constexpr):
    """Whether a Q `[k', k+B]` is finite: read once by every program, from L2."""
    broken = 0
    for first in range(0, kept * size, ROWS * 32):
        i = first + tl.arange(0, ROWS * 32)
        value = tl.load(q + i, mask=i < kept * size, other=0.0)
        broken = tl.maximum(broken, tl.max(tl.where(finite(value), 0, 1), axis=0))
    return broken == 0


@triton.jit
def rotated(
    q, kept, pointer, batch, stride, bases, rows, n, column, start, count,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Q [U; G] `[R, WIDTH]` of one tile in fp32; rows that Q lacks are zero."""
    out = tl.arange(0, ROWS)
    size = rows + batch
    value = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, rows, DEPTH):
        row = first + tl.arange(0, DEPTH)
        inside = row < rows
        u = load_rows(bases, bases, row, inside, n, 0, 0, column, start, count, 0, WIDTH, TAIL)
        w = tl.load(q + out[:, None] * size + row[None, :], mask=(out < kept)[:, None] & inside[None, :], other=0.0)
        value = tl.dot(w, u, value, input_precision="ieee")
    for b in range(0, batch):
        one = b + tl.arange(0, 1)
        g = load_gradients(pointer, one, one < batch, stride, start, count, WIDTH, TAIL)
        w = tl.load(q + out * size + rows + b, mask=out < kept, other=0.0)
        value += w[:, None] * g
    return tl.where((out < kept)[:, None], value, 0.0)


@triton.jit(do_not_specialize=["key"])  # another seed is no other kernel
def rotate_kernel(
    grads, bases, table, q, n, rows, batch, stride, length, kept, key,
    LIST: tl.constexpr, ALIGNED: tl.constexpr, DROPPED: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)
    pointer, column, count, group = chunk_of(tl.program_id(0), grads, table, n, length, LIST, ALIGNED)
    own = q + group * kept * (rows + batch)
    written = (row < rows) & is_finite(own, kept, rows + batch, ROWS)
    full = count // WIDTH * WIDTH
    for start in range(0, full, WIDTH):
        value = rotated(
            own, kept, pointer, batch, stride, bases, rows, n, column, start, count, ROWS, DEPTH, WIDTH, False
        )  # fmt: skip
        tl.debug_barrier()  # every thread has read its part of the old rows
        store_rows(bases, value, row, written, n, column, start, count, key, DROPPED, False)
    if full < count:
        value = rotated(
            own, kept, pointer, batch, stride, bases, rows, n, column, full, count, ROWS, DEPTH, WIDTH, True
        )  # fmt: skip
        tl.debug_barrier()
        store_rows(bases, value, row, written, n, column, full, count, key, DROPPED, True)


def key_of(seed: int) -> int:
    """What the hash of `reference._random_bits` makes of a seed; a signed 32-bit number with its bits."""
    word, low = seed & 0xFFFFFFFF, 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        word = ((word ^ (word >> shift)) * factor) & low
    word = ((word ^ (word >> 16)) + (seed >> 32)) & low
    return word - (1 << 32) if word >> 31 else word


def dropped_bits(dtype: torch.dtype, seed: int) -> int:
    """Mantissa bits to round stochastically, 0 for rounding to nearest."""
    return {torch.bfloat16: 16, torch.float16: 13}.get(dtype, 0) if seed else 0


def apply(work: Work, bases: Bases, q: Tensor, seed: int) -> None:
    *sizes, threads = _blocks.rotation(bases.rows)
    launch(
        rotate_kernel, (work.chunks,), q,
        work.grads, bases.data, work.table, q,
        bases.n, bases.rows, work.batch, work.stride, work.length, q.shape[-2], key_of(seed),
        work.is_list, work.aligned, dropped_bits(bases.data.dtype, seed), *sizes, threads=threads,
    )  # fmt: skip


def rotate_(bases, grads, q, seed=0):
    if bases.dim() == 2 and bases.shape[0] > _blocks.LARGEST_ROTATION:
        return reference.rotate_(bases, grads, q, seed)
    _ops.check_rotate(bases, grads, q)
    return apply(plan(grads, (), False), Bases.of(bases), q, seed)


def rotate_list(bases, grads, offsets, q, per_tensor=False, seed=0):
    if bases.dim() == 2 and bases.shape[0] > _blocks.LARGEST_ROTATION:
        return reference.rotate_list(bases, grads, offsets, q, per_tensor, seed)
    _ops.check_rotate(bases, grads, q, offsets, per_tensor)
    return apply(plan(grads, offsets, per_tensor), Bases.of(bases), q, seed)


KERNELS = {"rotate_": rotate_, "rotate_.list": rotate_list}
