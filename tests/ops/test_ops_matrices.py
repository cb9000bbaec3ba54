"""Ops over weight matrices and lists of numbers: two-sided products, packed symmetric maps, finiteness."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers import (
    BACKENDS,
    DOT_UNIT,
    DTYPES,
    FLOOR,
    FP32_UNIT,
    UNIT,
    Held,
    assert_within,
    bits,
    rng_of,
    same_bits,
    to64,
)

OURS = [backend for backend in BACKENDS if backend.name in ("reference", "cpu") and backend.missing() is None]
on_both = pytest.mark.parametrize("op", OURS, ids=repr)  # GPUs use the reference

# G, m, n, D, r: vectors and strips to spare, less than one of either, several blocks of rows, and depths beyond one
SHAPES = [
    (2, 96, 64, 3, 16),
    (3, 7, 5, 2, 3),
    (1, 1, 1, 1, 1),
    (1, 13, 9, 1, 8),
    (2, 61, 33, 3, 5),
    (1, 2003, 17, 1, 4),
    (2, 40, 1537, 3, 16),
    (1, 1300, 700, 2, 17),
]


def problem(shape: tuple[int, ...], dtype: str) -> tuple[list[Held], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Matrices between guard bytes, factors as long as orthonormal ones, coefficients that matter."""
    G, m, n, D, r = shape
    rng = rng_of("matrices", shape, dtype)

    def draw(*size: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(size)).float()

    matrices = [Held(draw(m, n).to(DTYPES[dtype]), lead=3) for _ in range(G)]
    return matrices, draw(G, m, D * r) / m**0.5, draw(G, D, r, r), draw(G, n, D * r) / n**0.5


def apart(factors: np.ndarray, domains: int) -> np.ndarray:
    """`[G, D, m, r]` out of `[G, m, D r]`."""
    return factors.reshape(*factors.shape[:2], domains, -1).transpose(0, 2, 1, 3)


@on_both
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_coefficients_of_blocks(op, shape, dtype):
    held, left, _, right = problem(shape, dtype)
    found = op("block_project", [h.view for h in held], left, right, shape[3])
    U, V, W = apart(to64(left), shape[3]), apart(to64(right), shape[3]), np.stack([to64(h.view) for h in held])
    expected = np.einsum("gdmi,gmn,gdnj->gdij", U, W, V, optimize=True)
    size = np.einsum("gdmi,gmn,gdnj->gdij", abs(U), abs(W), abs(V), optimize=True)
    assert found.dtype == torch.float64
    assert_within(found, expected, DOT_UNIT * size, "coefficient ")
    assert all(h.unchanged() for h in held)


@on_both
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_edits_by_blocks(op, shape, dtype):
    held, left, mix, right = problem(shape, dtype)
    before = np.stack([to64(h.view) for h in held])
    op("block_edit_", [h.view for h in held], left, mix, right)
    U, V, X = apart(to64(left), shape[3]), apart(to64(right), shape[3]), to64(mix)
    exact = before + np.einsum("gdmi,gdij,gdnj->gmn", U, X, V, optimize=True)
    size = abs(before) + np.einsum("gdmi,gdij,gdnj->gmn", abs(U), abs(X), abs(V), optimize=True)
    _, _, _, D, r = shape
    unit = DTYPES[dtype]
    bound = (r + D * r + 3) * FP32_UNIT * size + UNIT[unit] * abs(exact) + FLOOR[unit]
    assert_within(np.stack([to64(h.view) for h in held]), exact, bound, "element ")
    assert all(h.intact() for h in held)


@on_both
def test_nothing_moves_without_a_finite_coefficient(op):
    """A matrix whose coefficients are zero, or not all finite, is left alone; the others are edited."""
    held, left, mix, right = problem((4, 33, 21, 2, 3), "fp32")
    mix[0] = 0.0
    mix[1, 1, 2, 0], mix[2, 0, 0, 0] = torch.inf, torch.nan
    matrices = [h.view for h in held]
    before = [matrix.clone() for matrix in matrices]
    op("block_edit_", matrices, left, mix, right)
    assert [same_bits(a, b) for a, b in zip(before, matrices, strict=True)] == [True, True, True, False]


@on_both
@pytest.mark.parametrize("size", [1, 2, 3, 8, 65, 300])
@pytest.mark.parametrize("vectors", [1, 2, 3])
def test_packed_maps_are_linear_to_float64(op, size, vectors):
    rng = rng_of("packed", size, vectors)
    square = rng.standard_normal((3, size, size)).astype(np.float32)
    square = np.triu(square) + np.triu(square, 1).swapaxes(1, 2)
    row, column = np.triu_indices(size)
    x = rng.standard_normal((vectors, 3, size))
    found = op("packed_times", torch.from_numpy(np.ascontiguousarray(square[:, row, column])), torch.from_numpy(x))
    expected = np.einsum("gij,bgj->bgi", square.astype(np.float64), x)
    bound = size * 2.0**-52 * np.einsum("gij,bgj->bgi", abs(square).astype(np.float64), abs(x))
    assert_within(found, expected, bound, "component ")


@on_both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_one_number_that_is_not_finite_is_found_anywhere(op, dtype):
    """Also among the largest finite numbers, whose sum of squares is not, and numbers below the normal range."""
    limits = torch.finfo(dtype)
    sizes = (0, 1, 7, 1003, 300_001)
    parts = [torch.full((size,), limits.max, dtype=dtype) for size in sizes]
    parts[2].fill_(limits.tiny / 4)
    parts[3].neg_()
    assert bool(op("all_finite", parts))
    found = op("all_finite", parts)
    assert (found.dtype, found.shape) == (torch.bool, ())
    for part, value in itertools.product(parts[1:], (torch.inf, -torch.inf, torch.nan)):
        for at in {0, part.numel() // 2, part.numel() - 1}:
            kept = part[at].clone()
            part[at] = value
            assert not bool(op("all_finite", parts)), (part.numel(), at, value)
            part[at] = kept
    assert bool(op("all_finite", [torch.empty(0, dtype=dtype)]))


@on_both
def test_lists_may_mix_types(op):
    parts = [torch.ones(5), torch.ones(3, 4, dtype=torch.bfloat16), torch.ones((), dtype=torch.float64)]
    assert bool(op("all_finite", parts))
    bits(parts[1]).view(-1)[11] = 0x7F80
    assert not bool(op("all_finite", parts))
