"""Laws of the rules for whatever input: finite in, finite out; spectrum; weight 1 is the identity; duplicates change nothing."""

from __future__ import annotations

import numpy as np
import torch
from carerl_kernels.guard.factored_stack import BlockStack
from carerl_kernels.guard.frames import Frame
from carerl_kernels.guard.rules import MEMORY, RuleParams, decide
from factored_helpers import make_factored
from hypothesis import given
from hypothesis import strategies as st

N = 40
DECIDING = ("instant", "integrated", "probed", "remove")


def fresh_state(rule, T, K, device):
    """Zeros for what this rule remembers."""
    return {name: torch.zeros(T, K, dtype=torch.float64, device=device) for name in MEMORY.get(rule, ())}


def rows(rng, K, overlap, zero):
    """K unit rows; half of them overlap with the other half; some empty slots."""
    A = np.linalg.qr(rng.standard_normal((N, K)))[0].T
    half = K // 2
    A[half : 2 * half] = overlap * A[:half] + np.sqrt(max(0.0, 1 - overlap**2)) * A[half : 2 * half]
    A[rng.random(K) < zero] = 0
    return A


def params(K, aligned, conflict, bound=0.3):
    full = lambda v: torch.full((K,), v, dtype=torch.float64)  # noqa: E731
    return RuleParams(full(aligned), full(conflict), full(bound), full(bound))


cases = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10**6),
        "K": st.integers(1, 10),
        "overlap": st.sampled_from([0.0, 0.3, 0.99, 0.9999999, 1.0]),
        "zero": st.sampled_from([0.0, 0.3, 1.0]),
        "own": st.integers(0, 3),
    }
)


def build(case):
    rng = np.random.default_rng(case["seed"])
    A = rows(rng, case["K"], case["overlap"], case["zero"])
    active = torch.ones(case["K"], dtype=torch.bool)
    active[: case["own"]] = False
    S = torch.from_numpy(A @ A.T).unsqueeze(0)
    return rng, A, active, Frame.dense([(slice(0, 1), 1, S)], active, 1)


@given(case=cases, rule=st.sampled_from(DECIDING), exponent=st.integers(-150, 150))
def test_finite_in_finite_out(case, rule, exponent):
    rng, A, active, frame = build(case)
    K = case["K"]
    state = fresh_state(rule, 1, K, torch.device("cpu"))
    if "probe" in state:
        state["probe"].copy_(torch.from_numpy(rng.choice([-1.0, 0.0, 1.0], (1, K))))
    displacement = torch.from_numpy(np.abs(rng.standard_normal((1, K)))) * 10.0**exponent
    fallback = torch.from_numpy(rng.random(K) < 0.5) if rule == "probed" else None
    for _ in range(14):
        c = torch.from_numpy(A @ (rng.standard_normal(N) * 10.0**exponent)).unsqueeze(0)
        c = torch.where(torch.from_numpy(rng.random(K) < 0.2), 0.0, c)  # gradients can be exactly zero
        x = decide(rule, c, active, state, params(K, 1.3, 0.2), frame, displacement, None, fallback)
        assert x.isfinite().all()
        assert (x[0, ~active] == 0).all()
        assert all(v.isfinite().all() for v in state.values())


@given(case=cases, weights=st.tuples(st.floats(1, 2), st.floats(0, 1)), rule=st.sampled_from(["instant", "probed"]))
def test_symmetric_edit_stays_in_its_spectrum(case, weights, rule):
    """<g, g'> >= min(1, min w)|g|^2 and |g'| <= max(1, max w)|g|, whatever the overlap."""
    rng, A, active, frame = build(case)
    state = fresh_state(rule, 1, case["K"], torch.device("cpu"))
    if "probe" in state:
        state["probe"].copy_(torch.from_numpy(rng.choice([-1.0, 0.0, 1.0], (1, case["K"]))))
    g = rng.standard_normal(N)
    x = decide(
        rule, torch.from_numpy(A @ g).unsqueeze(0), active, state, params(case["K"], *weights), frame,
        torch.ones(1, case["K"], dtype=torch.float64),
    )  # fmt: skip
    edited = g - A.T @ x[0].numpy()
    slack = 1e-6 * (g @ g) + 2e-4 * (case["overlap"] > 0.9999) * (g @ g)  # RCOND treats rows this close as one
    assert g @ edited >= min(1, weights[1]) * (g @ g) - slack
    assert edited @ edited <= max(1, weights[0]) ** 2 * (g @ g) + slack


