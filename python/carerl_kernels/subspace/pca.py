"""Streaming gradient PCA: the exact incremental SVD by the Gram trick, over a parameter list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..linalg import pca_core
from .layout import Layout

_NUMBERS = ("singular_values", "energy", "discarded", "seen", "skipped")


class StreamingPCA:
    """Top directions of a stream of gradients, kept current in two passes over gradient and rows per update.

    `k + oversample` rows are stored and truncated to k by :meth:`directions`: with four extra rows the captured energy was
    .999 of batch PCA, without .95. Uncentred by default, because the guard wants energy, mean included.

    Args:
        layout: where the tensors lie; flat or per matrix.
        k: directions wanted, per coefficient row of the layout.
        oversample: extra rows stored while streaming.
        dtype: of the rows; bfloat16 halves memory and is rounded stochastically (seeded by the number of updates). Over 1e5
            updates its rows stayed orthonormal to .02, but cosines with the true subspace fell to .81 (float32: above .9).
        device: of the rows.
        centred: subtract the running mean, as scikit-learn's IncrementalPCA does (keeps one more row).

    Attributes:
        rows: `[k + oversample (+ 1 mean), N]`.
        singular_values: `[T, k + oversample]` float64.
        seen: updates taken in; skipped: updates refused because a gradient was not finite.
        energy: `[T]` sum of squared gradients; discarded: `[T]` the part the rows do not hold.
    """

    def __init__(
        self,
        layout: Layout,
        k: int,
        oversample: int = 4,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        centred: bool = False,
    ):
        self.layout, self.k, self.width, self.centred = layout, k, k + oversample, centred
        self.rows = torch.zeros(self.width + centred, layout.size, dtype=dtype, device=device)
        self.singular_values = torch.zeros(layout.T, self.width, dtype=torch.float64, device=device)
        self.energy = torch.zeros(layout.T, dtype=torch.float64, device=device)
        self.discarded = torch.zeros(layout.T, dtype=torch.float64, device=device)
        self.seen = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._updates = 0

    @torch.no_grad()
    def update(self, grads: Sequence[Tensor], decay: float = 1.0) -> None:
        """Takes in one gradient (a tensor per parameter of the layout). No N-sized temporary, no host synchronisation.

        A gradient that is not finite changes nothing but `skipped`.
        """
        q = self.decide(self.layout.gram(self.rows, grads), decay)
        self.layout.rotate_(self.rows, grads, q, self.seed)

    @property
    def seed(self) -> int:
        """Of stochastic rounding. It counts updates, so that a resumed stream rounds as the uninterrupted one."""
        return 0 if self.rows.dtype == torch.float32 else self._updates

    def decide(self, measured: Tensor, decay: float = 1.0) -> Tensor:
        """The rotation of one update, and its numbers counted; the rows are the caller's to rotate.

        Args:
            measured: Gram matrix `[T, W, W]` float64 of the rows and the gradient, W = rows + 1.

        Returns:
            q `[T, W - 1, W]`: new rows are `q [rows; g]`.
        """
        self._updates += 1
        transform = self._centring(measured)
        inner = transform @ measured @ transform.mT if transform is not None else measured
        q, values, discarded = pca_core(inner, self.singular_values, decay)
        finite = discarded.isfinite().all()
        if transform is not None:
            mean = self._mean_row(measured)
            q = torch.cat([q @ transform, torch.where(finite, mean, torch.nan)], dim=-2)
        self.singular_values.copy_(values)
        self.energy += torch.where(finite, inner[..., -1, -1], 0.0)
        self.discarded += torch.where(finite, discarded, 0.0)
        self.seen += finite
        self.skipped += ~finite
        return q

    def _mean_row(self, measured: Tensor) -> Tensor:
        """Combination `[T, 1, W]` of the rows [U; mean; g] that is the new mean."""
        n = self.seen.double()
        row = torch.zeros_like(measured[..., :1, :])
        row[..., -2] = n / (n + 1)
        row[..., -1] = 1 / (n + 1)
        return row

    def _centring(self, measured: Tensor) -> Tensor | None:
        """Map from rows [U; mean; g] to [U; correction]: a batch of one, centred, is all mean correction (Ross et al. 2008)."""
        if not self.centred:
            return None
        n = self.seen.double()
        size = measured.shape[-1]
        out = torch.zeros(size - 1, size, dtype=measured.dtype, device=measured.device)
        out[:-1, :-2] = torch.eye(size - 2, dtype=measured.dtype, device=measured.device)
        weight = (n / (n + 1)).sqrt()
        out[-1, -2], out[-1, -1] = -weight, weight
        return out

    def directions(self) -> tuple[Tensor, Tensor]:
        """The leading k rows `[k, N]` (a view) and their singular values `[T, k]`."""
        return self.rows[: self.k], self.singular_values[:, : self.k]

    def state_dict(self) -> dict[str, Any]:
        numbers = {name: getattr(self, name).clone() for name in _NUMBERS}
        return {"updates": self._updates, "rows": self.layout.unpack(self.rows), **numbers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._updates = state["updates"]
        self.layout.pack_(self.rows, state["rows"])
        for name in _NUMBERS:
            getattr(self, name).copy_(state[name])
