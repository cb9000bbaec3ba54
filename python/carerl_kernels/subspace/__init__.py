"""Where directions come from: bases over the parameters of a model, recorded, oriented, stored.

Flat and per-matrix gradient-PCA bases live here. Factored bases (two-sided ``block``, one-sided ``input``) belong in modules
of their own beside ``pca.py``, producing the same :class:`~carerl_kernels.subspace.store.DomainBasis` interface.
"""

from .layout import Layout
from .pca import StreamingPCA
from .recorder import StageRecorder
from .store import BasisError, DomainBasis

__all__ = ["BasisError", "DomainBasis", "Layout", "StageRecorder", "StreamingPCA"]
