"""Errors whose text is all that a user needs."""

from __future__ import annotations


class PlainError(RuntimeError):
    """Something outside of the program went wrong; the text says what was expected, what was found and what to do.

    Commands print the text without a traceback, which they keep for bugs.
    """
