"""The figures of a guard's report that are worth a curve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def guard_figures(report: Mapping[str, Any]) -> dict[str, Any]:
    """Of `CapabilityGuard.report()`, since the guard was attached.

    Returns:
        "touched_share", "steps", "dropped_steps", "open_windows" and "domains": per domain with history "aligned",
        "conflicting", "orthogonal" (shares of raw update energy), "net_displacement" (relative to the recorded stage's) and
        "capture" (share of the recorded stage's squared displacement that its directions hold). None: not measured.
    """
    domains = {}
    for name, found in report["domains"].items():
        energy = found["energy"] or {}
        domains[name] = {
            **{key: energy.get(key) for key in ("aligned", "conflicting", "orthogonal")},
            "net_displacement": found["net_displacement"],
            "capture": found["capture"]["displacement"],
        }
    kept = {key: report[key] for key in ("touched_share", "steps", "dropped_steps", "open_windows")}
    return {**kept, "domains": domains}
