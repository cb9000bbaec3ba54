"""Errors whose text is all that a user needs, and those that are raised most often."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec


class PlainError(RuntimeError):
    """Something outside of the program went wrong; the text says what was expected, what was found and what to do.

    Commands print the text without a traceback, which they keep for bugs.
    """


def one_of(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raises ValueError for a word, or another value, that is not on the list."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, allowed))}, found {value!r}")


def at_least(name: str, number: float, least: float) -> None:
    """Raises ValueError for a number that is too small."""
    if not number >= least:
        raise ValueError(f"{name}: expected at least {least}, found {number}")


def require(package: str, what: str, install: str = "carerl-kernels[train]") -> None:
    """Raises ImportError where a package is missing that `what` needs; says what to install."""
    if find_spec(package) is None:
        raise ImportError(f"{what} needs {package}: pip install '{install}'")
