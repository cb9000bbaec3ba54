"""One-sided directions of weight matrices: coefficients of inputs, projection back into a box, and the sign rule."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import oracle
import pytest
import torch
from helpers import (
    DOT_UNIT,
    DTYPES,
    FLOOR,
    FP32_UNIT,
    UNIT,
    Held,
    assert_within,
    naming,
    rng_of,
    same_bits,
    to64,
)
from torch import Tensor

SIDES = {"right": False, "left": True}
sides = pytest.mark.parametrize("left", list(SIDES.values()), ids=list(SIDES))
FLOATS = ("fp32", "bf16", "fp16")
dtypes = pytest.mark.parametrize("dtype", FLOATS)

# G, outputs, inputs, K: strips, panels and blocks to spare, less than one of any, one more than a whole number; and more
# directions than Triton takes, which leaves those to the reference
SHAPES = [
    (2, 96, 64, 32),
    (3, 7, 5, 3),
    (1, 1, 1, 1),
    (1, 13, 35, 33),
    (2, 97, 193, 17),
    (1, 301, 50, 48),
    (1, 40, 769, 5),
    (1, 5, 390, 260),
    (5, 12, 16, 0),
    (2, 0, 8, 3),
    (2, 6, 0, 3),
    (1, 300, 0, 3),
]


@cache
def orthonormal(G: int, inputs: int, K: int) -> Tensor:
    """Directions `[G, K, inputs]` in float64; zero rows where there are too many, and one where there are several."""
    rng, rows = rng_of("directions", G, inputs, K), np.zeros((G, K, inputs))
    for own in rows if inputs else ():
        basis = np.linalg.qr(rng.standard_normal((inputs, K)))[0].T
        own[: len(basis)] = basis
    if K > 2:
        rows[:, 1] = 0.0
    return torch.from_numpy(rows)


class Problem:
    """Matrices between guard bytes and orthonormal directions of their inputs."""

    def __init__(self, shape: tuple[int, ...], dtype: str, left: bool, directions: str = "fp32", device: str = "cpu"):
        G, outputs, inputs, K = shape
        self.rng, self.left, self.device = rng_of("inputs", shape, dtype, left, directions), left, device
        stacked = self.rng.standard_normal((G, outputs, inputs))
        self.directions = orthonormal(G, inputs, K).to(DTYPES[directions]).to(device, copy=True)
        self.held = [Held(self.stored(w).to(DTYPES[dtype]).to(device), lead=3) for w in stacked]
        self.V = to64(self.directions)
        self.unit, self.floor = UNIT[DTYPES[dtype]], FLOOR[DTYPES[dtype]]

    def stored(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(rows.T if self.left else rows))

    @property
    def matrices(self) -> list[Tensor]:
        return [h.view for h in self.held]

    @property
    def W(self) -> np.ndarray:
        """`[G, outputs, inputs]`, whatever the side."""
        stacked = np.stack([to64(h.view) for h in self.held])
        return stacked.swapaxes(1, 2) if self.left else stacked

    def per_output(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).float().to(self.device)

    def anchor(self, spread: float = 0.5) -> Tensor:
        """Where the outputs stand, and a little away from it; every third output stands still."""
        c = self.W @ self.V.swapaxes(1, 2)
        away = spread * self.rng.standard_normal(c.shape)
        away[:, ::3] = 0.0
        return self.per_output(c + away)

    def bounds(self, like: Tensor) -> Tensor:
        return self.per_output(0.3 * self.rng.random(like.shape))

    def dot_bound(self, W: np.ndarray) -> np.ndarray:
        return DOT_UNIT * (abs(W) @ abs(self.V).swapaxes(1, 2))

    def assert_moved(self, before: np.ndarray, x: np.ndarray, slack: np.ndarray, energy: Tensor) -> None:
        """W' = W + x V and the sum of x^2, where x is known up to `slack`."""
        exact = before + x @ self.V
        size = abs(before) + abs(x) @ abs(self.V)
        K = self.V.shape[1]
        bound = (K + 3) * FP32_UNIT * size + slack @ abs(self.V) + self.unit * abs(exact) + self.floor
        assert_within(self.W, exact, bound, "element ")
        assert energy.dtype == torch.float64
        total = (x**2).sum((1, 2))
        assert_within(energy, total, (2 * abs(x) * slack + slack**2).sum((1, 2)) + 1e-6 * total, "energy ")
        assert all(h.intact() for h in self.held)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_coefficients(op, shape):
    for dtype, (side, left) in itertools.product(FLOATS, SIDES.items()):
        with naming(dtype, side):
            p = Problem(shape, dtype, left, device=op.device)
            found = op("input_project", p.matrices, p.directions, left)
            assert (found.dtype, found.device.type) == (torch.float32, op.device)
            exact = oracle.input_project(p.W, p.V)
            assert_within(found, exact, p.dot_bound(p.W) + FP32_UNIT * abs(exact), "coefficient ")
            assert all(h.unchanged() for h in p.held)


