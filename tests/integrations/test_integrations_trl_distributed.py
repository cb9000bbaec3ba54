"""TRL behind the guard in 2 processes (gloo): DDP and FSDP2 end at the single process's weights."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'carerl-kernels[trl]'")
from carerl_kernels.subspace import DomainBasis
from processes import start, wait

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What every scenario left in one process and in two."""
    path = tmp_path_factory.mktemp("trl")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = start("trl_launcher.main", path, port, log=path / "log", HF_HUB_OFFLINE="1")
    codes = wait([launcher], timeout=700)
    assert codes == [0], "\n".join(log.read_text()[-2000:] for log in sorted(path.glob("log*")))
    return path


def both(folder, name):
    single = torch.load(folder / f"{name}-1-0.pt")
    return single, [torch.load(folder / f"{name}-2-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(
    "name",
    [
        "stageFalse",
        "stageTrue",
        "updateFalse",
        "updateTrue",
        "updateTrue-resumed",
        "domainsFalse",
        "domainsTrue",
        "surgeryFalse",
        "surgeryTrue",
    ],
)
def test_two_processes_equal_one(folder, name):
    """Recording, acting, resuming (FSDP2), per-domain gradients accumulated and edited by guard and PCGrad; the logs too."""
    single, (first, second) = both(folder, name)
    assert not single["sharded"] and first["sharded"] == second["sharded"] == ("True" in name)
    apart = []
    for a, b, c in zip(single["parameters"], first["parameters"], second["parameters"], strict=True):
        apart.append((a - b).detach().abs().flatten())
        assert torch.equal(b, c)
    # A step moves a weight by 1e-4. Adam divides by the gradient's size: where that is next to nothing, rounding moves it too.
    assert float(torch.cat(apart).mean()) <= 1e-8 and float(torch.cat(apart).max()) <= 2e-5
    # TRL averages entropy over micro-batches, and every process shuffles its own
    keys = [k for k in single["log"][-1] if k.startswith(("domain/", "guard/", "grad_norm", "reward"))]
    assert keys
    for key in keys:
        if key != "guard/seconds" and not key.endswith("/entropy"):
            assert first["log"][-1][key] == pytest.approx(single["log"][-1][key], rel=2e-3, abs=1e-5), key


def test_resumed_is_uninterrupted(folder):
    for world in (1, 2):
        whole, resumed = (torch.load(folder / f"updateTrue{how}-{world}-0.pt") for how in ("", "-resumed"))
        assert all(torch.equal(a, b) for a, b in zip(whole["parameters"], resumed["parameters"], strict=True))


def test_recorded_files_are_alike(folder):
    a, b = (DomainBasis.load(folder / f"stage-{world}.safetensors") for world in (1, 2))
    assert a.info.names == b.info.names and a.info.start_hash == b.info.start_hash
    torch.testing.assert_close(a.singular_values, b.singular_values, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(a.displacement, b.displacement, rtol=1e-3, atol=1e-6)


def test_lora_and_sampling_under_ddp_and_fsdp2(folder):
    """Real completions: the same adapters and the same recording, sharded or not."""
    ddp, fsdp = (torch.load(folder / f"sampled{sharded}-2-0.pt") for sharded in (False, True))
    assert fsdp["sharded"] and not ddp["sharded"]
    for a, b in zip(ddp["parameters"], fsdp["parameters"], strict=True):
        assert float((a - b).detach().abs().max()) <= 2e-6
    a, b = (DomainBasis.load(folder / f"sampled{sharded}.safetensors") for sharded in (False, True))
    assert a.info.names == b.info.names and all("lora" in name for name in a.info.names)
    torch.testing.assert_close(a.singular_values, b.singular_values, rtol=1e-4, atol=1e-6)
