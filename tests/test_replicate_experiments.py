"""The study's own guards: controls and ideas, each against the rule that it changes."""

from dataclasses import replace

import pytest
import torch
from carerl_kernels import CapabilityGuard
from carerl_kernels.guard.validate import as_random, random_basis
from carerl_kernels.replicate.experiments import RULES, ExperimentalGuard, relative_energy
from carerl_kernels.subspace.sites import guess_sides
from factored_helpers import make_factored
from guard_helpers import make_history, make_model

K = 4


def guarded(experiment, *, domains=("math",), rule=None, **options):
    """A model, its experimental guard (or a plain one) over orthonormal history with a spectrum, and an optimizer."""
    model = make_model()
    rule = rule or RULES[experiment]
    if experiment is None:
        guard = CapabilityGuard(model, rule, k=K, **options)
    else:
        guard = ExperimentalGuard(model, experiment=experiment, rule=rule, k=K, **options)
    for basis in make_history(model, "per_matrix", K, 0.0, domains):
        spectrum = torch.arange(K, 0, -1).double().expand_as(basis.singular_values).clone()
        guard.add(replace(basis, singular_values=spectrum))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    guard.attach(optimizer)
    return model, guard, optimizer


def walk(model, optimizer, size=1e-3, seed=1):
    draws = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = size * torch.randn(p.shape, generator=draws)
    optimizer.step()


def moved(experiment, **options):
    """Coefficients along the history's rows before and after three steps that are the same for everybody."""
    model, guard, optimizer = guarded(experiment, **options)
    start = guard._q_start.clone()
    for seed in range(3):
        walk(model, optimizer, seed=seed)
    return (start - guard._q_prev), guard


def test_elastic_passes_a_share_of_displacement_that_falls_with_the_energy_of_the_row():
    raw, _ = moved(None, rule="integrated", conflict=1.0)
    found, _ = moved("elastic", strength=3.0)
    squares = torch.tensor([16.0, 9.0, 4.0, 1.0]).double()
    share = 1 / (1 + 3.0 * squares / squares.mean())
    torch.testing.assert_close(found, raw * share, rtol=1e-3, atol=1e-8)
    nothing, _ = moved("elastic", strength=1e9)
    assert nothing.abs().max() < 1e-6 * raw.abs().max()
    everything, _ = moved("elastic", strength=1e-9)
    torch.testing.assert_close(everything, raw, rtol=1e-3, atol=1e-8)


def test_spectral_bounds_are_tighter_where_gradients_were_larger():
    found, guard = moved("spectral", strength=2.0, bound=1e-6)
    squares = torch.tensor([16.0, 9.0, 4.0, 1.0]).double()
    box = 1e-6 * guard._stack.displacement / (squares / squares.mean())
    assert (found.abs() <= box * (1 + 1e-3) + 1e-9).all()
    torch.testing.assert_close(found.abs().max(0).values, box.max(0).values, rtol=0.05, atol=1e-9)


def test_aged_bounds_shrink_with_every_domain_recorded_later():
    _, guard = moved("aged", strength=0.5, bound=(0.2, 0.4), domains=("math", "chat", "logic"))
    for part, bound in ((guard._params.lower, 0.2), (guard._params.upper, 0.4)):
        expected = torch.tensor([0.25, 0.5, 1.0]).double().repeat_interleave(K) * bound
        torch.testing.assert_close(part.expand_as(expected), expected)


def probe(model, guard, signs):
    """A probe whose coefficients along the first tensor's rows are these."""
    with guard.probe("math"):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        rows = guard.basis("math").directions[:, : 13 * 11].float()
        next(model.parameters()).grad += (torch.tensor(signs) @ rows).view(11, 13)
    guard._settle_probes()


def test_confident_removes_what_probes_agree_on_and_passes_what_they_do_not():
    model, guard, _ = guarded("confident")
    probe(model, guard, [1.0, 1.0, -1.0, -1.0])
    torch.testing.assert_close(guard._params.conflict[0], torch.zeros(K).double(), atol=1e-5, rtol=0)
    probe(model, guard, [1.0, -1.0, -1.0, 1.0])
    torch.testing.assert_close(guard._params.conflict[0], torch.tensor([0, 1.0, 0, 1.0]).double(), atol=1e-5, rtol=0)
    guard.rebase()
    probe(model, guard, [1.0, -1.0, -1.0, 1.0])
    assert guard._params.conflict[0].abs().max() < 1e-5


def test_curved_passes_less_where_squared_probes_are_larger():
    model, guard, _ = guarded("curved", strength=3.0)
    probe(model, guard, [4.0, -3.0, 2.0, 1.0])
    squares = torch.tensor([16.0, 9.0, 4.0, 1.0]).double()
    torch.testing.assert_close(guard._params.conflict[0], 1 / (1 + 3 * squares / squares.mean()), rtol=1e-4, atol=0)
    probe(model, guard, [0.0, 3.0, -2.0, 1.0])
    squares[0] /= 2
    torch.testing.assert_close(guard._params.conflict[0], 1 / (1 + 3 * squares / squares.mean()), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["block", "input"])
def test_random_directions_are_as_many_in_every_tensor(kind):
    model = make_model()
    sites = guess_sides(model, model.named_parameters())
    sides = sites if kind == "input" else None
    _, (basis,) = make_factored(model, kind, K, 0.0, ("math",), sides=sides)
    few = replace(basis, right={name: t * torch.tensor([1.0, 1.0, 0.0, 0.0]) for name, t in basis.right.items()})
    guard = CapabilityGuard(model, "remove", basis=kind, r=K)
    control = as_random(few, random_basis(guard.layout, 7))
    assert control.info == few.info
    for name, t in control.right.items():
        assert (t != 0).any(0).tolist() == (few.right[name] != 0).any(0).tolist()
        assert not torch.allclose(t, few.right[name])
    guard.add(control)  # what remains is a basis


def test_energies_of_an_input_basis_are_those_of_its_matrix():
    model = make_model()
    sides = guess_sides(model, model.named_parameters())
    _, (basis,) = make_factored(model, "input", K, 0.0, ("math",), sides=sides)
    values = {name: torch.tensor([2.0, 1.0, 1.0, 0.0]).double() for name in basis.values}
    guard = CapabilityGuard(model, "remove", basis="input", r=K)
    energy = relative_energy(replace(basis, values=values), guard.layout)
    assert energy.shape == (guard.layout.T, K)
    torch.testing.assert_close(energy[0], torch.tensor([2.0, 0.5, 0.5, 0.0]).double())


def test_an_experiment_needs_the_rule_that_it_changes():
    with pytest.raises(ValueError, match="elastic: expected rule 'integrated', found 'bounded'"):
        ExperimentalGuard(make_model(), experiment="elastic", rule="bounded")
    with pytest.raises(ValueError, match="energy per row, found 'block'"):
        ExperimentalGuard(make_model(), experiment="spectral", rule="bounded", basis="block")
    with pytest.raises(ValueError, match="curved: expected a basis of rows, found 'input'"):
        ExperimentalGuard(make_model(), experiment="curved", rule="probed", basis="input")