@pytest.mark.parametrize(("dtype", "shape"), [("fp32", s) for s in SHAPES] + [("bf16", s) for s in SHAPES[:6]], ids=str)
def test_confinement(op, shape, dtype):
    # Every pair of side, bound below and bound above.
    for side, below, above in (("right", 0, 0), ("right", 1, 1), ("left", 0, 1), ("left", 1, 0)):
        with naming(side, f"{below=}", f"{above=}"):
            left = SIDES[side]
            p = Problem(shape, dtype, left, device=op.device)
            before, anchor = p.W, p.anchor()
            lower, upper = (p.bounds(anchor) if bounded else None for bounded in (below, above))
            energy = op("input_confine_", p.matrices, p.directions, anchor, lower, upper, left)
            box = (0.0 if b is None else to64(b) for b in (lower, upper))
            x = oracle.input_confine(before, p.V, to64(anchor), *box)
            slack = p.dot_bound(before) + 4 * FP32_UNIT * (abs(to64(anchor)) + abs(x))
            p.assert_moved(before, x, slack, energy)


@dtypes
@sides
@pytest.mark.parametrize("directions", ["fp32", "bf16"])
def test_directions_may_be_rounded(op, dtype, left, directions):
    """A rounded direction is another direction: the oracle uses the same one."""
    p = Problem((2, 45, 70, 37), dtype, left, directions, op.device)
    before, anchor = p.W, p.anchor()
    energy = op("input_confine_", p.matrices, p.directions, anchor, None, None, left)
    x = oracle.input_confine(before, p.V, to64(anchor), 0.0, 0.0)
    p.assert_moved(before, x, p.dot_bound(before) + 4 * FP32_UNIT * (abs(to64(anchor)) + abs(x)), energy)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_sign_rule(op, shape):
    for i, (dtype, (side, left)) in enumerate(itertools.product(FLOATS, SIDES.items())):
        per_direction = i in (1, 2, 5)  # scalar weights or tensors of them with every type, and on every side
        with naming(dtype, side, f"{per_direction=}"):
            follow_the_sign_rule(op, shape, dtype, left, per_direction)


def follow_the_sign_rule(op, shape, dtype, left, per_direction):
    p = Problem(shape, dtype, left, device=op.device)
    before, K = p.W, shape[3]
    weights = [1.5, 0.25, 0.4]
    if per_direction:
        weights = [w + 0.1 * p.rng.random(K).astype(np.float32).astype(np.float64) for w in weights]
    given = [torch.from_numpy(w).float().to(op.device) for w in weights] if per_direction else weights
    if per_direction:
        weights = [to64(w) for w in given]
    overload = "input_dacsp_.tensor" if per_direction else "input_dacsp_"
    energy = op(overload, p.matrices, p.directions, *given, left)
    c, x = oracle.input_dacsp(before, p.V, *weights)
    close = p.dot_bound(before) + 1e-7  # of the class, and of c
    largest = np.maximum(abs(weights[0] - 1.0), abs(weights[1] - 1.0))
    slack = largest * (close + np.where(abs(abs(c) - weights[2]) <= close, abs(c), 0.0)) + 2 * FP32_UNIT * abs(x)
    p.assert_moved(before, x, slack, energy)


@dtypes
@sides
def test_where_it_was_anchored_a_matrix_is_a_fixed_point(op, dtype, left):
    p = Problem((3, 50, 77, 24), dtype, left, device=op.device)
    anchor = op("input_project", p.matrices, p.directions, left)
    energy = op("input_confine_", p.matrices, p.directions, anchor, None, None, left)
    assert energy.tolist() == [0.0] * 3
    assert all(h.unchanged() for h in p.held)


