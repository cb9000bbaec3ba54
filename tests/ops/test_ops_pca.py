"""Streaming PCA: one step against a dense SVD, and the laws that a whole stream must obey."""

from __future__ import annotations

import itertools

import numpy as np
import oracle
import pytest
import torch
from cases import build_list, directions
from helpers import DTYPES, UNIT, Held, assert_within, rng_of, same_bits, to64

FLOATS = ("fp32", "bf16", "fp16")


def fresh(k: int, n: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(k, n, dtype=dtype, device=device), torch.zeros(k, dtype=torch.float64, device=device)


def stream(op, batches: list[np.ndarray], k: int, decay: float = 1.0) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Runs the op over fp32 batches; returns rows, singular values and what each update discarded, in float64."""
    basis, values = fresh(k, batches[0].shape[1], op.device)
    discarded = []
    for batch in batches:
        grads = torch.from_numpy(batch).float().to(op.device)
        discarded.append(float(op("pca_update_", basis, values, grads, decay)))
    return to64(basis), to64(values), discarded


def decaying(rng, total: int, n: int, power: float = 1.0) -> np.ndarray:
    """Gradients `[total, N]` whose covariance has standard deviations i^-power, rounded to fp32."""
    frame = np.linalg.qr(rng.standard_normal((n, 60)))[0].T
    return (rng.standard_normal((total, 60)) / np.arange(1, 61) ** power @ frame).astype(np.float32).astype(np.float64)


def orthonormality(rows: np.ndarray, values: np.ndarray) -> float:
    used = rows[values > 0]
    return float(np.abs(used @ used.T - np.eye(len(used))).max(initial=0))


@pytest.mark.parametrize(("grad", "basis"), [("fp32", "fp32"), ("bf16", "fp32"), ("fp32", "bf16"), ("fp16", "fp16")])
@pytest.mark.parametrize(
    ("k", "batch", "n"), [(1, 0, 1003), (8, 3, 129), (5, 1, 33_001), (4, 9, 15), (3, 2, 3), (2, 5, 1), (4, 2, 0)]
)
def test_one_step_is_a_dense_svd(op, k, batch, n, grad, basis):
    """Energies and captured energy, not angles: U' and s' of [decay diag(s) U; G] up to the rounding of the storage."""
    rng = rng_of("pca step", k, batch, n, grad, basis)
    rank = min(k, n)
    rows = np.zeros((k, n))
    rows[:rank] = np.linalg.qr(rng.standard_normal((n, rank)))[0].T if n else 0
    values = torch.zeros(k, dtype=torch.float64, device=op.device)
    values[:rank] = torch.from_numpy(np.sort(rng.uniform(0.5, 2, rank))[::-1].copy())
    held = Held(torch.from_numpy(rows).to(DTYPES[basis]).to(op.device), lead=1)
    grads = torch.from_numpy(rng.standard_normal((batch, n) if batch else n) / max(n, 1) ** 0.5).to(DTYPES[grad])
    old, s, g = to64(held.view), to64(values), np.atleast_2d(to64(grads))
    discarded = op("pca_update_", held.view, values, grads.to(op.device), 0.9)

    expected, spectrum, tail = oracle.pca_step(old, s, g, 0.9)
    stored = 4 * UNIT[DTYPES[basis]]  # rows are stored, and were read, to this relative precision; H is exact to 1e-6
    unit = max(stored, 4e-6) * (1 + spectrum.max(initial=0))
    assert_within(values, spectrum, unit, "s")
    total = (0.81 * s**2).sum() + (g**2).sum()
    assert_within(discarded, np.array((tail**2).sum()), 2 * unit * max(total, 1), "discarded")
    data = np.vstack([0.9 * s[:, None] * old, g])
    new = to64(held.view)
    assert np.linalg.norm(data @ new.T) ** 2 >= np.linalg.norm(data @ expected.T) ** 2 - 4 * unit * max(total, 1)
    assert orthonormality(new, to64(values)) <= max(1e-5, 8 * UNIT[DTYPES[basis]])
    assert held.intact()


@pytest.mark.parametrize("per_tensor", [False, True], ids=["summed", "per_tensor"])
def test_list_is_a_step_per_tensor_or_one_of_all(op, per_tensor):
    x = build_list("fp32", "fp32", op.device)
    basis, other = x.bases.view[0], x.bases.view[1].clone()
    covered = torch.from_numpy(x.masks.any(0)).to(op.device)
    basis[:, covered] = 0.0  # the gaps keep their NaN
    groups = (len(x.grads),) if per_tensor else ()
    values = torch.zeros(*groups, 5, device=op.device)
    for _ in range(2):
        discarded = op("pca_update_.list", basis, values, x.views, x.offsets, 1.0, per_tensor)
    assert discarded.shape == groups
    assert discarded.dtype == torch.float64
    gradients = [g for g, _ in x.groups(per_tensor)]
    for t, (g, found) in enumerate(zip(gradients, values.reshape(-1, 5), strict=True)):
        size = np.linalg.norm(g) * 2**0.5  # the same gradient twice: one direction, sqrt(2) times its length
        assert_within(found, np.array([size, 0, 0, 0, 0]), 1e-6 * size, f"s[{t}]")
        rows = to64(basis)[:, x.masks[t] if per_tensor else x.masks.any(0)]
        assert_within(np.abs(rows[0] @ g[0]), np.array(np.linalg.norm(g)), 1e-6 * size, "captured")
        assert (rows[1:] == 0).all()
    assert basis[:, ~covered].isnan().all()
    assert all(held.unchanged() for held in x.grads)
    assert x.bases.intact()
    assert same_bits(x.bases.view[1], other)


def test_energy_identity(op):
    """At decay = 1 nothing is lost from the books: sum s^2 + sum discarded = sum |g|^2."""
    data = decaying(rng_of("energy"), 30, 1003)
    _, values, discarded = stream(op, np.split(data, 10), 8)
    total = (data**2).sum()
    assert sum(discarded) > 0.01 * total
    assert abs((values**2).sum() + sum(discarded) - total) <= 1e-6 * total


def test_covariance_error_is_bounded_by_the_top_discarded_eigenvalues(op):
    """|A^T A - B^T B|_2 <= sum of the largest eigenvalue dropped in each step, and B never claims more than A has."""
    rng = rng_of("covariance")
    data, k, n = decaying(rng, 45, 129, 0.5), 6, 129
    basis, values = fresh(k, n, op.device)
    dropped = 0.0
    for batch in np.split(data, 15):
        _, _, tail = oracle.pca_step(to64(basis), to64(values), batch, 1.0)
        dropped += tail[0] ** 2
        op("pca_update_", basis, values, torch.from_numpy(batch).float().to(op.device))
    kept = to64(values)[:, None] * to64(basis)
    error = np.linalg.eigvalsh(data.T @ data - kept.T @ kept)
    slack = 1e-5 * np.linalg.norm(data, 2) ** 2  # 15 steps in fp32
    assert dropped > 100 * slack
    assert error.max() <= dropped + slack
    assert error.min() >= -slack


@pytest.mark.parametrize("n", [15, 1003, 12289])
def test_data_of_low_rank_is_recovered_exactly(op, n):
    """Eight directions, the smallest of 1 % of the largest, in ten steps of two gradients: nothing is discarded."""
    rng = rng_of("low rank", n)
    frame = np.linalg.qr(rng.standard_normal((n, 8)))[0].T
    strength = np.geomspace(1, 0.01, 8)
    data = (rng.standard_normal((20, 8)) * strength @ frame).astype(np.float32).astype(np.float64)
    rows, values, discarded = stream(op, np.split(data, 10), 8)
    expected = np.linalg.svd(data, compute_uv=False)[:8]
    # fp32 rows perturb the data by 2^-24 of its norm in every step: sqrt(10) * 6e-8 * s_max = 2e-7 s_max.
    assert_within(values, expected, 1e-6 * expected[0], "s")
    assert sum(discarded) <= 1e-6 * (data**2).sum()
    assert np.linalg.norm(frame - frame @ rows.T @ rows, axis=1).max() <= 1e-3  # each direction, that of 1 % too


@pytest.mark.native_speed
def test_rows_stay_orthonormal_over_two_thousand_updates(op):
    rng = rng_of("long stream")
    basis, values = fresh(8, 257, op.device)
    data = torch.from_numpy(decaying(rng, 4000, 257, 0.5)).float().to(op.device)
    worst = 0.0
    for step, batch in enumerate(data.split(2)):
        op("pca_update_", basis, values, batch, 0.999)
        if step % 100 == 99:
            worst = max(worst, orthonormality(to64(basis), to64(values)))
    assert worst <= 1e-5
    assert (values.diff() <= 0).all()


@pytest.mark.parametrize("residual", [1e-2, 1e-3, 1e-4, 1e-5])
def test_directions_that_barely_show_do_not_cost_orthonormality(op, residual):
    """Gradients almost in the span of the basis: what is left of them, blown up to a unit row, is mostly rounding.

    A direction at the relative cut (1e-6 of the energy, 1e-3 of the length) enters with coefficients of 1e3, which fp32
    rounds by 2^-24 * 1e3 = 6e-5; the next update measures that and repairs it. A cut of 1e-10 would let 6e-3 in.
    """
    rng = rng_of("residual", residual)
    frame = np.linalg.qr(rng.standard_normal((1003, 4)))[0].T
    data = rng.standard_normal((16, 4)) @ frame + residual * rng.standard_normal((16, 1003)) / 1003**0.5
    basis, values = fresh(8, 1003, op.device)
    for batch in torch.from_numpy(data).float().to(op.device).split(2):
        op("pca_update_", basis, values, batch)
        assert orthonormality(to64(basis), to64(values)) <= 6e-5
    op("pca_update_", basis, values, batch * 0)
    assert orthonormality(to64(basis), to64(values)) <= 1e-5


@pytest.mark.compiled
def test_captures_what_batch_pca_captures(op):
    """With four rows of oversampling, truncated at the end: at least .99 of the energy of an offline SVD."""
    data = decaying(rng_of("capture"), 300, 1003, 0.75)
    rows, values, _ = stream(op, np.split(data, 100), 8 + 4)
    best, _ = oracle.batch_pca(data, 8)
    captured = np.linalg.norm(data @ rows[:8].T) ** 2 / np.linalg.norm(data @ best.T) ** 2
    assert 0.99 <= captured <= 1 + 1e-6
    assert (np.diff(values) <= 0).all()


def test_unused_slots_are_exact_zeros(op):
    basis, values = fresh(6, 1003, op.device)
    grads = torch.from_numpy(rng_of("slots").standard_normal((2, 1003))).float().to(op.device)
    for _ in range(3):  # repeats bring no new direction
        op("pca_update_", basis, values, grads)
    assert (values[:2] > 0).all()
    assert (values[2:] == 0).all()
    assert (basis[2:] == 0).all()


@pytest.mark.parametrize("zeros", ["gradients", "everything"])
def test_zero_gradients_change_nothing_that_matters(op, zeros):
    """GRPO batches without a signal have gradients of exactly zero."""
    basis, values = fresh(3, 129, op.device)
    if zeros == "gradients":
        op("pca_update_", basis, values, torch.randn(3, 129, device=op.device))
    rows, old = to64(basis), to64(values)
    assert float(op("pca_update_", basis, values, torch.zeros(2, 129, device=op.device))) <= 1e-6 * (old**2).sum()
    assert_within(values, old, 1e-6 * (1 + old.max()), "s")
    assert_within(to64(basis).T @ to64(basis), rows.T @ rows, 1e-6, "projector")


def test_decay_forgets_geometrically(op):
    """Two orthogonal directions, the older one seen three updates ago: its singular value has shrunk by decay^3."""
    basis, values = fresh(4, 129, op.device)
    old, new = torch.eye(129, device=op.device)[:2]
    op("pca_update_", basis, values, old * 8, 0.5)
    for _ in range(3):
        op("pca_update_", basis, values, new * 0, 0.5)
    assert_within(values, np.array([1.0, 0, 0, 0]), 1e-6)
    op("pca_update_", basis, values, new * 2, 0.0)
    assert_within(values, np.array([2.0, 0, 0, 0]), 1e-6)
    assert_within(basis[0].abs(), to64(new), 1e-6)


def test_shards_give_the_update_of_the_whole(op):
    """Gram matrices of shards are summed, the core is the same for all, every shard rotates its own rows."""
    from carerl_kernels.linalg import pca_core

    data = decaying(rng_of("pca shards"), 12, 1003)
    cuts = [0, 0, 1, 130, 1003]
    whole, s_whole = fresh(6, 1003, op.device)
    shards = [torch.zeros(6, b - a, device=op.device) for a, b in itertools.pairwise(cuts)]
    values = torch.zeros(6, dtype=torch.float64, device=op.device)
    for batch in np.split(data, 6):
        grads = torch.from_numpy(batch).float().to(op.device)
        op("pca_update_", whole, s_whole, grads)
        parts = [grads[:, a:b] for a, b in itertools.pairwise(cuts)]
        measured = sum(op("gram", u, g) for u, g in zip(shards, parts, strict=True))
        q, values, _ = pca_core(measured, values, 1.0)
        for u, g in zip(shards, parts, strict=True):
            op("rotate_", u, g, q.float())
    assert_within(values, to64(s_whole), 1e-6 * float(s_whole[0]), "s")
    rows, expected = to64(torch.cat(shards, 1)), to64(whole)
    signs = np.sign((rows * expected).sum(1, keepdims=True))  # singular vectors are defined up to their sign
    assert_within(rows * signs, expected, 1e-4, "U'")


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("basis", FLOATS)
def test_non_finite_gradients_write_nothing(op, basis, poison):
    held = Held(
        torch.from_numpy(directions(rng_of("pca nan"), 1, 4, 1003, "overlap0")[0]).to(DTYPES[basis]).to(op.device)
    )
    values = torch.tensor([4.0, 3.0, 2.0, 1.0], device=op.device)
    grads = torch.randn(3, 1003, device=op.device)
    grads[1, 1002] = poison
    assert op("pca_update_", held.view, values, grads, 0.9, 7).isnan()
    assert held.unchanged()
    assert values.tolist() == [4.0, 3.0, 2.0, 1.0]


def test_one_non_finite_tensor_of_a_list_stops_the_whole_update(op):
    """All or nothing, so that the tensors of a model never drift apart in the number of updates that they have seen."""
    x = build_list("fp32", "fp32", op.device)
    x.grads[2].view[0, 0] = torch.nan
    values = torch.ones(len(x.grads), 5, device=op.device)
    discarded = op("pca_update_.list", x.bases.view[0], values, x.views, x.offsets, 1.0, True)
    assert discarded.isnan().all()
    assert (values == 1).all()
    assert x.bases.unchanged()


@pytest.mark.compiled
@pytest.mark.parametrize("seed", [1, 2])
def test_stochastic_rounding_keeps_a_low_precision_stream_unbiased(op, seed):
    """Many steps, each below half a bf16 spacing: rounding to nearest never moves, stochastic rounding follows."""
    n, steps = 1024, 400
    row = torch.full((1, n), 1 / 64, dtype=torch.bfloat16, device=op.device)  # unit length
    push = torch.ones(1, n, device=op.device) / 64
    nearest, q = row.clone(), torch.tensor([[1.0, 2.0**-12]], device=op.device)
    for step in range(steps):
        op("rotate_", row, push, q, seed * 1000 + step)
    op("rotate_", nearest, push, q, 0)
    assert (nearest == 1 / 64).all()  # the next step would be the same
    # Each element is 1/64 plus spacing * a binomial count; the mean over elements averages n of those.
    expected = (1 + steps * 2.0**-12) / 64
    assert abs(float(row.double().mean()) / expected - 1) < 5 * 2.0**-7 * (steps * 2.0**-5 / n) ** 0.5
