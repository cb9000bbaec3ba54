"""Laws of the edit that hold for every input: spectrum, no reversal, duplicated domains, permutations, never a NaN."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from cases import GEOMETRIES, directions
from helpers import DTYPES, assert_within, rng_of, to64
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

N = 31
OVERLAPPING = pytest.mark.parametrize("geometry", GEOMETRIES)
# One fp32 edit with |R|^2 <= 1 / (smallest kept eigenvalue of S): at overlap .99 and three domains lambda_max = 3 and
# the smallest kept one is .01, so x carries a relative error of at most 3e2 * 2^-24 = 2e-5.
ROOTED = 2e-5


def _root(bases: torch.Tensor) -> torch.Tensor:
    rows = to64(bases).reshape(-1, bases.shape[-1])
    return torch.from_numpy(oracle.loewdin_root(rows @ rows.T)).to(bases.device)


def _orthonormal_slots(rng, domains: int, slots: int, geometry: str) -> np.ndarray:
    """Domains `[D, k, N]` of orthonormal rows, with mutual overlaps of exactly what the geometry says."""
    frames = np.linalg.qr(rng.standard_normal((N, (domains + 1) * slots)))[0].T.reshape(domains + 1, slots, N)
    if geometry == "deficient":
        return directions(rng, domains, slots, N, geometry)
    overlap = float(geometry.removeprefix("overlap")) if geometry.startswith("overlap") else 0.0
    bases = overlap**0.5 * frames[0] + (1 - overlap) ** 0.5 * frames[1:]
    if geometry == "zero_rows":
        bases[:, ::2] = 0.0
    return bases


def _bases(rng, domains: int, slots: int, geometry: str, device: str) -> torch.Tensor:
    return torch.from_numpy(_orthonormal_slots(rng, domains, slots, geometry)).float().contiguous().to(device)


@OVERLAPPING
def test_spectrum_of_the_symmetric_edit(op, geometry):
    """The operator G -> G' for given weights is symmetric with eigenvalues in [min w, max w] u {1}: it never reverses.

    Its matrix is what the op makes of the identity, with weights that do not depend on the sign of c.
    """
    rng = rng_of("spectrum", geometry)
    bases = _bases(rng, 3, 4, geometry, op.device)
    weights = torch.from_numpy(rng.uniform(0.1, 1.6, 12)).float().to(op.device)
    matrix = torch.eye(N, device=op.device)
    op("dacsp_.tensor", matrix, bases, weights, weights, torch.zeros_like(weights), _root(bases))
    found = to64(matrix)
    assert_within(found, found.T, ROOTED, "asymmetry")
    spectrum = np.linalg.eigvalsh((found + found.T) / 2)
    low, high = min(to64(weights).min(), 1.0), max(to64(weights).max(), 1.0)
    assert spectrum.min() >= low - ROOTED
    assert spectrum.max() <= high + ROOTED
    rank = np.linalg.matrix_rank(to64(bases).reshape(12, N), tol=1e-2)
    assert (np.abs(spectrum - 1) <= ROOTED).sum() >= N - rank  # the orthogonal complement is left alone


@pytest.mark.compiled
@OVERLAPPING
def test_the_symmetric_edit_never_reverses_or_amplifies_beyond_its_weights(op, geometry):
    """<g, g'> >= min(1, min w) |g|^2 and |g'| <= max(1, max w) |g|, with classes from the sign of c."""
    rng = rng_of("descent", geometry)
    bases = _bases(rng, 3, 4, geometry, op.device)
    grads = torch.from_numpy(rng.standard_normal((200, N))).float().to(op.device)
    before = to64(grads)
    op("dacsp_", grads, bases, 1.5, 0.1, 0.0, _root(bases))
    energy = (before**2).sum(1)
    assert ((before * to64(grads)).sum(1) >= (0.1 - ROOTED) * energy).all()
    assert (np.linalg.norm(to64(grads), axis=1) <= (1.5 + ROOTED) * energy**0.5).all()


def test_the_sum_combine_does_reverse_duplicated_directions(op):
    """Documented, and the reason for the symmetric combine: (1 - w) * lambda_max(S) > 1 turns a component around."""
    row = torch.ones(1, 1, N, device=op.device) / N**0.5
    grads = -torch.ones(N, device=op.device)
    op("dacsp_", grads, row.repeat(3, 1, 1), 1.0, 0.5, 0.0)
    assert (grads > 0).all()


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_duplicated_domains_count_once(op, geometry):
    """The whole stack twice, whatever the overlap: the nearest orthonormal frame stays."""
    rng = rng_of("duplicate", geometry)
    bases = _bases(rng, 2, 4, geometry, op.device)
    once = torch.from_numpy(rng.standard_normal((5, N))).float().to(op.device)
    again, twice = once.clone(), torch.cat([bases, bases])
    op("dacsp_", once, bases, 1.5, 0.2, 0.0, _root(bases))
    op("dacsp_", again, twice, 1.5, 0.2, 0.0, _root(twice))
    assert_within(again, to64(once), ROOTED * float(once.abs().max()), "G'")


@pytest.mark.parametrize(
    ("geometry", "conflict"), [("overlap0", 0.2), ("zero_rows", 0.2), ("overlap.5", 1.5), ("overlap.99", 1.5)]
)
def test_one_duplicated_domain_changes_nothing(op, geometry, conflict):
    """One domain of several twice. With partial overlap its frame moves, its span does not: equal weights then."""
    rng = rng_of("duplicate one", geometry)
    bases = _bases(rng, 3, 4, geometry, op.device)
    once = torch.from_numpy(rng.standard_normal((5, N))).float().to(op.device)
    again, more = once.clone(), torch.cat([bases, bases[1:2]])
    op("dacsp_", once, bases, 1.5, conflict, 0.0, _root(bases))
    op("dacsp_", again, more, 1.5, conflict, 0.0, _root(more))
    assert_within(again, to64(once), ROOTED * float(once.abs().max()), "G'")


@pytest.mark.parametrize("combine", ["sum", "symmetric"])
def test_permuted_directions_domains_and_gradients_commute(op, combine):
    rng = rng_of("permute", combine)
    bases = _bases(rng, 3, 4, "overlap.5", op.device)
    grads = torch.from_numpy(rng.standard_normal((6, N))).float().to(op.device)
    aligned, conflict = (torch.from_numpy(rng.uniform(0, 2, (3, 4))).float().to(op.device) for _ in range(2))
    threshold = torch.full((3, 4), 0.1, device=op.device)
    d, k, b = (torch.from_numpy(rng.permutation(size)).to(op.device) for size in (3, 4, 6))

    def run(g, u, weights):
        root = _root(u) if combine == "symmetric" else None
        coeffs, classes = op("dacsp_.tensor", g, u, *(w.flatten() for w in weights), root)
        return g, coeffs, classes

    weights = aligned, conflict, threshold
    permuted = run(grads[b], bases[d][:, k].contiguous(), [w[d][:, k] for w in weights])
    edited, coeffs, classes = run(grads, bases, weights)
    assert_within(permuted[0], to64(edited)[b.cpu().numpy()], ROOTED * float(edited.abs().max()), "G'")
    assert_within(permuted[1], to64(coeffs[b][:, d][:, :, k]), 1e-5, "c")
    assert torch.equal(permuted[2], classes[b][:, d][:, :, k])


def test_scaling_a_gradient_scales_its_edit(op):
    """Powers of two are exact, so the edit of 4 g (with 4 tau) is four times the edit of g, bit for bit."""
    rng = rng_of("homogeneous")
    bases = _bases(rng, 2, 4, "overlap.5", op.device)
    grads = torch.from_numpy(rng.standard_normal((6, N))).float().to(op.device)
    four = grads * 4
    op("dacsp_", grads, bases, 1.5, 0.2, 0.5, _root(bases))
    op("dacsp_", four, bases, 1.5, 0.2, 2.0, _root(bases))
    assert torch.equal(four, grads * 4)


# Rows of bases are unit vectors, so their entries are at most 1. Gradients reach 2^50: their squares and sums stay in
# the range of fp32, in which lanes may accumulate. Edits of fp16 gradients may overflow to infinity, but never to NaN.
_entry = st.floats(-1, 1, width=32) | st.sampled_from([0.0, -0.0, 1e-30, 1e-45])
_gradient = st.floats(-(2.0**50), 2.0**50, width=32) | st.sampled_from([0.0, -0.0, 1e-40, -1e-45, 6e-8])


@st.composite
def _finite_inputs(draw):
    domains, slots, batch = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    n = draw(st.integers(0, 40))
    bases = draw(hnp.arrays(np.float32, (domains, slots, n), elements=_entry))
    grads = draw(hnp.arrays(np.float32, (batch, n), elements=_gradient))
    limit = 6e4 if (name := draw(st.sampled_from(["fp32", "bf16", "fp16"]))) == "fp16" else 2.0**50
    return torch.from_numpy(bases), torch.from_numpy(grads.clip(-limit, limit)).to(DTYPES[name])


@pytest.mark.compiled
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # the backend is stateless
@given(data=st.data())
def test_never_a_nan_out_of_finite_input(op, data):
    bases, grads = (t.to(op.device) for t in data.draw(_finite_inputs()))
    if data.draw(st.booleans()):  # the directions are directions of the gradients themselves, or exact duplicates
        bases = bases[:, :1].expand(bases.shape).contiguous()
    codes, scales = op("quantize_bases", bases)
    for stored, scale in ((bases, None), (bases.bfloat16(), None), (codes, scales)):
        outputs = [op("project", grads, stored, scale), op("gram", stored, grads, scale)]
        measured = outputs[1][: bases.shape[0] * bases.shape[1], : bases.shape[0] * bases.shape[1]]
        for root in (None, torch.from_numpy(oracle.loewdin_root(measured.cpu().numpy())).to(op.device)):
            edited = grads.clone()
            coeffs, _ = op("dacsp_", edited, stored, 2.0, 0.0, 0.0, root, scale)
            outputs += [edited, coeffs]
        assert not any(t.isnan().any() for t in outputs)
    stream, values = bases[0].clone() * 0, torch.zeros(bases.shape[1], device=op.device)
    for _ in range(2):
        discarded = op("pca_update_", stream, values, grads)
    assert stream.isfinite().all()
    assert values.isfinite().all()
    assert discarded.isfinite()
