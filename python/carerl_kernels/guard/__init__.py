"""The capability guard: corrects what an optimizer step does along directions that earlier stages learned."""

from .frames import COMBINES
from .guard import CapabilityGuard
from .rules import RULES

__all__ = ["COMBINES", "RULES", "CapabilityGuard"]
