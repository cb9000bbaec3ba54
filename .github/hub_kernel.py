"""The ops as a project of Hugging Face's kernel-builder (build.toml, torch-ext/): make hub-kernel.

    python .github/hub_kernel.py OUT     # then, where nix is: cd OUT && nix run .#build-and-copy

Nothing is kept twice in the repository: sources are copied. The Hub asks for a namespace of its own in every build; the
preprocessor puts it in place of `carerl`, and so does a replacement of names in the copied Python modules.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = "carerl_kernels"
REFERENCES = [path.stem for path in sorted((ROOT / "python" / NAME).glob("reference*.py"))]
MODULES = {"_ops": "declared", **{name: name for name in (*REFERENCES, "linalg", "thin")}}
"""Modules of the package that the ops need, and what they are called there: kernel-builder makes an `_ops` of its own."""
COMMON = ["-Dcarerl=TORCH_EXTENSION_NAME", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
BINDING = """// Schemas are declared in Python (torch-ext/carerl_kernels/declared.py), kernels register in csrc/ops.
#include "registration.h"

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
"""
PACKAGE = '''"""Gradient projection kernels of carerl-kernels over CPU and CUDA tensors.

Every op is a function of this module, and `help(NAME)` says what it means. Overloads (`.list`) are at `ops.NAME`.
"""

from ._ops import ops
from . import declared, reference

reference.register()
for _name in declared.OP_NAMES:
    globals()[_name] = getattr(ops, _name)
    globals()[_name].__doc__ = reference.KERNELS[_name].__doc__

__all__ = ["ops", *declared.OP_NAMES]
'''


def flags_of(file: Path) -> list[str]:
    """Compiler flags of a CPU source, as CMakeLists.txt has them: an instruction set is a file's, never the target's."""
    text = (ROOT / "CMakeLists.txt").read_text()
    source = re.escape(str(file.relative_to(ROOT)))
    own = re.search(rf'set_source_files_properties\(\s*{source}\s+PROPERTIES\s+COMPILE_OPTIONS\s+"([^"]*)"', text)
    return COMMON if own is None else [*COMMON, *flags_in(own[1], text)]


def flags_in(options: str, text: str) -> list[str]:
    """The -m flags in a list of CMake, variables looked up."""
    out: list[str] = []
    for part in options.split(";"):
        name = re.fullmatch(r"\$\{(\w+)\}", part)
        if name is not None:
            value = re.search(rf"set\({name[1]} ([^)]*)\)", text)
            assert value is not None, f"CMakeLists.txt: expected set({name[1]} ...), found none"
            out += flags_in(value[1].replace(" ", ";"), text)
        elif part.startswith("-m"):
            out.append(part)
    return list(dict.fromkeys(out))


def build_toml() -> str:
    """kernel-builder's description: one section for each set of flags."""
    headers = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.h")) if "host" not in path.parts]
    cuda_headers = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.cuh"))]
    cpu = [*sorted((ROOT / "csrc/kernels/cpu").glob("*.cpp")), *sorted((ROOT / "csrc/ops").glob("*.cpp"))]
    lines = [
        "[general]",
        f'name = "{NAME}"',
        "version = 1",
        'license = "Apache-2.0"',
        'backends = ["cpu", "cuda"]',
        "",
        "[general.cuda]",
        'minver = "12.8"',
        "",
        "[torch]",
        'src = ["torch-ext/torch_binding.cpp"]',
        "",
        "[torch.stable-abi]",
        'cpu = "2.11"',
        'cuda = "2.11"',
    ]
    for path in cpu:
        if path.name == "cuda.cpp":
            continue
        section = f"{path.parent.name}_{path.stem}"
        lines += ["", f"[kernel.{section}]", 'backend = "cpu"', 'depends = ["torch"]']
        lines += [
            f"cxx-flags = {json.dumps(flags_of(path))}",
            f"src = {json.dumps([str(path.relative_to(ROOT)), *headers])}",
        ]
    sources = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc/kernels/cuda").glob("*.cu"))]
    sources += ["csrc/ops/cuda.cpp", "csrc/ops/checks.cpp"]
    lines += [
        "",
        "[kernel.cuda]",
        'backend = "cuda"',
        'depends = ["torch"]',
        'cuda-capabilities = ["8.0", "9.0", "10.0", "12.0"]',
    ]
    lines += [
        'cuda-flags = ["-Dcarerl=TORCH_EXTENSION_NAME"]',
        f"src = {json.dumps([*sources, *headers, *cuda_headers])}",
    ]
    return "\n".join(lines) + "\n"


def module(name: str) -> str:
    """The text of a module of the package, with the Hub's namespace in place of `carerl`."""
    text = (ROOT / "python" / NAME / f"{name}.py").read_text()
    text = text.replace("torch.ops.carerl", "_ops.ops" if name in REFERENCES else "ops")
    text = re.sub(r"\b_ops\.(?!ops\b)", "declared.", text).replace("from . import _ops", "from . import _ops, declared")
    if name == "_ops":
        text = text.replace('NAMESPACE = "carerl"', 'NAMESPACE = add_op_namespace_prefix("").removesuffix("::")')
        text = text.replace(
            "from torch import Tensor\n",
            "from torch import Tensor\n\nfrom ._ops import add_op_namespace_prefix, ops\n",
            1,
        )
    return text


def write(out: Path) -> None:
    """Makes the project.

    Raises:
        SystemExit: the folder is there already.
    """
    if out.exists():
        raise SystemExit(f"hub_kernel: expected a new folder, found {out}; remove it or name another")
    package = out / "torch-ext" / NAME
    package.mkdir(parents=True)
    shutil.copytree(ROOT / "csrc", out / "csrc", ignore=shutil.ignore_patterns("host"))
    shutil.copy(ROOT / "LICENSE", out)
    (out / "build.toml").write_text(build_toml())
    (out / "torch-ext/torch_binding.cpp").write_text(BINDING)
    for name, there in MODULES.items():
        (package / f"{there}.py").write_text(module(name))
    (package / "__init__.py").write_text(PACKAGE)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    write(Path(sys.argv[1]))
