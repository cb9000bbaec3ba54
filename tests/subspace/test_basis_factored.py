"""Block and input bases: acting equals dense oracles, recording equals the exact SVD, files load back."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from carerl_kernels import BasisError, CapabilityGuard, DomainBasis
from carerl_kernels.guard.input_stack import CHUNK
from carerl_kernels.subspace import FactoredBasis, StoredBasis
from carerl_kernels.subspace.block import leading_factors
from carerl_kernels.subspace.random_basis import random_basis
from carerl_kernels.subspace.shards import Shards
from factored_helpers import FactoredWalk, make_factored
from guard_helpers import make_model

R = 3


def numpy_of(tensors):
    return [t.detach().double().numpy().copy() for t in tensors]


def run(walk: FactoredWalk, steps: int = 9) -> float:
    """Guarded AdamW steps; the largest deviation from the oracle on a copy that takes the raw step."""
    optimizer = torch.optim.AdamW(walk.params, lr=3e-3, weight_decay=0.1)
    twin = [torch.nn.Parameter(p.detach().clone()) for p in walk.params]
    twin_optimizer = torch.optim.AdamW(twin, lr=3e-3, weight_decay=0.1)
    walk.guard.attach(optimizer)
    worst = 0.0
    for step in range(steps):
        own = (None, "code", "chat", "math")[step % 4]
        generator = torch.Generator().manual_seed(step)
        old = numpy_of(walk.params)
        for p, q in zip(walk.params, twin, strict=True):
            p.grad = torch.randn(p.shape, generator=generator) * (1 + step % 3)
            q.data.copy_(p.data)
            q.grad = p.grad.clone()
        twin_optimizer.step()
        with walk.guard.domain(own):
            optimizer.step()
        for i, (a, b, c) in enumerate(zip(old, numpy_of(twin), numpy_of(walk.params), strict=True)):
            worst = max(worst, float(np.abs((a - c) - walk.expect(i, a - b, own)).max()))
    return worst


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("rule", ["instant", "integrated", "bounded", "remove"])
@pytest.mark.parametrize("kind", ["block", "input"])
def test_acting_equals_dense_oracle(kind, rule, overlap):
    assert run(FactoredWalk(make_model(), rule, kind, r=R, overlap=overlap)) < 3e-6


@pytest.mark.parametrize("numbers", [1, 4, 9, 20, 1000])
@pytest.mark.parametrize("rule", ["instant", "integrated"])
def test_deciding_chunk_by_chunk_changes_nothing(rule, numbers, monkeypatch):
    """Of a row, of a few, of several matrices: the same steps, sums and memory as all at once."""
    found = []
    for size in (1 << 20, 8 * 2 * R * numbers):
        monkeypatch.setitem(CHUNK, "cpu", size)
        walk = FactoredWalk(make_model(), rule, "input", r=R, overlap=0.6, track_energy=True)
        chunks = walk.guard.stack.chunks
        assert [b.start for b in chunks[1:]] == [b.stop for b in chunks[:-1]]
        assert (chunks[0].start, chunks[-1].stop) == (0, walk.layout.T)
        ends = {rows.stop for group in walk.layout.groups for _, _, rows in walk.layout.matrices(group)}
        for chunk in chunks:  # whole matrices, or a part of one
            inside = [end for end in ends if chunk.start < end < chunk.stop]
            assert not inside or {chunk.start, chunk.stop} <= ends | {0}
            assert size == 1 << 20 or chunk.stop - chunk.start <= max(numbers, 1)
        assert len(chunks) == 1 or size < 1 << 20
        assert run(walk) < 3e-6
        report, guard = walk.guard.report(), walk.guard
        found.append(
            (
                numpy_of(walk.params),
                report["touched_share"],
                report["domains"],
                guard.memory.steps.q_prev,
                guard.memory.steps.q_start,
            )
        )
    (a, touched, domains, *q), (b, touched_by_chunks, domains_by_chunks, *q_by_chunks) = found
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)
    assert touched_by_chunks == pytest.approx(touched, rel=1e-5)
    for name, of in domains.items():
        assert domains_by_chunks[name]["energy"] == pytest.approx(of["energy"], rel=1e-5)
    torch.testing.assert_close(q_by_chunks, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", ["integrated", "bounded"])
@pytest.mark.parametrize("kind", ["block", "input"])
def test_three_domains(kind, rule):
    names = ("math", "chat", "logic")
    assert run(FactoredWalk(make_model(), rule, kind, r=2, overlap=0.6, names=names, aligned=1.3)) < 5e-6


@pytest.mark.parametrize("rule", ["bounded", "integrated"])
def test_left_sided_inputs_equal_dense_oracle(rule):
    """Weights that multiply from the other side, beside right-sided ones; what is not named is left alone."""
    sides = {"0.weight": "left", "2.weight": "right"}
    model = make_model()
    walk = FactoredWalk.__new__(FactoredWalk)
    from carerl_kernels.guard import protection as module

    before = module.sides_of
    module.sides_of = lambda *_: sides
    try:
        walk.__init__(model, rule, "input", r=R, sides=sides)
    finally:
        module.sides_of = before
    assert set(walk.oracles) == {0, 2}
    assert run(walk) < 3e-6


def test_factors_of_the_change_against_the_exact_svd():
    """Slowly decaying spectra (1/sqrt(i)), tall, wide, and of lower rank than asked for."""
    rng = np.random.default_rng(0)
    for m, n, rank in ((90, 40, 40), (30, 110, 30), (50, 60, 5), (4, 60, 4)):
        U, V = (np.linalg.qr(rng.standard_normal((size, rank)))[0] for size in (m, n))
        matrix = torch.from_numpy((U / np.sqrt(np.arange(1, rank + 1))) @ V.T).float()
        whole = Shards.of([("w", matrix)])
        left, values, right = leading_factors([matrix], 16, ["w"], m, whole)
        width = min(16, rank)
        exact = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
        assert float(values[0, :width].square().sum()) >= 0.99 * np.square(exact[:16]).sum()
        np.testing.assert_allclose(left[0].mT @ left[0], np.diag((np.arange(16) < width) * 1.0), atol=1e-6)
        np.testing.assert_allclose(right[0].mT @ right[0], np.diag((np.arange(16) < width) * 1.0), atol=1e-6)
        captured = torch.linalg.norm(left[0].mT @ matrix @ right[0]) ** 2
        assert float(captured) == pytest.approx(float(values.square().sum()), rel=1e-5)


class Small(torch.nn.Module):
    """Embedding tied to the output, attention-like and MLP-like matrices, a bias and a norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(29, 12)
        self.up = torch.nn.Linear(12, 20)
        self.down = torch.nn.Linear(20, 12, bias=False)
        self.norm = torch.nn.LayerNorm(12)
        self.head = torch.nn.Linear(12, 29, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        hidden = self.embed(ids)
        hidden = self.norm(hidden + self.down(torch.tanh(self.up(hidden))))
        return self.head(hidden)


def learn(model, guard, steps=12, seed=0, lr=0.05):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    guard.attach(optimizer)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(0, 11 + seed, (4, 9), generator=generator)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    guard.detach()


@pytest.mark.parametrize("kind", ["block", "input"])
def test_stage_is_recorded_saved_and_protects(kind, tmp_path):
    model = Small()
    guard = CapabilityGuard(model, "remove", basis=kind, r=4)
    start = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    path = tmp_path / "math.safetensors"
    with guard.stage("math", path=path):
        learn(model, guard)
    basis = StoredBasis.load(path)
    assert isinstance(basis, FactoredBasis) and basis.info.kind == kind
    assert set(basis.moved) == {"embed.weight", "up.weight", "down.weight"}  # the tied matrix once, no vectors
    captured = total = 0.0
    for name, p in model.named_parameters():
        delta = start[name] - p.detach().double()
        total += float(delta.square().sum())
        if name not in basis.moved:
            continue
        part = basis.left[name].double().mT @ delta if name in basis.left else delta
        part = part @ basis.right[name].double() if name in basis.right else part
        np.testing.assert_allclose(basis.moved[name].reshape(part.shape), part, atol=1e-6)
        captured += float(part.square().sum())
    assert basis.info.displacement_capture == pytest.approx(captured / total, rel=1e-5)
    assert basis.info.displacement_capture > 0.2
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    loaded = CapabilityGuard.load(path, model=model, rule="remove")
    assert loaded.layout.k == 4 and loaded.history == ["math"]
    if kind == "block":  # four inputs of twelve hold a third of anything, which hides what they know
        assert not loaded.report()["open_windows"]
    learn(model, loaded, seed=5)
    moved = along = 0.0
    for name, p in model.named_parameters():
        delta = p.detach().double() - before[name]
        moved += float(delta.square().sum())
        if name in basis.moved:
            part = basis.left[name].double().mT @ delta if name in basis.left else delta
            part = part @ basis.right[name].double() if name in basis.right else part
            along += float(part.square().sum())
    assert along < 1e-9 * moved
    assert loaded.report()["domains"]["math"]["net_displacement"] < 1e-4


class Wide(torch.nn.Module):
    """As wide as input bases have columns, or narrower."""

    def __init__(self, width=32):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = torch.nn.Linear(width, 48), torch.nn.Linear(48, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def practise(model, optimizer, guard, steps, domain=None):
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(4, model.first.in_features, generator=generator)  # inputs lie in four directions
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(16, 4, generator=generator) @ mix
        (model(x) - x[:, :4]).square().mean().backward()
        with guard.domain(domain) if domain else nullcontext():
            optimizer.step()


@pytest.mark.parametrize("width", [8, 32, 64])
def test_the_default_guard_knows_what_it_recorded_in_narrow_models_too(width):
    """Of its 32 columns those that hold the inputs act: chance is theirs, and the basis lies above it."""
    model = Wide(width)
    guard = CapabilityGuard(model)
    assert guard.layout.kind == "input" and guard.layout.k == 32
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    guard.attach(optimizer)
    with guard.stage("math"):
        practise(model, optimizer, guard, 30)
    kept = {name: int((V != 0).any(0).sum()) for name, V in guard.basis("math").right.items()}
    rows = {"first.weight": 48, "last.weight": 4}
    total = sum(p.numel() for p in model.parameters())
    assert guard.stack.chance("math") == pytest.approx(sum(kept[n] * rows[n] for n in rows) / total)
    assert guard.report()["open_windows"] == []


def test_a_newcomer_of_the_default_guard_acts():
    model = Wide(64)
    guard = CapabilityGuard(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    guard.attach(optimizer)
    guard.open_domain("math", check_every=10)
    practise(model, optimizer, guard, 40, "math")
    assert guard.report()["recording"]["math"]["acting"] and guard.history == ["math"]


def test_without_layers_to_watch_the_default_is_of_gradients():
    model = torch.nn.Sequential(torch.nn.Conv1d(3, 8, 3), torch.nn.Tanh(), torch.nn.Conv1d(8, 4, 3))
    assert CapabilityGuard(model).layout.kind == "per_matrix"
    assert CapabilityGuard(Wide().named_parameters()).layout.kind == "per_matrix"
    assert CapabilityGuard(Wide(), k=4).layout.kind == "per_matrix"
    assert CapabilityGuard(Wide(), basis_dtype=torch.bfloat16).layout.kind == "per_matrix"
    with pytest.raises(ValueError, match="covers weight matrices"):
        CapabilityGuard(model, basis="input")


def test_untied_embedding_keeps_its_most_frequent_tokens():
    model = Small()
    model.head.weight = torch.nn.Parameter(model.embed.weight.detach().clone())
    guard = CapabilityGuard(model, "remove", basis="input", r=3, energy=1.0, room=1.0, every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard.attach(optimizer)
    with guard.stage("math"):
        ids = torch.tensor([[7, 7, 7, 7, 3, 3, 3, 9, 9, 1]])
        model(ids).square().mean().backward()
        optimizer.step()
    left = guard.basis("math").left["embed.weight"]
    assert left.argmax(0).tolist() == [7, 3, 9]
    before = model.embed.weight.detach().clone()
    optimizer.zero_grad()
    model(torch.arange(29).unsqueeze(0)).square().mean().backward()
    optimizer.step()
    moved = (model.embed.weight.detach() - before).abs().amax(1)
    # what the head moved along its own inputs is another matrix; of the embedding, the three tokens stay
    assert float(moved[[7, 3, 9]].max()) < 1e-6 < float(moved[[1, 2, 4]].min())


def test_energy_threshold_leaves_slots_empty():
    model = Small()
    guard = CapabilityGuard(model, basis="input", r=8, energy=0.5)
    with guard.stage("math"):
        learn(model, guard)
    widths = {name: int((V.abs().sum(0) > 0).sum()) for name, V in guard.basis("math").right.items()}
    assert all(1 <= width < 8 for width in widths.values())
    assert 0.5 <= guard.report()["domains"]["math"]["capture"]["gradient"] < 1


def uneven(model, names=("math", "chat", "logic"), seed=1, sides=None):
    """Input bases whose directions hold different shares of their domain's inputs."""
    layout, bases = make_factored(model, "input", R, 0.3, names, sides=sides)
    rng = np.random.default_rng(seed)
    return layout, [replace(b, values={n: torch.from_numpy(rng.uniform(0.1, 9, R)) for n in b.values}) for b in bases]


def trimmed(layout, bases, room):
    """The same by hand: in every matrix the largest shares stay."""
    kept = [{"left": {}, "right": {}, "moved": {}} for _ in bases]
    held = np.zeros((2, len(bases)))
    for group in layout.groups:
        side, inputs = ("left", group.whole) if group.side == "left" else ("right", group.n)
        for _, name, _ in layout.matrices(group):
            squares = [b.values[name].numpy() ** 2 * (getattr(b, side)[name].abs().sum(0) > 0).numpy() for b in bases]
            shares = np.array([square / square.sum() for square in squares])
            least = np.sort(shares.ravel())[::-1][: max(1, int(room * inputs))][-1]
            held += [np.where(shares >= least, shares, 0).sum(1), shares.sum(1)]
            for part, basis, own in zip(kept, bases, shares, strict=True):
                mask = torch.from_numpy((own >= least) & (own > 0)).float()
                part[side][name], part["moved"][name] = getattr(basis, side)[name] * mask, basis.moved[name] * mask
    return [replace(b, **part) for b, part in zip(bases, kept, strict=True)], held[0] / held[1]


def act_alike(model, one, other):
    """Two guards of which the second may have its domains in another order."""
    gradient = [torch.randn_like(p) for p in model.parameters()]
    found, edited = [], []
    for guard in (one, other):
        stack, tensors = guard.stack, [g.clone() for g in gradient]
        parts = {n: (stack.project(gradient, n), stack.displacement[:, stack.columns(n)]) for n in one.history}
        mix = torch.zeros(guard.layout.T, stack.rows, dtype=torch.float64)
        for number, name in enumerate(one.history):
            draw = torch.Generator().manual_seed(number)
            mix[:, stack.columns(name)] = torch.randn(mix.shape[0], R, dtype=torch.float64, generator=draw)
        stack.edit_(tensors, mix)
        found.append(parts)
        edited.append(tensors)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(edited[0], edited[1], rtol=0, atol=1e-5)


SIDES = {"0.weight": "left", "2.weight": "right"}


@pytest.mark.parametrize("room", [0.1, 0.5, 0.75])
@pytest.mark.parametrize("order", [("math", "chat", "logic"), ("logic", "math", "chat"), ("chat", "logic", "math")])
def test_what_there_is_no_room_for_gives_way(order, room):
    """In every matrix those directions stay that hold the most of their domain's inputs, in whatever order domains come."""
    model = make_model()
    layout, bases = uneven(model)
    by_hand, held = trimmed(layout, bases, room)
    tight = CapabilityGuard(model, basis="input", r=R, room=room)
    free = CapabilityGuard(model, basis="input", r=R, room=1.0)
    for guard, among in ((tight, bases), (free, by_hand)):
        for name in order:
            guard.add(next(b for b in among if b.info.domain == name))
    act_alike(model, free, tight)
    for basis, share in zip(bases, held, strict=True):
        name = basis.info.domain
        assert tight.report()["domains"][name]["acting"] == pytest.approx(share)
        assert free.report()["domains"][name]["acting"] == 1
        assert (name in tight.report()["open_windows"]) == (share == 0)
        for matrix, factor in tight.basis(name).right.items():  # what is recorded stays, to be saved again
            torch.testing.assert_close(factor, basis.right[matrix])
    for group in layout.groups:
        rows = torch.cat([tight.stack.present(name)[group.rows] for name in order], dim=1)
        assert rows.sum(1).max() <= max(1, room * group.n)


def test_what_a_domain_recorded_anew_leaves_free_is_taken_again():
    """The guard is the one that the same files make, whatever it knew before; left-sided matrices too."""
    model = make_model()
    from carerl_kernels.guard import protection as module

    before = module.sides_of
    module.sides_of = lambda *_: SIDES
    try:
        layout, (math, chat, logic) = uneven(model, sides=SIDES)
        *_, small = uneven(model, seed=5, sides=SIDES)[1]
        small = replace(small, values={n: v * torch.tensor([1.0, 1e-3, 1e-3]) for n, v in small.values.items()})
        lived, fresh, free = (CapabilityGuard(model, basis="input", r=R, room=room) for room in (0.3, 0.3, 1.0))
    finally:
        module.sides_of = before
    for basis in (math, logic, chat, small):  # small is of the domain logic, and renews it
        lived.add(basis)
    for basis in (math, chat, small):
        fresh.add(basis)
    for basis in trimmed(layout, [math, chat, small], 0.3)[0]:
        free.add(basis)
    assert lived.history == fresh.history == ["math", "chat", "logic"]
    act_alike(model, fresh, lived)
    act_alike(model, free, lived)
    assert lived.report()["domains"]["math"]["acting"] == fresh.report()["domains"]["math"]["acting"] < 1


def test_a_domain_adopted_on_the_way_leaves_what_others_counted():
    model = make_model()
    _, (math, chat) = uneven(model, ("math", "chat"))
    guard = CapabilityGuard(model, "integrated", basis="input", r=R, room=0.3, conflict=1.0)
    guard.add(math)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard.attach(optimizer)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    columns, before = guard.stack.columns("math"), guard.stack.present("math")
    moved = (guard.memory.steps.q_start - guard.memory.steps.q_prev)[:, columns].clone()
    guard.add(chat, rebase=False)
    columns, after = guard.stack.columns("math"), guard.stack.present("math")
    assert (before & ~after).any() and (before & after).any()
    now = (guard.memory.steps.q_start - guard.memory.steps.q_prev)[:, columns]
    torch.testing.assert_close(now, torch.where(after, moved, 0.0))
    assert not guard.memory.steps.q_prev[:, columns][~after].any()


def test_a_state_is_of_a_guard_with_the_same_room():
    model = make_model()
    _, (math,) = uneven(model, ("math",))
    guards = {room: CapabilityGuard(model, basis="input", r=R, room=room) for room in (0.5, 1.0)}
    for guard in guards.values():
        guard.add(math)
    state = guards[1.0].state_dict()
    with pytest.raises(ValueError, match="same settings"):
        guards[0.5].load_state_dict(state)
    guards[1.0].load_state_dict(state)


def test_weight_one_is_bitwise_identity():
    for kind in ("block", "input"):
        walk = FactoredWalk(make_model(), "integrated", kind, r=R, aligned=1.0, conflict=1.0)
        optimizer = torch.optim.SGD(walk.params, lr=0.1)
        walk.guard.attach(optimizer)
        twin = [torch.nn.Parameter(p.detach().clone()) for p in walk.params]
        for p, q in zip(walk.params, twin, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        torch.optim.SGD(twin, lr=0.1).step()
        assert all(torch.equal(p, q) for p, q in zip(walk.params, twin, strict=True))


def test_grad_mode_scales_matrices_without_directions_too():
    walk = FactoredWalk(make_model(), "remove", "block", r=R, apply_to="grad", max_grad_norm=0.5)
    optimizer = torch.optim.SGD(walk.params, lr=0.1)
    walk.guard.attach(optimizer)
    torch.manual_seed(0)
    for p in walk.params:
        p.grad = torch.randn_like(p)
    raw = numpy_of([p.grad for p in walk.params])
    optimizer.step()
    edited = [walk.expect(i, g, None) for i, g in enumerate(raw)]
    norm = np.sqrt(sum(np.square(g).sum() for g in edited))
    for p, want in zip(walk.params, edited, strict=True):
        np.testing.assert_allclose(p.grad.numpy(), want * 0.5 / norm, atol=2e-6)


def test_smallest_step_is_still_resolved():
    """A step of 1e-7 on weights of size 1, along one direction u v^T, is seen and removed."""
    model = torch.nn.Sequential(torch.nn.Linear(256, 192, bias=False))
    torch.nn.init.normal_(model[0].weight)
    _, (basis,) = make_factored(model, "block", 4, 0.0, names=("math",))
    guard = CapabilityGuard(model, "remove", basis="block", r=4)
    guard.add(basis)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    guard.attach(optimizer)
    u, v = basis.left["0.weight"][:, 1], basis.right["0.weight"][:, 2]
    weight = model[0].weight
    start = weight.detach().double().clone()
    for _ in range(200):
        weight.grad = 2e-4 * torch.outer(u, v)  # elements of 1e-6
        optimizer.step()
    moved = float(u.double() @ (weight.detach().double() - start) @ v.double())
    assert abs(moved) < 0.05 * 200 * 2e-4


def test_low_precision_matrices_are_edited_with_one_rounding():
    model = make_model(dtype=torch.bfloat16)
    walk = FactoredWalk(model, "remove", "block", r=R)
    optimizer = torch.optim.SGD(walk.params, lr=0.05)
    walk.guard.attach(optimizer)
    start = numpy_of(walk.params)
    for step in range(60):
        generator = torch.Generator().manual_seed(step)
        for p in walk.params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
    along = moved = 0.0
    for i, (a, b) in enumerate(zip(start, numpy_of(walk.params), strict=True)):
        moved += np.square(a - b).sum()
        if i in walk.oracles:
            along += np.square(walk.oracles[i].A @ (a - b).ravel()).sum()
    assert np.sqrt(along) < 0.03 * np.sqrt(moved)  # rounding of single elements; it does not accumulate


def test_files_quantise_and_name_what_is_wrong(tmp_path):
    model = Small()
    guard = CapabilityGuard(model, basis="block", r=4)
    with guard.stage("math", path=tmp_path / "math.safetensors"):
        learn(model, guard)
    half = guard.basis("math").quantized()
    half.save(tmp_path / "half.safetensors")
    fresh = CapabilityGuard.load(tmp_path / "half.safetensors", model=model)
    a, b = fresh.basis("math").left["up.weight"], guard.basis("math").left["up.weight"]
    assert 0 < float((a - b).norm() / b.norm()) < 0.01
    np.testing.assert_allclose(a.mT @ a, np.eye(4), atol=1e-5)  # orthonormal again
    with pytest.raises(BasisError, match="expected a DomainBasis, found a block basis"):
        DomainBasis.load(tmp_path / "math.safetensors")
    with pytest.raises(BasisError, match="construct the guard with basis='block'"):
        CapabilityGuard(model).add(tmp_path / "math.safetensors")
    with pytest.raises(BasisError, match="expected kind block with k = 5, found block with k = 4"):
        CapabilityGuard(model, basis="block", r=5).add(tmp_path / "math.safetensors")
    with pytest.raises(ValueError, match="k: expected r with basis='block', found k=8"):
        CapabilityGuard(model, basis="block", k=8)
    with pytest.raises(ValueError, match="r: expected k with basis='flat', found r=8"):
        CapabilityGuard(model, basis="flat", r=8)
    with pytest.raises(ValueError, match=r"expected torch\.float32 with basis='input'"):
        CapabilityGuard(model, basis="input", basis_dtype=torch.int8)
    with pytest.raises(ValueError, match="covers weight matrices: expected at least one"):
        CapabilityGuard(torch.nn.LayerNorm(4), basis="block")
    pairs = CapabilityGuard(list(model.named_parameters()), basis="input")
    with pytest.raises(RuntimeError, match="built from a module"), pairs.stage("math"):
        pass
    unseen = CapabilityGuard(model, basis="input")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    unseen.attach(optimizer)
    with pytest.raises(RuntimeError, match="calls of the model with gradients before"), unseen.stage("math"):  # noqa: PT012
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()


@pytest.mark.parametrize("kind", ["block", "input"])
def test_interrupted_stage_resumes_exactly(kind):
    def steps(model, optimizer, span):
        for step in span:
            ids = torch.randint(0, 29, (4, 9), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(ids).square().mean().backward()
            optimizer.step()

    def fresh():
        model = Small()
        guard = CapabilityGuard(model, "integrated", basis=kind, r=3)
        layout = guard.layout
        guard.add(random_basis(layout, domain="chat", architecture="Small"))
        return model, guard, torch.optim.AdamW(model.parameters(), lr=0.01)

    whole, guard, optimizer = fresh()
    with guard.stage("math"):
        guard.attach(optimizer)
        steps(whole, optimizer, range(12))
    want = guard.basis("math")
    model, guard, optimizer = fresh()
    with pytest.raises(KeyboardInterrupt), guard.stage("math"):  # noqa: PT012
        guard.attach(optimizer)
        steps(model, optimizer, range(7))
        saved = [model.state_dict(), optimizer.state_dict(), guard.state_dict()]
        saved = [{k: v.clone() if torch.is_tensor(v) else v for k, v in saved[0].items()}, *saved[1:]]
        raise KeyboardInterrupt
    model, guard, optimizer = fresh()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    guard.load_state_dict(saved[2])
    with guard.stage("math"):
        guard.attach(optimizer)
        steps(model, optimizer, range(7, 12))
    for p, q in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
    got = guard.basis("math")
    assert got.info == want.info
    for name, V in want.right.items():
        assert torch.equal(V, got.right[name])
