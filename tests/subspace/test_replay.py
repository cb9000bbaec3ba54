"""What a stage of input directions is made of: its own accepted steps, as the model was called or as the trainer says."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from carerl_kernels import CapabilityGuard
from carerl_kernels.subspace.batches import Reservoir
from torch import nn

MATH, CHAT, OTHER = (torch.eye(8)[i].repeat(4, 1) for i in (0, 5, 7))


def linear(**options):
    torch.manual_seed(0)
    model = nn.Linear(8, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    guard = CapabilityGuard(model, energy=1.0, **options)
    guard.attach(optimizer)
    return model, optimizer, guard


def step(model, optimizer, x, factor=1.0):
    (model(x).square().mean() * factor).backward()
    optimizer.step()
    optimizer.zero_grad()


def energies(basis, name="weight"):
    """Of every input, how much of it the basis holds: squared values spread over the inputs."""
    return (basis.right[name].double().square() * basis.values[name].square()).sum(1)


def only(basis, at):
    found = energies(basis)
    assert found[at] > 0 and float(found.sum() - found[at]) < 1e-9 * float(found[at])


def test_dropped_steps_of_another_domain_do_not_count():
    model, optimizer, guard = linear()
    with guard.stage("math"):
        for _ in range(6):
            step(model, optimizer, MATH)
            with guard.domain("chat"):
                step(model, optimizer, CHAT, float("inf"))
    only(guard.basis("math"), 0)


def test_steps_of_another_domain_do_not_count():
    model, optimizer, guard = linear()
    with guard.stage("math"):
        for _ in range(3):
            step(model, optimizer, MATH)
            with guard.domain("chat"):
                step(model, optimizer, CHAT)
    only(guard.basis("math"), 0)


def test_steps_that_a_scaler_skips_do_not_count():
    model, optimizer, guard = linear()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with guard.stage("math"):
        for number in range(6):
            x, factor = (OTHER, float("inf")) if number % 2 else (MATH, 1.0)
            scaler.scale(model(x).square().mean() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    only(guard.basis("math"), 0)


def test_every_call_of_an_accumulated_step_counts():
    """Micro-batches, and several calls before one backward pass."""
    model, optimizer, guard = linear()
    with guard.stage("math"):
        for _ in range(2):
            model(MATH).square().mean().backward()
            (model(CHAT).square().mean() + model(OTHER).square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert energies(guard.basis("math"))[[0, 5, 7]].tolist() == pytest.approx([8, 8, 8])


def test_probes_and_passes_without_gradients_do_not_count():
    model = nn.Linear(8, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = CapabilityGuard(model, "probed", probe_every=2, energy=1.0)
    guard.attach(optimizer)
    with guard.stage("math"):
        step(model, optimizer, MATH)
    with guard.stage("code") as recorder:
        for _ in range(6):
            if guard.probes_due():
                with guard.probe("math"):
                    model(MATH).square().mean().backward()
            with torch.no_grad():
                model(OTHER)
            with recorder.paused():
                model(OTHER).square().mean()
            step(model, optimizer, CHAT)
    only(guard.basis("code"), 5)


class Ways(nn.Module):
    """Weights whose modules' forward is not called, or twice, or shared."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.b.weight = self.a.weight
        self.head = nn.Linear(8, 8, bias=False)

    def forward(self, x):
        y = self.a(input=x)
        z = self.b(torch.tanh(y))
        return nn.functional.linear(torch.tanh(z), self.head.weight)


