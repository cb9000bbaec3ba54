"""The Triton kernels as a backend on CPU tensors, run by Triton's interpreter, with its known defects patched.

TRITON_INTERPRET is read when a kernel is decorated, so this module sets it before anything imports triton; machines with
a GPU run the kernels themselves instead. What is patched (triton 3.8):

* fp32 to bf16 truncates; here it rounds to nearest even, as the hardware does.
* Loads and stores out of bounds go through silently; here every address has to lie in a tensor that the call was given or
  the kernel was launched with (:class:`Guard`).
* A load takes as long for an address that its mask keeps out as for any other; here those are left out.
* Every call of a device function patches the language again (milliseconds each, and never undone); here once.
* Sums of integers are done again in 64 bits to see whether they overflow, which nobody is told without a debug option; here not.
* Every value makes and checks its type again, which takes about as long as numpy does; here once for every type.

Above :data:`SMALL` columns blocks are larger than on a GPU: numpy is fast on long vectors and slow on many short ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, wraps
from importlib.util import find_spec
from types import FunctionType
from typing import Any

import numpy as np
import torch
from carerl_kernels import _ops, linalg, reference

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

SMALL = 4096  # columns; up to here block sizes are those of a GPU, but for gram


def missing() -> str | None:
    """Why the interpreter cannot be used here."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "TRITON_INTERPRET is not 1: the kernels run on the GPU"
    return None


class OutOfBounds(IndexError):
    """A kernel touched memory that it was not given."""


class Guard:
    """Memory that kernels may touch, as ranges of addresses."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []
        self._sorted: tuple[np.ndarray, np.ndarray] | None = None

    @contextmanager
    def allowing(self, values: Any) -> Iterator[None]:
        """Allows all tensors in `values`, however nested: from their first to their last element."""
        before = len(self.ranges)
        self.ranges.extend(_extents(values))
        self._sorted = None
        try:
            yield
        finally:
            del self.ranges[before:]
            self._sorted = None

    def check(self, what: str, touched: np.ndarray, size: int) -> None:
        if touched.size == 0:
            return
        if self._sorted is None:
            self._sorted = _merged(self.ranges)
        starts, ends = self._sorted
        at = np.searchsorted(starts, touched.min(), "right") - 1
        if at >= 0 and int(touched.max()) + size <= ends[at]:
            return  # all in one tensor
        at = np.searchsorted(starts, touched, "right") - 1
        wrong = (at < 0) | (touched + np.uint64(size) > ends[np.maximum(at, 0)])
        if wrong.any():
            raise OutOfBounds(f"{what} of {int(wrong.sum())} elements outside every tensor of the call")


def _extents(values: Any) -> Iterator[tuple[int, int]]:
    if isinstance(values, torch.Tensor):
        if values.numel():
            last = sum((size - 1) * stride for size, stride in zip(values.shape, values.stride(), strict=True))
            yield values.data_ptr(), values.data_ptr() + (last + 1) * values.itemsize
    elif isinstance(values, dict):
        yield from _extents(list(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _extents(value)


def _merged(ranges: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Views of one buffer overlap: merged. Neighbours that only touch stay apart."""
    merged: list[list[int]] = []
    for start, end in sorted(set(ranges)):
        if merged and start < merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    pairs = np.array(merged, dtype=np.uint64).reshape(-1, 2)
    return pairs[:, 0].copy(), pairs[:, 1].copy()


