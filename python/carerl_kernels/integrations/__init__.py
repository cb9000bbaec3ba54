"""The guard inside other people's trainers. One file each, imported only when used: nothing here imports any of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def report_numbers(report: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of :meth:`CapabilityGuard.report` under names for a trainer's log; what is not known is left out."""
    numbers = {
        "guard/touched_share": report["touched_share"],
        "guard/dropped_steps": report["dropped_steps"],
        "guard/open_windows": len(report["open_windows"]),
        "guard/seconds": sum(report["seconds"].values()),
    }
    for name, domain in report["domains"].items():
        numbers[f"guard/{name}/net_displacement"] = domain["net_displacement"]
        for share, value in (domain["energy"] or {}).items():
            numbers[f"guard/{name}/{share}"] = value
    return {name: float(value) for name, value in numbers.items() if value is not None}
