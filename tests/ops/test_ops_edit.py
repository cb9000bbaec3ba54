"""Pass 2: `edit_`, `rotate_` and `edit_rotate_` against dense float64; what must keep its bits keeps them."""

from __future__ import annotations

import itertools

import numpy as np
import oracle
import pytest
import torch
from cases import Case, ListInputs, build, build_list, covering, draw_mix, gradients, integers, once, over, store_bases
from helpers import DTYPES, assert_within, edit_bound, naming, rng_of, rotate_bound, same_bits, to64

FLOATS = ("fp32", "bf16", "fp16")
EDIT_CASES = covering()
ROTATE_CASES = covering(basis=FLOATS)
PER_TENSOR = pytest.mark.parametrize("per_tensor", [False, True], ids=["summed", "per_tensor"])
BATCHES = [Case(301, B, (2, 5), "fp32", "bf16", "overlap.5", "strided") for B in (8, 9, 17)]  # around 8 rows, over 16
TYPICAL = Case(1003, 5, (2, 5), "fp32", "fp32", "overlap.5", "strided")


def _q(rng, kept: int, size: int, device: str) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal((kept, size)) / size**0.5).float().to(device)


def dense_edit(g, rows, mix, scale, dtype) -> tuple[np.ndarray, np.ndarray]:
    """G' and its bound."""
    args = g, rows, to64(mix), to64(scale)
    return oracle.edit(*args), edit_bound(*args, dtype)


def dense_rotation(rows, g, q, dtype) -> tuple[np.ndarray, np.ndarray]:
    """U' and its bound."""
    return oracle.rotate(rows, g, to64(q)), rotate_bound(rows, g, to64(q), dtype)


def dense_edits(x: ListInputs, mix, scale, dtype) -> list[tuple[np.ndarray, np.ndarray]]:
    """G' and its bound of every tensor of a list, with coefficients of its own or those of all."""
    groups = x.groups(True)
    each = zip(groups, mix.expand(len(groups), -1).split(1), scale.expand(len(groups)).split(1), strict=True)
    return [dense_edit(*group, *own, dtype) for group, *own in each]


@over(EDIT_CASES)
def test_edit_matches_dense(op, case):
    x = build(case, op.device)
    mix, scale = draw_mix(x, len(x.g), op.device)
    assert op("edit_", x.grads.view, x.bases.view, mix, scale, x.scales) is None
    expected, bound = once(("edit", case), lambda: dense_edit(x.g, x.rows, mix, scale, DTYPES[case.grad]))
    assert_within(x.grads.view.reshape(expected.shape), expected, bound, "G'")
    assert x.grads.intact()
    assert x.bases.unchanged()


@over(ROTATE_CASES)
def test_rotate_matches_dense(op, case):
    x = build(case, op.device)
    slots = case.dk[1]
    q = _q(x.rng, max(1, slots - 1), slots + len(x.g), op.device)  # one row short: the last slot becomes zero
    basis, rows = x.bases.view[0], x.rows[:slots]
    assert op("rotate_", basis, x.grads.view, q) is None
    assert_within(basis, *once(("rotate", case), lambda: dense_rotation(rows, x.g, q, basis.dtype)), "U'")
    assert slots == 1 or same_bits(basis[-1], torch.zeros_like(basis[-1]))
    x.bases.view[0] = torch.from_numpy(rows.copy()).to(basis)  # back to what it was: the other domains never moved
    assert x.bases.unchanged()
    assert x.grads.unchanged()


