"""What the guard refuses, and how it says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# These keep float32 masters and overwrite the parameters from them, so an edit of the parameters would be lost.
MASTER_OPTIMIZERS = (
    "BF16_Optimizer",
    "DeepSpeedZeroOptimizer",
    "DeepSpeedZeroOptimizer_Stage3",
    "DistributedOptimizer",
    "FP16_Optimizer",
    "Float16OptimizerWithFloat16Params",
)


def refuse_masters(optimizer: Any) -> None:
    """Refuses optimizers that would undo an edit of the parameters.

    Raises:
        TypeError: names the optimizer and what to do.
    """
    for name in {c.__name__ for c in type(optimizer).__mro__} & set(MASTER_OPTIMIZERS):
        raise TypeError(
            f"{name} keeps float32 masters and overwrites the parameters: an edit would be lost; "
            "build the guard over its master parameters, or use an optimizer that updates the parameters in place"
        )


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
