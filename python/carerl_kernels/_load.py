"""Loads the backends, best first, and remembers why the others are missing.

`CARERL_BACKEND=reference|cpu|triton|cuda` forces one: the ops then use it, or the import says why they cannot. Without it
an import never fails for a missing backend; the reference in plain PyTorch serves whatever the others do not.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from . import _ops, reference

NAMES = ("cuda", "cpu", "triton", "reference")
"""In order of loading: native libraries first, Triton where they leave gaps, the reference below everything."""

REINSTALL = "reinstall where a C++17 compiler is available: pip install --force-reinstall --no-deps <this package>"


@dataclass(frozen=True)
class Backend:
    """What became of one backend."""

    name: str  # one of :data:`NAMES`
    ops: tuple[str, ...] = ()  # the op overloads it serves, named as in `_ops.SCHEMAS`; empty if it is missing
    reason: str = ""  # why it is missing; empty if it is there
    remedy: str = ""  # what to do about it

    @property
    def available(self) -> bool:
        return not self.reason


BACKENDS: dict[str, Backend] = {}
"""Filled by :func:`load`."""


def load() -> None:
    """Registers kernels for every op. RuntimeError: `CARERL_BACKEND` or `CARERL_CPU_ISA` names what is not there."""
    forced = os.environ.get("CARERL_BACKEND", "").strip().lower()
    if forced and forced not in NAMES:
        raise RuntimeError(f"CARERL_BACKEND: expected one of {', '.join(sorted(NAMES))}, found {forced}")
    loaders = {"cuda": _load_cuda, "cpu": _load_cpu, "triton": _load_triton, "reference": _load_reference}
    for name in NAMES:
        if forced in ("", name) or name == "reference":  # below a forced backend too: composites live there
            BACKENDS[name] = loaders[name]()
        else:
            BACKENDS[name] = Backend(name, (), f"CARERL_BACKEND={forced} is set", "unset CARERL_BACKEND")
    if forced and not BACKENDS[forced].available:
        missing = BACKENDS[forced]
        raise RuntimeError(f"CARERL_BACKEND={forced} cannot be had: {missing.reason}; {missing.remedy}, or unset it")


def find_library(name: str) -> Path | None:
    """A native library beside the modules of this package (in an editable install they lie in several places)."""
    package = importlib.import_module(__package__)
    return next((path for base in package.__path__ if (path := Path(base) / name).is_file()), None)


def has_kernel(op: str, key: str) -> bool:
    """Whether an op overload, named as in `_ops.SCHEMAS`, has a kernel of its own under a dispatch key."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{_ops.NAMESPACE}::{op}", key)


def _load_native(name: str, reason: str, remedy: str) -> Backend:
    library = find_library(f"libcarerl_{name}.so")
    if library is None:
        return Backend(name, (), reason, remedy)
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return Backend(name, (), f"{library.name} does not load into torch {torch.__version__}: {error}", REINSTALL)
    return Backend(name, tuple(op for op in _ops.SCHEMAS if has_kernel(op, name.upper())))


def _load_cpu() -> Backend:
    missing = "installed without native kernels (CARERL_SKIP_NATIVE=1, or no compiler)"
    backend = _load_native("cpu", missing, REINSTALL)
    chosen = backend.available and os.environ.get("CARERL_CPU_ISA")
    if chosen and importlib.util.find_spec("._host", __package__) is not None:  # a wheel for every Python has none
        # Here, where it can be said, rather than in the first call.
        importlib.import_module("._host", __package__).select_isa()
    return backend


def _load_cuda() -> Backend:
    remedy = "build it with CARERL_CUDA=ON where nvcc is (make gpu-build)"
    return _load_native("cuda", "this build has no CUDA library", remedy)


def _load_triton() -> Backend:
    reason, remedy = _triton_gap()
    if reason:
        return Backend("triton", (), reason, remedy)
    kernels = importlib.import_module(".triton_kernels", __package__)
    return Backend("triton", tuple(kernels.register()))


def _triton_gap() -> tuple[str, str]:
    """Why Triton kernels are not loaded, and what to do. Does not import triton, which takes longer than all else."""
    if importlib.util.find_spec(".triton_kernels", __package__) is None:
        return "this version has no Triton kernels", "the reference serves GPUs"
    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        return "this torch is a CPU build", "install a torch with CUDA or ROCm"
    if all(has_kernel(name, "CUDA") for name in _ops.KERNEL_OVERLOADS):
        return "the CUDA library serves every op", "set CARERL_BACKEND=triton to use Triton instead"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed", "pip install triton"
    return "", ""


def _load_reference() -> Backend:
    reference.register()
    return Backend("reference", tuple(reference.KERNELS))
