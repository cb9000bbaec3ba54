"""Mixed batches: on each domain's part of the gradient the directions of all other domains act, however it comes in parts."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from carerl_kernels import CapabilityGuard
from factored_helpers import make_factored
from guard_helpers import make_history, make_model

NAMES = ("math", "chat", "code")


def gradients(model, names=NAMES, seed=0, sizes=(1.0, 1.0, 1.0)):
    draw = torch.Generator().manual_seed(seed)
    return {
        name: [size * torch.randn(p.shape, generator=draw).to(p.dtype) for p in model.parameters()]
        for name, size in zip(names, sizes, strict=False)
    }


def accumulate(model, gradient):
    for p, g in zip(model.parameters(), gradient, strict=True):
        p.grad = g.clone() if p.grad is None else p.grad + g


def guarded(kind, overlap, model=None, rule="remove", names=NAMES, **options):
    model = model or make_model()
    if kind == "input":
        _, bases = make_factored(model, "input", 3, overlap, names)
        options |= {"r": 3, "room": 1.0}
    else:
        bases = make_history(model, kind, 4, overlap, names)
        options |= {"k": 4}
    guard = CapabilityGuard(model, rule, basis=kind, **options)
    for basis in bases:
        guard.add(basis)
    return model, guard, bases


def without(gradient: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """A gradient without what lies in the span of columns, float64, by singular vectors."""
    U, s, _ = np.linalg.svd(directions, full_matrices=False)
    U = U[:, s > 1e-2 * s.max()] if s.size and s.max() > 0 else U[:, :0]  # the guard's cut on squares is 1e-4
    return gradient - gradient @ U @ U.T


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("order", list(itertools.permutations(NAMES))[::2])
def test_each_domain_s_part_is_without_the_others_directions(overlap, order):
    """Against projectors in float64, for domains of very different size, in any order."""
    model, guard, bases = guarded("input", overlap)
    grads = gradients(model, sizes=(1.0, 100.0, 0.01))
    parts = guard.mixed()
    for name in order:
        accumulate(model, grads[name])
        parts.gained(name)
    parts.finish()
    for i, (name, p) in enumerate(model.named_parameters()):
        if p.dim() == 2 and p.shape[1] < 9:
            continue  # no room for all directions
        want = np.zeros(tuple(p.shape))
        for domain in NAMES:
            g = grads[domain][i].double().numpy()
            others = [b.right[name].double().numpy() for b in bases if b.info.domain != domain and name in b.right]
            want += without(g, np.concatenate(others, 1)) if others else g
        np.testing.assert_allclose(p.grad.double().numpy(), want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("kind", ["input", "per_matrix", "flat"])
def test_parts_of_a_domain_add_up_and_a_domain_may_be_missing(kind):
    """As many copies of gradients as domains, each edited by itself, give the same; so do micro-batches in any order."""
    model, guard, _ = guarded(kind, 0.5)
    grads = {name: g for name, g in gradients(model).items() if name != "chat"} | {
        "new": gradients(model, seed=7)["math"]
    }
    want = [torch.zeros_like(p) for p in model.parameters()]
    for name, gradient in grads.items():
        copy = [g.clone() for g in gradient]
        guard.stack.remove_(copy, guard.stack.along(guard.stack.seen(copy), name))
        torch._foreach_add_(want, copy)
    halves = [(name, [g * share for g in gradient]) for share in (0.25, 0.75) for name, gradient in grads.items()]
    for pieces in (list(grads.items()), halves, halves[::-1]):
        model.zero_grad()
        parts = guard.mixed()
        for name, gradient in pieces:
            accumulate(model, gradient)
            parts.gained(name)
        parts.finish()
        for p, w in zip(model.parameters(), want, strict=True):
            torch.testing.assert_close(p.grad, w, atol=1e-4, rtol=1e-4)


class Tagged(torch.nn.Module):
    """Embedding, shared with the layer that makes logits; an embedding of its own; linear layers."""

    def __init__(self, tied=True, other=None):
        super().__init__()
        self.words, self.kinds = torch.nn.Embedding(17, 13, padding_idx=0), torch.nn.Embedding(5, 13)
        self.inner, self.out = torch.nn.Linear(13, 13), torch.nn.Linear(13, 17, bias=False)
        self.other = other
        if tied:
            self.out.weight = self.words.weight

    def forward(self, ids, kinds):
        hidden = torch.tanh(self.inner(self.words(ids) + self.kinds(kinds)))
        if self.other == "flattened":
            hidden = self.inner(hidden.flatten(0, 1)).view(hidden.shape)
        if self.other == "by hand":
            hidden = hidden @ self.inner.weight
        return self.out(hidden)


def batch(rows=12, seed=0):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 17, (rows, 6), generator=draw)
    weights = torch.randn(rows, 6, 17, generator=draw)
    return ids, ids % 5, weights, [NAMES[i % 3] for i in range(rows)]


def tagged(**options):
    torch.manual_seed(1)
    model = Tagged(**options)
    guard = CapabilityGuard(model, r=4)
    for i, name in enumerate(NAMES):
        ids, kinds, *_ = batch(seed=10 + i)
        guard.protect(name, [(ids, kinds)], progress=False)
    return model, guard


def passes(model, guard, ids, kinds, weights, owners):
    """Domain by domain."""
    model.zero_grad()
    parts = guard.mixed()
    for name in dict.fromkeys(owners):
        rows = torch.tensor([i for i, owner in enumerate(owners) if owner == name])
        (model(ids[rows], kinds[rows]) * weights[rows]).sum().backward()
        parts.gained(name)
    parts.finish()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("pieces", [1, 2])
def test_one_pass_row_by_row_equals_passes_domain_by_domain(tied, ordered, pieces):
    model, guard = tagged(tied=tied)
    ids, kinds, weights, owners = batch()
    owners = sorted(owners) if ordered else owners
    want = passes(model, guard, ids, kinds, weights, owners)
    model.zero_grad()
    parts = guard.mixed()
    assert parts.takes_rows
    for rows in torch.arange(len(owners)).chunk(pieces):
        with parts.rows([owners[i] for i in rows.tolist()]):
            (model(ids[rows], kinds[rows]) * weights[rows]).sum().backward()
    assert parts.complete()
    parts.finish()
    for p, w in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, w, atol=1e-5 * float(w.abs().max()), rtol=1e-4)
    model.zero_grad()
    (model(ids, kinds) * weights).sum().backward()
    assert any(not torch.allclose(p.grad, w, atol=1e-2) for p, w in zip(model.parameters(), want, strict=True))


@pytest.mark.parametrize("other", ["flattened", "by hand"])
def test_what_rows_cannot_tell_is_noticed(other):
    """A layer fed something else than a row for each of the batch; a weight used without its module."""
    model, guard = tagged(other=other)
    ids, kinds, weights, owners = batch()
    parts = guard.mixed()
    with parts.rows(owners):
        (model(ids, kinds) * weights).sum().backward()
    assert not parts.complete()


def test_a_box_counts_from_where_mixed_steps_end():
    """Mixed steps are not corrected again, a checkpoint between knows it, and later steps of one domain are held from there."""
    model, guard, bases = guarded("input", 0.0, rule="bounded", names=("math", "chat"), every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    guard.attach(optimizer)
    for seed in range(2):
        grads = gradients(model, ("math", "chat"), seed)
        optimizer.zero_grad()
        parts = guard.mixed()
        for name, gradient in grads.items():
            accumulate(model, gradient)
            parts.gained(name)
        parts.finish()
        before = [p.detach() - p.grad for p in model.parameters()]
        optimizer.step()
        for p, b in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(p.detach(), b)
    middle = [p.detach().clone() for p in model.parameters()]
    guard.confine_()
    guard.load_state_dict(guard.state_dict())
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), middle, strict=True))
    optimizer.zero_grad()
    accumulate(model, gradients(model, seed=5)["math"])
    with guard.domain("math"):
        optimizer.step()
    guard.detach()
    name, p = next((n, p) for n, p in model.named_parameters() if n in bases[1].right)
    index = [n for n, _ in model.named_parameters()].index(name)
    V, moved = bases[1].right[name], p.detach() - middle[index]
    bound = 0.1 * bases[1].moved[name].abs().float() + 1e-5
    assert bool(((moved @ V).abs() <= bound).all()) and moved.norm() > 0.1
    assert guard.report()["steps"] == 3


def test_a_gradient_that_is_not_finite_drops_the_step():
    model, guard, _ = guarded("input", 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    guard.attach(optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    grads = gradients(model)
    grads["chat"][0].view(-1)[0] = math.nan
    parts = guard.mixed()
    for name, gradient in grads.items():
        accumulate(model, gradient)
        parts.gained(name)
    parts.finish()
    optimizer.step()
    assert guard.report()["dropped_steps"] == 1
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_energy_of_what_is_taken_out():
    model, guard, _ = guarded("input", 0.0, track_energy=True, apply_to="grad")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    guard.attach(optimizer)
    grads = gradients(model)
    accumulate(model, grads["math"])
    raw = [p.grad.clone() for p in model.parameters()]
    parts = guard.mixed()
    parts.gained("math")
    parts.finish()
    taken = sum(float((p.grad - r).square().sum()) for p, r in zip(model.parameters(), raw, strict=True))
    optimizer.step()
    whole = sum(float(r.square().sum()) for r in raw)
    assert guard.report()["touched_share"] == pytest.approx(taken / whole, rel=1e-4) and taken > 0


def test_a_guard_of_updates_says_once_what_mixed_batches_want():
    model, guard, _ = guarded("input", 0.0, rule="bounded")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard.attach(optimizer)
    accumulate(model, gradients(model)["math"])
    with pytest.warns(UserWarning, match=r"mixes math, new: .*editor='guard'"), guard.domain(["math", "new"]):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with guard.domain(["math", "chat"]):
            optimizer.step()
        _, other, _ = guarded("input", 0.0, rule="bounded")
        with other.domain(["new", "newer"]), other.domain("math"), other.domain(None):
            pass


def test_what_mixed_batches_cannot_have_is_refused():
    model = make_model()
    with pytest.raises(ValueError, match="expected rule 'bounded' or 'remove', found 'integrated'"):
        CapabilityGuard(model, "integrated", k=4).mixed()
    with pytest.raises(ValueError, match=r"expected max_grad_norm=None, found 1\.0; clip"):
        CapabilityGuard(model, "remove", k=4, apply_to="grad", max_grad_norm=1.0).mixed()
    guard = CapabilityGuard(model, basis="input", r=3)
    with pytest.raises(ValueError, match=r"no recording in progress, found one of code.*protect"), guard.stage("code"):
        guard.mixed()
    with pytest.raises(ValueError, match="expected one of math, found 'mth'"):
        CapabilityGuard(model, k=4, domains=["math"]).mixed().gained("mth")
