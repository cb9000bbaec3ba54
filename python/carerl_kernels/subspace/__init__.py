"""Where directions come from: bases over the parameters of a model, recorded, oriented, stored.

Rows over all parameters (`flat`, `per_matrix`: streaming gradient PCA) and factors per weight matrix (`block`: the stage's
parameter change; `input`: what is fed into the matrix) share one interface: a layout, a recorder, a stored form
(:class:`~carerl_kernels.subspace.store.StoredBasis`) and, in :mod:`carerl_kernels.guard`, a stack of acting directions.
"""

from .block import BlockRecorder
from .factored import FactoredBasis
from .layout import Layout
from .matrices import MatrixLayout
from .moments import Moments
from .observe import observe
from .pca import StreamingPCA
from .recorder import StageRecorder
from .replay import ReplayRecorder
from .store import BasisError, DomainBasis, StoredBasis

__all__ = [
    "BasisError",
    "BlockRecorder",
    "DomainBasis",
    "FactoredBasis",
    "Layout",
    "MatrixLayout",
    "Moments",
    "ReplayRecorder",
    "StageRecorder",
    "StoredBasis",
    "StreamingPCA",
    "observe",
]
