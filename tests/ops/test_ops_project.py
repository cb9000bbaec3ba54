"""Pass 1: `project` and `gram` against dense float64, over lists, shards, threads and long accumulations."""

from __future__ import annotations

import itertools

import numpy as np
import oracle
import pytest
import torch
from cases import Case, Inputs, build, build_list, covering, dense_rows, directions, gradients, once, over, store_bases
from helpers import DOT_UNIT, DTYPES, assert_within, dot_bound, rng_of, same_bits, to64

CASES = covering()
# How sums are grouped depends on the offsets, how elements are read on the dtypes: half of their product, both groupings
# with every dtype of gradients, with bases that have scales and with others.
LISTS = pytest.mark.parametrize(
    ("grad", "basis", "per_tensor"),
    [
        ("fp32", "fp32", False),
        ("bf16", "int8b32", False),
        ("fp16", "bf16", False),
        ("bf16", "bf16", True),
        ("fp32", "int8", True),
        ("fp16", "fp8", True),
    ],
)


def _untouched(inputs: Inputs) -> bool:
    return inputs.grads.unchanged() and inputs.bases.unchanged()


def dense_project(case: Case, x: Inputs, out: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """c and its bound."""
    exact = once(("project", case), lambda: oracle.project(x.g, x.rows))
    return exact, once(("project bound", case, out), lambda: dot_bound(x.g, x.rows, out))


def dense_gram(g: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """H and its bound."""
    stack = np.vstack([rows, g])
    return oracle.gram(rows, g), dot_bound(stack, stack, torch.float64)


@over(CASES)
def test_project_matches_dense(op, case):
    x = build(case, op.device)
    coeffs = op("project", x.grads.view, x.bases.view, x.scales)
    assert coeffs.dtype == torch.float32
    assert coeffs.shape == ((case.batch, *case.dk) if case.batch else case.dk)
    expected, bound = dense_project(case, x, torch.float32)
    assert_within(coeffs.reshape(expected.shape), expected, bound, "c")
    assert _untouched(x)


@over(CASES[::3])
def test_project_in_float64_is_not_rounded_to_float32(op, case):
    x = build(case, op.device)
    coeffs = op("project", x.grads.view, x.bases.view, x.scales, torch.float64)
    assert coeffs.dtype == torch.float64
    expected, bound = dense_project(case, x, torch.float64)
    assert_within(coeffs.reshape(expected.shape), expected, bound, "c")
    assert same_bits(coeffs.float(), op("project", x.grads.view, x.bases.view, x.scales))


@over(CASES)
def test_gram_matches_dense(op, case):
    x = build(case, op.device)
    measured = op("gram", x.bases.view, x.grads.view, x.scales)
    assert measured.dtype == torch.float64
    expected, bound = once(("gram", case), lambda: dense_gram(x.g, x.rows))
    assert_within(measured, expected, bound, "H")
    assert _untouched(x)


def test_gram_takes_the_rows_of_one_domain(op):
    rng = rng_of("gram 2d")
    rows = directions(rng, 1, 5, 1003, "overlap0")
    bases, _ = store_bases(rows[0], "fp32", op.device)
    grads = gradients(rng, to64(bases), 3, torch.float32, op.device)
    assert torch.equal(op("gram", bases, grads), op("gram", bases.unsqueeze(0), grads))


@LISTS
def test_project_list_matches_dense(op, grad, basis, per_tensor):
    x = build_list(grad, basis, op.device)
    coeffs = op("project.list", x.views, x.bases.view, x.offsets, x.scales, torch.float32, per_tensor)
    assert coeffs.shape == ((len(x.grads), 2, 5) if per_tensor else (2, 5))
    exact = once(
        ("project list", grad, basis, per_tensor),
        lambda: [(oracle.project(g, rows)[0], dot_bound(g, rows)[0]) for g, rows in x.groups(per_tensor)],
    )
    for found, (expected, bound) in zip(coeffs.reshape(-1, 10), exact, strict=True):
        assert_within(found, expected, bound, "c")
    assert x.bases.unchanged()
    assert all(held.unchanged() for held in x.grads)


@LISTS
def test_gram_list_matches_dense(op, grad, basis, per_tensor):
    x = build_list(grad, basis, op.device)
    measured = op("gram.list", x.bases.view, x.views, x.offsets, x.scales, per_tensor)
    assert measured.shape == ((len(x.grads), 11, 11) if per_tensor else (11, 11))
    exact = once(
        ("gram list", grad, basis, per_tensor), lambda: [dense_gram(g, rows) for g, rows in x.groups(per_tensor)]
    )
    for found, (expected, bound) in zip(measured.reshape(-1, 11, 11), exact, strict=True):
        assert_within(found, expected, bound, "H")
    assert x.bases.unchanged()
    assert all(held.unchanged() for held in x.grads)


@pytest.mark.parametrize("overload", ["project", "gram"])
def test_shards_add_up(op, overload):
    """Any split of N, aligned or not, into shards of which some are empty: coefficients and Gram matrices are sums."""
    rng = rng_of("shards", overload)
    n = 33_001
    bases, _ = store_bases(directions(rng, 2, 4, n, "overlap.5"), "fp32", op.device)
    rows = to64(bases).reshape(8, n)
    grads = gradients(rng, rows, 3, torch.float32, op.device)
    cuts = [0, 0, 1, 4099, 4099, 20000, n]

    def call(g, u):
        return op("project", g, u, None, torch.float64).reshape(3, 8) if overload == "project" else op("gram", u, g)

    parts = [call(grads[:, a:b], bases[..., a:b].contiguous()) for a, b in itertools.pairwise(cuts)]
    left, right = (to64(grads), rows) if overload == "project" else (np.vstack([rows, to64(grads)]),) * 2
    bound = 2 * dot_bound(left, right, torch.float64)  # the sum of the parts and the whole each have this error
    assert_within(sum(parts), to64(call(grads, bases)), bound, "sum of shards")


def test_permuted_directions_domains_and_gradients_commute(op):
    rng = rng_of("permute project")
    bases, _ = store_bases(directions(rng, 3, 5, 1003, "overlap.5"), "bf16", op.device)
    grads = gradients(rng, to64(bases).reshape(15, -1), 4, torch.bfloat16, op.device)
    coeffs = op("project", grads, bases, None, torch.float64)
    d, k, b = (torch.from_numpy(rng.permutation(size)).to(op.device) for size in (3, 5, 4))
    permuted = op("project", grads[b], bases[d][:, k].contiguous(), None, torch.float64)
    bound = 2 * dot_bound(to64(grads), to64(bases).reshape(15, -1), torch.float64).reshape(4, 3, 5)
    index = np.ix_(b.cpu().numpy(), d.cpu().numpy(), k.cpu().numpy())
    assert_within(permuted, to64(coeffs)[index], bound[index], "permuted c")


@pytest.mark.native_speed
@pytest.mark.parametrize(("grad", "basis"), [("fp32", "fp32"), ("bf16", "int8"), ("bf16", "fp8")])
def test_long_rows_on_any_number_of_threads(op, threads, grad, basis):
    n = 300_003

    def draw():
        rng = rng_of("long rows", grad, basis)
        bases, scales = store_bases(directions(rng, 1, 3, n, "overlap0"), basis)
        rows = dense_rows(bases, scales, basis)
        grads = gradients(rng, rows, 0, DTYPES[grad])
        g = to64(grads)[None]
        return grads, bases, scales, oracle.project(g, rows), dot_bound(g, rows, torch.float64), dense_gram(g, rows)

    *tensors, exact, bound, exact_gram = once(("long rows", grad, basis), draw)
    grads, bases, scales = (t if t is None else t.to(op.device) for t in tensors)
    assert_within(op("project", grads, bases, scales, torch.float64), exact, bound, "c")
    assert_within(op("gram", bases, grads, scales), *exact_gram, "H")


def test_totals_of_whole_numbers_are_exact(op):
    """Products up to 225: fp32 lanes of up to 7e4 of them are exact, fp64 totals too, an fp32 total (beyond 2^24) is not."""
    rng = rng_of("exact totals")
    whole = rng.integers(8, 15, (3, 200_003), endpoint=True)
    whole[0, 0] = 1
    whole[1:, 0] += 1 - whole[1:] @ whole[0] % 2  # odd totals: fp32 has none of them
    x = torch.from_numpy(whole).float().to(op.device)
    exact = to64(x) @ to64(x).T
    assert exact.min() > 2**24
    assert np.array_equal(to64(op("project", x[0], x[1:].unsqueeze(0), None, torch.float64)), exact[:1, 1:])
    assert np.array_equal(to64(op("project.list", [x[0]], x[1:].unsqueeze(0), [0], None, torch.float64)), exact[:1, 1:])
    assert np.array_equal(to64(op("gram", x[1:], x[0]))[:2, :2], exact[1:, 1:])


@pytest.mark.native_speed
def test_long_all_positive_sums_keep_six_digits(op):
    """fp32 totals would stall: at 3e7 terms a sequential fp32 sum is off by several percent.

    The basis is the gradient itself (one buffer of 120 MB), a tiled pattern, so that the exact sum is one of 1e5 terms.
    """
    pattern = torch.from_numpy(rng_of("positive").uniform(0.5, 1.5, 100_000)).float()
    x = pattern.repeat(300).to(op.device)
    exact = 300 * float((pattern.double() ** 2).sum())
    coeff = op("project", x, x.view(1, 1, -1), None, torch.float64).item()
    assert abs(coeff / exact - 1) <= DOT_UNIT
    measured = op("gram", x.view(1, -1), x)
    assert ((measured / exact - 1).abs() <= DOT_UNIT).all()


def test_the_smallest_step_of_large_parameters_is_resolved(op):
    """The guard projects parameters: |theta| = 20 against a step of coefficient 1e-6 (Adam, lr 1e-6, random direction).

    Lanes of m products u_i theta_i (each of rms |u||theta|/N) round by about 2^-25 * sqrt(m/2) |u||theta|/N per
    addition, independently: sqrt(N m/2) * 2^-25 * |u||theta|/N = 1.0e-8 for m = 512; five sigma on a
    difference of two are 7e-8.
    """
    rng = rng_of("small step")
    n = 1_000_003
    theta = torch.from_numpy(rng.standard_normal(n) * 0.02).float().to(op.device)
    bases, _ = store_bases(directions(rng, 1, 2, n, "overlap0"), "fp32", op.device)
    moved = theta - 1e-6 * bases[0, 0]
    true = (to64(moved) - to64(theta)) @ to64(bases).reshape(2, n).T
    before, after = (op("project", p, bases, None, torch.float64).cpu().numpy()[0] for p in (theta, moved))
    assert abs(true[0]) > 5e-7
    assert np.abs(after - before - true).max() <= 7e-8


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_gradient_shows_in_its_own_coefficients_only(op, poison):
    x = build(Case(1003, 5, (2, 5), "fp32", "fp32", "overlap0", "plain"), op.device)
    clean = op("project", x.grads.view, x.bases.view)
    x.grads.view[2, 1002] = poison
    coeffs = op("project", x.grads.view, x.bases.view)
    assert not coeffs[2].isfinite().any()
    others = [0, 1, 3, 4]
    assert same_bits(coeffs[others], clean[others])
    measured = op("gram", x.bases.view, x.grads.view)
    assert not measured[12].isfinite().any()
    assert not measured[:, 12].isfinite().any()


@pytest.mark.parametrize(("batch", "domains", "slots"), [(0, 2, 3), (2, 0, 3), (2, 3, 0)])
def test_no_gradients_or_no_directions(op, batch, domains, slots):
    bases = torch.zeros(domains, slots, 129, device=op.device)
    grads = torch.ones(batch, 129, device=op.device)
    assert op("project", grads, bases).shape == (batch, domains, slots)
    rows = domains * slots
    measured = op("gram", bases, grads)
    assert measured.shape == (rows + batch, rows + batch)
    assert (measured[rows:, rows:] == 129).all()
