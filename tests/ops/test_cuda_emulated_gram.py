"""`gram` of the CUDA kernels as GPUs with slow fp64 run it, in pairs of fp32, emulated: against float64."""

from __future__ import annotations

import emulated
import numpy as np
import pytest
import torch
from helpers import rng_of, to64

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing())),
]


@pytest.fixture(autouse=True)
def _slow_doubles(monkeypatch):
    monkeypatch.setenv("CARERL_EMULATED_FP64", "64")


def gram(rows: torch.Tensor, grads: torch.Tensor) -> np.ndarray:
    return to64(emulated.kernel("gram")(rows, grads))


def assert_close(rows: torch.Tensor, grads: torch.Tensor, bound: float) -> None:
    """Within `bound` of the lengths of both rows, the scale on which PCA looks at the matrix."""
    stack = np.vstack([to64(rows), to64(grads)])
    exact = stack @ stack.T
    lengths = np.sqrt(np.diag(exact))
    error = np.abs(gram(rows, grads) - exact) / np.maximum(np.outer(lengths, lengths), np.finfo(np.float64).tiny)
    assert error.max() <= bound


@pytest.mark.parametrize(("k", "batch"), [(1, 0), (1, 1), (3, 4), (12, 1), (24, 9), (68, 1)])
@pytest.mark.parametrize("n", [1, 131, 5003])
def test_sums_have_40_bits_and_more(k, batch, n):
    rng = rng_of("gram float", k, batch, n)
    rows = torch.from_numpy(rng.standard_normal((k, n))).float()
    grads = torch.zeros(batch, n).copy_(torch.from_numpy(rng.standard_normal((batch, n)) * 1e-3))
    assert_close(rows, grads, 2.0**-40)


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30])
def test_squares_beyond_the_range_of_fp32_are_not_lost(size):
    """Rows of any size, also where it changes from slot to slot and from tile to tile."""
    rng = rng_of("gram float range", size)
    rows = torch.from_numpy(rng.standard_normal((5, 4099))).float()
    grads = torch.from_numpy(rng.standard_normal((2, 4099)) * size).float()
    grads[1] *= torch.from_numpy(10.0 ** np.linspace(-6, 6, 4099)).float()
    assert_close(rows, grads, 2.0**-40 if size > 1e-37 else 2.0**-20)  # elements themselves have few bits there


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_row_spoils_its_own_products_only(poison):
    rng = rng_of("gram float poison")
    rows, grads = (torch.from_numpy(rng.standard_normal((k, 1003))).float() for k in (4, 3))
    clean = gram(rows, grads)
    grads[1, 777] = poison
    found = gram(rows, grads)
    assert not np.isfinite(found[5]).any()
    kept = [0, 1, 2, 3, 4, 6]
    assert np.array_equal(found[np.ix_(kept, kept)], clean[np.ix_(kept, kept)])
