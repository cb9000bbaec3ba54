"""Both second passes in one: G <- scale * (G + mix U) and, from the raw gradients, U_d <- Q [U_d; G]."""

import triton
import triton.language as tl
from torch import Tensor

from .. import _ops, reference
from . import _blocks
from ._bases import Bases
from ._plan import Work, launch, plan
from ._tiles import chunk_of, store_rows
from .edit import edited, judge, store_gradients
from .rotate import dropped_bits, is_finite, key_of, rotated


@triton.jit
def both(
    pointer, batch, stride, bases, domain, mix, scale, group, q, kept, sound, n, rows, slots, column, start, count, key,
    DROPPED: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, DEPTH: tl.constexpr,
    WIDTH: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One tile of columns: everything is read before anything is written, but for gradients that no later turn reads."""
    slot = tl.arange(0, SLOTS)
    value = rotated(
        q, kept, pointer, batch, stride, domain, slots, n, column, start, count, SLOTS, DEPTH, WIDTH, TAIL
    )  # fmt: skip
    tl.debug_barrier()  # the rotation has read the raw gradients
    for turn in range(0, batch, BATCH):
        b = turn + tl.arange(0, BATCH)
        factor, moved, written = judge(mix, scale, group + b, b < batch, rows, BATCH, ROWS)
        new = edited(
            pointer, b, group + b, factor, moved, written, stride, bases, bases, mix, n, rows, 0, 0,
            column, start, count, 0, ROWS, WIDTH, TAIL,
        )  # fmt: skip
        store_gradients(pointer, new, b, written, stride, start, count, TAIL)
    tl.debug_barrier()  # the edit has read the old rows
    store_rows(domain, value, slot, (slot < slots) & sound, n, column, start, count, key, DROPPED, TAIL)


@triton.jit(do_not_specialize=["key"])  # another seed is no other kernel
def edit_rotate_kernel(
    grads, bases, domain, table, mix, scale, q, n, rows, slots, batch, stride, length, kept, key,
    LIST: tl.constexpr, ALIGNED: tl.constexpr, DROPPED: tl.constexpr,
    BATCH: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    pointer, column, count, group = chunk_of(tl.program_id(0), grads, table, n, length, LIST, ALIGNED)
    own = q + group * kept * (slots + batch)
    sound = is_finite(own, kept, slots + batch, SLOTS)
    full = count // WIDTH * WIDTH
    for start in range(0, full, WIDTH):
        both(
            pointer, batch, stride, bases, domain, mix, scale, group, own, kept, sound, n, rows, slots,
            column, start, count, key, DROPPED, BATCH, ROWS, SLOTS, DEPTH, WIDTH, False,
        )  # fmt: skip
    if full < count:
        both(
            pointer, batch, stride, bases, domain, mix, scale, group, own, kept, sound, n, rows, slots,
            column, full, count, key, DROPPED, BATCH, ROWS, SLOTS, DEPTH, WIDTH, True,
        )  # fmt: skip


def _apply(work: Work, bases: Tensor, mix: Tensor, scale: Tensor, domain: int, q: Tensor, seed: int) -> None:
    all_rows, slots = Bases.of(bases), bases.shape[1]
    batch = _blocks.batch_tile(work.batch)
    size, depth, width, threads = _blocks.rotation(slots)
    rows = max(min(32 * _blocks.LANES // (width * batch), 16), 1)
    launch(
        edit_rotate_kernel, (work.chunks,), mix,
        work.grads, bases, bases[domain], work.table, mix, scale, q,
        all_rows.n, all_rows.rows, slots, work.batch, work.stride, work.length, q.shape[-2], key_of(seed),
        work.is_list, work.aligned, dropped_bits(bases.dtype, seed), batch, rows, size, depth, width, threads=threads,
    )  # fmt: skip


def edit_rotate_(grads, bases, mix, scale, domain, q, seed=0):
    if bases.dim() == 3 and bases.shape[1] > _blocks.LARGEST_ROTATION:
        return reference.edit_rotate_(grads, bases, mix, scale, domain, q, seed)
    _ops.check_edit_rotate(grads, bases, mix, scale, domain, q)
    return _apply(plan(grads, (), False), bases, mix, scale, domain, q, seed)


def edit_rotate_list(grads, bases, offsets, mix, scale, domain, q, per_tensor=False, seed=0):
    if bases.dim() == 3 and bases.shape[1] > _blocks.LARGEST_ROTATION:
        return reference.edit_rotate_list(grads, bases, offsets, mix, scale, domain, q, per_tensor, seed)
    _ops.check_edit_rotate(grads, bases, mix, scale, domain, q, offsets, per_tensor)
    return _apply(plan(grads, offsets, per_tensor), bases, mix, scale, domain, q, seed)


KERNELS = {"edit_rotate_": edit_rotate_, "edit_rotate_.list": edit_rotate_list}
