"""The sign rule in one call: `dacsp_` in all four overloads against dense float64, and what it must not touch."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from cases import Case, Inputs, build, build_list, covering, once, over, spread
from helpers import DTYPES, FP32_UNIT, assert_within, dot_bound, edit_bound, naming, same_bits, to64

CASES = covering()
PER_TENSOR = pytest.mark.parametrize("per_tensor", [False, True], ids=["summed", "per_tensor"])
WEIGHTS = 1.5, 0.2


def between(coeffs: np.ndarray) -> float:
    """A threshold in the widest gap of the middle half of |c|: some rows are neutral, none is near the edge."""
    size = np.sort(np.abs(coeffs).ravel())
    middle = size[len(size) // 4 : 3 * len(size) // 4 + 1]
    if len(middle) < 2:
        return 0.0
    widest = int(np.diff(middle).argmax())
    return float(middle[widest : widest + 2].mean())


def edited_bound(g, rows, gains, root, dtype) -> np.ndarray:
    """Bound on G': that of the edit itself plus what the error of c does to x = R diag(w - 1) R c (or (w - 1) c)."""
    c, slack = g @ rows.T, dot_bound(g, rows)
    frame = np.eye(len(rows)) if root is None else root
    x = (gains * (c @ frame)) @ frame
    x_slack = (np.abs(gains) * (slack @ np.abs(frame))) @ np.abs(frame) + FP32_UNIT * np.abs(x)
    return edit_bound(g, rows, x, np.ones(len(g)), dtype) + (1 + 2 * FP32_UNIT) * x_slack @ np.abs(rows)


def check(key, found, g, rows, weights, root, dtype) -> None:
    """Coefficients, classes and edited gradients of one call against the oracle, which `key` stands for."""
    edited, coeffs, classes = found
    expected, c, sides, gains = once(("dacsp", *key), lambda: oracle.dacsp(g, rows, *weights, root))
    bounds = once(("dacsp bounds", *key), lambda: (dot_bound(g, rows), edited_bound(g, rows, gains, root, dtype)))
    assert coeffs.dtype == torch.float32
    assert classes.dtype == torch.int8
    assert_within(coeffs.reshape(c.shape), c, bounds[0], "c")
    assert np.array_equal(classes.reshape(c.shape).cpu().numpy(), sides)
    assert_within(edited.reshape(expected.shape), expected, bounds[1], "G'")


def frame(x: Inputs) -> np.ndarray:
    """R of the rows of a case."""
    return oracle.loewdin_root(x.rows @ x.rows.T)


# The frame acts on coefficients, whatever they were summed from: it is one more factor of the pairs.
@over(spread(CASES, ("sum", "symmetric")))
def test_scalar_weights_match_dense(op, case, combine):
    x = build(case, op.device)
    threshold = once(("between", case), lambda: between(x.g @ x.rows.T))
    root = once(("root", case), lambda: frame(x)) if combine == "symmetric" else None
    passed = None if root is None else torch.from_numpy(root).to(op.device)
    coeffs, classes = op("dacsp_", x.grads.view, x.bases.view, *WEIGHTS, threshold, passed, x.scales)
    assert coeffs.shape == classes.shape == ((case.batch, *case.dk) if case.batch else case.dk)
    found = x.grads.view, coeffs, classes
    check((case, combine, "scalars"), found, x.g, x.rows, (*WEIGHTS, threshold), root, DTYPES[case.grad])
    assert x.grads.intact()
    assert x.bases.unchanged()


def draw_weights(x, threshold: float, device: str) -> tuple[list[torch.Tensor], list[np.ndarray]]:
    size = len(x.rows)
    drawn = [x.rng.uniform(1, 2, size), x.rng.uniform(0, 1, size), threshold * np.ones(size)]
    tensors = [torch.from_numpy(w).float().to(device) for w in drawn]
    return tensors, [to64(w) for w in tensors]


