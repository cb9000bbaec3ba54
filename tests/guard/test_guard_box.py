"""Confinement: a projection onto a box, against dense float64, whenever it is asked for."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from carerl_kernels import CapabilityGuard
from carerl_kernels.guard.box import lora_pairs
from carerl_kernels.subspace.kinds import KINDS
from factored_helpers import FactoredWalk, make_factored
from guard_helpers import Walk, make_model
from guard_oracle import root_of_pinv

OVERLAPS = [0.0, 0.5, 0.99, 1.0]


def walk_of(kind: str, rule: str, overlap: float, **options):
    if KINDS[kind].rank == "k":
        return Walk(rule, kind=kind, overlap=overlap, **options)
    return FactoredWalk(make_model(), rule, kind, r=3, overlap=overlap, **options)


def rows_of(walk) -> list[tuple[np.ndarray, np.ndarray, list[int]]]:
    """Dense rows and recorded displacements, with the parameters that they lie over."""
    if isinstance(walk, FactoredWalk):
        return [(oracle.A, oracle.rule.h, [index]) for index, oracle in walk.oracles.items()]
    from guard_helpers import blocks

    parts = blocks(walk.model, walk.kind, walk.k)
    return [(oracle.A, oracle.h, part) for oracle, part in zip(walk.oracles, parts, strict=True)]


def dense(params, part) -> np.ndarray:
    return np.concatenate([params[i].detach().double().numpy().ravel() for i in part])


def shake(params, size: float, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in params:
            p += (size * torch.randn(p.shape, generator=generator)).to(p.dtype)


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("rule", ["bounded", "remove"])
@pytest.mark.parametrize("kind", KINDS)
def test_confining_equals_the_dense_projection(kind, rule, overlap):
    walk = walk_of(kind, rule, overlap)
    start = [dense(walk.params, part) for _, _, part in rows_of(walk)]
    shake(walk.params, 0.1)
    moved = [dense(walk.params, part) for _, _, part in rows_of(walk)]
    walk.guard.confine_()
    for (A, h, part), a, b in zip(rows_of(walk), start, moved, strict=True):
        S = A @ A.T
        R = root_of_pinv(S, -0.5)
        size = 0.1 * h * np.sqrt(np.maximum(np.diag(R @ S @ R), 0)) * (rule == "bounded")
        D = R @ A @ (a - b)
        want = b + A.T @ R @ (D - np.clip(D, -size, size))
        got = dense(walk.params, part)
        np.testing.assert_allclose(got, want, atol=3e-6)
        # Directions that are one and the same share a component: where their bounds differ, one call comes close to the box.
        inside = np.abs(R @ A @ (a - got))
        assert (inside <= size + 3e-6).all() or (rule == "bounded" and overlap == 1 and inside.sum() < np.abs(D).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_a_second_call_changes_nothing_and_the_anchor_is_a_fixed_point(overlap, dtype):
    model = make_model(dtype=dtype)
    _, bases = make_factored(model, "input", 3, overlap)
    guard = CapabilityGuard(model, "remove", basis="input", r=3, room=1.0)
    for basis in bases:
        guard.add(basis)
    params = list(model.parameters())
    before = [p.detach().clone() for p in params]
    guard.confine_()
    # Anchors are float32 numbers of size |w|; directions that nearly depend on one another magnify their rounding tenfold.
    eps = max(torch.finfo(dtype).eps, 20 * torch.finfo(torch.float32).eps)
    for p, q in zip(params, before, strict=True):
        assert float((p - q).detach().abs().max()) <= eps * float(q.abs().max())
    shake(params, 0.1)
    guard.confine_()
    once = [p.detach().clone() for p in params]
    guard.confine_()
    for p, q in zip(params, once, strict=True):
        assert float((p - q).detach().abs().max()) <= eps * float(q.abs().max())


def test_what_is_inside_of_the_box_is_left_alone_bit_by_bit():
    walk = walk_of("input", "bounded", 0.3)
    with torch.no_grad():
        for index, oracle in walk.oracles.items():  # only across the directions
            p = walk.params[index]
            noise = np.random.default_rng(index).standard_normal(p.numel())
            noise -= np.linalg.pinv(oracle.A) @ (oracle.A @ noise)
            p += torch.from_numpy(0.05 * noise).float().view_as(p)
    before = [p.detach().clone() for p in walk.params]
    walk.guard.confine_()
    assert all(torch.equal(p, q) for p, q in zip(walk.params, before, strict=True))


def test_steps_do_not_matter_only_where_they_end():
    """Every 4th step of the same path, in one piece or in many: the weights are those of one projection at the end."""
    ends = []
    for every in (1000, 4):
        walk = walk_of("input", "remove", 0.5, every=every)
        optimizer = torch.optim.SGD(walk.params, lr=0.01)
        walk.guard.attach(optimizer)
        for step in range(12):
            generator = torch.Generator().manual_seed(step)
            for p in walk.params:
                p.grad = torch.randn(p.shape, generator=generator)  # the path does not depend on the weights
            optimizer.step()
        assert walk.guard.report()["waiting"] == (12 if every == 1000 else 0)
        walk.guard.detach()
        assert walk.guard.report()["waiting"] == 0
        ends.append([p.detach().clone() for p in walk.params])
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


@pytest.mark.parametrize("every", [1, 3])
def test_a_segment_ends_where_the_domain_changes(every):
    """A domain's own steps move its anchors along; other domains' steps do not, however few came before the change."""
    walk = walk_of("input", "remove", 0.0, every=every)
    optimizer = torch.optim.SGD(walk.params, lr=0.05)
    walk.guard.attach(optimizer)
    columns = {name: np.repeat([n == name for n in walk.names], 1) for name in walk.names}
    positions = {name: [dense(walk.params, [i]) for i in walk.oracles] for name in walk.names}

    def steps(domain, number):
        for step in range(number):
            generator = torch.Generator().manual_seed(100 + step)
            for p in walk.params:
                p.grad = torch.randn(p.shape, generator=generator)
            with walk.guard.domain(domain) if domain else nullcontext():
                optimizer.step()

    def along(name):
        """How far the weights are from where they were along a domain's rows."""
        out = 0.0
        for (index, oracle), old in zip(walk.oracles.items(), positions[name], strict=True):
            half = oracle.per_domain
            at = walk.names.index(name) * half
            out = max(out, float(np.abs(oracle.A[at : at + half] @ (dense(walk.params, [index]) - old)).max()))
        return out

    assert set(columns) == {"math", "chat"}
    steps("math", 4)
    steps("code", 2)  # ends math's segment
    assert along("math") > 0.05
    positions["math"] = [dense(walk.params, [i]) for i in walk.oracles]
    walk.guard.confine_()
    assert along("chat") < 1e-5
    steps("chat", 5)
    steps(None, 1)
    walk.guard.detach()
    assert along("math") < 0.3  # code's two unconfined steps, taken back since
    report = walk.guard.report()["domains"]
    assert report["math"]["moved"] < 1e-4 and report["chat"]["moved"] < 1e-4


