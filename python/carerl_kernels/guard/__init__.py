"""The capability guard: corrects what an optimizer step does along directions that earlier stages learned."""

from .guard import CapabilityGuard
from .probes import PromptStore
from .rules import RULES

__all__ = ["RULES", "CapabilityGuard", "PromptStore"]
