"""What the op tests share: the backends under test, comparisons and error bounds, guarded buffers."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import emulated
import numpy as np
import torch
import triton_interpreted
from carerl_kernels import _load, reference, triton_kernels
from torch import Tensor

# --------------------------------------------------------------------------------------------------------- backends


@dataclass(frozen=True, repr=False)
class Backend:
    """A set of kernels under test: `backend("project.list", ...)` calls the overload of that name."""

    name: str
    device: str
    kernel: Callable[[str], Callable]
    missing: Callable[[], str | None]  # why it cannot run here, None when it can

    def __call__(self, overload: str, *args, **kwargs):
        return self.kernel(overload)(*args, **kwargs)

    def __repr__(self) -> str:
        return self.name


def dispatched(overload: str) -> torch._ops.OpOverload:
    """`torch.ops.carerl.<op>.<overload>`: whatever kernel the dispatcher picks for the device of the arguments."""
    name, _, variant = overload.partition(".")
    return getattr(getattr(torch.ops.carerl, name), variant or "default")


def in_small_chunks(overload: str) -> Callable:
    """The reference, with chunks of a quarter of their size: several of them then need no more than 2^15 elements."""
    run = reference.KERNELS[overload]

    @wraps(run)
    def call(*args, **kwargs):
        with mock.patch.object(reference, "CHUNK", 1 << 14):
            return run(*args, **kwargs)

    return call


def _not_loaded(name: str) -> str | None:
    return _load.BACKENDS[name].reason or None


def _no_cuda() -> str | None:
    return _not_loaded("cuda") if torch.cuda.is_available() else "no CUDA device"


def _no_triton() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    return None if find_spec("triton") else "triton is not installed"


BACKENDS = [
    Backend("reference", "cpu", in_small_chunks, lambda: None),
    Backend("cpu", "cpu", dispatched, lambda: _not_loaded("cpu")),
    Backend("cuda", "cuda", dispatched, _no_cuda),
    Backend("cuda-emulated", "cpu", emulated.kernel, emulated.missing),
    Backend("triton", "cuda", lambda overload: (reference.KERNELS | triton_kernels.kernels())[overload], _no_triton),
    Backend("triton-interpreted", "cpu", triton_interpreted.kernel, triton_interpreted.missing),
]
GPU_BACKENDS = {"cuda", "cuda-emulated", "triton"}


# ------------------------------------------------------------------------------------------------------------- cases


@contextmanager
def naming(*case: object) -> Iterator[None]:
    """Says of whatever fails inside which case it was of those that a test loops over.

    A test item costs about 10 ms (fixtures, reports between processes, collection in each of them): cases of a millisecond are
    looped over.
    """
    try:
        yield
    except BaseException as error:  # pytest.fail, too
        error.add_note(f"case: {', '.join(map(str, case))}")
        raise


# ----------------------------------------------------------------------------------------------------------- numbers

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
    "int8b32": torch.int8,  # blocks of 32 instead of 128
    "fp8": torch.float8_e4m3fn,
}
SCALED = {torch.int8: 127, torch.float8_e4m3fn: 448}  # with a scale per block, and the largest code
FP32_UNIT = 2.0**-24
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a spacing, relative
FLOOR = {
    torch.float32: 2.0**-149,
    torch.bfloat16: 2.0**-133,
    torch.float16: 2.0**-25,
}  # the same below the normal range

DOT_UNIT = 1e-6
"""Bound on a blocked dot product relative to sum |u_i g_i|. Lanes are fp32 and totals fp64, so a kernel that sums m
products in a lane has an error of m * 2^-24 at worst and sqrt(m) * 2^-24 typically: 1e-6 allows 16 at worst, 280
typically."""


def rng_of(*labels: object) -> np.random.Generator:
    """Inputs are a function of the test's labels; CARERL_TEST_SEED draws fresh ones."""
    return np.random.default_rng([zlib.crc32(repr(labels).encode()), int(os.environ.get("CARERL_TEST_SEED", "0"))])


def to64(tensor: Tensor) -> np.ndarray:
    """Exact float64 values, a copy: in-place ops must not reach what the oracle is given."""
    return tensor.detach().cpu().double().numpy().copy()


