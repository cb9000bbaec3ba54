"""The guarded engine over a stand-in with the methods of verl's, and over verl's own where verl is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from carerl_kernels import CapabilityGuard, DomainBasis
from carerl_kernels.integrations.verl import guarded, install
from guard_helpers import make_model
from places import EXAMPLES
from safetensors.torch import load_file


class Engine:
    """What verl's FSDP engine does in a step: zero, backward, clip, skip what is not finite, step."""

    is_param_offload_enabled = is_optimizer_offload_enabled = False

    def __init__(self, trains=True):
        self.trains, self.saved = trains, []

    def initialize(self):
        self.module = make_model()
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.01) if self.trains else None

    def is_mp_src_rank_with_outputs(self):
        return True

    def train_batch(self, data, loss_function):
        self.optimizer.zero_grad()
        loss_function(self.module, data).backward()
        norm = self.optimizer_step()
        return {"metrics": {"grad_norm": norm}}

    def optimizer_step(self):
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        return norm.item()

    def save_checkpoint(self, local_path, hdfs_path=None, global_step=0, max_ckpt_to_keep=None):
        self.saved.append(local_path.name)
        local_path.mkdir()
        torch.save((self.module.state_dict(), self.optimizer.state_dict()), local_path / "engine.pt")

    def load_checkpoint(self, local_path, hdfs_path=None, del_local_after_load=False):
        weights, optimizer = torch.load(local_path / "engine.pt")
        self.module.load_state_dict(weights)
        self.optimizer.load_state_dict(optimizer)


def loss(model, data):
    generator = torch.Generator().manual_seed(data["seed"])
    x = torch.randn(16, 13, generator=generator)
    return (model(x) - data["target"]).square().mean()


def run(engine, seeds, target=0.0):
    return [engine.train_batch({"seed": s, "target": target, "domain": "chat"}, loss) for s in seeds]


def other(path):
    """A checkpoint of other weights, without a guard."""
    engine = Engine()
    engine.initialize()
    run(engine, [7])
    with torch.no_grad():
        for p in engine.module.parameters():
            p.add_(1.0)
    engine.save_checkpoint(path)
    return path


def test_a_resumed_stage_goes_on(tmp_path):
    """Interrupted and begun anew from verl's checkpoint: the file is that of the whole stage."""

    def build(name):
        path = tmp_path / f"{name}.safetensors"
        engine = guarded(Engine, lambda m: CapabilityGuard(m, k=4), stage="math", path=path)()
        engine.initialize()
        return engine, path

    whole, expected = build("whole")
    run(whole, range(4))
    whole.save_checkpoint(tmp_path / "middle")
    run(whole, range(4, 8))
    whole.save_checkpoint(tmp_path / "end")

    resumed, found = build("resumed")
    resumed.load_checkpoint(tmp_path / "middle")
    run(resumed, range(4, 8))
    resumed.save_checkpoint(tmp_path / "again")
    assert DomainBasis.load(found).info.steps == 8
    ours, theirs = load_file(found), load_file(expected)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in theirs)
    with pytest.raises(FileNotFoundError, match=r"recording stage 'math': expected the guard's state in .*guard\.pt"):
        resumed.load_checkpoint(other(tmp_path / "other"))


@pytest.mark.filterwarnings("ignore:basis of domain 'math' ends at weights")
def test_weights_are_corrected_before_a_checkpoint(tmp_path):
    engine = guarded(
        Engine, lambda m: CapabilityGuard(m, "remove", k=4), stage="math", path=tmp_path / "math.safetensors"
    )()
    engine.initialize()
    run(engine, range(4))
    engine.save_checkpoint(tmp_path / "first")
    engine = guarded(Engine, lambda m: CapabilityGuard.load(tmp_path / "math.safetensors", model=m, rule="remove"))()
    engine.initialize()
    run(engine, range(3))
    assert engine.guard.report()["waiting"] == 3
    engine.save_checkpoint(tmp_path / "second")
    report = engine.guard.report()
    assert report["waiting"] == 0 and report["domains"]["math"]["moved"] < 1e-6