@given(
    case=cases,
    rule=st.sampled_from(["instant", "integrated", "probed"]),
)
def test_weight_one_is_exactly_nothing(case, rule):
    rng, A, active, frame = build(case)
    state = fresh_state(rule, 1, case["K"], torch.device("cpu"))
    for _ in range(12):
        c = torch.from_numpy(A @ rng.standard_normal(N)).unsqueeze(0)
        x = decide(rule, c, active, state, params(case["K"], 1.0, 1.0), frame, torch.ones(1, case["K"]).double())
        assert (x == 0).all()


@given(seed=st.integers(0, 10**6), rule=st.sampled_from(["instant", "remove", "integrated"]))
def test_duplicating_a_domain_changes_nothing(seed, rule):
    rng = np.random.default_rng(seed)
    A = np.linalg.qr(rng.standard_normal((N, 3)))[0].T
    g = rng.standard_normal(N)
    edited = []
    for stack in (A, np.concatenate([A, A])):
        K = len(stack)
        frame = Frame.dense(
            [(slice(0, 1), 1, torch.from_numpy(stack @ stack.T).unsqueeze(0))],
            torch.ones(K, dtype=torch.bool), 1,
        )  # fmt: skip
        state = fresh_state(rule, 1, K, torch.device("cpu"))
        c = torch.from_numpy(stack @ g).unsqueeze(0)
        x = decide(
            rule, c, torch.ones(K, dtype=torch.bool), state, params(K, 1.0, 0.0), frame, torch.ones(1, K).double()
        )
        edited.append(g - stack.T @ x[0].numpy())
    np.testing.assert_allclose(edited[0], edited[1], atol=1e-9)


@given(
    seed=st.integers(0, 10**6),
    overlap=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    names=st.sampled_from([("a",), ("a", "b"), ("a", "b", "c")]),
    weights=st.tuples(st.floats(1, 2), st.floats(0, 1)),
)
def test_block_edits_stay_in_their_spectrum(seed, overlap, names, weights):
    """The identity of one domain, the closed form of two and the dense root of three obey the same law."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(9, 7, bias=False), torch.nn.Linear(7, 2, bias=False))
    layout, bases = make_factored(model, "block", 2, overlap, names, seed=seed)
    stack = BlockStack(layout, torch.device("cpu"))
    matrices = [p.detach() for p in model.parameters()]
    for basis in bases:
        stack.put(basis, matrices)
    G = [torch.randn(p.shape) for p in matrices]
    c = stack.project(G)
    frame = stack.frame(None)
    state = fresh_state("instant", layout.T, stack.rows, torch.device("cpu"))
    x = decide("instant", c, stack.active(None), state, params(stack.rows, *weights), frame, stack.displacement)
    edited = [g.clone() for g in G]
    stack.edit_(edited, -x)
    for g, e in zip(G, edited, strict=True):
        inner, size, after = (float((a * b).sum()) for a, b in ((g, e), (g, g), (e, e)))
        assert inner >= min(1, weights[1]) * size - 1e-4 * size
        assert after <= max(1, weights[0]) ** 2 * size + 1e-4 * size
    torch.testing.assert_close(
        stack.overlap_times(x), stack.project([a - b for a, b in zip(G, edited, strict=True)]), atol=1e-5, rtol=1e-4
    )