@over(spread(CASES[1::3], ("sum", "symmetric")))
def test_weights_of_every_row_match_dense(op, case, combine):
    x = build(case, op.device)
    tensors, weights = draw_weights(x, once(("between", case), lambda: between(x.g @ x.rows.T)), op.device)
    root = None
    if combine == "symmetric":  # an fp32 root: the oracle gets the rounded one
        root = torch.from_numpy(once(("root", case), lambda: frame(x))).float().to(op.device)
    coeffs, classes = op("dacsp_.tensor", x.grads.view, x.bases.view, *tensors, root, x.scales)
    root64 = None if root is None else to64(root)
    found = x.grads.view, coeffs, classes
    check((case, combine, "rows"), found, x.g, x.rows, weights, root64, DTYPES[case.grad])
    assert x.grads.intact()
    assert x.bases.unchanged()


# Weights, frame and grouping are looked at by different parts of the op. Half of their product has every pair of them, and
# every one with all dtypes.
@pytest.mark.parametrize(
    ("overload", "combine", "per_tensor"),
    [
        ("dacsp_.list", "sum", False),
        ("dacsp_.list", "symmetric", True),
        ("dacsp_.list_tensor", "sum", True),
        ("dacsp_.list_tensor", "symmetric", False),
    ],
)
@pytest.mark.parametrize(("grad", "basis"), [("fp32", "fp32"), ("bf16", "int8b32"), ("fp16", "bf16"), ("bf16", "fp8")])
def test_lists_match_dense(op, overload, grad, basis, combine, per_tensor):
    x = build_list(grad, basis, op.device)
    case = "list", grad, basis, per_tensor
    groups = once(case, lambda: x.groups(per_tensor))
    threshold = once((*case, "between"), lambda: between(np.vstack([g @ rows.T for g, rows in groups])))
    weights = passed = (*WEIGHTS, threshold)
    if overload == "dacsp_.list_tensor":
        passed, weights = draw_weights(x, threshold, op.device)
    roots = [oracle.loewdin_root(rows @ rows.T) for _, rows in groups] if combine == "symmetric" else None
    root = None if roots is None else torch.from_numpy(np.stack(roots) if per_tensor else roots[0]).to(op.device)
    coeffs, classes = op(overload, x.views, x.bases.view, x.offsets, *passed, root, x.scales, per_tensor)
    assert coeffs.shape == classes.shape == ((len(x.grads), 2, 5) if per_tensor else (2, 5))
    edited = [view.flatten() for view in x.views]
    edited = edited if per_tensor else [torch.cat(edited)]
    for t, (g, rows) in enumerate(groups):
        found = edited[t], coeffs.reshape(-1, 10)[t], classes.reshape(-1, 10)[t]
        check((*case, overload, t), found, g, rows, weights, None if roots is None else roots[t], DTYPES[grad])
    assert all(held.intact() for held in x.grads)
    assert x.bases.unchanged()


@pytest.mark.parametrize(
    ("grad", "basis", "combine"),  # half of the product, as above
    [
        ("fp32", "fp32", "sum"),
        ("fp32", "int8", "symmetric"),
        ("bf16", "fp32", "symmetric"),
        ("bf16", "int8", "sum"),
        ("fp16", "fp32", "sum"),
        ("fp16", "int8", "symmetric"),
    ],
)
def test_unit_weights_keep_every_bit(op, grad, basis, combine):
    x = build(Case(1003, 2, (2, 5), grad, basis, "overlap.99", "offset"), op.device)
    x.grads.view[:, ::7] = -0.0
    before = x.grads.view.clone()
    root = torch.from_numpy(frame(x)).to(op.device) if combine == "symmetric" else None
    op("dacsp_", x.grads.view, x.bases.view, 1.0, 1.0, 0.0, root, x.scales)
    ones = torch.ones(10, device=op.device)
    op("dacsp_.tensor", x.grads.view, x.bases.view, ones, ones, ones * 0, root, x.scales)
    assert same_bits(x.grads.view, before)
    assert x.grads.intact()


def test_neutral_components_keep_every_bit(op):
    x = build(Case(1003, 5, (3, 8), "bf16", "fp32", "overlap.5", "strided"), op.device)
    coeffs, classes = op("dacsp_", x.grads.view, x.bases.view, *WEIGHTS, 1e6)
    assert (classes == 0).all()
    assert coeffs.abs().min() > 0
    assert x.grads.unchanged()


