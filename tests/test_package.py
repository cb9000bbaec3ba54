"""What installing and importing promise: light, never failing for something that is missing, and honest about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import carerl_kernels
import pytest
import torch
from carerl_kernels import _load, _ops, info
from carerl_kernels.cli import app
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent


FORKING = """
import gc, json, os, sys, tempfile, traceback
import torch
gc.freeze()  # else collecting would write to, and so copy, what processes share
for line in sys.stdin:
    code, environment = json.loads(line)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = os.fork()
        if not process:
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
            os.environ.update(environment)
            status = 0
            try:
                exec(code, {"__name__": "__main__"})
            except SystemExit as e:
                status = e.code or 0
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        print(json.dumps([status, *(file.seek(0) or file.read() for file in (out, err))]), flush=True)
"""


@pytest.fixture(scope="module")
def python():
    """Runs code in a process that has imported torch and nothing of ours: a fork of one that waits, as the import takes long."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("CARERL_")}
    with subprocess.Popen(
        [sys.executable, "-c", FORKING], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:

        def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
            print(json.dumps([code, environment]), file=server.stdin, flush=True)
            return subprocess.CompletedProcess(code, *json.loads(server.stdout.readline()))

        yield run
        server.stdin.close()


# ----------------------------------------------------------------------------------------------------------- import


def test_import_is_light(python):
    """Beyond torch: this package and safetensors, and triton where its kernels can run."""
    run = python("""
import sys, torch
before = set(sys.modules)  # what torch itself drags in is not ours
import carerl_kernels
print(*{name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))
print(*{"torch._dynamo", "torch._inductor", "torch.distributed.fsdp"} & set(sys.modules) - before)
""")
    assert run.returncode == 0, run.stderr
    packages, parts_of_torch = (set(line.split()) for line in run.stdout.splitlines())
    allowed = {"carerl_kernels", "safetensors", "torch"} | ({"triton"} if _load.BACKENDS["triton"].available else set())
    assert packages <= allowed
    assert not parts_of_torch


def test_version_is_declared_once():
    declared = re.findall(r"\b0\.\d+\.\d+\b", (ROOT / "pyproject.toml").read_text())
    assert carerl_kernels.__version__ not in declared
    assert importlib.metadata.version("carerl-kernels") == carerl_kernels.__version__


# --------------------------------------------------------------------------------------------------------- backends


def test_a_missing_library_is_a_reason_not_a_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(_load, "find_library", lambda name: None)
    backend = _load._load_cpu()
    assert not backend.available
    assert "CARERL_SKIP_NATIVE" in backend.reason
    assert "compiler" in backend.remedy

    broken = tmp_path / "libcarerl_cpu.so"
    broken.write_text("not a library")
    monkeypatch.setattr(_load, "find_library", lambda name: broken)
    backend = _load._load_cpu()
    assert not backend.available
    assert f"does not load into torch {torch.__version__}" in backend.reason


def test_the_reference_can_be_forced(python):
    run = python(
        "import carerl_kernels, json; from carerl_kernels import info; print(json.dumps(info.collect()))",
        CARERL_BACKEND="reference",
    )
    assert run.returncode == 0, run.stderr
    for op in json.loads(run.stdout)["ops"].values():
        assert op["backends"] == ["reference"]
        assert "CARERL_BACKEND=reference is set" in op["missing"]["cpu"]


def test_the_reference_serves_every_op_when_nothing_native_is_there(python):
    """The same as an installation without a compiler, as seen from Python."""
    run = python("""
import torch
torch.ops.load_library = lambda path: (_ for _ in ()).throw(OSError("no such thing"))
import carerl_kernels
from carerl_kernels import _load
bases, grad = torch.eye(2, 8).view(1, 2, 8), torch.arange(8.0)
coefficients, classes = torch.ops.carerl.dacsp_(grad, bases, 1.0, 0.0, 0.0)
print(coefficients.tolist(), _load.BACKENDS["cpu"].available, _load.BACKENDS["reference"].available)
""")
    assert run.stdout.split("\n")[0] == "[[0.0, 1.0]] False True", run.stderr


@pytest.mark.parametrize("name", ["triton", "cuda", "tpu"])
def test_forcing_what_cannot_be_had_says_so(python, name):
    gpu_torch = torch.version.cuda is not None or torch.version.hip is not None
    if (name == "triton" and gpu_torch) or (name == "cuda" and _load.BACKENDS["cuda"].available):
        pytest.skip(f"{name} can be had here")
    run = python("import carerl_kernels", CARERL_BACKEND=name)
    assert run.returncode != 0
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: CARERL_BACKEND")
    assert name in last


# -------------------------------------------------------------------------------------------------------------- info


def test_info_accounts_for_every_op_and_backend():
    report = info.collect()
    assert set(report["ops"]) == set(_ops.OP_NAMES)
    assert set(report["backends"]) == set(_load.NAMES)
    for op, served in report["ops"].items():
        assert "reference" in served["backends"], op
        assert {*served["backends"], *served["missing"]} == set(_load.NAMES)
        assert all(served["missing"].values()), op
    if _load.BACKENDS["cpu"].available:
        assert all("cpu" in served["backends"] for served in report["ops"].values())
        assert report["machine"]["cpu_isa"] in report["machine"]["cpu_isas_supported"]
        assert report["build"]["version"] == carerl_kernels.__version__


def test_info_says_what_the_gpu_kernels_have_been_through():
    ops = info.collect()["ops"]
    assert ops["group_advantages"]["evidence"] == {}  # torch's kernels
    for op in ("project", "pca_update_", "token_logprobs"):
        assert set(ops[op]["evidence"]) == {"cuda", "triton"}
        assert ops[op]["evidence"]["cuda"] == ["built", "emulated", "code generation checked"]


def test_info_prints(python):
    run = python("import runpy, sys; sys.argv[1:] = ['info']; runpy.run_module('carerl_kernels', run_name='__main__')")
    assert run.returncode == 0, run.stderr
    assert all(op in run.stdout for op in _ops.OP_NAMES)
    printed = CliRunner().invoke(app, ["info", "--json"]).stdout
    assert json.loads(printed)["versions"]["carerl_kernels"] == carerl_kernels.__version__


def test_info_prints_without_a_native_part(monkeypatch, capsys):
    monkeypatch.setattr(info, "_host_call", lambda name: None)
    absent = _load.Backend("cpu", (), "installed without native kernels", "reinstall")
    monkeypatch.setitem(_load.BACKENDS, "cpu", absent)
    info.render(info.collect())
    printed = " ".join(capsys.readouterr().out.split())
    assert "cpu: installed without native kernels; reinstall" in printed
    assert "no native part" in printed


def test_a_command_names_the_extra_it_needs(monkeypatch):
    for name in (
        "transformers",
        "carerl_kernels.study.demo",
    ):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = CliRunner().invoke(app, ["demo", "--fast"])
    assert result.exit_code == 1
    assert "transformers" in result.output
    assert "carerl-kernels[train]" in result.output


# ------------------------------------------------------------------------------------------------------------- build

BUILD_TOOLS = importlib.util.find_spec("scikit_build_core") is not None


@pytest.mark.skipif(not BUILD_TOOLS, reason="scikit-build-core is not installed")
def test_wheel_without_native_parts(python, tmp_path):
    """CARERL_SKIP_NATIVE=1: no compiler, and a package that works and says what it lacks."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        str(ROOT),
        "-w",
        str(tmp_path),
    ]
    env = {**os.environ, "CARERL_SKIP_NATIVE": "1", "CXX": "/nonexistent", "CMAKE": "/nonexistent"}
    subprocess.run(command, env=env, check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "carerl_kernels/triton_kernels/__init__.py" in names
    assert not any(name.startswith("triton_kernels") or name.endswith((".so", ".cpp")) for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    modules = {str(p.relative_to(ROOT / "python")) for p in (ROOT / "python").rglob("*.py")}
    assert modules <= set(names)

    run = python(
        f"""
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "Redirecting" not in type(f).__name__]  # of an editable installation
sys.path.insert(0, {str(tmp_path / "site")!r})
import json, carerl_kernels
from carerl_kernels import info
assert carerl_kernels.__file__.startswith({str(tmp_path)!r})
print(json.dumps(info.collect()))
"""
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["build"] is None
    assert "CARERL_SKIP_NATIVE" in report["backends"]["cpu"]["reason"]
    served = [set(op["backends"]) - {"triton"} for op in report["ops"].values()]  # Triton's kernels are no native part
    assert all(names == {"reference"} for names in served)


@pytest.mark.skipif(
    not (BUILD_TOOLS and shutil.which("c++") and shutil.which("cmake")), reason="no C++ compiler or CMake"
)
def test_cuda_is_refused_rather_than_ignored(tmp_path):
    command = [
        str(shutil.which("cmake")),
        "-S",
        str(ROOT),
        "-B",
        str(tmp_path),
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    command.append("-DCARERL_NVCC=")  # what a search without result leaves
    # In one folder: the second time CMake knows the compiler.
    for value, message in (("ON", "nvcc was not found"), ("maybe", "expected AUTO, ON or OFF, found 'maybe'")):
        run = subprocess.run(command, env={**os.environ, "CARERL_CUDA": value}, capture_output=True, text=True)
        assert run.returncode != 0
        assert message in " ".join(run.stderr.split())
