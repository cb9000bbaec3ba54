"""What the guard refuses, and how it says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def pair(name: str, value: Any) -> tuple[float, float]:
    """A checked weight or bound, as (against, along)."""
    lower, upper = value if isinstance(value, tuple | list) and name == "bound" else (value, value)
    for number in (lower, upper):
        if not isinstance(number, int | float) or not 0 <= number < float("inf"):
            raise ValueError(f"{name}: expected a finite number of at least 0, found {value!r}")
    return float(lower), float(upper)


def for_domain(what: str, value: Any, name: str) -> Any:
    """One domain's number, where numbers may differ by domain."""
    if not isinstance(value, Mapping):
        return value
    if name not in value:
        raise ValueError(f"{what}: expected a number for domain {name!r}, found one only for {', '.join(value)}")
    return value[name]


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """Refuses a word that is not on the list."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, found {value!r}")


def at_least(name: str, number: float, least: float) -> None:
    """Refuses a number that is too small."""
    if not number >= least:
        raise ValueError(f"{name}: expected at least {least}, found {number}")
