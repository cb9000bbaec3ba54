"""Rewards: what a completion is worth.

Verifiers compute it (`verifiers`), a language model judges it (`pa_grm`), several are mixed (`compose`), and any of them
serves any trainer (`adapters`). A reward is a function of an `Example` and a completion, or has `score_batch`; it returns a
number, or None for what could not be judged.

Nothing is imported before it is wanted: the command line imports this package for `carerl info` too.
"""

from typing import Any

__all__ = ["exact_match"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(name)
    from .verifiers.exact import exact_match

    return exact_match
