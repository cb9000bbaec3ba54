"""Rewards: what a completion is worth."""

from .verifiers import exact_match

__all__ = ["exact_match"]
