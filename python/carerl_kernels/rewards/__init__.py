"""Rewards: what a completion is worth.

Verifiers compute it (`verifiers`), a language model judges it (`pa_grm`), several are mixed (`compose`), and any of them serves any
trainer (`adapters`). A reward is a function of an `Example` and a completion, or has `score_batch`; it returns a number, or
None for what could not be judged.
"""

from .verifiers import exact_match

__all__ = ["exact_match"]