@over([*ROTATE_CASES[1::2], *BATCHES])
def test_edit_rotate_matches_dense(op, case):
    x = build(case, op.device)
    domains, slots = case.dk
    domain = domains // 2
    mix, scale = draw_mix(x, len(x.g), op.device)
    q = _q(x.rng, max(1, slots - 1), slots + len(x.g), op.device)  # one row short: the last slot becomes zero
    assert op("edit_rotate_", x.grads.view, x.bases.view, mix, scale, domain, q) is None

    def dense() -> tuple[np.ndarray, ...]:
        bases = x.rows.reshape(domains, slots, -1)
        bound = np.zeros(bases.shape)  # the other domains stay exactly
        bound[domain] = rotate_bound(bases[domain], x.g, to64(q), DTYPES[case.basis])
        g, u = oracle.edit_rotate(x.g, bases, to64(mix), to64(scale), domain, to64(q))
        return g, edit_bound(x.g, x.rows, to64(mix), to64(scale), DTYPES[case.grad]), u, bound

    g, g_bound, u, u_bound = once(("edit_rotate", case), dense)
    assert_within(x.grads.view.reshape(g.shape), g, g_bound, "G'")
    assert_within(x.bases.view, u, u_bound, "U'")
    assert x.grads.intact()
    assert x.bases.intact()


@PER_TENSOR
@pytest.mark.parametrize(
    ("grad", "basis"), [("fp32", "fp32"), ("bf16", "int8b32"), ("fp16", "bf16"), ("bf16", "fp8"), ("bf16", "bf16")]
)
def test_edit_list_matches_dense(op, grad, basis, per_tensor):
    x = build_list(grad, basis, op.device)
    mix, scale = draw_mix(x, len(x.grads) if per_tensor else 1, op.device)
    op("edit_.list", x.views, x.bases.view, x.offsets, mix, scale, x.scales, per_tensor)
    edits = once(("edit list", grad, basis, per_tensor), lambda: dense_edits(x, mix, scale, DTYPES[grad]))
    for t, held in enumerate(x.grads):
        assert_within(held.view.reshape(1, -1), *edits[t], f"G'[{t}]")
        assert held.intact()
    assert x.bases.unchanged()


# The grouping chooses the core of a tensor, whether gradients are edited on the way what is done with them: of these two and the
# dtypes every pair.
@pytest.mark.parametrize(
    ("overload", "grad", "basis", "per_tensor"),
    [
        ("rotate_.list", "fp32", "fp32", False),
        ("rotate_.list", "bf16", "bf16", True),
        ("rotate_.list", "fp32", "bf16", True),
        ("edit_rotate_.list", "fp32", "fp32", True),
        ("edit_rotate_.list", "bf16", "bf16", False),
        ("edit_rotate_.list", "fp32", "bf16", False),
    ],
)
def test_rotate_list_matches_dense_and_skips_gaps(op, overload, grad, basis, per_tensor):
    x = build_list(grad, basis, op.device)
    shape = (len(x.grads), 4, 6) if per_tensor else (4, 6)
    q = torch.from_numpy(x.rng.standard_normal(shape) / 3).float().to(op.device)
    mix, scale = draw_mix(x, len(x.grads) if per_tensor else 1, op.device)
    before = x.bases.view.clone()
    if overload == "rotate_.list":
        op(overload, x.bases.view[1], x.views, x.offsets, q, per_tensor)
        assert all(held.unchanged() for held in x.grads)
    else:
        op(overload, x.views, x.bases.view, x.offsets, mix, scale, 1, q, per_tensor)
    case, cores = (grad, basis, per_tensor), q if per_tensor else [q] * len(x.grads)
    rotations = once(
        ("rotate list", *case),
        lambda: [
            dense_rotation(u[5:], g, core, DTYPES[basis]) for (g, u), core in zip(x.groups(True), cores, strict=True)
        ],
    )
    for t, held in enumerate(x.grads):
        assert_within(x.bases.view[1][:, torch.from_numpy(x.masks[t])], *rotations[t], "U'")
        if overload == "edit_rotate_.list":
            edits = once(("rotate list edit", *case), lambda: dense_edits(x, mix, scale, DTYPES[grad]))
            assert_within(held.view.reshape(1, -1), *edits[t], f"G'[{t}]")
        assert held.intact()
    gaps = torch.from_numpy(~x.masks.any(0))
    assert same_bits(x.bases.view[0], before[0])
    assert same_bits(x.bases.view[1][:, gaps], before[1][:, gaps])
    assert x.bases.intact()


