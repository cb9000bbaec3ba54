"""PCGrad, modular gradient surgery, TorchJD's weightings and GPM behind one protocol."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from carerl_kernels import CapabilityGuard
from carerl_kernels.guard.editors import (
    GPM,
    GramEditor,
    PCGrad,
    assign,
    domain_gradients,
    modular_surgery,
    table,
    torchjd_editor,
)
from factored_helpers import make_factored
from guard_helpers import make_model


def gradients(model, domains=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {f"d{i}": [torch.randn(p.shape, generator=generator) for p in model.parameters()] for i in range(domains)}


def flat(tensors):
    return np.concatenate([t.detach().double().numpy().ravel() for t in tensors])


def pcgrad(rows: np.ndarray, order) -> np.ndarray:
    """The paper's algorithm on whole vectors; ``order`` gives the others in turn."""
    total = np.zeros(rows.shape[1])
    for i in range(len(rows)):
        g = rows[i].copy()
        for j in order(i):
            if g @ rows[j] < 0:
                g -= (g @ rows[j]) / (rows[j] @ rows[j]) * rows[j]
        total += g
    return total / len(rows)


def test_pcgrad_of_two_domains_is_the_paper_s():
    model = make_model()
    grads = gradients(model, 2)
    grads["d1"] = [-0.7 * a + 0.4 * b for a, b in zip(grads["d0"], grads["d1"], strict=True)]  # in conflict
    rows = np.stack([flat(g) for g in grads.values()])
    assert rows[0] @ rows[1] < 0
    np.testing.assert_allclose(flat(PCGrad().combine(grads)), pcgrad(rows, lambda i: [1 - i]), atol=1e-6)


def test_pcgrad_of_many_domains_draws_its_order_by_seed():
    import random

    model = make_model()
    grads = gradients(model, 4)
    grads = {
        k: [(-1) ** i * t + s for t, s in zip(g, grads["d0"], strict=True)] for i, (k, g) in enumerate(grads.items())
    }
    rng = random.Random(3)
    rows = np.stack([flat(g) for g in grads.values()])
    want = pcgrad(rows, lambda i: rng.sample([j for j in range(4) if j != i], 3))
    np.testing.assert_allclose(flat(PCGrad(seed=3).combine(grads)), want, atol=1e-5)


def test_without_conflict_the_mean_comes_out_and_inputs_stay():
    model = make_model()
    grads = {name: [t.abs() for t in g] for name, g in gradients(model).items()}
    kept = {name: [t.clone() for t in g] for name, g in grads.items()}
    for editor in (PCGrad(), modular_surgery(model)):
        mean = np.mean([flat(g) for g in grads.values()], axis=0)
        np.testing.assert_allclose(flat(editor.combine(grads)), mean, atol=1e-6)
    assert all(torch.equal(a, b) for n in grads for a, b in zip(grads[n], kept[n], strict=True))


def test_modular_surgery_looks_for_conflicts_within_each_module():
    """Domains that agree over all and fight in the first layer: PCGrad leaves them, surgery does not."""
    model = make_model()
    first = [torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) for i, p in enumerate(model.parameters())]
    second = [-0.5 * t if i < 2 else 3.0 * t for i, t in enumerate(first)]
    grads = {"a": first, "b": second}
    assert flat(first) @ flat(second) > 0
    mean = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(flat(PCGrad().combine(grads)), flat(mean), atol=1e-6)
    surgery = modular_surgery(model).combine(grads)
    for i, (got, plain) in enumerate(zip(surgery, mean, strict=True)):
        # exactly opposite gradients project each other away; other modules keep their mean
        torch.testing.assert_close(got, torch.zeros_like(got) if i < 2 else plain, atol=1e-5, rtol=1e-5)


def test_torchjd_weightings_equal_its_own_aggregator():
    aggregation = pytest.importorskip("torchjd.aggregation")
    model = make_model()
    grads = gradients(model)
    matrix = torch.stack([torch.cat([t.reshape(-1) for t in g]) for g in grads.values()]).double()
    for weighting, aggregator in (
        (aggregation.MGDAWeighting(), aggregation.MGDA()),
        (aggregation.MeanWeighting(), aggregation.Mean()),
    ):
        np.testing.assert_allclose(
            flat(torchjd_editor(weighting).combine(grads)), aggregator(matrix).numpy(), atol=1e-4
        )


def test_gpm_removes_the_span_of_earlier_inputs():
    model = make_model()
    _, bases = make_factored(model, "input", 3, 0.6)
    guard = CapabilityGuard(model, "remove", basis="input", r=3, room=1.0, apply_to="grad")
    for basis in bases:
        guard.add(basis)
    grads = gradients(model)
    edited = GPM(guard).combine(grads)
    mean = [sum(g[i] for g in grads.values()) / 3 for i in range(len(edited))]
    for i, (name, _) in enumerate(model.named_parameters()):
        if name not in bases[0].right:
            torch.testing.assert_close(edited[i], mean[i])
            continue
        V = torch.linalg.qr(torch.cat([b.right[name] for b in bases], dim=1))[0]
        torch.testing.assert_close(edited[i], mean[i] - mean[i] @ V @ V.mT, atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="expected a guard with rule='remove' and apply_to='grad'"):
        GPM(CapabilityGuard(model, "remove", basis="input"))


