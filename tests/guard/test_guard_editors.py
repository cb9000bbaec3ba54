"""PCGrad, modular gradient surgery, TorchJD's weightings and GPM behind one protocol."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from carerl_kernels import CapabilityGuard
from carerl_kernels.guard.editors import (
    GPM,
    PCGrad,
    assign,
    domain_gradients,
    modular_surgery,
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
    """The paper's algorithm on whole vectors; `order` gives the others in turn."""
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


def test_a_step_with_any_editor():
    model = make_model()
    x = torch.randn(8, 13)
    losses = {"a": lambda: model(x).square().mean(), "b": lambda: (model(x) - 1).square().mean()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gpm = GPM(CapabilityGuard(model, "remove", basis="input", r=2, apply_to="grad"))
    for editor in (PCGrad(), modular_surgery(model), gpm):
        before = [p.detach().clone() for p in model.parameters()]
        assign(model, editor.combine(domain_gradients(model, losses)))
        optimizer.step()
        assert any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    with pytest.raises(ValueError, match="same number of tensors for every domain"):
        PCGrad().combine({"a": [x], "b": [x, x]})
    with pytest.raises(ValueError, match="same number of tensors"):
        PCGrad().combine({})
