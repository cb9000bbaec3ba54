"""Errors whose text is all that a user needs, and the two that are raised most often."""

from __future__ import annotations

from collections.abc import Iterable


class PlainError(RuntimeError):
    """Something outside of the program went wrong; the text says what was expected, what was found and what to do.

    Commands print the text without a traceback, which they keep for bugs.
    """


def one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    """Raises ValueError for a word that is not on the list."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, found {value!r}")


def at_least(name: str, number: float, least: float) -> None:
    """Raises ValueError for a number that is too small."""
    if not number >= least:
        raise ValueError(f"{name}: expected at least {least}, found {number}")