GUARD = Guard()


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """fp32 to the bits of bf16, to nearest even."""
    bits = values.view(np.uint32)
    rounded = ((bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


@cache
def patch() -> None:
    """Patches the interpreter of this process, once."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    cast, load, store = builder.cast_impl, builder.create_masked_load, builder.create_masked_store

    def cast_rounding(self, src, dst_type):
        kinds = src.dtype.scalar, dst_type.scalar
        with np.errstate(over="ignore"):  # to infinity, as it should
            if kinds == (tl.float32, tl.bfloat16):
                return interpreter.TensorHandle(to_bfloat16(src.data), tl.bfloat16)
            if kinds == (tl.bfloat16, tl.float32):
                wide = (src.data.astype(np.uint32) << 16).view(np.float32)
                return interpreter.TensorHandle(wide, tl.float32)
            return cast(self, src, dst_type)

    def inside(what, ptrs, mask):
        """The mask as booleans (it is int32 at times), and the pointers that it lets through."""
        chosen = mask.data.astype(bool)
        touched = ptrs.data[chosen]
        GUARD.check(what, touched, ptrs.get_element_ty().primitive_bitwidth // 8)
        return chosen, touched

    def load_inside(self, ptrs, mask, other, *rest, **named):
        chosen, touched = inside("load", ptrs, mask)
        if other is None or touched.size == chosen.size:
            return load(self, ptrs, interpreter.TensorHandle(chosen, mask.dtype), other, *rest, **named)
        handle = interpreter.TensorHandle
        some = np.ones(touched.shape, bool)
        result = np.array(other.data)
        result[chosen] = load(self, handle(touched, ptrs.dtype), handle(some, mask.dtype), None, *rest, **named).data
        return handle(result, ptrs.get_element_ty())

    def store_inside(self, ptrs, value, mask, *rest, **named):
        chosen, _ = inside("store", ptrs, mask)
        return store(self, ptrs, value, interpreter.TensorHandle(chosen, mask.dtype), *rest, **named)

    builder.cast_impl = cast_rounding
    builder.create_masked_load, builder.create_masked_store = load_inside, store_inside

    execute = interpreter.GridExecutor.__call__

    def execute_guarded(self, *args, **kwargs):
        with GUARD.allowing((args, kwargs)), np.errstate(all="ignore"):
            return execute(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = execute_guarded

    _remember_types(tl, interpreter)
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)

    # It looks for the language among the globals of a function.
    interpreter._patch_lang(FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()  # all is patched: nothing to restore


def _remember_types(tl: Any, interpreter: Any) -> None:
    """Block types, the shapes of tensors and numpy's dtypes are made and checked once, not again for every value."""
    block, tensor, dtype = tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype
    blocks: dict[tuple, dict[str, Any]] = {}
    shapes: dict[tuple, tuple] = {}
    dtypes: dict[str, np.dtype] = {}

    def dtype_once(of):
        name = of.scalar.name
        if name not in dtypes:
            dtypes[name] = dtype(of)
        return dtypes[name]

    def block_once(self, element_ty, shape):
        key = element_ty.name, tuple(getattr(size, "value", size) for size in shape)
        if key not in blocks:
            block(self, element_ty, shape)
            blocks[key] = dict(self.__dict__)
        self.__dict__ |= blocks[key]

    def tensor_of_shape(self, handle, type):
        key = tuple(type.shape) if type.is_block() else ()
        if key not in shapes:
            tensor(self, handle, type)
            shapes[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[key]

    tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype = block_once, tensor_of_shape, dtype_once


@cache
def kernels() -> dict[str, Callable]:
    """The kernels, `pca_update_` over them, and what needs none from the reference."""
    from carerl_kernels import triton_kernels

    patch()
    served = dict(triton_kernels.kernels())

    def pca_update_(bases, singular_values, grads, decay=1.0, seed=0):
        _ops.check_pca_update(bases, singular_values, grads, decay)
        q, values, discarded = linalg.pca_core(served["gram"](bases, grads), singular_values, decay)
        served["rotate_"](bases, grads, q.float(), seed)
        singular_values.copy_(values)
        return discarded

    def pca_update_list(bases, singular_values, grads, offsets, decay=1.0, per_tensor=False, seed=0):
        _ops.check_pca_update(bases, singular_values, grads, decay, offsets, per_tensor)
        measured = served["gram.list"](bases, grads, offsets, None, per_tensor)
        q, values, discarded = linalg.pca_core(measured, singular_values, decay)
        served["rotate_.list"](bases, grads, offsets, q.float(), per_tensor, seed)
        singular_values.copy_(values)
        return discarded

    return reference.KERNELS | served | {"pca_update_": pca_update_, "pca_update_.list": pca_update_list}


def _choose_blocks(n: int) -> None:
    from carerl_kernels.triton_kernels import _blocks

    _blocks.LANES, _blocks.UNIT = (128, 8192) if n <= SMALL else (2048, 32768)
    _blocks.GRAM_WIDTH = 512 if n <= SMALL else 8192


def kernel(overload: str) -> Callable:
    """The interpreted kernel of an overload, confined to the tensors that it is called with."""

    run = kernels()[overload]

    @wraps(run)
    def call(*args, **kwargs):
        _choose_blocks(max((t.shape[-1] for t in args if isinstance(t, torch.Tensor) and t.dim() > 1), default=0))
        with GUARD.allowing((args, kwargs)):
            return run(*args, **kwargs)

    return call
