"""A domain that appears in the middle of a run."""

from __future__ import annotations

import pytest
import torch
from carerl_kernels import CapabilityGuard, DomainBasis

WIDTH = 300


class Mixed:
    """Two domains, each with inputs in a subspace of its own; batches alternate."""

    def __init__(self, kind="per_matrix", rule="remove", learnable=True, **options):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(WIDTH, 24), torch.nn.Tanh(), torch.nn.Linear(24, 3))
        self.spans = {name: torch.randn(4, WIDTH) / 4 for name in ("chat", "code")}
        size = {"r": 6} if kind == "input" else {"k": 6}
        self.guard = CapabilityGuard(self.model, rule, basis=kind, **size, **options)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.guard.attach(self.optimizer)
        self.draw = torch.Generator().manual_seed(1)
        self.learnable = learnable

    def step(self, name):
        self.optimizer.zero_grad()
        if self.learnable:
            x = torch.randn(16, 4, generator=self.draw) @ self.spans[name]
            (self.model(x) - x[:, :3]).square().mean().backward()
        else:  # pure noise: nothing that a basis could know
            for p in self.model.parameters():
                p.grad = torch.randn(p.shape, generator=self.draw) * 0.01
        with self.guard.domain(name):
            self.optimizer.step()


@pytest.mark.parametrize("kind", ["flat", "per_matrix", "input"])
def test_a_newcomer_acts_once_above_the_noise_floor(kind, tmp_path):
    run = Mixed(kind)
    run.guard.open_domain("code", check_every=5)
    seen = []
    for _ in range(30):
        run.step("code")
        run.step("chat")
        report = run.guard.report()
        seen.append(
            ("code" in run.guard.history, "code" in report["open_windows"], report["recording"]["code"]["acting"])
        )
    first = next(i for i, (acting, *_) in enumerate(seen) if acting)
    assert 8 <= first < 29  # not before eight fresh gradients were explained
    assert all(window and not acting for _, window, acting in seen[:first])
    assert all(acting for _, _, acting in seen[first:])
    run.guard.close_domain("code", tmp_path / "code.safetensors")
    assert run.guard.history == ["code"] and run.guard.report()["recording"] == {}
    # what it found is the domain's own subspace: a chat step does not touch code's inputs
    CapabilityGuard.load(tmp_path / "code.safetensors", model=run.model)
    if kind != "input":
        basis = DomainBasis.load(tmp_path / "code.safetensors")
        rows = basis.directions[:, : 24 * WIDTH].view(-1, 24, WIDTH)
        span = torch.linalg.qr(run.spans["code"].mT)[0]
        inside = (rows @ span).square().sum() / rows.square().sum()
        assert float(inside) > 0.9


def test_noise_never_acts_on_its_own():
    run = Mixed("per_matrix", learnable=False)
    run.guard.open_domain("code", check_every=5)
    for _ in range(40):
        run.step("code")
    report = run.guard.report()
    assert run.guard.history == [] and report["open_windows"] == ["code"]
    assert report["recording"]["code"]["steps"] == 40
    assert report["recording"]["code"]["explained"] < 0.05


def test_other_domains_go_on_counting():
    """Adopting a newcomer does not start the displacement of the others afresh."""
    run = Mixed("per_matrix", rule="integrated", aligned=1.0, conflict=1.0)
    with run.guard.stage("chat"):
        for _ in range(12):
            run.step("chat")
    run.guard.open_domain("code", check_every=5)
    far = 0.0
    for _ in range(25):
        run.step("code")
        now = run.guard.report()["domains"]["chat"]["net_displacement"]
        assert now > 0.3 * far  # it may turn, but a fresh start would be all but zero
        far = max(far, now)
    assert run.guard.history == ["chat", "code"] and far > 0


def test_misuse_is_named():
    run = Mixed()
    with pytest.raises(KeyError, match="expected a domain opened before"):
        run.guard.close_domain("code")
    run.guard.open_domain("code")
    with pytest.raises(RuntimeError, match="is being recorded already"):
        run.guard.open_domain("code")
    with pytest.raises(RuntimeError, match="at least one finite gradient"):
        run.guard.close_domain("code")
    with pytest.raises(ValueError, match="expected a basis of gradients or inputs, found 'block'"):
        CapabilityGuard(run.model, basis="block").open_domain("code")
    with pytest.raises(ValueError, match="check_every: expected at least 1"):
        run.guard.open_domain("code", check_every=0)
