"""Capability-aware RL post-training: gradient projection kernels, the capability guard, and a thin GRPO trainer.

Importing registers `torch.ops.carerl.*`. The trainer (`carerl_kernels.grpo`) and everything else that needs more than
torch is imported by name, when it is wanted.
"""

from . import _load

__version__ = "0.1.0"

_load.load()

from .guard import CapabilityGuard  # noqa: E402 (the ops must be registered first)
from .linalg import loewdin_root  # noqa: E402
from .subspace import BasisError, DomainBasis, StreamingPCA  # noqa: E402

__all__ = ["BasisError", "CapabilityGuard", "DomainBasis", "StreamingPCA", "__version__", "loewdin_root"]
