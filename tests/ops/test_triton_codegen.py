"""Every Triton kernel compiled for GPUs that are not there; gates on the generated code: nothing spilled, loads of 16 bytes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import triton_codegen
from behind import once
from places import ROOT

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

KERNELS = {
    "project_kernel", "totals_kernel", "gram_kernel", "edit_kernel", "rotate_kernel", "edit_rotate_kernel",
    "core_kernel", "input_project_kernel", "input_edit_kernel",
    "quantize_kernel", "token_logprobs_kernel", "token_logprobs_backward_kernel",
}  # fmt: skip
PLACES = ("cuda:90", "cuda:80", "cuda:100", "cuda:120", "hip:gfx942")
SHARED = 48 << 10  # bytes that every GPU has for a program


def reports() -> Path:
    """What the compiler made of every kernel, by place; made anew for other sources or another Triton."""
    sources = [
        *ROOT.glob("triton_kernels/*.py"),
        *ROOT.glob("python/carerl_kernels/*.py"),
        Path(triton_codegen.__file__),
    ]
    key = hashlib.sha256(repr((PLACES, version("triton"), torch.__version__)).encode())
    for path in sorted(sources):
        key.update(path.read_bytes())
    return once(ROOT / "build/codegen" / f"{key.hexdigest()[:16]}.json", compile_all)


def compile_all(out: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_DISABLE_LINE_INFO"] = "1"  # which changes no instruction and takes a tenth of the time
    with tempfile.TemporaryDirectory() as cache:  # nothing is left of an earlier run
        environment["TRITON_CACHE_DIR"] = cache
        command = [sys.executable, triton_codegen.__file__, *PLACES]
        child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    out.write_text(child.stdout)


@pytest.mark.slow
@pytest.mark.behind(made=reports)
@pytest.mark.parametrize("place", PLACES)
def test_every_kernel_compiles_and_keeps_to_its_gates(place):
    found = json.loads(reports().read_text())[place]
    assert {report["kernel"] for report in found} == KERNELS
    assert sum(report["wanted_loads"] > 0 for report in found) >= 8
    for report in found:
        name = f"{report['variant']}: {report['kernel']}"
        assert report["spilled"] == 0, f"{name} spills: {report}"
        assert report["wide_loads"] >= report["wanted_loads"], f"{name}: narrow loads: {report}"
        assert report["wide_stores"] >= report["wanted_stores"], f"{name}: narrow stores: {report}"
        assert report["shared"] <= SHARED, f"{name}: {report['shared']} bytes of shared memory"
