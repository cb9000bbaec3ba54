"""The guard against a snapshot-based float64 oracle of the same rule, step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from carerl_kernels import CapabilityGuard
from carerl_kernels.guard import RULES
from guard_helpers import Walk, blocks, make_history, make_model

OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=3e-3, weight_decay=0.1),
    "sgd": lambda params: torch.optim.SGD(params, lr=3e-2, momentum=0.9),
}


def run_update(walk: Walk, optimizer: str, steps: int = 25) -> list[tuple[np.ndarray, np.ndarray]]:
    """Steps a guarded model; a twin optimizer on a copy tells what the unguarded step would have proposed."""
    opt = OPTIMIZERS[optimizer](walk.params)
    twin = [torch.nn.Parameter(p.detach().clone()) for p in walk.params]
    twin_opt = OPTIMIZERS[optimizer](twin)
    walk.guard.attach(opt)
    rng = np.random.default_rng(1)
    pairs = []
    for step in range(steps):
        own = (None, "code", "chat", "math")[step % 4]
        if walk.guard.probes_due():
            for name in walk.guard.history:
                with walk.guard.probe(name):
                    walk.backward(1000 + step)
                columns = walk.guard.history.index(name) * walk.k + np.arange(walk.k)
                # the oracle's own reading of the same probe gradient
                walk.backward(1000 + step)
                for oracle, g in zip(walk.oracles, walk.blocks_of([p.grad for p in walk.params]), strict=True):
                    oracle.probe[columns] = np.sign(oracle.A[columns] @ g)
        walk.backward(step, scale=1 + rng.random())
        old = walk.blocks_of(walk.params)
        for p, q in zip(walk.params, twin, strict=True):
            q.data.copy_(p.data)
            q.grad = p.grad.clone()
        twin_opt.step()
        with walk.guard.domain(own):
            opt.step()
        proposed, new = walk.blocks_of(twin), walk.blocks_of(walk.params)
        active = walk.active(own)
        for oracle, a, b, c in zip(walk.oracles, old, proposed, new, strict=True):
            pairs.append((a - c, oracle.step(a - b, active)))
    return pairs


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("rule", RULES)
def test_update_mode_equals_snapshot_oracle(rule, overlap, optimizer):
    walk = Walk(rule, overlap=overlap)
    pairs = run_update(walk, optimizer)
    # One fp32 rounding of parameters of size ~0.3 on steps of ~3e-3, and once more in q: 1e-6 of the parameters' norm (~2).
    worst = max(np.abs(got - want).max() for got, want in pairs)
    assert worst < 2e-6
    assert sum(np.square(want).sum() for _, want in pairs) > 0


@pytest.mark.parametrize("kind", ["flat", "per_matrix"])
@pytest.mark.parametrize("rule", ["instant", "integrated", "bounded", "remove"])
def test_every_kind(rule, kind):
    pairs = run_update(Walk(rule, kind=kind, overlap=0.8), "adamw", steps=12)
    assert max(np.abs(got - want).max() for got, want in pairs) < 3e-6


@pytest.mark.parametrize("rule", ["instant", "integrated", "probed"])
def test_amplifying_weights(rule):
    pairs = run_update(Walk(rule, aligned=1.5, conflict=0.2), "sgd")
    assert max(np.abs(got - want).max() for got, want in pairs) < 3e-6


@pytest.mark.parametrize("kind", ["flat", "per_matrix"])
@pytest.mark.parametrize("rule", ["instant", "integrated", "remove"])
def test_grad_mode_equals_oracle(rule, kind):
    walk = Walk(rule, kind=kind, apply_to="grad", aligned=1.5, conflict=0.25)
    walk.guard.attach(torch.optim.SGD(walk.params, lr=1e-2))
    optimizer = torch.optim.SGD(walk.params, lr=1e-2)
    walk.guard.detach()
    walk.guard.attach(optimizer)
    for step in range(8):
        own = (None, "chat")[step % 2]
        walk.backward(step)
        raw = walk.blocks_of([p.grad for p in walk.params])
        with walk.guard.domain(own):
            optimizer.step()
        edited = walk.blocks_of([p.grad for p in walk.params])
        for oracle, g, got in zip(walk.oracles, raw, edited, strict=True):
            np.testing.assert_allclose(got, oracle.step(g, walk.active(own), True), atol=2e-6 * np.abs(g).max())


def one_direction(rule: str, **options):
    """A guard whose only direction is the first coordinate: prior learning lowered that parameter (gradient convention +)."""
    weight = torch.nn.Parameter(torch.zeros(64))
    model = torch.nn.ParameterDict({"w": weight})
    history = make_history(model, "flat", 1, 0.0, names=("math",))[0]
    history.directions.zero_()
    history.directions[0, 0] = 1.0
    history.displacement.fill_(1.0)
    guard = CapabilityGuard(model, rule, basis="flat", k=1, every=1, **options)
    guard.add(history)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    guard.attach(optimizer)

    def step(first: float, rest: float = 0.25) -> torch.Tensor:
        """A raw gradient whose first component is this; returns what the parameters moved by, gradient convention."""
        if rule == "probed" and guard.probes_due():
            with guard.probe("math"):
                (weight[0] * 1.0).backward()  # lowering w[0] lowers the earlier loss
        before = weight.detach().clone()
        weight.grad = torch.full((64,), rest)
        weight.grad[0] = first
        optimizer.step()
        return before - weight.detach()

    return step


@pytest.mark.parametrize("rule", ["instant", "integrated", "probed"])
def test_aligned_motion_passes_and_conflicting_motion_is_removed(rule):
    """The sign of the whole construction: protecting against aligned instead of conflicting motion must fail here."""
    moved = one_direction(rule)(+1.0)
    torch.testing.assert_close(moved, torch.tensor([1.0] + [0.25] * 63))
    moved = one_direction(rule)(-1.0)
    torch.testing.assert_close(moved, torch.tensor([0.0] + [0.25] * 63))


def test_reversed_probe_reverses_what_passes():
    """The probe's sign, not the recorded orientation, decides: a loss that falls when w[0] rises lets it rise."""
    weight = torch.nn.Parameter(torch.zeros(64))
    model = torch.nn.ParameterDict({"w": weight})
    history = make_history(model, "flat", 1, 0.0, names=("math",))[0]
    history.directions.zero_()
    history.directions[0, 0] = 1.0
    guard = CapabilityGuard(model, "probed", basis="flat", k=1)
    guard.add(history)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    guard.attach(optimizer)
    with guard.probe("math"):
        (-weight[0]).backward()
    for first, expected in ((-1.0, -1.0), (+1.0, 0.0)):
        before = weight.detach().clone()
        weight.grad = torch.zeros(64)
        weight.grad[0] = first
        optimizer.step()
        assert float((before - weight.detach())[0]) == pytest.approx(expected)


