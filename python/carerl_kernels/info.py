"""What is installed, what serves every op, and what is missing and why: `carerl info`."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from typing import Any

import torch

from . import __version__, _load, _ops

PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "triton",
    "transformers",
    "trl",
    "accelerate",
    "peft",
    "datasets",
    "llguidance",
)
ENVIRONMENT = ("CARERL_BACKEND", "CARERL_CPU_ISA", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET")
EVIDENCE: dict[str, tuple[str, ...]] = {
    "cuda": ("built", "emulated", "code generation checked"),
    "triton": ("interpreted", "code generation checked"),
}
"""What the kernels of a GPU backend have been through, each step a part of the test suite: `built` for every architecture,
results and memory accesses `emulated` or `interpreted` on the host, machine code read (`code generation checked`). The
step that is missing is `run on a GPU`: it is added when it has happened (`make gpu-check`)."""


def collect() -> dict[str, Any]:
    """Everything `carerl info --json` prints. Needs no compiler, GPU or optional package, and imports none."""
    return {
        "versions": {"carerl_kernels": __version__, "python": platform.python_version(), **_versions()},
        "machine": {
            "platform": f"{platform.system()} {platform.machine()}",
            "cpu_isa": _host_call("select_isa"),
            "cpu_isas_supported": _host_call("supported_isas"),
            "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "build": _host_call("build_info"),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "backends": {
            backend.name: {"available": backend.available, "reason": backend.reason, "remedy": backend.remedy}
            for backend in _load.BACKENDS.values()
        },
        "ops": {op: _served(op) for op in _ops.OP_NAMES},
    }


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _host_call(name: str) -> Any:
    """Result of a function of the native module `_host`; None where it was not built, its message where it refuses."""
    try:
        return getattr(importlib.import_module("._host", __package__), name)()
    except ImportError:
        return None
    except RuntimeError as error:
        return str(error)


def _served(op: str) -> dict[str, Any]:
    """Backends that serve all overloads of an op, and for each of the others why not."""
    overloads = [name for name in _ops.SCHEMAS if name.split(".")[0] == op]
    served: list[str] = []
    missing: dict[str, str] = {}
    for backend in _load.BACKENDS.values():
        parts = _ops.COMPOSITE.get(op) if backend.name != "reference" else None
        wanted = overloads if parts is None else [name for name in _ops.SCHEMAS if name.split(".")[0] in parts]
        absent = [name for name in wanted if name not in backend.ops]
        if not backend.available:
            missing[backend.name] = f"{backend.reason}; {backend.remedy}"
        elif absent:
            missing[backend.name] = f"no kernel for {', '.join(absent)}"
        else:
            served.append(backend.name)
    through = list(_ops.COMPOSITE.get(op, ()))
    on_gpu = op not in _ops.CPU_ONLY and (through or op not in _ops.COMPOSITE)
    evidence = {name: list(steps) for name, steps in EVIDENCE.items() if on_gpu}
    return {"backends": served, "missing": missing, "through": through, "evidence": evidence}


def render(report: dict[str, Any]) -> None:
    """Prints a report of :func:`collect` for people."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    installed = {name: version for name, version in report["versions"].items() if version}
    facts.add_row("versions", ", ".join(f"{name} {version}" for name, version in installed.items()))
    facts.add_row(
        "not installed", ", ".join(name for name, version in report["versions"].items() if not version) or "-"
    )
    machine, build = report["machine"], report["build"]
    loaded, known = report["backends"]["cpu"]["available"], machine["cpu_isas_supported"]
    used = (machine["cpu_isa"] or "the best that this CPU has") if loaded else "no instruction set (not loaded)"
    facts.add_row("CPU kernels", f"{used} in use" + (f"; this CPU supports {', '.join(known)}" if known else ""))
    facts.add_row("threads", f"{machine['threads']} (torch.get_num_threads())")
    facts.add_row("GPUs", ", ".join(machine["gpus"]) or "none visible to torch")
    if isinstance(build, dict):
        facts.add_row(
            "built with", f"{build['compiler']}, {build['build_type']}, torch {build['torch']}, {build['flags']}"
        )
    else:
        facts.add_row("built with", "not recorded (a wheel for every Python)" if loaded else "no native part")
    if report["environment"]:
        facts.add_row("environment", ", ".join(f"{name}={value}" for name, value in report["environment"].items()))
    console.print(facts)

    table = Table(box=box.SIMPLE_HEAD)
    names = list(report["backends"])
    table.add_column("op", no_wrap=True, min_width=max(map(len, report["ops"])))  # a cut name names nothing
    for column in names:
        table.add_column(column)
    for op, served in report["ops"].items():
        through = " via " + ", ".join(served["through"]) if served["through"] else ""
        cells = ["yes" + through if name in served["backends"] else "-" for name in names]
        table.add_row(op, *cells)
    console.print(table)
    for name, steps in EVIDENCE.items():
        untried = "" if "run on a GPU" in steps else "; not yet run on a GPU"
        console.print(f"[bold]{name}[/bold] kernels: {', '.join(steps)}{untried}", highlight=False)
    for name, backend in report["backends"].items():
        if not backend["available"]:
            console.print(f"[bold]{name}[/bold]: {backend['reason']}; {backend['remedy']}", highlight=False)