def test_an_interrupted_segment_goes_on_exactly():
    def fresh():
        walk = walk_of("input", "bounded", 0.5, every=8)
        return walk, torch.optim.AdamW(walk.params, lr=0.01)

    def steps(walk, optimizer, span):
        for step in span:
            generator = torch.Generator().manual_seed(step)
            for p in walk.params:
                p.grad = torch.randn(p.shape, generator=generator) + p.detach()
            with walk.guard.domain(("math", "code")[step // 7 % 2]):
                optimizer.step()

    whole, optimizer = fresh()
    whole.guard.attach(optimizer)
    steps(whole, optimizer, range(30))

    first, optimizer = fresh()
    first.guard.attach(optimizer)
    steps(first, optimizer, range(19))
    saved = first.guard.state_dict(), optimizer.state_dict(), [p.detach().clone() for p in first.params]
    second, optimizer = fresh()
    with torch.no_grad():
        for p, q in zip(second.params, saved[2], strict=True):
            p.copy_(q)
    optimizer.load_state_dict(saved[1])
    second.guard.load_state_dict(saved[0])
    second.guard.attach(optimizer)
    steps(second, optimizer, range(19, 30))
    for p, q in zip(whole.params, second.params, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_with_other_anchors_replaces_those_that_corrections_were_made_with(kind):
    walk = walk_of(kind, "remove", 0.5)
    begun, state = [p.detach().clone() for p in walk.params], walk.guard.state_dict()
    held = [dense(walk.params, part) for _, _, part in rows_of(walk)]
    shake(walk.params, 0.1)
    walk.guard.rebase()
    shake(walk.params, 0.1, seed=1)
    walk.guard.confine_()
    with torch.no_grad():
        for p, q in zip(walk.params, begun, strict=True):
            p.copy_(q)
    walk.guard.load_state_dict(state)
    shake(walk.params, 0.1, seed=2)
    walk.guard.confine_()
    for (A, _, part), start in zip(rows_of(walk), held, strict=True):
        assert np.abs(A @ (dense(walk.params, part) - start)).max() < 1e-5


@pytest.mark.parametrize("then", ["add", "stage", "protect"])
def test_steps_that_wait_are_corrected_before_anything_counts_anew(then):
    """What moved outside of the box since the last correction does not become the new anchor."""
    walk = walk_of("input", "remove", 0.3, every=8, names=("math",))
    optimizer = torch.optim.SGD(walk.params, lr=0.1)
    walk.guard.attach(optimizer)
    start = [dense(walk.params, [i]) for i in walk.oracles]
    for _ in range(3):
        for p in walk.params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    if then == "add":
        walk.guard.add(make_factored(walk.model, "input", 3, 0.3, ("chat",), seed=5)[1][0])
    elif then == "protect":
        walk.guard.protect("chat", [(torch.randn(8, 13),)])
    else:
        with pytest.raises(KeyboardInterrupt), walk.guard.stage("chat"):
            raise KeyboardInterrupt
    for (index, oracle), old in zip(walk.oracles.items(), start, strict=True):
        assert np.abs(oracle.A @ (dense(walk.params, [index]) - old)).max() < 1e-5


def test_the_state_belongs_to_its_weights_and_version():
    walk = walk_of("input", "bounded", 0.5)
    state = walk.guard.state_dict()
    shake(walk.params, 1e-3)
    with pytest.raises(
        ValueError, match=r"expected the weights it was saved with .*load the checkpoint's weights first"
    ):
        walk.guard.load_state_dict(state)
    del state["version"]
    with pytest.raises(ValueError, match="expected version 2, found 1"):
        walk.guard.load_state_dict(state)


def test_the_smallest_step_is_still_resolved_in_float32():
    """|w| = 1e3 a row against steps of 1e-2 along a direction: float32 sums of 4096 numbers tell them apart."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4096, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(1e3 / 64 * torch.randn(3, 4096).sign())
    _, (basis,) = make_factored(model, "input", 1, 0.0, ("math",))
    basis.right["weight"].copy_(torch.ones(4096, 1) / 64)
    guard = CapabilityGuard(model, "remove", basis="input", r=1, every=1, room=1.0)
    guard.add(basis)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    guard.attach(optimizer)
    start = model.weight.detach().double().sum(1) / 64
    for _ in range(50):
        model.weight.grad = torch.full((3, 4096), 1e-2 / 64) + 1e-2 * torch.randn(3, 4096)
        optimizer.step()
    moved = start - model.weight.detach().double().sum(1) / 64
    assert float(moved.abs().max()) < 0.02 * 50 * 1e-2


def test_asymmetric_bounds_follow_the_direction_of_the_stage():
    """(against, along): a stage that moved down a direction may be repeated further than it may be undone."""
    ends = {}
    for sign in (1.0, -1.0):
        walk = walk_of("input", "bounded", 0.0, bound=(0.2, 0.7), names=("math",))
        oracle = walk.oracles[0]
        with torch.no_grad():
            walk.params[0] -= sign * torch.from_numpy(oracle.A.sum(0)).float().view_as(walk.params[0])
        before = -sign * oracle.A @ oracle.A.sum(0)
        walk.guard.confine_()
        start = dense(walk_of("input", "bounded", 0.0, names=("math",)).params, [0])
        ends[sign] = oracle.A @ (start - dense(walk.params, [0])), oracle.rule.h
        assert np.abs(before).min() > 0
    np.testing.assert_allclose(ends[1.0][0], 0.7 * ends[1.0][1], atol=1e-5)
    np.testing.assert_allclose(ends[-1.0][0], -0.2 * ends[-1.0][1], atol=1e-5)


def test_confine_on_demand_needs_no_optimizer_and_a_rule_that_is_a_projection():
    walk = walk_of("input", "remove", 0.5)
    before = [p.detach().clone() for p in walk.params]
    walk.guard.confine_()
    for p, q in zip(walk.params, before, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0)
    with pytest.raises(RuntimeError, match="expected rule 'bounded' or 'remove'"):
        walk_of("input", "instant", 0.5).guard.confine_()


# ------------------------------------------------------------------------------------------------------------------- LoRA


class Adapted(torch.nn.Module):
    """Two frozen layers with LoRA adapters under PEFT's names, B zero as PEFT makes it."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        for name, (n, m) in {"first": (12, 10), "second": (10, 6)}.items():
            layer = torch.nn.Module()
            layer.base = torch.nn.Linear(n, m)
            layer.base.requires_grad_(False)
            layer.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(n, 4, bias=False)})
            layer.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(4, m, bias=False)})
            torch.nn.init.zeros_(layer.lora_B["default"].weight)
            setattr(self, name, layer)

    def forward(self, x):
        for layer in (self.first, self.second):
            x = layer.base(x) + layer.lora_B["default"](layer.lora_A["default"](x))
        return x


