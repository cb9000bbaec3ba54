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


FILES = ("project", "edit", "quantize_bases", "input")
# Sets that are the one below them with other kernels in some places (isa_avx512_bf16.cpp, isa_amx_bf16.cpp), and where.
BASED_ON = {"avx512_bf16": ("avx512", "project"), "amx_bf16": ("avx512_bf16", "input")}


def _owner(isa: str, file: str) -> str:
    """The set whose kernels run when `isa` is chosen."""
    while isa in BASED_ON and BASED_ON[isa][1] != file:
        isa = BASED_ON[isa][0]
    return isa


def _other_kernels() -> dict[str, list[str]]:
    """Sets of this CPU, and the files that test kernels of theirs which no test of this process reaches: every kernel once."""
    if not _load.BACKENDS["cpu"].available:
        return {}
    from carerl_kernels import _host

    chosen = _host.select_isa()
    own = {isa: [f for f in FILES if _owner(isa, f) == isa != _owner(chosen, f)] for isa in _host.supported_isas()}
    return {isa: files for isa, files in own.items() if files}


# A process picks its set when it imports the package; torch and pytest are imported once, by the one that they are forked from.
CHILDREN = """
import os, sys
import numpy, pytest, sympy, torch
for argument in sys.argv[1:]:
    isa, *files = argument.split(",")
    if os.fork():
        if os.wait()[1]:
            sys.exit(f"the kernels of {isa} failed")
        continue
    os.environ["CARERL_CPU_ISA"] = isa
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "on_cpu and not native_speed"]
    code = pytest.main([*options, *files])
    sys.stdout.flush()
    os._exit(code)  # taking torch down would take a second
"""


@pytest.mark.skipif(not _other_kernels(), reason="no native CPU kernels, or no other set of them on this CPU")
def test_kernels_of_every_instruction_set():
    """The process picks one set of kernels for good: the others of this CPU go through both passes and matrices in children."""
    sets = [
        ",".join([isa, *(str(Path(__file__).with_name(f"test_ops_{name}.py")) for name in files)])
        for isa, files in _other_kernels().items()
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    child = subprocess.run([sys.executable, "-c", CHILDREN, *sets], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-4000:] + child.stderr[-1000:]
    assert child.stdout.count(" passed") == len(sets)