def test_the_sign_convention(op):
    """u . g > 0 repeats prior learning: it is aligned and amplified; u . g < 0 conflicts and is suppressed."""
    bases = torch.eye(3, device=op.device).unsqueeze(0)
    grads = torch.tensor([2.0, -2.0, 0.0], device=op.device)
    coeffs, classes = op("dacsp_", grads, bases, 1.5, 0.25, 0.0)
    assert classes.tolist() == [[1, -1, 0]]
    assert coeffs.tolist() == [[2.0, -2.0, 0.0]]
    assert grads.tolist() == [3.0, -0.5, 0.0]


def test_a_coefficient_at_the_threshold_is_neutral(op):
    bases = torch.eye(3, device=op.device).unsqueeze(0)
    grads = torch.tensor([2.0, -2.0, 2.5], device=op.device)
    assert op("dacsp_", grads, bases, 0.0, 0.0, 2.0)[1].tolist() == [[0, 0, 1]]
    assert grads.tolist() == [2.0, -2.0, 0.0]


@pytest.mark.parametrize(
    ("overload", "combine", "weight"),  # half of the product, which has every pair of them, as above
    [
        ("dacsp_", "sum", 0.2),
        ("dacsp_", "symmetric", 1.0),
        ("dacsp_.tensor", "sum", 1.0),
        ("dacsp_.tensor", "symmetric", 0.2),
    ],
)
def test_a_non_finite_gradient_is_left_alone(op, overload, combine, weight):
    case = Case(1003, 5, (2, 5), "fp32", "fp32", "overlap.5", "strided")
    x = build(case, op.device)
    root = torch.from_numpy(frame(x)).to(op.device) if combine == "symmetric" else None
    weights = (1.5, weight, 0.0)
    if overload == "dacsp_.tensor":
        weights = tuple(torch.full((10,), w, device=op.device) for w in weights)
    clean = x.grads.view.clone()
    op(overload, clean, x.bases.view, *weights, root)
    for poison in (torch.nan, torch.inf, -torch.inf):
        with naming(poison):
            x = build(case, op.device)
            x.grads.view[2, 1001] = poison
            before = x.grads.view.clone()
            coeffs, _ = op(overload, x.grads.view, x.bases.view, *weights, root)
            assert same_bits(x.grads.view[2], before[2])
            assert not coeffs[2].isfinite().any()
            others = [0, 1, 3, 4]
            assert same_bits(x.grads.view[others], clean[others])
            assert x.grads.intact()
            assert x.bases.unchanged()


@PER_TENSOR
def test_a_non_finite_tensor_of_a_list(op, per_tensor):
    """One set of coefficients for the list: nothing is written anywhere. One per tensor: the others are edited."""
    x = build_list("fp32", "fp32", op.device)
    x.grads[6].view[3, 5] = torch.nan
    before = [held.view.clone() for held in x.grads]
    op("dacsp_.list", x.views, x.bases.view, x.offsets, *WEIGHTS, 0.0, None, None, per_tensor)
    kept = [same_bits(held.view, old) for held, old in zip(x.grads, before, strict=True)]
    assert kept == [not per_tensor or t == 6 or old.numel() == 0 for t, old in enumerate(before)]


@pytest.mark.parametrize("which", [0, 1, 2], ids=["aligned", "conflict", "threshold"])
def test_nan_in_tensor_weights_writes_nothing(op, which):
    """Tensors of weights are not read on the host, so a NaN there cannot raise; it must not reach a gradient either."""
    x = build(Case(1003, 2, (2, 5), "fp32", "fp32", "overlap.5", "plain"), op.device)
    weights = [torch.full((10,), w, device=op.device) for w in (1.0, 1.0, 0.0)]
    weights[which][:] = torch.nan
    op("dacsp_.tensor", x.grads.view, x.bases.view, *weights)
    assert x.grads.unchanged()


@pytest.mark.parametrize(("batch", "domains", "slots"), [(0, 2, 3), (2, 0, 3)])
def test_no_gradients_or_no_directions(op, batch, domains, slots):
    bases, grads = torch.ones(domains, slots, 129, device=op.device), torch.ones(batch, 129, device=op.device)
    coeffs, classes = op("dacsp_", grads, bases, *WEIGHTS, 0.0)
    assert coeffs.shape == classes.shape == (batch, domains, slots)
    assert (grads == 1).all()
