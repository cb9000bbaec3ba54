"""Every Triton kernel compiled for GPUs that are not there; gates on the generated code: nothing spilled, loads of 16 bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

KERNELS = {
    "project_kernel", "totals_kernel", "gram_kernel", "edit_kernel", "rotate_kernel", "edit_rotate_kernel",
    "core_kernel", "input_project_kernel", "input_edit_kernel",
    "quantize_kernel", "token_logprobs_kernel", "token_logprobs_backward_kernel",
}  # fmt: skip
PLACES = ("cuda:90", "cuda:80", "cuda:100", "cuda:120", "hip:gfx942")
SHARED = 48 << 10  # bytes that every GPU has for a program


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, list[dict]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))  # nothing is left of an earlier run
    environment["TRITON_DISABLE_LINE_INFO"] = "1"  # which changes no instruction and takes a tenth of the time
    command = [sys.executable, str(Path(__file__).with_name("triton_codegen.py")), *PLACES]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_every_kernel_compiles_and_keeps_to_its_gates(compiled, place):
    reports = compiled[place]
    assert {report["kernel"] for report in reports} == KERNELS
    assert sum(report["wanted_loads"] > 0 for report in reports) >= 8
    for report in reports:
        name = f"{report['variant']}: {report['kernel']}"
        assert report["spilled"] == 0, f"{name} spills: {report}"
        assert report["wide_loads"] >= report["wanted_loads"], f"{name}: narrow loads: {report}"
        assert report["wide_stores"] >= report["wanted_stores"], f"{name}: narrow stores: {report}"
        assert report["shared"] <= SHARED, f"{name}: {report['shared']} bytes of shared memory"
