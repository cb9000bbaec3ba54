"""No op makes an N-sized temporary: peak resident memory, since allocations outside Python do not show elsewhere."""

from __future__ import annotations

import ctypes

import pytest
import torch
from helpers import CLEAR, Backend, resident

N = 3_000_000  # a gradient in bf16 is 6 MB, a fp32 copy of it 12 MB, one of the bases 24 MB
N_MATRIX = 8_000_000  # elements, of which the reference takes some millions at once
N_EMULATED = 300_000  # kernels that are a hundred times slower, and have neither chunks nor threads


def elements(op: Backend, most: int = N) -> int:
    """As many bytes are allowed, half of a copy in bf16: the chunks of the reference, and threads."""
    return N_EMULATED if op.name == "cuda-emulated" else most


pytestmark = pytest.mark.skipif(not CLEAR.exists(), reason="no /proc/self/clear_refs to reset the peak with")


@pytest.fixture(scope="module", autouse=True)
def _large_blocks_come_from_the_system():
    """glibc keeps blocks of a size once freed, for the next of that size, which would then not show."""
    libc, threshold = ctypes.CDLL(None), -3  # M_MMAP_THRESHOLD
    libc.mallopt(threshold, 512 << 10)  # less than a copy of anything of N
    yield
    libc.mallopt(threshold, 32 << 20)  # as far as it goes up by itself


def arguments(overload: str, n: int) -> tuple:
    bases, grads = torch.zeros(1, 2, n, dtype=torch.bfloat16), torch.ones(n, dtype=torch.bfloat16)
    bases[0, 0, 0] = bases[0, 1, 1] = 1.0
    mix, scale, q = torch.ones(1, 2), torch.ones(1), torch.ones(2, 3) / 2
    half = n // 256 * 128
    parts, offsets = [grads[:half], grads[half:]], [0, half]
    return {
        "project": (grads, bases),
        "project.list": (parts, bases, offsets),
        "gram": (bases, grads),
        "edit_": (grads, bases, mix, scale),
        "edit_.list": (parts, bases, offsets, mix, scale),
        "rotate_": (bases[0], grads, q, 1),
        "edit_rotate_": (grads, bases, mix, scale, 0, q, 1),
        "edit_rotate_.list": (parts, bases, offsets, mix, scale, 0, q),
        "dacsp_": (grads, bases, 1.5, 0.5, 0.0, torch.eye(2)),
        "pca_update_": (bases[0], torch.ones(2), grads),
    }[overload]


@pytest.mark.compiled
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_peak_memory_does_not_grow_with_matrices(op, left):
    if op.device != "cpu":
        pytest.skip("resident memory is that of the host")

    def confine(m: int, n: int) -> None:
        matrix = torch.ones(m, n, dtype=torch.bfloat16)
        directions = torch.zeros(1, 8, m if left else n)
        directions[0, torch.arange(8), torch.arange(8)] = 1.0
        anchor = op("input_project", [matrix], directions, left).add_(0.1)
        CLEAR.write_text("5")
        before = resident("VmRSS")
        op("input_confine_", [matrix], directions, anchor, None, None, left)
        peaks.append(resident("VmHWM") - before)

    peaks: list[int] = []
    confine(64, 64)
    confine(elements(op, N_MATRIX) // 2000, 2000)
    assert peaks[-1] <= elements(op, N_MATRIX)


OVERLOADS = "project project.list gram edit_ edit_.list rotate_ edit_rotate_ edit_rotate_.list dacsp_ pca_update_"


@pytest.mark.compiled
@pytest.mark.parametrize("overload", OVERLOADS.split())
def test_peak_memory_does_not_grow_with_n(op, overload):
    if op.device != "cpu":
        pytest.skip("resident memory is that of the host")
    op(overload, *arguments(overload, 50_000))  # whatever is allocated once
    args = arguments(overload, elements(op))
    CLEAR.write_text("5")
    before = resident("VmRSS")
    op(overload, *args)
    assert resident("VmHWM") - before <= elements(op)