@pytest.mark.filterwarnings("ignore:basis of domain 'math' ends at weights")
def test_stage_is_written_with_checkpoints_and_protects(tmp_path):
    path = tmp_path / "math.safetensors"
    engine = guarded(Engine, lambda m: CapabilityGuard(m, k=4), stage="math", path=path)()
    engine.initialize()
    run(engine, range(4))
    engine.save_checkpoint(tmp_path / "first")
    assert DomainBasis.load(path).info.steps == 4
    outputs = run(engine, range(4, 8))
    engine.save_checkpoint(tmp_path / "last")
    assert engine.saved == ["first", "last"] and DomainBasis.load(path).info.steps == 8  # the recording went on
    assert outputs[-1]["metrics"]["guard/dropped_steps"] == 0 and outputs[-1]["metrics"]["grad_norm"] > 0

    # the same steps by hand
    def make(model):
        return CapabilityGuard.load(path, model=model, rule="remove", every=1)

    def domain(data):
        return data["domain"]

    behind = guarded(Engine, make, domain=domain)()
    behind.initialize()
    run(behind, range(100, 104), 1.0)
    plain = Engine()
    plain.initialize()
    guard = make(plain.module)
    guard.attach(plain.optimizer)
    with guard.domain("chat"):
        run(plain, range(100, 104), 1.0)
    assert all(torch.equal(a, b) for a, b in zip(plain.module.parameters(), behind.module.parameters(), strict=True))
    moved = behind.guard.report()["domains"]["math"]["net_displacement"]
    behind.load_checkpoint(other(tmp_path / "other"))  # rebased: loading is no step
    before = [p.detach().clone() for p in behind.module.parameters()]
    for group in behind.optimizer.param_groups:
        group["lr"] = 0.0
    run(behind, [104])
    assert moved < 1e-4
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(before, behind.module.parameters(), strict=True))


def test_reference_models_have_no_guard():
    engine = guarded(Engine, CapabilityGuard)(trains=False)
    engine.initialize()
    assert engine.guard is None


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="expected stage and path together"):
        guarded(Engine, CapabilityGuard, stage="math")
    with pytest.raises(ValueError, match="expected a guard with apply_to='update', found 'grad'"):
        guarded(Engine, lambda m: CapabilityGuard(m, "remove", apply_to="grad"))().initialize()
    offloaded = type("Offloaded", (Engine,), {"is_param_offload_enabled": True})
    with pytest.raises(ValueError, match="found offloading"):
        guarded(offloaded, CapabilityGuard)().initialize()

    class Flat(Engine):
        def initialize(self):
            super().initialize()
            self.module.__class__ = type("FullyShardedDataParallel", (type(self.module),), {})

    with pytest.raises(ValueError, match="expected FSDP2, found FSDP1"):
        guarded(Flat, CapabilityGuard)().initialize()
    if "verl" not in sys.modules:
        with pytest.raises(ImportError, match="needs verl"):
            install(CapabilityGuard)


def test_install_replaces_the_registered_engine(monkeypatch):
    """verl's decorator keeps the first engine of a key."""
    registry = SimpleNamespace(_engines={"language_model": {"fsdp2": {"cuda": Engine}, "fsdp": {"cuda": Engine}}})
    module = ModuleType("verl.workers.engine")
    module.EngineRegistry = registry
    for name, value in (
        ("verl", ModuleType("verl")),
        ("verl.workers", ModuleType("verl.workers")),
        (module.__name__, module),
    ):
        monkeypatch.setitem(sys.modules, name, value)
    engine = install(CapabilityGuard)
    assert registry._engines["language_model"]["fsdp2"]["cuda"] is engine and issubclass(engine, Engine)
    assert registry._engines["language_model"]["fsdp"]["cuda"] is Engine and engine.__name__ == "GuardedEngine"


@pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="verl is not installed: pip install verl")
def test_verl_s_own_engine():
    """FSDP2 on a CPU: the guarded engine ends where a guard attached by hand does."""
    script = EXAMPLES / "verl_engine.py"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "MASTER_PORT": "29613"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "largest difference: 0.0" in done.stdout and "4 steps recorded" in done.stdout
