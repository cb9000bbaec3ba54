"""What the machine can do and what a call takes of it: streaming-read bandwidth, cache size, peak resident memory."""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

PROBE_BYTES = 512 << 20  # far beyond any last-level cache, so that what is timed is memory


class Bandwidth:
    """Streaming-read bandwidth of all of torch's threads over one buffer of at least 512 MiB.

    Several ways of reading are tried, the native probe of the `_host` module (if it was built) and two torch reductions,
    and the fastest stays: a ceiling should be one.
    """

    def __init__(self, size: int = PROBE_BYTES):
        self._other = torch.ones(min(2 * cache_bytes(), size) // 4)
        ways = _ways(size)
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(5):
            for name, read in ways.items():
                rates[name].append(read())
        self.source = max(rates, key=lambda name: statistics.median(rates[name]))
        self._read = ways[self.source]

    def measure(self) -> float:
        """GB/s (1e9 bytes per second) of one read of the buffer."""
        return self._read() / 1e9

    def evict(self) -> None:
        """Fills the caches with something else, so that every timed call starts cold."""
        self._other.sum()


def _ways(size: int) -> dict[str, Callable[[], float]]:
    """Ways of reading `size` bytes, each returns bytes per second."""
    buffer = torch.ones(size // 4)  # touched, so that no page is missing when it is timed

    def timed(read: Callable[[], Any]) -> float:
        started = time.perf_counter()
        read()
        return size / (time.perf_counter() - started)

    ways: dict[str, Callable[[], float]] = {
        "torch.sum": lambda: timed(buffer.sum),
        "torch.dot": lambda: timed(lambda: torch.dot(buffer, buffer)),
    }
    with suppress(ImportError):
        host = importlib.import_module("carerl_kernels._host")
        ways["native probe"] = host.BandwidthProbe(size, torch.get_num_threads()).read
    return ways


@lru_cache(maxsize=1)
def cache_bytes() -> int:
    """Last-level cache of the whole machine; 32 MiB where the system does not say."""
    seen: dict[str, int] = {}
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        try:
            if (index / "level").read_text().strip() == "3":
                size = (index / "size").read_text().strip().upper()
                seen[(index / "shared_cpu_list").read_text()] = int(size[:-1]) << {"K": 10, "M": 20}[size[-1]]
        except (OSError, KeyError, ValueError):
            continue
    return sum(seen.values()) or 32 << 20


def peak_memory(call: Callable[[], Any]) -> tuple[int, int] | None:
    """Bytes resident before `call` and at most during it; None where the system does not say (not Linux).

    Resident pages, not allocations: memory taken by libraries behind Python's back counts.
    """
    try:
        _trim()
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status("VmRSS")
        call()
        return before, max(_status("VmHWM"), before)
    except (OSError, KeyError):
        return None


def peak_extra_memory(call: Callable[[], Any]) -> int | None:
    """Bytes by which the resident set grew at most during `call`; None where the system does not say.

    Make the call once before, so that buffers kept for ever after and thread stacks are there already.
    """
    seen = peak_memory(call)
    return None if seen is None else seen[1] - seen[0]


def _status(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) << 10


def _trim() -> None:
    """Gives freed memory back to the system, else a call could use it unseen."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def environment(bandwidth: float, source: str) -> dict[str, Any]:
    """What results depend on. No host name, no path."""
    from .. import info

    found = info.collect()
    return {
        "cpu": _cpu_model(),
        "isa": found["machine"]["cpu_isa"] or torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # of the last minute, before the run
        "last_level_cache_bytes": cache_bytes(),
        "bandwidth_gbps": bandwidth,
        "bandwidth_source": source,
        "versions": {name: version for name, version in found["versions"].items() if version},
        "serves": {
            op: next(name for name in served["backends"] if name in ("cpu", "reference"))
            for op, served in found["ops"].items()
        },
        "build": found["build"],
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
        name = fields.get("model name", platform.processor())
        return f"{name} (family {fields.get('cpu family')}, model {fields.get('model')})"
    except OSError:
        return platform.processor() or platform.machine()