@dtypes
@sides
def test_after_it_the_displacement_is_in_its_box_and_a_second_time_changes_rounding_alone(op, dtype, left):
    p = Problem((2, 60, 90, 30), dtype, left, device=op.device)
    anchor = p.anchor()
    lower, upper = p.bounds(anchor), p.bounds(anchor)
    first = op("input_confine_", p.matrices, p.directions, anchor, lower, upper, left)
    once = p.W
    d = to64(anchor) - once @ p.V.swapaxes(1, 2)
    rounding = p.dot_bound(once) + 4 * p.unit * (abs(once) @ abs(p.V).swapaxes(1, 2)) + 1e-5
    rounding[:, :, 1] = np.inf  # an empty direction moves nothing
    assert (d <= to64(upper) + rounding).all()
    assert (d >= -to64(lower) - rounding).all()
    p.held = [Held(h.view.clone(), lead=3) for h in p.held]
    second = op("input_confine_", p.matrices, p.directions, anchor, lower, upper, left)
    assert_within(p.W, once, rounding[:, :, [0, 2]].max() * 6 + 2 * p.unit * abs(once), "element ")
    still = np.clip(abs(d[..., 1]) - 0.0, 0, None)  # what the empty direction contributes to both energies
    assert (to64(second) <= 1e-2 * to64(first) + (still**2).sum(1)).all()


@dtypes
@sides
def test_what_does_not_move_keeps_its_bits(op, dtype, left):
    """Outputs inside their box, infinite bounds, numbers that are not finite in W, in the anchor and in a bound: all bits
    stay, -0 and the payload of NaN included, and the neighbours move."""
    p = Problem((1, 41, 64, 20), dtype, left, device=op.device)
    (held,) = p.held
    rows = held.view.T if left else held.view
    rows[5, 3], rows[6, 60], rows[7] = torch.nan, -torch.inf, -0.0
    anchor = op("input_project", p.matrices, p.directions, left)
    lower, upper = torch.full_like(anchor, 0.25), torch.full_like(anchor, 0.5)
    anchor[0, 0] += 0.4  # inside
    anchor[0, 7] -= 0.2
    anchor[0, 8] += 0.8  # outside
    anchor[0, 9, 2] = torch.nan
    anchor[0, 10] += 5.0
    anchor[0, 11] -= 5.0
    anchor[0, 12] += 5.0
    upper[0, 10], lower[0, 11], upper[0, 12, 4] = torch.inf, torch.inf, torch.nan
    held.before = held.buffer.clone()
    energy = op("input_confine_", p.matrices, p.directions, anchor, lower, upper, left)
    start = held.before.as_strided(held.view.shape, held.view.stride(), 3)
    changed = [i for i in range(41) if not same_bits(rows[i], (start.T if left else start)[i])]
    assert changed == [8]
    assert_within(energy, np.array([20 * 0.3**2]), 1e-4, "energy ")
    assert held.intact()


@dtypes
@sides
def test_weights_of_one_change_no_bit(op, dtype, left):
    p = Problem((2, 30, 41, 9), dtype, left, device=op.device)
    assert op("input_dacsp_", p.matrices, p.directions, 1.0, 1.0, 0.0, left).tolist() == [0.0, 0.0]
    ones = torch.ones(9, device=op.device)
    op("input_dacsp_.tensor", p.matrices, p.directions, ones, ones, torch.zeros_like(ones), left)
    assert all(h.unchanged() for h in p.held)


@sides
def test_a_list_is_its_matrices_one_by_one(op, left):
    p = Problem((4, 33, 50, 11), "fp32", left, device=op.device)
    anchor = p.anchor()
    alone = [m.clone() for m in p.matrices]
    energy = op("input_confine_", p.matrices, p.directions, anchor, None, None, left)
    for g, matrix in enumerate(alone):
        one = slice(g, g + 1)
        part = op(
            "input_confine_", [matrix], p.directions[one].contiguous(), anchor[one].contiguous(), None, None, left
        )
        assert_within(part, to64(energy[one]), 1e-5 * to64(energy[one]))
        assert_within(matrix, to64(p.matrices[g]), 1e-6 * 8)


@sides
def test_the_smallest_step_that_a_matrix_can_take_is_undone(op, left):
    """Far from the resolution of c itself: a step of some ulps in every element, along one direction."""
    p = Problem((1, 20, 400, 6), "fp32", left, device=op.device)
    anchor = op("input_project", p.matrices, p.directions, left)
    start = p.W
    step = 3e-5 * p.V[0, 3]
    for matrix in p.matrices:
        moved = (matrix.T if left else matrix).add_(torch.from_numpy(step).float().to(op.device))
        assert moved.shape == (20, 400)
    op("input_confine_", p.matrices, p.directions, anchor, None, None, left)
    assert abs((p.W - start) @ p.V[0, 3]).max() < 0.1 * 3e-5
