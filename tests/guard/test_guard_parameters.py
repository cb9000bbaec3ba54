"""Parameters and optimizers that the guard does not know, or knows wrongly: each is held, or named once with the remedy."""

from __future__ import annotations

import copy
import gc
import warnings
from pathlib import Path

import pytest
import schedulefree
import torch
from carerl_kernels import CapabilityGuard
from carerl_kernels.guard.build import trainable, unwrapped
from factored_helpers import make_factored
from guard_helpers import make_history, make_model

R = 3


def guarded(model, rule="remove", *, every=1, **options):
    """A guard over a hand-made history of input directions, and the directions."""
    _, (basis,) = make_factored(model, "input", R, 0.0, ("math",))
    guard = CapabilityGuard(model, rule, basis="input", r=R, room=1.0, every=every, **options)
    guard.add(basis)
    return guard, basis


def along(model, basis, start) -> float:
    """How far the weights are from a start along the directions."""
    named = dict(model.named_parameters())
    return max(
        float(((named[n].detach() - start[n]).double() @ V.double()).abs().max()) for n, V in basis.right.items()
    )


def snapshot(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def learn(model, *optimizers, steps=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        (model(torch.randn(16, 13, generator=generator)) - 1).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


# ------------------------------------------------------------------------------------------------ parameters nobody knows


def test_a_parameter_unfrozen_later_is_named_once_with_the_reason():
    model = make_model()
    model[2].weight.requires_grad_(False)
    guard = CapabilityGuard(model, k=2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guard.attach(optimizer)
        learn(model, optimizer, steps=1)
    model[2].weight.requires_grad_(True)
    optimizer.add_param_group({"params": [model[2].weight]})
    with pytest.warns(UserWarning, match=r"2\.weight \(it was frozen or not there when the guard was built\); build"):
        learn(model, optimizer, steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn(model, optimizer, steps=2)
    unguarded = guard.report()["unguarded"]
    assert unguarded["it was frozen or not there when the guard was built"] == {"parameters": 1, "elements": 77}


def test_a_replaced_layer_is_named_by_the_optimizer_and_refused_by_a_stage():
    model = make_model()
    guard = CapabilityGuard(model, k=2)
    model[2] = torch.nn.Linear(11, 7)
    with (
        pytest.raises(RuntimeError, match=r"'2\.weight' was replaced since the guard was built"),
        guard.stage("math"),
    ):
        pass
    with pytest.raises(RuntimeError, match="was replaced since the guard was built"):
        guard.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    fresh = CapabilityGuard(model, k=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fresh.attach(optimizer)
    model[4] = torch.nn.Linear(7, 3)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    with pytest.warns(UserWarning, match=r"4\.weight, 4\.bias \(it took the place of a guarded one"):
        learn(model, optimizer, steps=1)


def test_parameters_of_another_module_are_named():
    model, other = make_model(), torch.nn.Linear(2, 2)
    guard = CapabilityGuard(model, k=2)
    with pytest.warns(UserWarning, match=r"\[2, 2\], \[2\] \(not a parameter of the guarded model\)"):
        guard.attach(torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1))


def test_vectors_are_counted_as_free_without_a_warning():
    model = make_model()
    guard, _ = guarded(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guard.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    free = guard.report()["unguarded"]["not a weight matrix that directions exist for"]
    assert free == {"parameters": 3, "elements": 21}


def test_wrappers_in_any_nesting_change_no_name():
    model = make_model()
    compiled = torch.compile(model, backend="eager")
    assert unwrapped(compiled) is model
    with pytest.raises(TypeError, match=r"before torch\.compile"):
        CapabilityGuard(torch.compile(compiled, backend="eager"))  # which is a function
    assert [n for n, _ in trainable(compiled)] == [n for n, _ in model.named_parameters()]
    regional = make_model()
    regional[2] = torch.compile(regional[2], backend="eager")
    assert [n for n, _ in trainable(regional)] == [n for n, _ in model.named_parameters()]


# ------------------------------------------------------------------------------------------------------------ optimizers


def test_several_optimizers_take_one_step_together():
    """Matrices by one, vectors by the other: the weights are those of a guard behind a single optimizer."""
    ends = []
    for split in (False, True):
        model = make_model()
        guard, basis = guarded(model, every=4)
        matrices = [p for p in model.parameters() if p.dim() == 2]
        vectors = [p for p in model.parameters() if p.dim() == 1]
        parts = [matrices, vectors] if split else [[*matrices, *vectors]]
        optimizers = [torch.optim.SGD(part, lr=0.1) for part in parts]
        guard.attach(*optimizers)
        start = snapshot(model)
        learn(model, *optimizers, steps=8)
        assert guard.report()["steps"] == 8
        assert along(model, basis, start) < 1e-5
        ends.append(snapshot(model))
    for name, p in ends[0].items():
        assert torch.equal(p, ends[1][name])


def test_an_overflow_in_one_of_several_optimizers_drops_the_step_of_all():
    model = make_model()
    guard, _ = guarded(model)
    first = torch.optim.SGD([p for p in model.parameters() if p.dim() == 2], lr=0.1)
    second = torch.optim.SGD([p for p in model.parameters() if p.dim() == 1], lr=0.1)
    guard.attach(first, second)
    before = snapshot(model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    model[4].bias.grad[0] = torch.inf
    first.step()
    second.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    learn(model, first, second, steps=2)
    report = guard.report()
    assert report["dropped_steps"] == 1 and report["steps"] == 2


def test_an_optimizer_that_steps_more_often_than_another_ends_its_steps():
    model = make_model()
    guard, basis = guarded(model)
    first = torch.optim.SGD([p for p in model.parameters() if p.dim() == 2], lr=0.1)
    second = torch.optim.SGD([p for p in model.parameters() if p.dim() == 1], lr=0.1)
    guard.attach(first, second)
    start = snapshot(model)
    for _ in range(3):  # a scaler skips the second's steps
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        first.step()
    guard.detach()
    assert along(model, basis, start) < 1e-5


@pytest.mark.parametrize("every", [1, 4])
def test_schedule_free_weights_are_held_in_both_of_their_sequences(every):
    """What is evaluated and saved, after `optimizer.eval()`, lies in the box: the average and the fast sequence both do."""
    model = make_model()
    guard, basis = guarded(model, every=every)
    plain = copy.deepcopy(model)
    start = snapshot(model)
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.05)
    optimizer.train()
    guard.attach(optimizer)
    learn(model, optimizer, steps=12)
    optimizer.eval()
    assert along(model, basis, start) < 1e-4
    guard.confine_()
    optimizer.train()
    learn(model, optimizer, steps=4)
    optimizer.eval()
    assert along(model, basis, start) < 1e-4
    other = schedulefree.AdamWScheduleFree(plain.parameters(), lr=0.05)
    other.train()
    learn(plain, other, steps=12)
    other.eval()
    assert along(plain, basis, start) > 0.1


def test_a_second_copy_of_the_weights_is_refused_by_name():
    class Averaging(torch.optim.SGD):
        """Keeps an average that replaces the weights later."""

        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    average = self.state[p].setdefault("slow", p.detach().clone())
                    average.lerp_(p.detach(), 0.1)

    model = make_model()
    guard, _ = guarded(model)
    optimizer = Averaging(model.parameters(), lr=0.1)
    guard.attach(optimizer)
    with pytest.raises(RuntimeError, match=r"Averaging keeps another copy of the weights in its state \('slow'\)"):
        learn(model, optimizer, steps=1)

    class Lookahead:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    with pytest.raises(TypeError, match=r"Lookahead keeps the weights elsewhere.*carerl confine"):
        CapabilityGuard(model, k=2).attach(Lookahead(torch.optim.SGD(model.parameters(), lr=0.1)))


def test_a_step_that_calls_its_parent_s_is_one_step():
    """torch runs hooks for both; and a step that raised leaves nothing behind."""

    class Mine(torch.optim.SGD):
        fails = False

        def step(self, closure=None):
            super().step(closure)
            if self.fails:
                raise KeyError("mine")

    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)  # from now on the parent's step has hooks, too
    model = make_model()
    guard, basis = guarded(model)
    optimizer = Mine(model.parameters(), lr=0.1)
    guard.attach(optimizer)
    start = snapshot(model)
    learn(model, optimizer, steps=2)
    assert guard.report()["steps"] == 2
    optimizer.fails = True
    with pytest.raises(KeyError):
        learn(model, optimizer, steps=1)
    optimizer.fails = False
    learn(model, optimizer, steps=2)
    assert along(model, basis, start) < 1e-5
    assert guard.report()["steps"] == 4


def test_moments_are_no_copies():
    for optimizer in (
        torch.optim.AdamW,
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        torch.optim.Adamax,
        torch.optim.Rprop,
    ):
        model = make_model()
        guard, _ = guarded(model)
        made = optimizer(model.parameters(), lr=1e-3)
        guard.attach(made)
        learn(model, made, steps=2)
        assert guard.report()["steps"] == 2, optimizer


# ------------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("apply_to", ["grad", "update"])
def test_a_scaler_that_leaves_dividing_to_the_optimizer_changes_nothing(apply_to):
    """Fused optimizers get `grad_scale` and divide inside their step: what is recorded and edited is divided all the same."""

    class Fused(torch.optim.SGD):
        """As a fused optimizer: divides by its `grad_scale`."""

        def step(self, closure=None):
            scale = getattr(self, "grad_scale", None)
            if scale is not None:
                for group in self.param_groups:
                    for p in group["params"]:
                        p.grad.div_(scale)
            super().step(closure)

    ends, values = [], []
    for scale in (None, 2.0**16):
        model = make_model()
        guard = CapabilityGuard(model, "remove", k=2, apply_to=apply_to, every=1)
        guard.add(make_history(model, "per_matrix", 2, 0.0, ("math",))[0])
        optimizer = Fused(model.parameters(), lr=0.1)
        guard.attach(optimizer)
        with guard.stage("code"):
            for step in range(3):
                generator = torch.Generator().manual_seed(step)
                for p in model.parameters():
                    p.grad = torch.randn(p.shape, generator=generator) * (scale or 1.0)
                if scale is not None:
                    optimizer.grad_scale = torch.tensor(scale)
                optimizer.step()
        ends.append(snapshot(model))
        values.append(guard.basis("code").singular_values)
    for name, p in ends[0].items():
        torch.testing.assert_close(p, ends[1][name], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=0)


def test_sparse_gradients_are_guarded_as_updates_and_named_where_they_cannot_be():
    class Tokens(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(30, 8, sparse=True)
            self.out = torch.nn.Linear(8, 4)

        def forward(self, ids):
            return self.out(self.embed(ids)).square().mean()

    model = Tokens()
    guard = CapabilityGuard(model, "remove", basis="block", r=2, every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard.attach(optimizer)
    model(torch.tensor([1, 2, 3])).backward()
    optimizer.step()
    assert guard.report()["steps"] == 1
    rows = CapabilityGuard(model, "remove", basis="flat", k=2, apply_to="grad")
    guard.detach()
    rows.attach(optimizer)
    optimizer.zero_grad()
    with pytest.raises(ValueError, match=r"gradient of 'embed\.weight': expected a dense tensor"), rows.stage("math"):  # noqa: PT012
        model(torch.tensor([1, 2, 3])).backward()
        optimizer.step()


def test_gradients_that_are_not_contiguous_are_edited():
    ends = []
    for transposed in (False, True):
        model = make_model()
        guard = CapabilityGuard(model, "remove", k=2, apply_to="grad")
        guard.add(make_history(model, "per_matrix", 2, 0.0, ("math",))[0])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        guard.attach(optimizer)
        generator = torch.Generator().manual_seed(0)
        for p in model.parameters():
            g = torch.randn(p.shape, generator=generator)
            p.grad = g.t().contiguous().t() if transposed and g.dim() == 2 else g
        optimizer.step()
        ends.append(snapshot(model))
    for name, p in ends[0].items():
        assert torch.equal(p, ends[1][name])


# ---------------------------------------------------------------------------------------------------------------- files


def test_a_stage_leaves_no_temporary_directory_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = make_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ("per_matrix", "block"):
            guard = CapabilityGuard(model, basis=kind)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            guard.attach(optimizer)
            with guard.stage("math"):
                learn(model, optimizer, steps=2)
            assert not list(Path(tmp_path).iterdir())
            state = None
            with guard.stage("chat"):
                learn(model, optimizer, steps=2)
                state = guard.state_dict()
            other = CapabilityGuard(model, basis=kind)
            other.add(guard.basis("math"))
            state["weights"] = other.state_dict()["weights"]
            other.load_state_dict({**state, "history": ["math"], "correction": other.state_dict()["correction"],
                                   "statistics": other.state_dict()["statistics"]})  # fmt: skip
            guard.detach()
            del other, guard
            gc.collect()
    assert not list(Path(tmp_path).iterdir())