def test_a_step_with_any_editor_and_the_table(capsys):
    model = make_model()
    x = torch.randn(8, 13)
    losses = {"a": lambda: model(x).square().mean(), "b": lambda: (model(x) - 1).square().mean()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    editors = {
        "PCGrad": PCGrad(),
        "modular surgery": modular_surgery(model),
        "GPM": GPM(CapabilityGuard(model, "remove", basis="input", r=2, apply_to="grad")),
    }
    for editor in editors.values():
        before = [p.detach().clone() for p in model.parameters()]
        assign(model, editor.combine(domain_gradients(model, losses)))
        optimizer.step()
        assert any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    text = table(editors, domains=2)
    assert "| PCGrad | 2 | 2 | nothing | 5 | 4 |" in text and "| modular surgery | 2 | 2 | nothing | 5 | 12 |" in text
    with pytest.raises(ValueError, match="same number of tensors for every domain"):
        PCGrad().combine({"a": [x], "b": [x, x]})
    with pytest.raises(ValueError, match="same number of tensors"):
        PCGrad().combine({})
    with pytest.raises(ValueError, match="names of the parameters"):
        GramEditor(lambda gram: gram[0], per_module=True)


def history(model, path, k=4):
    """A guard with a recorded domain "math", and its file."""
    guard = CapabilityGuard(model, "remove", k=k)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    guard.attach(optimizer)
    with guard.stage("math", path=path):
        for step in range(6):
            for p, g in zip(model.parameters(), gradients(model, 1, step)["d0"], strict=True):
                p.grad = g
            optimizer.step()
    guard.detach()
    return path


def test_one_gradient_per_domain_is_edited_by_the_others_rows(tmp_path):
    """B = D in grad mode: math's rows act on chat's gradient and not on math's; the step leaves the sum alone."""
    model = make_model()
    guard = CapabilityGuard.load(
        history(model, tmp_path / "m.safetensors"), model=model, rule="remove", apply_to="grad", track_energy=True
    )
    grads = gradients(model, 2)
    grads = {"math": grads["d0"], "chat": grads["d1"]}
    removed = [g.clone() for g in grads["chat"]]
    guard.remove_(removed)
    want = [a + b for a, b in zip(grads["math"], removed, strict=True)]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    guard.attach(optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    edited = guard.edit_domains({name: [g.clone() for g in part] for name, part in grads.items()})
    np.testing.assert_allclose(flat(edited), flat(want), atol=1e-6)
    assign(model, edited)
    optimizer.step()
    moved = [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]
    np.testing.assert_allclose(flat(moved), flat(want), atol=1e-5)
    assert guard.report()["steps"] == 1 and guard.report()["touched_share"] > 0
    assign(model, [torch.ones_like(p) for p in model.parameters()])
    optimizer.step()  # the next step is edited as usual
    assert guard.report()["steps"] == 2


def test_recordings_see_their_own_domain_s_gradient_of_a_mixed_batch():
    """A stage fed by per-domain gradients is the stage of that domain alone."""
    bases = []
    for mixed in (False, True):
        model = make_model()
        guard = CapabilityGuard(model, "remove", k=4, apply_to="grad")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        guard.attach(optimizer)
        with guard.stage("code"):
            for step in range(5):
                mine, other = gradients(model, 2, step).values()
                if mixed:
                    with guard.domain(None):
                        assign(model, guard.edit_domains({"code": [g.clone() for g in mine], "chat": other}))
                        optimizer.step()
                else:
                    assign(model, mine)
                    optimizer.step()
            if mixed:
                assert guard.recorded().info.steps == 5  # the stage goes on
        bases.append(guard.basis("code"))
    assert bases[0].info.steps == bases[1].info.steps == 5
    torch.testing.assert_close(bases[0].singular_values, bases[1].singular_values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bases[0].directions.abs(), bases[1].directions.abs(), rtol=1e-3, atol=1e-4)


def test_one_gradient_that_is_not_finite_drops_the_step():
    model = make_model()
    guard = CapabilityGuard(model, "remove", k=4, apply_to="grad")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    guard.attach(optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    with guard.stage("code"):
        for bad in (True, False):
            grads = gradients(model, 2)
            if bad:
                grads["d1"][0].view(-1)[0] = torch.nan
            assign(model, guard.edit_domains({"code": grads["d0"], "chat": grads["d1"]}))
            optimizer.step()
            if bad:
                assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert guard.report()["dropped_steps"] == 1 and guard.basis("code").info.steps == 1


def test_what_per_domain_gradients_cannot_do_is_refused(tmp_path):
    model = make_model()
    grads = gradients(model, 2)
    for options in (
        {"rule": "remove"},
        {"rule": "remove", "apply_to": "grad", "max_grad_norm": 1.0},
    ):
        with pytest.raises(ValueError, match="edit_domains: expected"):
            CapabilityGuard(model, k=4, **options).edit_domains(grads)
    with pytest.raises(ValueError, match="found none"):
        CapabilityGuard(model, "remove", k=4, apply_to="grad").edit_domains({})
    guard = CapabilityGuard(model, "remove", basis="input", r=3, apply_to="grad")
    with pytest.raises(ValueError, match="cannot tell whose"), guard.stage("code"):
        guard.edit_domains(grads)
    with pytest.raises(RuntimeError, match="expected a stage in progress"):
        guard.recorded()
