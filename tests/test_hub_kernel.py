"""The project for Hugging Face's kernel-builder: everything that CMake builds, with the same flags, under another namespace."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAKE = ROOT / ".github" / "hub_kernel.py"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "project"
    subprocess.run([sys.executable, MAKE, out], check=True)
    return out


def test_it_has_every_source_with_its_flags(project):
    kernels = tomllib.loads((project / "build.toml").read_text())["kernel"]
    named = re.findall(r"csrc/[\w/]+\.(?:cpp|cu)\b", (ROOT / "CMakeLists.txt").read_text())
    built = {name for name in named if "/host/" not in name}
    sources = {source for kernel in kernels.values() for source in kernel["src"] if source.endswith((".cpp", ".cu"))}
    assert sources == built
    for kernel in kernels.values():
        assert kernel["backend"] in ("cpu", "cuda") and kernel["depends"] == ["torch"]
        assert all((project / source).is_file() for source in kernel["src"])
    flags = {source: kernel.get("cxx-flags", []) for kernel in kernels.values() for source in kernel["src"]}
    assert "-mavx512bf16" in flags["csrc/kernels/cpu/isa_avx512_bf16.cpp"]
    assert "-mfma" in flags["csrc/kernels/cpu/isa_avx2.cpp"]
    for source in ("csrc/kernels/cpu/isa_generic.cpp", "csrc/ops/cpu.cpp"):
        assert not any(flag.startswith("-m") for flag in flags[source]), source


def test_its_modules_know_the_other_namespace_alone(project):
    package = project / "torch-ext" / "carerl_kernels"
    references = {path.name for path in (ROOT / "python/carerl_kernels").glob("reference*.py")}
    assert {path.name for path in package.iterdir()} == {
        "__init__.py",
        "declared.py",
        "linalg.py",
        "thin.py",
        *references,
    }
    for path in package.iterdir():
        code = ast.unparse(ast.parse(path.read_text()))
        assert "torch.ops.carerl." not in re.sub(r'""".*?"""', "", code, flags=re.DOTALL), path.name
        assert "NAMESPACE = 'carerl'" not in code, path.name


def test_it_overwrites_nothing(project):
    again = subprocess.run([sys.executable, MAKE, project], capture_output=True, text=True, check=False)
    assert again.returncode != 0 and "expected a new folder" in again.stderr
