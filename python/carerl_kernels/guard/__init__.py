"""The capability guard: corrects what an optimizer step does along directions that earlier stages learned."""

from .guard import CapabilityGuard
from .rules import COMBINES, RULES

__all__ = ["COMBINES", "RULES", "CapabilityGuard"]
