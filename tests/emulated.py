"""The CUDA backend on the host: kernels, launches and binding of `csrc` compiled against `tests/cuda_emulator`.

The library is built once per state of the sources, under `build/emulator`, and registers the ops of the CUDA binding in
the namespace `carerl_emulated` for CPU tensors.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from behind import once
from carerl_kernels import _ops, linalg, reference
from places import ROOT

NAMESPACE = "carerl_emulated"
KERNELS = sorted((ROOT / "csrc/kernels/cuda").glob("*.cu"))
EMULATOR = ROOT / "tests/cuda_emulator"
BUILT = ROOT / "build/emulator"
HEADERS = [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh"), *EMULATOR.glob("*.h")]
FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-I{EMULATOR}",
         '-DCARERL_CUDA_ARCHITECTURES="sm_80"',
         # Few tensors or matrices a launch and few slots: small inputs then need several launches, and slots several tiles.
         "-DCARERL_SPANS=4", "-DCARERL_MATRICES=4", "-DCARERL_SLOTS=int64_t{3}")  # fmt: skip

Object = tuple[Path, Sequence[str]]
"""A source and the flags that it is compiled with."""
OBJECTS: list[Object] = [
    *((source, [*FLAGS, "-O1", "-fsanitize=alignment"]) for source in KERNELS),
    (EMULATOR / "emulator.cpp", [*FLAGS, "-O2", "-DEMULATOR_CHECKS_ALIGNMENT"]),
]
"""The kernels and the GPU that they run on, as the op tests have them."""


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def missing() -> str | None:
    return None if compiler() else "no C++ compiler to build the emulated CUDA kernels with"


def run(arguments: Sequence[str]) -> None:
    done = subprocess.run([str(compiler()), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def build(name: str, objects: Sequence[Object], link: Sequence[str]) -> Path:
    """Compiles sources with their flags and links them to `build/emulator/<hash>/<name>`; what exists is used again."""
    headers = b"".join(path.read_bytes() for path in sorted(HEADERS))

    def compiled(one: Object) -> str:
        source, flags = one
        key = hashlib.sha256(repr(one).encode() + source.read_bytes() + headers).hexdigest()[:16]
        language = ["-x", "c++"] if source.suffix == ".cu" else []
        command = [*flags, *language, "-c", str(source), "-o"]
        return str(once(BUILT / f"{source.stem}-{key}.o", lambda out: run([*command, str(out)])))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        files = list(pool.map(compiled, objects))
    key = hashlib.sha256(repr((files, link)).encode()).hexdigest()[:16]
    return once(BUILT / key / name, lambda out: run([*files, *link, "-o", str(out)]))


@functools.cache
def library() -> None:
    """Builds, loads and declares the emulated ops."""
    torch_dir = Path(torch.__file__).parent
    binding = [*FLAGS, "-O1", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(torch_dir / "include"),
               f"-DCARERL_OPS_NAMESPACE={NAMESPACE}", "-DCARERL_OPS_KEY=CPU"]  # fmt: skip
    objects = [*OBJECTS, *((ROOT / "csrc/ops" / name, binding) for name in ("cuda.cpp", "checks.cpp"))]
    link = ["-shared", f"-L{torch_dir / 'lib'}", "-ltorch_cpu"]
    path = build("libcarerl_emulated.so", objects, link)

    namespace = torch.library.Library(NAMESPACE, "DEF")
    for name in _ops.KERNEL_OVERLOADS:
        namespace.define(name + _ops.SCHEMAS[name])
        namespace.impl(name, _fake(name), "Meta")
    torch.ops.load_library(str(path))
    library.namespace = namespace  # type: ignore[attr-defined]  # lives as long as the ops are wanted


def _overload(namespace: str, name: str) -> torch._ops.OpOverload:
    op, _, variant = name.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), op), variant or "default")


def _fake(name: str) -> Callable:
    """A tensor on another device than the rest: what the real op says of it."""
    return lambda *args, **kwargs: _overload("carerl", name)(*args, **kwargs)


def pca_update_(bases, singular_values, grads, decay=1.0, seed=0):
    _ops.check_pca_update(bases, singular_values, grads, decay)
    q, values, discarded = linalg.pca_core(kernel("gram")(bases, grads), singular_values, decay)
    kernel("rotate_")(bases, grads, q.float(), seed)
    singular_values.copy_(values)
    return discarded


def pca_update_list(bases, singular_values, grads, offsets, decay=1.0, per_tensor=False, seed=0):
    _ops.check_pca_update(bases, singular_values, grads, decay, offsets, per_tensor)
    measured = kernel("gram.list")(bases, grads, offsets, None, per_tensor)
    q, values, discarded = linalg.pca_core(measured, singular_values, decay)
    kernel("rotate_.list")(bases, grads, offsets, q.float(), per_tensor, seed)
    singular_values.copy_(values)
    return discarded


def kernel(overload: str) -> Callable:
    """The emulated kernel of an op overload; the composite ones over the emulated ops."""
    library()
    composite = {"pca_update_": pca_update_, "pca_update_.list": pca_update_list}
    if overload not in _ops.KERNEL_OVERLOADS:
        return composite.get(overload) or reference.KERNELS[overload]
    return _overload(NAMESPACE, overload)
