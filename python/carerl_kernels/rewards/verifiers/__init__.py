"""Verifiers: functions of an example and a completion that return a reward in [0, 1], or None where they cannot.

Each says what to install when its library is missing.
"""

from .code import CodeTests
from .exact import exact_match
from .fences import extract_code
from .gym import GYM_DOMAINS, gym_domain
from .instructions import CHECKS, followed, instructions_followed
from .math import MathMatch
from .sandbox import Outcome, Sandbox, SandboxError, SandboxLimits, why_not_isolated

__all__ = [
    "CHECKS",
    "GYM_DOMAINS",
    "CodeTests",
    "MathMatch",
    "Outcome",
    "Sandbox",
    "SandboxError",
    "SandboxLimits",
    "exact_match",
    "extract_code",
    "followed",
    "gym_domain",
    "instructions_followed",
    "why_not_isolated",
]