def adapted(bound_by_stage: bool = False):
    """An adapted model, a guard over its adapters, and inputs of the first layer that lie in the protected span."""
    model = Adapted()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    holder = torch.nn.ParameterDict({n.replace(".", "_"): p for n, p in named})
    assert len(holder) == 4
    _, (basis,) = make_factored(_Named(named), "input", 3, 0.0, ("math",))
    if not bound_by_stage:
        for t in basis.moved.values():
            t.zero_()
    guard = CapabilityGuard(named, "bounded", basis="input", r=3, room=1.0)
    guard.add(basis)
    seen = torch.randn(20, 3) @ basis.right["first.lora_A.default.weight"].mT
    return model, guard, basis, seen


class _Named(torch.nn.Module):
    def __init__(self, named):
        super().__init__()
        self._named = named

    def named_parameters(self, *args, **kwargs):
        return iter(self._named)


def test_a_fresh_adapter_is_off_the_directions_and_its_b_is_free():
    model, guard, basis, seen = adapted()
    with torch.no_grad():
        before = model(seen)
    A, B = model.first.lora_A["default"].weight, model.first.lora_B["default"].weight
    V = basis.right["first.lora_A.default.weight"]
    assert float((A @ V).detach().abs().max()) < 1e-6
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    guard.attach(optimizer)
    for _ in range(20):
        optimizer.zero_grad()
        (model(torch.randn(32, 12)) - 1).square().mean().backward()
        optimizer.step()
    guard.detach()
    assert float(B.detach().abs().max()) > 0.1  # moved freely, along its own inputs too
    assert float((A @ V).detach().abs().max()) < 1e-5
    first = model.first
    with torch.no_grad():
        torch.testing.assert_close(
            first.lora_B["default"](first.lora_A["default"](seen)), torch.zeros(20, 10), atol=1e-4, rtol=0
        )
    assert before.isfinite().all()