@pytest.mark.parametrize("rule", ["remove", "bounded"])
def test_what_was_recorded_is_protected_however_weights_are_used(rule):
    """Fused heads, inputs by keyword, layers called twice, shared weights: nothing moves along their inputs."""
    model = Ways()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    guard = CapabilityGuard(model, rule, energy=1.0, room=1.0, bound=1e-9, every=1) if rule == "bounded" else None
    guard = guard or CapabilityGuard(model, rule, energy=1.0, room=1.0, every=1)
    guard.attach(optimizer)
    x = torch.randn(16, 3) @ torch.randn(3, 8)
    with guard.stage("math"):
        for _ in range(3):
            step(model, optimizer, x)
    basis = guard.basis("math")
    assert all(values[0] > 0 for values in basis.values.values())
    inputs = torch.cat([x, torch.tanh(model.a(x))]).detach().double()
    V = basis.right["a.weight"].double()
    torch.testing.assert_close((inputs @ V).square().sum(), inputs.square().sum(), rtol=1e-4, atol=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with guard.domain("chat"):
        for _ in range(5):
            step(model, optimizer, torch.randn(16, 8))
    for name, p in model.named_parameters():
        moved = p.detach() - before[name]
        assert (moved @ basis.right[name]).norm() < 1e-3 * max(float(moved.norm()), 1e-2)


class Net(nn.Sequential):
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("way", ["outside", "inside", "in place", "regional"])
@pytest.mark.parametrize("warm", [False, True])
def test_compiled_models_are_heard(way, warm):
    """The guard may have the compiled model or the one inside; it may have run before the stage."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Net(nn.Linear(8, 8), nn.Tanh(), nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
    called = model
    if way == "in place":
        model.compile(backend="eager")
    elif way == "regional":
        model[2].compile(backend="eager")
    else:
        called = torch.compile(model, backend="eager")
    if warm:
        called(OTHER).sum().backward()
        model.zero_grad()
    guard = CapabilityGuard(called if way == "outside" else model, energy=1.0, room=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    guard.attach(optimizer)
    with guard.stage("math"):
        for _ in range(12):
            step(called, optimizer, MATH)
    basis = guard.basis("math")
    assert set(basis.values) == {"0.weight", "2.0.weight"} and all(v[0] > 0 for v in basis.values.values())
    assert energies(basis, "0.weight")[0] == pytest.approx(48)
    assert "_compiled_call_impl" not in vars(model) or way == "in place"
    step(called, optimizer, MATH)


def test_calls_that_are_not_heard_are_an_error_at_the_first_step():
    model, optimizer, guard = linear()
    match = r"stage 'math'.*before its first step.*inputs=batches"
    with pytest.raises(RuntimeError, match=match), guard.stage("math"):  # noqa: PT012
        nn.functional.linear(MATH, model.weight).square().mean().backward()
        optimizer.step()
    with guard.stage("math", inputs=[MATH]):
        nn.functional.linear(MATH, model.weight).square().mean().backward()
        optimizer.step()
    only(guard.basis("math"), 0)


def test_copies_of_the_model_are_not_heard_and_can_be_saved(tmp_path):
    model, optimizer, guard = linear()
    with guard.stage("math"):
        for _ in range(3):
            twin = copy.deepcopy(model)
            twin(OTHER).square().mean().backward()
            step(model, optimizer, MATH)
        torch.save(model, tmp_path / "model.pt")
        loaded = [torch.load(tmp_path / "model.pt", weights_only=False), pickle.loads(pickle.dumps(model))]
        for other in loaded:
            assert torch.equal(other.weight, model.weight)
            other(OTHER).square().mean().backward()
        step(model, optimizer, MATH)
    only(guard.basis("math"), 0)


def test_a_snapshot_does_not_change_and_brings_back_what_was_kept():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = CapabilityGuard(model)
    guard.attach(optimizer)
    reused = torch.zeros(3, 5, dtype=torch.long)
    with guard.stage("a"):
        step(model, optimizer, reused)
        kept, weights = guard.state_dict(), {n: t.clone() for n, t in model.state_dict().items()}
        reused.fill_(7)  # the caller's own memory
        for _ in range(5):
            step(model, optimizer, torch.full((3, 5), 7))
        file = io.BytesIO()
        torch.save(kept, file)
        file.seek(0)
        model.load_state_dict(weights)
        guard.load_state_dict(torch.load(file, weights_only=True))
    assert guard.basis("a").left["0.weight"].sum(1).nonzero().flatten().tolist() == [0]


def test_a_trainer_may_say_what_the_model_was_called_with():
    """Padding is not kept; calls that are heard besides do not count."""
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(12, 8), nn.Linear(8, 4)

        def forward(self, input_ids, attention_mask=None):
            return self.head(self.embed(input_ids))

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = CapabilityGuard(model, energy=1.0)
    guard.attach(optimizer)
    ids, mask = torch.tensor([[0, 0, 3, 4], [5, 6, 7, 0]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    with guard.stage("a") as recorder:
        for _ in range(2):
            model(input_ids=torch.full((2, 4), 11)).square().mean().backward()
            recorder.see({"input_ids": ids, "attention_mask": mask})
            optimizer.step()
    left = guard.basis("a").left["embed.weight"]
    assert left.sum(1).nonzero().flatten().tolist() == [3, 4, 5, 6, 7]


def test_sequences_of_all_steps_are_kept_alike():
    """The sample is uniform over accepted steps, its size is bounded, and its order of accepting does not leak into it."""
    counts = torch.zeros(100)
    for seed in range(300):
        reservoir = Reservoir(16, seed)
        for number in range(50):
            reservoir.offer({"x": torch.full((2, 3), number)})
            if number % 5 == 4:
                reservoir.drop()
            else:
                reservoir.accept()
        assert len(reservoir.items) == 16 and reservoir.seen == 80
        for call, own in reservoir.items:
            assert own == [True] and call["x"].shape == (1, 3)
            counts[int(call["x"][0, 0])] += 1
    kept = counts[:50]
    assert kept[4::5].sum() == 0
    accepted = torch.cat([kept[i::5] for i in range(4)])
    assert accepted.min() > 0.7 * 120 and accepted.max() < 1.3 * 120  # 300 * 16 / 40 in the mean


def test_a_sample_comes_back_in_batches_of_what_fits_together():
    reservoir = Reservoir(64, 0)
    reservoir.offer(((torch.ones(3, 4), 2), {"scale": torch.tensor(2.0)}))
    reservoir.offer(((torch.ones(2, 5), 2), {"scale": torch.tensor(2.0)}))
    reservoir.offer(((torch.zeros(2, 4), 2), {"scale": torch.tensor(2.0)}))
    reservoir.accept()
    again = Reservoir(64, 0)
    again.load(reservoir.state())
    for kept in (reservoir, again):
        shapes = sorted(tuple(args[0].shape) for args, _ in kept.batches())
        assert shapes == [(2, 5), (5, 4)]
        assert all(args[1] == 2 and float(kwargs["scale"]) == 2 for args, kwargs in kept.batches())


def test_the_first_stage_corrects_sides_that_were_guessed_wrong():
    """A plain parameter multiplied from the left: recorded and protected from there."""

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.w = nn.Parameter(torch.randn(8, 6))

        def forward(self, x):
            return x @ self.w

    model = Plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = CapabilityGuard(model, "remove", energy=1.0, room=1.0, every=1)
    assert [group.side for group in guard.layout.groups] == ["right"]
    guard.attach(optimizer)
    with guard.stage("math"):
        step(model, optimizer, MATH)
    assert [group.side for group in guard.layout.groups] == ["left"]
    before = model.w.detach().clone()
    with guard.domain("chat"):
        step(model, optimizer, torch.randn(16, 8))
    moved = (model.w.detach() - before).abs().amax(1)
    assert float(moved[0]) < 1e-6 < float(moved[1:].min())


def test_stacks_of_matrices_are_guarded_slice_by_slice(tmp_path):
    """Fused experts: recorded, saved, loaded, and each slice held along its own inputs."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.w = nn.Parameter(torch.randn(3, 5, 8))

        def forward(self, x):
            return torch.bmm(x, self.w.mT)

    model = Experts()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = CapabilityGuard(model, "remove", energy=1.0, room=1.0, every=1)
    guard.attach(optimizer)
    x = torch.stack([MATH, CHAT, OTHER])
    with guard.stage("math", path=tmp_path / "math.safetensors"):
        step(model, optimizer, x)
    loaded = CapabilityGuard.load(tmp_path / "math.safetensors", model=model, rule="remove", room=1.0, every=1)
    assert set(loaded.basis("math").right) == {"w[0]", "w[1]", "w[2]"}
    guard.detach()
    loaded.attach(optimizer)
    before = model.w.detach().clone()
    with loaded.domain("chat"):
        step(model, optimizer, torch.randn(3, 16, 8))
    moved = (model.w.detach() - before).abs().amax(1)  # [3, 8]
    for e, at in enumerate((0, 5, 7)):
        assert float(moved[e, at]) < 1e-6 < float(moved[e].max())
