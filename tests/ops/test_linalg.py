"""The K x K cores between the two passes: against numpy, and batched like they are called."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from carerl_kernels.linalg import dacsp_core, loewdin_root, pca_core
from cases import GEOMETRIES, directions
from helpers import assert_within, rng_of, to64


def overlap(geometry: str, domains: int = 3, slots: int = 4, n: int = 200) -> np.ndarray:
    rows = directions(rng_of("overlap", geometry), domains, slots, n, geometry).reshape(domains * slots, n)
    return rows @ rows.T


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_root_is_a_power_of_the_range(geometry):
    s = overlap(geometry)
    assert_within(loewdin_root(torch.from_numpy(s)), oracle.psd_power(s, -0.5), 1e-8)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_root_orthonormalises_the_rows(geometry):
    """R S R is the projector on the range of S; R is symmetric; empty slots and null directions map to zero."""
    s = overlap(geometry)
    root = to64(loewdin_root(torch.from_numpy(s)))
    projector = root @ s @ root
    assert_within(projector @ projector, projector, 1e-9, "projector")
    assert_within(root, root.T, 1e-12, "root")
    assert round(np.trace(projector)) == np.linalg.matrix_rank(s, tol=1e-4 * np.linalg.norm(s, 2))
    assert_within(root[np.diag(s) == 0], np.zeros_like(root[np.diag(s) == 0]), 1e-14)


def test_empty_and_batched_overlaps():
    assert (loewdin_root(torch.zeros(4, 4, dtype=torch.float64)) == 0).all()
    stack = torch.from_numpy(np.stack([overlap(g) for g in GEOMETRIES]))
    for one, many in zip(stack, loewdin_root(stack), strict=True):
        assert torch.allclose(loewdin_root(one), many, atol=1e-12)


def test_the_relative_cut():
    s = torch.diag(torch.tensor([1.0, 2e-4, 0.5e-4], dtype=torch.float64))
    assert loewdin_root(s).diagonal().tolist() == pytest.approx([1.0, 2e-4**-0.5, 0.0])
    assert loewdin_root(s, rcond=1e-5).diagonal()[2] > 0


@pytest.mark.parametrize("combine", ["sum", "symmetric"])
@pytest.mark.parametrize("kind", ["floats", "tensors"])
@pytest.mark.parametrize("lead", [(), (4,)], ids=["single", "batch"])
def test_dacsp_core(lead, kind, combine):
    rng = rng_of("core", lead, kind, combine)
    c = rng.standard_normal((*lead, 12))
    weights = [1.5, 0.2, 0.4] if kind == "floats" else [rng.uniform(0, 2, 12) for _ in range(3)]
    root = oracle.loewdin_root(overlap("overlap.5")) if combine == "symmetric" else None
    passed = weights if kind == "floats" else [torch.from_numpy(w) for w in weights]
    classes, mix = dacsp_core(torch.from_numpy(c), *passed, None if root is None else torch.from_numpy(root))
    flat = c.reshape(-1, 12)
    edited, _, sides, _ = oracle.dacsp(flat, np.eye(12), *weights, root)  # with unit rows the edit shows x itself
    assert classes.dtype == torch.int8
    assert np.array_equal(classes.reshape(-1, 12).numpy(), sides)
    assert_within(mix.reshape(-1, 12), edited - flat, 1e-12, "x")


def test_dacsp_core_of_non_finite_coefficients_is_not_finite():
    """So that the second pass writes nothing: weights of exactly one must not hide the poison."""
    c = torch.tensor([1.0, torch.nan, torch.inf], dtype=torch.float64)
    for root in (None, torch.eye(3, dtype=torch.float64)):
        assert not dacsp_core(c, 1.0, 1.0, 0.0, root)[1][1:].isfinite().any()


@pytest.mark.parametrize("decay", [1.0, 0.5, 0.0])
@pytest.mark.parametrize(("k", "batch"), [(1, 1), (4, 3), (8, 1), (3, 12)])
def test_pca_core_is_an_exact_svd_step(k, batch, decay):
    """Float64 throughout: rows, values and what is left out agree with a dense SVD to 1e-9."""
    rng = rng_of("pca core", k, batch, decay)
    n = 40
    rows, s = np.linalg.qr(rng.standard_normal((n, k)))[0].T, np.sort(rng.uniform(0.5, 2, k))[::-1].copy()
    g = rng.standard_normal((batch, n))
    q, values, discarded = pca_core(torch.from_numpy(oracle.gram(rows, g)), torch.from_numpy(s), decay)
    kept, expected, tail = oracle.pca_step(rows, s, g, decay)
    assert_within(values, expected, 1e-9, "s")
    assert_within(discarded, np.array((tail**2).sum()), 1e-9, "discarded")
    found = to64(q) @ np.vstack([rows, g])
    assert_within(found.T @ found, kept.T @ kept, 1e-8, "projector")


def test_pca_core_uses_the_measured_overlap_of_its_rows():
    """Rows that drifted from orthonormality are brought back instead of being taken for orthonormal."""
    rng = rng_of("drifted")
    rows = np.linalg.qr(rng.standard_normal((50, 4)))[0].T @ (np.eye(50) + 1e-3 * rng.standard_normal((50, 50)))
    g = rng.standard_normal((2, 50))
    q, _, _ = pca_core(torch.from_numpy(oracle.gram(rows, g)), torch.ones(4, dtype=torch.float64), 1.0)
    found = to64(q) @ np.vstack([rows, g])
    assert_within(found @ found.T, np.eye(4), 1e-12)


def test_pca_core_is_batched_and_all_or_nothing():
    rng = rng_of("batched core")
    h = np.stack(
        [oracle.gram(np.linalg.qr(rng.standard_normal((30, 3)))[0].T, rng.standard_normal((2, 30))) for _ in "ab"]
    )
    s = torch.from_numpy(rng.uniform(1, 2, (2, 3)))
    q, values, discarded = pca_core(torch.from_numpy(h), s, 0.9)
    for t in range(2):
        one = pca_core(torch.from_numpy(h[t]), s[t], 0.9)
        assert torch.allclose(values[t], one[1])
        assert torch.allclose(discarded[t], one[2])
        assert torch.allclose(q[t].abs(), one[0].abs(), atol=1e-9)
    h[1, 0, 0] = np.nan
    q, values, discarded = pca_core(torch.from_numpy(h), s, 0.9)
    assert q.isnan().all()
    assert discarded.isnan().all()
    assert torch.equal(values, s)