def test_no_bound_lets_a_fresh_adapter_into_the_directions():
    """What an earlier adapter of the same name moved says nothing about a fresh one, whose B is free."""
    model, guard, basis, _ = adapted(bound_by_stage=True)
    A = model.first.lora_A["default"].weight
    with torch.no_grad():
        A += torch.randn_like(A)
    guard.confine_()
    assert float((A @ basis.right["first.lora_A.default.weight"]).detach().abs().max()) < 1e-5


def test_a_trained_adapter_is_held_like_any_two_matrices():
    model, _, basis, _ = adapted()
    with torch.no_grad():
        for layer in (model.first, model.second):
            torch.nn.init.normal_(layer.lora_A["default"].weight)
            torch.nn.init.normal_(layer.lora_B["default"].weight)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    guard = CapabilityGuard(named, "remove", basis="input", r=3, room=1.0)
    guard.add(basis)
    before = {n: p.detach().clone() for n, p in named}
    optimizer = torch.optim.SGD([p for _, p in named], lr=0.1)
    guard.attach(optimizer)
    for _, p in named:
        p.grad = torch.randn_like(p)
    optimizer.step()
    guard.detach()
    for n, p in named:
        moved = (p.detach() - before[n]).double()
        assert float(moved.norm()) > 0.1
        assert float((moved @ basis.right[n].double()).norm()) < 1e-4


def test_lora_pairs_are_told_by_their_names():
    names = ["x.lora_A.default.weight", "x.lora_B.default.weight", "y.lora_A.other.weight", "w"]
    assert lora_pairs(names) == [(0, 1)]
    assert lora_pairs([*names, "x.lora_magnitude_vector.default.weight"]) == []
    assert lora_pairs(["e.lora_embedding_B.a", "e.lora_embedding_A.a"]) == [(1, 0)]
