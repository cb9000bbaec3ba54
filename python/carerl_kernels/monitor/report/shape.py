"""What of a run's files has the shape that this package writes: the rest is left out of the page, and said.

Files come from other loops, other versions and broken disks. A page of what can be read is worth more than a traceback, and
nothing unread may pass for a measurement.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

NUMBER, TEXT, FLAG, EACH = "a number", "a text", "true or false", "*"
LARGEST, SMALLEST = 1e100, 1e-100  # what a chart can do arithmetic with; below it is nothing

_NUMBERS = {EACH: NUMBER}
_SPLIT = {"norm": NUMBER, "odd": _NUMBERS, "even": _NUMBERS}
_BY_NAME = ("eval", "rewards", "reward_variance", "agreed", "batch_share", "step_share", "weight", "redrawn", "seconds")
LINE: dict[str, Any] = {
    "stage": TEXT,
    **dict.fromkeys(_BY_NAME, _NUMBERS),
    **dict.fromkeys(("domination", "lr", "grad_norm", "clip_fraction", "entropy", "informative", "skipped"), NUMBER),
    "monitor": {
        "alpha": NUMBER,
        "drop": NUMBER,
        "span": NUMBER,
        "domains": {EACH: {"score": NUMBER, "p": NUMBER, "drop": NUMBER, "error": NUMBER, "fallen": FLAG}},
        "alerts": [{"domain": TEXT} | dict.fromkeys(("step", "drop", "error", "baseline", "score", "n", "p"), NUMBER)],
        "gradients": {"norm": _NUMBERS, "cosine": {EACH: _NUMBERS}},
        "budget": {"gradient": _NUMBERS, "step": _NUMBERS},
        "split": {"since": NUMBER, "acting": TEXT, **_SPLIT, "by": {EACH: _SPLIT}},
        "balance": {
            "by": TEXT,
            "factor": _NUMBERS,
            "decisions": [{"domain": TEXT} | dict.fromkeys(("step", "before", "after", "drop", "error"), NUMBER)],
        },
        "guard": {
            "touched_share": NUMBER,
            "domains": {EACH: {"conflicting": NUMBER, "net_displacement": NUMBER}},
        },
    },
}
CONFIG: dict[str, Any] = {"domains": [TEXT], "parameters": NUMBER, "guarded": FLAG}
GUARD: dict[str, Any] = {
    "domains": {EACH: {"net_displacement": NUMBER, "capture": {"displacement": NUMBER}, "energy": _NUMBERS}},
    "open_windows": [TEXT],
}
_MISSING = object()


def fitting(value: Mapping[str, Any], shape: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The part of an object that has a shape, and the places of what has not.

    Fields that the shape does not name stay as they are; null is nothing and no fault. An entry of a list counts as a whole: one
    that lacks a field is left out. Names are made printable.
    """
    faults: list[str] = []
    fitted = _fit(value, shape, "", faults)
    return (fitted if isinstance(fitted, dict) else {}), faults


def printable(name: str) -> str:
    """A name that neither a terminal nor a page takes for anything else."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in name)


def _fit(value: Any, shape: Any, place: str, faults: list[str]) -> Any:
    if value is None:
        return _MISSING
    if shape == NUMBER and isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST:
        return (0.0 if 0 < abs(value) < SMALLEST else value) if math.isfinite(value) else _MISSING
    if shape == TEXT and isinstance(value, str):
        return printable(value)
    if shape == FLAG and isinstance(value, bool):
        return value
    if isinstance(shape, list) and isinstance(value, list):
        return list(_entries(value, shape[0], place, faults))
    if isinstance(shape, Mapping) and isinstance(value, Mapping):
        out = {}
        for name, part in value.items():
            known = shape.get(name, shape.get(EACH, _MISSING))
            if known is _MISSING:
                out[printable(name)] = part
                continue
            fitted = _fit(part, known, f"{place}.{name}" if place else name, faults)
            if fitted is not _MISSING:
                out[printable(name)] = fitted
        return out
    faults.append(printable(place))
    return _MISSING


def _entries(values: Any, shape: Any, place: str, faults: list[str]) -> Iterator[Any]:
    for i, value in enumerate(values):
        fitted = _fit(value, shape, f"{place}.{i}", faults)
        if isinstance(shape, Mapping) and isinstance(fitted, dict) and not shape.keys() <= fitted.keys():
            faults.append(f"{place}.{i}")
        elif fitted is not _MISSING:
            yield fitted
