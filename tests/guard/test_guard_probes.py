"""Probes: micro-batches, trust, adaptive interval, fall-back to "bounded"; the prompt store."""

from __future__ import annotations

import pytest
import torch
from carerl_kernels import CapabilityGuard
from carerl_kernels.guard import PromptStore
from guard_helpers import make_history


class Probed:
    """k coordinate directions of a vector; probes with a wanted sign per direction."""

    def __init__(self, k=4, **options):
        self.weight = torch.nn.Parameter(torch.zeros(64))
        model = torch.nn.ParameterDict({"w": self.weight})
        history = make_history(model, "flat", k, 0.0, names=("math",))[0]
        history.directions.zero_()
        history.directions[:, :k] = torch.eye(k)
        history.displacement.fill_(1.0)
        self.k = k
        self.guard = CapabilityGuard(model, "probed", basis="flat", k=k, **options)
        self.guard.add(history)
        self.optimizer = torch.optim.SGD([self.weight], lr=1.0)
        self.guard.attach(self.optimizer)

    def probe(self, *signs):
        with self.guard.probe("math"):
            (self.weight[: self.k] * torch.tensor(signs)).sum().backward()

    def step(self, *first):
        before = self.weight.detach().clone()
        self.weight.grad = torch.zeros(64)
        self.weight.grad[: self.k] = torch.tensor(first)
        self.optimizer.step()
        return (before - self.weight.detach())[: self.k].tolist()

    def report(self):
        return self.guard.report()["probes"]


def test_micro_batches_of_a_round_add_up():
    run = Probed(k=2)
    run.probe(1.0, -1.0)
    run.probe(-3.0, -1.0)  # together: -2, -2
    assert run.step(1.0, -1.0) == [0.0, -1.0]
    assert run.report()["rounds"] == 1 and run.report()["seconds"] > 0
    run.probe(1.0, 1.0)  # a round of its own
    assert run.step(1.0, -1.0) == [1.0, 0.0]
    assert run.report()["rounds"] == 2 and run.report()["agreement"] == {"math": 0.0}


def test_without_a_probe_the_rule_is_bounded():
    run = Probed(k=2, bound=0.1)
    assert "never probed" in run.report()["fallback"]["math"]
    run.step(1.0, -1.0)  # bounds are .1 of a displacement of 1
    torch.testing.assert_close(run.weight[:2].detach(), torch.tensor([-0.1, 0.1]))
    run.probe(1.0, 1.0)
    assert run.step(1.0, -1.0) == [1.0, 0.0]
    assert run.report()["fallback"] == {}


def test_stale_probes_fall_back_and_fresh_ones_return():
    run = Probed(k=2, probe_every=3, bound=0.1)
    run.probe(1.0, 1.0)
    for _ in range(6):
        run.step(0.01, -0.01)
    assert run.report()["fallback"] == {}
    run.step(0.0, 0.0)
    assert run.report()["fallback"]["math"].startswith("stale: 7 steps")
    at = run.weight.detach()[:2].clone()
    for _ in range(50):  # signs no longer pass anything without limit
        run.step(1.0, -1.0)
    assert float((run.weight.detach()[:2] - at).abs().max()) <= 0.2 + 1e-6
    assert run.guard.probes_due()
    run.probe(1.0, 1.0)
    assert run.step(1.0, -1.0) == [1.0, 0.0]


def test_interval_grows_while_probes_agree_and_shrinks_to_distrust_when_they_do_not():
    run = Probed(k=4, probe_every=4, probe_adaptive=True)
    for _ in range(6):
        run.probe(1.0, 1.0, -1.0, 1.0)
        run.step(0.0, 0.0, 0.0, 0.0)
    assert run.report()["interval"] == 32 and run.report()["agreement"]["math"] == 1.0  # eight times, no more
    signs = torch.Generator().manual_seed(0)
    for _ in range(12):
        run.probe(*(torch.randint(0, 2, (4,), generator=signs) * 2.0 - 1).tolist())
        run.step(0.0, 0.0, 0.0, 0.0)
        if run.report()["fallback"]:
            break
    assert run.report()["interval"] == 1
    assert run.report()["fallback"]["math"].startswith("noisy: successive probes agree on")
    for _ in range(3):
        run.probe(1.0, 1.0, -1.0, 1.0)
        run.step(0.0, 0.0, 0.0, 0.0)
    assert run.report()["fallback"] == {}  # trusted again
    fixed = Probed(k=4, probe_every=4)
    for sign in (1.0, -1.0) * 4:
        fixed.probe(sign, sign, sign, sign)
        fixed.step(0.0, 0.0, 0.0, 0.0)
    assert fixed.report()["interval"] == 4 and fixed.report()["fallback"] == {}  # adaptive only when asked


def test_a_probe_that_is_not_finite_leaves_the_one_before():
    run = Probed(k=2)
    run.probe(1.0, -1.0)
    run.step(0.0, 0.0)
    run.probe(float("nan"), 1.0)
    assert run.step(1.0, 1.0) == [1.0, 0.0]


def test_state_of_probes_survives():
    run, again = Probed(k=2, probe_every=3), Probed(k=2, probe_every=3)
    run.probe(1.0, -1.0)
    run.step(1.0, 1.0)
    state = run.guard.state_dict()
    again.weight.data.copy_(run.weight.data)
    again.guard.load_state_dict(state)
    assert again.step(1.0, 1.0) == run.step(1.0, 1.0)
    assert not again.guard.probes_due()


def test_prompt_store_keeps_a_uniform_sample_and_its_file(tmp_path):
    store = PromptStore(size=8, seed=1)
    for i in range(500):
        store.add("math", {"prompt": i})
    kept = [item["prompt"] for item in store["math"]]
    assert len(set(kept)) == 8 and max(kept) > 250 and store["chat"] == []
    store.save(tmp_path / "prompts.json")
    assert PromptStore.load(tmp_path / "prompts.json")["math"] == store["math"]
    (tmp_path / "prompts.json").write_text("[]")
    with pytest.raises(ValueError, match=r"expected a prompt store written by PromptStore\.save"):
        PromptStore.load(tmp_path / "prompts.json")
    with pytest.raises(ValueError, match="at least 1 prompt"):
        PromptStore(0)
