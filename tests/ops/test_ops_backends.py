"""Which backends the op tests ran over, and the instruction sets that one process cannot switch between."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from carerl_kernels import _load
from helpers import BACKENDS, GPU_BACKENDS, Backend


def _parameters():
    for backend in BACKENDS:
        yield pytest.param(backend, id=backend.name, marks=[pytest.mark.gpu] if backend.name in GPU_BACKENDS else [])


@pytest.mark.parametrize("backend", list(_parameters()))
def test_backend_is_under_test(backend: Backend):
    """One visible skip, with the reason, instead of one for every test; CARERL_TEST_REQUIRE=cpu,cuda makes it a failure."""
    reason = backend.missing()
    if reason and backend.name in os.environ.get("CARERL_TEST_REQUIRE", "").split(","):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


def _other_isas() -> list[str]:
    if not _load.BACKENDS["cpu"].available:
        return []
    from carerl_kernels import _host

    return [isa for isa in _host.supported_isas() if isa != _host.select_isa()]


@pytest.mark.parametrize("isa", _other_isas())
def test_kernels_of_every_instruction_set(isa: str):
    """The process picks one set of kernels for good, so the others of this CPU go through both passes and matrices in a child."""
    from carerl_kernels import _host

    # AVX512-BF16 differs from AVX-512 in one kernel alone.
    ops = (
        ("project",)
        if (isa, _host.select_isa()) == ("avx512", "avx512_bf16")
        else ("project", "edit", "quantize", "inputs")
    )
    files = [str(Path(__file__).with_name(f"test_ops_{name}.py")) for name in ops]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *files]
    command += ["-m", "on_cpu and not native_speed"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | {"CARERL_CPU_ISA": isa}
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-4000:] + child.stderr[-1000:]
    assert " passed" in child.stdout