def test_bounded_stops_at_its_bounds_and_lets_motion_back_in():
    step = one_direction("bounded", bound=(0.25, 0.5))  # h = 1: at most .25 against, .5 along
    total = sum(float(step(+0.3)[0]) for _ in range(5))
    assert total == pytest.approx(0.5)
    step = one_direction("bounded", bound=(0.25, 0.5))
    assert sum(float(step(-0.2)[0]) for _ in range(5)) == pytest.approx(-0.25)


def test_integrated_net_displacement_is_f_of_the_raw_one():
    step = one_direction("integrated", aligned=1.5, conflict=0.2)
    raw = [0.5, -0.2, -0.9, 0.4, 0.7]
    net = sum(float(step(r)[0]) for r in raw)
    P = sum(raw)
    assert net == pytest.approx(1.5 * P if P > 0 else 0.2 * P)


def test_instant_rectifies_noise_and_displacement_rules_do_not():
    """Zero-mean noise of size s drifts by (wa - wc)*s*phi(0) a step under the sign rule: why it is not the default."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, generator=generator).tolist()
    drift = {}
    for rule in ("instant", "integrated", "remove"):
        step = one_direction(rule)
        drift[rule] = sum(float(step(v, 0.0)[0]) for v in noise)
    assert drift["instant"] > 0.8 * 400 * 0.3989  # 1/sqrt(2 pi)
    assert abs(drift["integrated"]) <= abs(sum(noise)) + 1e-3
    assert abs(drift["remove"]) < 1e-5


def test_weight_one_leaves_the_update_bitwise_alone():
    for rule in ("instant", "integrated"):
        walk = Walk(rule, aligned=1.0, conflict=1.0)
        plain = make_model()
        opts = torch.optim.AdamW(walk.params, lr=1e-2), torch.optim.AdamW(plain.parameters(), lr=1e-2)
        walk.guard.attach(opts[0])
        for step in range(5):
            walk.backward(step)
            for p, q in zip(walk.params, plain.parameters(), strict=True):
                q.grad = p.grad.clone()
            for opt in opts:
                opt.step()
            for p, q in zip(walk.params, plain.parameters(), strict=True):
                assert torch.equal(p, q), rule


def test_smallest_step_is_still_resolved():
    """|theta| = 1e3 against steps of 1e-3 along a direction: float64 totals tell them apart to 1 %."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(1e3 / 4096**0.5 * torch.randn(4096).sign())
    model = torch.nn.ParameterDict({"w": weight})
    history = make_history(model, "flat", 1, 0.0, names=("math",))[0]
    history.directions[:] = torch.ones(1, 4096) / 64
    guard = CapabilityGuard(model, "remove", basis="flat", k=1)
    guard.add(history)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    guard.attach(optimizer)
    start = weight.detach().double().sum() / 64
    for _ in range(50):
        weight.grad = torch.full((4096,), 1e-3 / 64) + 1e-2 * torch.randn(4096)
        optimizer.step()
    guard.detach()
    moved = float(start - weight.detach().double().sum() / 64)
    assert abs(moved) < 0.01 * 50 * 1e-3