@pytest.mark.parametrize("seed", [0, 5], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_list_is_the_flattened_batch(op, dtype, seed):
    """Segments back to back are one gradient; what stochastic rounding does depends on the position in the row only."""
    rng = rng_of("list is batch", dtype)
    sizes = [128, 1280, 33_024, 256, 77]
    offsets = [0, 128, 1408, 34_432, 34_688]
    bases = integers(rng, 2, 5, sum(sizes), device=op.device).to(DTYPES[dtype])
    flat = integers(rng, sum(sizes), device=op.device).to(DTYPES[dtype])
    parts, moved = [part.clone() for part in flat.split(sizes)], bases.clone()
    mix, scale = integers(rng, 1, 10, device=op.device), torch.full((1,), 0.75, device=op.device)
    q = integers(rng, 5, 6, limit=255, device=op.device)
    op("edit_rotate_", flat, bases, mix, scale, 1, q, seed)
    op("edit_rotate_.list", parts, moved, offsets, mix, scale, 1, q, False, seed)
    assert same_bits(torch.cat(parts), flat)
    assert same_bits(moved, bases)


@pytest.mark.parametrize("dtype", FLOATS)
def test_edits_and_rotations_of_shards_are_those_of_the_whole(op, dtype):
    rng = rng_of("edit shards", dtype)
    bases = integers(rng, 2, 5, 1003, device=op.device).to(DTYPES[dtype])
    grads = integers(rng, 3, 1003, device=op.device).to(DTYPES[dtype])
    mix, scale = integers(rng, 3, 10, device=op.device), torch.full((3,), 0.75, device=op.device)
    q = integers(rng, 4, 8, device=op.device)
    parts, shards = grads.clone(), []
    for a, b in ((0, 0), (0, 1), (1, 130), (130, 1003)):
        shards.append(bases[..., a:b].contiguous())
        op("edit_rotate_", parts[:, a:b], shards[-1], mix, scale, 0, q)
    op("edit_rotate_", grads, bases, mix, scale, 0, q)
    assert same_bits(parts, grads)
    assert same_bits(torch.cat(shards, -1), bases)


@pytest.mark.parametrize("grad", FLOATS)
@pytest.mark.parametrize("mix_zero", [0.0, -0.0])
def test_no_edit_keeps_every_bit(op, grad, mix_zero):
    """x = 0 and scale = 1 write back what was read: -0.0, subnormals, infinities and NaN included."""
    n = 1003
    pattern = torch.arange(n, dtype=torch.int32, device=op.device)
    grads = (pattern * 4_283_137 if grad == "fp32" else (pattern * 131).to(torch.int16)).view(DTYPES[grad])
    if grad != "fp32":  # signalling NaNs may become quiet on the way through fp32: leave only the infinities
        grads = torch.where(grads.isnan(), torch.inf, grads.float()).to(DTYPES[grad])
    else:
        grads = torch.where(grads.isnan(), torch.inf, grads)
    grads[7] = -0.0
    before = grads.clone()
    bases = torch.randn(2, 5, n, device=op.device)
    op("edit_", grads, bases, torch.full((1, 10), mix_zero, device=op.device), torch.ones(1, device=op.device))
    assert same_bits(grads, before)


@pytest.mark.parametrize("overload", ["edit_", "edit_rotate_"])
def test_a_non_finite_row_of_mix_writes_nothing_to_its_gradient(op, overload):
    x = build(TYPICAL, op.device)
    mix, scale = draw_mix(x, 5, op.device)
    clean = x.grads.view.clone()
    extra = (1, _q(x.rng, 5, 10, op.device)) if overload == "edit_rotate_" else ()
    op(overload, clean, x.bases.view.clone(), mix, scale, *extra)
    for where, poison in itertools.product(("mix", "scale"), (torch.nan, torch.inf)):
        with naming(where, poison):
            x, given = build(TYPICAL, op.device), {"mix": mix.clone(), "scale": scale.clone()}
            given[where][3:4].view(-1)[-1] = poison
            op(overload, x.grads.view, x.bases.view, given["mix"], given["scale"], *extra)
            others = [0, 1, 2, 4]
            assert same_bits(x.grads.view[others], clean[others])
            assert same_bits(x.grads.view[3], torch.from_numpy(x.g[3].copy()).float().to(op.device))
            assert x.grads.intact()


@pytest.mark.parametrize("poison", [float("nan"), -float("inf")])
@pytest.mark.parametrize("basis", FLOATS)
def test_a_non_finite_q_leaves_the_basis(op, basis, poison):
    x = build(Case(1003, 2, (2, 5), "fp32", basis, "overlap0", "offset"), op.device)
    q = _q(x.rng, 4, 7, op.device)
    q[2, 6] = poison
    op("rotate_", x.bases.view[0], x.grads.view, q, 3)
    mix, scale = draw_mix(x, 2, op.device)
    op("edit_rotate_", x.grads.view, x.bases.view, mix, scale, 1, q)
    assert x.bases.unchanged()
    args = x.g, x.rows, to64(mix), to64(scale)  # the gradients are edited all the same
    assert_within(x.grads.view, oracle.edit(*args), edit_bound(*args, torch.float32), "G'")


def test_a_non_finite_tensor_of_a_list_leaves_only_its_own_segment(op):
    x = build_list("fp32", "fp32", op.device)
    mix, scale = draw_mix(x, len(x.grads), op.device)
    q = torch.from_numpy(x.rng.standard_normal((len(x.grads), 5, 6))).float().to(op.device)
    mix[2, 0] = torch.nan
    q[2, 0, 0] = torch.nan
    before = x.bases.view.clone()
    op("edit_rotate_.list", x.views, x.bases.view, x.offsets, mix, scale, 0, q, True)
    assert [held.unchanged() for held in x.grads] == [
        held.view.numel() == 0 or t == 2 for t, held in enumerate(x.grads)
    ]
    own = torch.from_numpy(x.masks[2])
    assert same_bits(x.bases.view[0][:, own], before[0][:, own])


@pytest.mark.native_speed
@pytest.mark.parametrize(("grad", "basis"), [("fp32", "fp32"), ("bf16", "bf16")])
def test_long_rows_on_any_number_of_threads(op, threads, grad, basis):
    """Threads share out N: results are bitwise those of one thread."""
    n = 300_003

    def draw():
        rng = rng_of("long edit", grad, basis)
        bases, _ = store_bases(rng.standard_normal((1, 3, n)) / n**0.5, basis)
        rows = to64(bases)[0]
        grads = gradients(rng, rows, 2, DTYPES[grad])
        mix = torch.from_numpy(rng.standard_normal((2, 3)) * 100).float()
        scale, q, g = torch.full((2,), 0.5), _q(rng, 3, 5, "cpu"), to64(grads)
        edited, rotated = dense_edit(g, rows, mix, scale, DTYPES[grad]), dense_rotation(rows, g, q, DTYPES[basis])
        return (grads, bases, mix, scale, q), edited, rotated

    tensors, exact, exact_rows = once(("long edit", grad, basis), draw)
    grads, bases, mix, scale, q = (t.to(op.device, copy=True) for t in tensors)
    edited, rotated = grads.clone(), bases.clone()
    op("edit_rotate_", edited, rotated, mix, scale, 0, q)
    assert_within(edited, *exact, "G'")
    assert_within(rotated[0], *exact_rows, "U'")
    torch.set_num_threads(1)
    op("edit_rotate_", grads, bases, mix, scale, 0, q)
    assert same_bits(grads, edited)
    assert same_bits(bases, rotated)


@pytest.mark.parametrize(("batch", "domains", "slots"), [(0, 2, 3), (2, 0, 3)])
def test_no_gradients_or_no_directions(op, batch, domains, slots):
    bases, grads = torch.ones(domains, slots, 129, device=op.device), torch.ones(batch, 129, device=op.device)
    mix, scale = torch.ones(batch, domains * slots, device=op.device), torch.full((batch,), 0.5, device=op.device)
    op("edit_", grads, bases, mix, scale)
    assert (grads == 0.5).all()
