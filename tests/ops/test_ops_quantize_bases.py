"""Storage: block-scaled int8 and fp8 (error bound, layout of scales) and stochastic rounding of low-precision rows."""

from __future__ import annotations

import itertools

import numpy as np
import oracle
import pytest
import torch
from cases import directions
from helpers import DTYPES, FP32_UNIT, SCALED, Held, assert_within, naming, rng_of, same_bits, to64

FLOATS = ("fp32", "bf16", "fp16")
BLOCKS = (32, 128, 1024)
SIZES = (0, 1, 31, 32, 127, 128, 129, 1003, 33_001)
TRIPLES = [  # every pair of size, storage and block; at the largest size, of several of any block, every triple
    *((n, FLOATS[(i + j) % 3], block) for i, n in enumerate(SIZES[:-1]) for j, block in enumerate(BLOCKS)),
    *itertools.product(SIZES[-1:], FLOATS, BLOCKS),
]


@pytest.mark.parametrize("n", SIZES)
def test_dequantised_rows_are_within_half_a_step(op, n):
    for size, dtype, block in TRIPLES:
        if size == n:
            with naming(dtype, block):
                check_int8(op, n, dtype, block)


def check_int8(op, n, dtype, block):
    rng = rng_of("quantize", n, dtype, block)
    values = directions(rng, 2, 5, n, "zero_rows") * rng.choice([1e-4, 1.0, 50.0], n)  # blocks of very different size
    held = Held(torch.from_numpy(values).to(DTYPES[dtype]).to(op.device), lead=1)
    codes, scales = op("quantize_bases", held.view, block)
    assert codes.dtype == torch.int8
    assert codes.shape == (2, 5, n)
    assert scales.dtype == torch.float32
    assert scales.shape == (2, 5, -(-n // block))
    rows = to64(held.view)
    found = oracle.dequantize(to64(codes), scales.cpu().numpy(), block)
    step = np.repeat(to64(scales), block, axis=-1)[..., :n]
    # Half a step, and the fp32 roundings of scale and quotient: they move a code of up to 127 by 127 * 2 * 2^-24 steps.
    assert_within(found, rows, step * (0.5 + 254 * FP32_UNIT), "row")
    assert codes.abs().max() <= 127 if n else True
    assert (found[rows == 0] == 0).all()
    _, expected = oracle.quantize(rows, block)
    assert_within(scales, expected.astype(np.float64), FP32_UNIT * expected, "scale")
    assert held.unchanged()


@pytest.mark.parametrize("n", SIZES)
def test_fp8_codes_are_the_nearest(op, n):
    for dtype in FLOATS:
        with naming(dtype):
            check_fp8(op, n, dtype)


def check_fp8(op, n, dtype):
    rng = rng_of("quantize fp8", n, dtype)
    values = directions(rng, 2, 5, n, "zero_rows") * 2.0 ** rng.integers(-12, 3, n)  # down to subnormal codes
    held = Held(torch.from_numpy(values).to(DTYPES[dtype]).to(op.device), lead=1)
    codes, scales = op("quantize_bases", held.view, 32, torch.float8_e4m3fn)
    assert codes.dtype == torch.float8_e4m3fn
    rows = to64(held.view)
    expected, expected_scales = oracle.quantize(rows, 32, 448)
    assert_within(scales, expected_scales.astype(np.float64), FP32_UNIT * expected_scales, "scale")
    step = np.repeat(to64(scales), 32, axis=-1)[..., :n]
    # Half the spacing of the exact quotient's neighbours: 2^-4 of it, 2^-10 at least.
    found = oracle.dequantize(to64(codes), scales.cpu().numpy(), 32)
    assert_within(found, rows, (np.abs(rows) * 2.0**-4 + step * 2.0**-10) * (1 + 4 * FP32_UNIT), "row")
    exact = to64(codes) == expected
    assert (~exact).sum() <= 2 + 1e-3 * exact.size  # a quotient rounded to fp32 may fall on the other side of a tie
    assert (np.signbit(to64(codes))[rows != 0] == np.signbit(rows)[rows != 0]).all()
    assert held.unchanged()


@pytest.mark.parametrize(("dtype", "largest"), SCALED.items(), ids=str)
def test_codes_saturate_instead_of_wrapping(op, dtype, largest):
    """Scales of tiny rows are subnormal and coarse: a quotient may exceed the largest code."""
    bases = torch.full((1, 1, 128), 2e-43, device=op.device)
    codes, scales = op("quantize_bases", bases, 128, dtype)
    assert ((codes.float() >= 0) & (codes.float() <= largest)).all()
    assert (scales >= 0).all()


@pytest.mark.parametrize("dtype", SCALED, ids=str)
def test_a_block_with_a_nan_says_so_in_its_scale(op, dtype):
    bases = torch.ones(1, 1, 300, device=op.device)
    bases[0, 0, 130] = torch.nan
    codes, scales = op("quantize_bases", bases, 128, dtype)
    assert scales.isnan().flatten().tolist() == [False, True, False]
    assert codes.float().isfinite().all()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_default_block_is_128(op, dtype):
    bases = torch.randn(1, 2, 300, device=op.device).to(DTYPES[dtype])
    for a, b in zip(op("quantize_bases", bases), op("quantize_bases", bases, 128), strict=True):
        assert same_bits(a, b)


# ---------------------------------------------------------------------------------------------- stochastic rounding

FORMATS = {"bf16": (7, -126), "fp16": (10, -14)}  # mantissa bits, exponent of the smallest normal number
LOW = pytest.mark.parametrize("dtype", FORMATS)


def round_rows(op, values: torch.Tensor, dtype: str, seed: int) -> torch.Tensor:
    """Stores fp32 rows `[k, N]` through a rotation that copies gradient i to row i exactly."""
    k = len(values)
    bases = torch.zeros(values.shape, dtype=DTYPES[dtype], device=values.device)
    q = torch.cat([torch.zeros(k, k), torch.eye(k)], 1).to(values.device)
    op("rotate_", bases, values, q, seed)
    return bases


def _values(rng, device: str, k: int = 4, n: int = 4099) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal((k, n)) * 2.0 ** rng.integers(-10, 3, (k, n))).float().to(device)


@LOW
def test_rounding_is_the_documented_hash(op, dtype):
    values = _values(rng_of("hash", dtype), op.device)
    for seed in (1, -1, 12345, 2**40 + 7, -(2**62)):
        bits = oracle.random_bits(4, np.arange(values.shape[1]), seed)
        expected = oracle.round_stochastically(to64(values), bits, *FORMATS[dtype])
        assert np.array_equal(to64(round_rows(op, values, dtype, seed)), expected), seed


@LOW
def test_seed_zero_rounds_to_nearest(op, dtype):
    values = _values(rng_of("nearest", dtype), op.device)
    assert same_bits(round_rows(op, values, dtype, 0), values.to(DTYPES[dtype]))


@pytest.mark.compiled
@LOW
def test_rounding_is_reproducible_and_differs_between_seeds(op, dtype):
    values = _values(rng_of("seeds", dtype), op.device)
    first = round_rows(op, values, dtype, 3)
    assert same_bits(first, round_rows(op, values, dtype, 3))
    assert not same_bits(first, round_rows(op, values, dtype, 4))


@LOW
def test_representable_values_never_move(op, dtype):
    values = _values(rng_of("exact", dtype), op.device).to(DTYPES[dtype]).float()
    values[:, ::5] = 0.0
    for seed in range(1, 6):
        assert same_bits(round_rows(op, values, dtype, seed), values.to(DTYPES[dtype]))


@pytest.mark.compiled
@LOW
@pytest.mark.parametrize("magnitude", ["normal", "subnormal"])
def test_rounding_is_unbiased(op, dtype, magnitude):
    """Over seeds, every element's mean error is zero and its spread is that of a coin with p = the dropped fraction."""
    rng = rng_of("unbiased", dtype, magnitude)
    values = _values(rng, op.device, 2, 1003)
    mantissa, exponent = FORMATS[dtype]
    if magnitude == "subnormal":
        values = values / values.abs().max() * 2.0**exponent
        values = torch.where(values.abs() < 2.0 ** (exponent - mantissa), 2.0 ** (exponent - 1) / 3, values)
    exact, seeds = to64(values), 256
    errors = np.stack([to64(round_rows(op, values, dtype, seed)) - exact for seed in range(1, seeds + 1)])
    spacing = np.ldexp(1.0, np.maximum(np.frexp(exact)[1] - 1, exponent) - mantissa)
    fraction = np.abs(exact) / spacing % 1
    spread = spacing * np.sqrt(fraction * (1 - fraction) / seeds)
    # Comparing with a 13 or 16 bit number shifts p by at most 2^-13: left out where that is not small to the spread.
    usable = (fraction > 0.05) & (fraction < 0.95)
    z = errors.mean(0)[usable] / spread[usable]
    assert np.abs(errors).max() < spacing.max()
    assert (np.abs(errors) < spacing).all()
    assert np.abs(z).max() < 6
    assert abs(z.mean()) < 5 / len(z) ** 0.5
    assert 0.9 < z.std() < 1.1
    # Neighbours along the row and across rows round independently.
    noise = (errors / spacing)[:, :, :1000]
    for a, b in ((noise[:, :, 1:], noise[:, :, :-1]), (noise[:, 1:], noise[:, :-1]), (noise[1:], noise[:-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 6 / a.size**0.5