def bits(tensor: Tensor) -> Tensor:
    """The storage of a tensor as integers: comparisons that tell -0.0 from 0.0 and can compare NaN."""
    return tensor.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def assert_within(actual: Tensor | np.ndarray, expected: np.ndarray, bound: np.ndarray | float, what: str = "") -> None:
    """Elementwise `|actual - expected| <= bound`, with the worst element in the message."""
    found = to64(actual) if isinstance(actual, Tensor) else actual
    assert found.shape == expected.shape, f"{what} shape {found.shape}, expected {expected.shape}"
    error = np.abs(found - expected)
    excess = error - bound
    if excess.size and not (excess <= 0).all():  # written so that NaN fails
        worst = np.unravel_index(np.nanargmax(np.where(np.isnan(excess), np.inf, excess)), excess.shape)
        limit = np.broadcast_to(bound, excess.shape)[worst]
        raise AssertionError(
            f"{what}{list(map(int, worst))}: {found[worst]!r}, expected {expected[worst]!r} within {limit:.3g}"
        )


def dot_bound(g: np.ndarray, rows: np.ndarray, out: torch.dtype = torch.float32) -> np.ndarray:
    """Bound on c `[B, K]`: the lanes' error plus one rounding to the output."""
    unit = FP32_UNIT if out == torch.float32 else 0.0
    return DOT_UNIT * (np.abs(g) @ np.abs(rows).T) + unit * np.abs(g @ rows.T)


def edit_bound(g: np.ndarray, rows: np.ndarray, mix: np.ndarray, scale: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Bound on g' `[B, N]`: K + 1 fp32 terms in any order, a rounding each for dequantisation, scale and storage."""
    size = np.abs(scale)[:, None] * (np.abs(g) + np.abs(mix) @ np.abs(rows))
    exact = scale[:, None] * (g + mix @ rows)
    return (len(rows) + 3) * FP32_UNIT * size + UNIT[dtype] * np.abs(exact) + FLOOR[dtype]


def rotate_bound(
    rows: np.ndarray, g: np.ndarray, q: np.ndarray, dtype: torch.dtype, stochastic: bool = False
) -> np.ndarray:
    """Bound on U' `[k, N]`: k + B fp32 terms and one rounding (of up to a whole spacing when stochastic)."""
    stack = np.vstack([rows, g])
    size, exact = np.zeros_like(rows), np.zeros_like(rows)
    size[: len(q)], exact[: len(q)] = np.abs(q) @ np.abs(stack), np.abs(q @ stack)
    storage = (2 if stochastic else 1) * (UNIT[dtype] * exact + FLOOR[dtype])
    return (len(stack) + 1) * FP32_UNIT * size + storage


# ----------------------------------------------------------------------------------------------------------- buffers


class Held:
    """A tensor in a larger buffer of sentinels (NaN, or -77 in int8): stray reads poison results, stray writes show.

    Args:
        values: the contents, copied.
        lead: sentinels before the first element; 1 makes every vector load unaligned.
        gap: sentinels between the rows of a 2-D tensor.
    """

    def __init__(self, values: Tensor, lead: int = 0, gap: int = 0):
        sentinel = -77 if values.dtype == torch.int8 else torch.nan
        strides = list(torch.empty(values.shape, device="meta").stride())
        if values.dim() == 2 and gap:
            strides[0] = values.shape[1] + gap
        size = values.numel() + gap * (values.shape[0] if values.dim() == 2 else 0) + lead + 67
        self.buffer = torch.full((size,), sentinel, dtype=values.dtype, device=values.device)
        self.view = self.buffer.as_strided(values.shape, strides, lead)
        self.view.copy_(values)
        self.before = self.buffer.clone()
        self.outside = torch.ones(size, dtype=torch.bool, device=values.device)
        self.outside.as_strided(values.shape, strides, lead).fill_(False)

    def unchanged(self) -> bool:
        return same_bits(self.buffer, self.before)

    def intact(self) -> bool:
        """Whether everything around the tensor still has its bits."""
        return same_bits(self.buffer[self.outside], self.before[self.outside])


# ------------------------------------------------------------------------------------------------------------ memory

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
"""What the process occupies, and where "5" resets its peak; Linux has both."""


def resident(field: str) -> int:
    """Bytes that the process occupies: "VmRSS" now, "VmHWM" at its peak."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
