"""The demonstration: a small language model learns three verifiable domains in sequence, plainly and guarded."""

from .run import DemoError, run_demo
from .variants import VARIANTS

__all__ = ["VARIANTS", "DemoError", "run_demo"]
