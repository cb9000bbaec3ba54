"""Capability-aware RL post-training: gradient projection kernels, the capability guard, and a thin GRPO trainer."""

from . import _load, _ops

__all__ = ["__version__"]
__version__ = "0.1.0"

_load.load()