def test_bfloat16_parameters_do_not_leak():
    """Rounding of bf16 weights is measured at the next step and corrected: net displacement stays at one rounding."""
    walk = Walk("remove", dtype=torch.bfloat16, overlap=0.5)
    rows = [o.A for o in walk.oracles]
    start = walk.blocks_of(walk.params)
    optimizer = torch.optim.SGD(walk.params, lr=5e-2)
    walk.guard.attach(optimizer)
    worst = []
    for step in range(150):
        walk.backward(step)
        optimizer.step()
        now = walk.blocks_of(walk.params)
        moved = sum(np.square(A @ (a - b)).sum() for A, a, b in zip(rows, start, now, strict=True)) ** 0.5
        worst.append(moved)
    # One rounding moves each weight by up to 2^-9 of itself at random: sqrt(K) * |w|_rms * 2^-9, about 2e-3 here.
    assert np.mean(worst[-20:]) < 5e-3
    assert np.mean(worst[-20:]) < 3 * np.mean(worst[5:25]) + 1e-3


def test_own_domain_is_never_held_back():
    walk = Walk("remove", overlap=0.0)
    plain = make_model()
    optimizer, other = torch.optim.SGD(walk.params, lr=0.1), torch.optim.SGD(plain.parameters(), lr=0.1)
    walk.guard.attach(optimizer)
    columns = {"math": slice(0, walk.k), "chat": slice(walk.k, 2 * walk.k)}
    old = walk.blocks_of(walk.params)
    walk.backward(0)
    for p, q in zip(walk.params, plain.parameters(), strict=True):
        q.grad = p.grad.clone()
    with walk.guard.domain("math"):
        optimizer.step()
    other.step()
    new, unguarded = walk.blocks_of(walk.params), walk.blocks_of(list(plain.parameters()))
    for oracle, a, b, c in zip(walk.oracles, old, new, unguarded, strict=True):
        own, rival = oracle.A[columns["math"]], oracle.A[columns["chat"]]
        np.testing.assert_allclose(own @ (a - b), own @ (a - c), atol=1e-6)
        np.testing.assert_allclose(rival @ (a - b), 0, atol=1e-6)


def test_clipping_after_the_edit_in_grad_mode():
    walk = Walk("instant", apply_to="grad", aligned=3.0, max_grad_norm=0.01)
    optimizer = torch.optim.SGD(walk.params, lr=0.1)
    walk.guard.attach(optimizer)
    walk.backward(0, scale=10.0)
    optimizer.step()
    norm = torch.stack([p.grad.norm() for p in walk.params]).norm()
    assert float(norm) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize(("dtype", "seen"), [(torch.float32, True), (torch.int8, False)])
def test_signs_within_the_rounding_of_int8_directions_count_for_nothing(dtype, seen):
    """tau >= 3 delta |g| / sqrt(N), wherever |g| is known: here in grad mode."""
    walk = Walk("instant", apply_to="grad", basis_dtype=dtype, overlap=0.0)
    walk.guard.attach(torch.optim.SGD(walk.params, lr=0.1))
    torch.manual_seed(0)
    raw = [torch.randn_like(p) for p in walk.params]
    flat = walk.blocks_of(raw)
    for p, g in zip(walk.params, raw, strict=True):
        p.grad = g
    # make every coefficient conflict by a little: less than rounding of the directions could do
    rms = np.sqrt(sum(np.square(f).sum() for f in flat) / sum(p.numel() for p in walk.params))
    rows = [o.A for o in walk.oracles]
    wanted = [f - A.T @ np.linalg.pinv(A @ A.T) @ (A @ f + 0.001 * rms) for A, f in zip(rows, flat, strict=True)]
    at = [0] * len(walk.params)
    for block, part in zip(blocks(walk.model, walk.kind, walk.k), wanted, strict=True):
        start = 0
        for i in block:
            n = walk.params[i].numel()
            walk.params[i].grad.copy_(torch.from_numpy(part[start : start + n]).view_as(walk.params[i]))
            start, at[i] = start + n, 1
    assert all(at)
    before = [p.grad.clone() for p in walk.params]
    walk.guard.memory.steps.edit_gradients([p.grad for p in walk.params], None)
    changed = any(not torch.equal(p.grad, b) for p, b in zip(walk.params, before, strict=True))
    assert changed == seen


@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize("kind", ["flat", "per_matrix"])
def test_recording_a_stage_under_the_sign_rule_takes_two_passes_and_changes_nothing(kind, poison, monkeypatch):
    """`gram` and `edit_rotate_` over rows that act and rows that are recorded: what four passes one after the other make."""
    from carerl_kernels.guard.correct import StepCorrection

    found, passes = [], []
    for together in (True, False):
        walk = Walk("instant", kind=kind, apply_to="grad", aligned=1.25, conflict=0.25)
        if not together:
            monkeypatch.setattr(StepCorrection, "fuses", lambda *_: False)
        optimizer = torch.optim.SGD(walk.params, lr=0.1)
        walk.guard.attach(optimizer)
        edited = []
        with walk.guard.stage("code"), torch.profiler.profile() as profile:
            for step in range(6):
                walk.backward(step)
                if poison and step == 3:
                    walk.params[0].grad[0, 0] = torch.nan
                with walk.guard.domain("chat" if step == 4 else "code"):
                    optimizer.step()
                edited += [p.grad.clone() for p in walk.params if p.grad is not None]
        names = [event.name for event in profile.events() if event.name.startswith("carerl::")]
        passes.append({name.removeprefix("carerl::") for name in names} - {"all_finite"})
        basis = walk.guard.basis("code")
        energy = walk.guard.report()["domains"]["math"]["energy"]
        shares = [energy["aligned"], energy["conflicting"]]
        found.append(([*edited, basis.directions, basis.displacement, basis.singular_values], shares, basis.info.steps))
    assert "edit_rotate_" in passes[0] and "edit_rotate_" not in passes[1] and "rotate_" in passes[1]
    assert found[0][2] == found[1][2] == (4 if poison else 5)
    for a, b in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)
