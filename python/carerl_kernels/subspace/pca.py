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
    .999 of batch PCA, without .95. Gradients are not centred: the guard wants energy, mean included.

    Args:
        layout: where the tensors lie; flat or per matrix.
        k: directions wanted, per coefficient row of the layout.
        device: The device of the rows, which are float32.

    Attributes:
        rows: `[k + oversample, N]`.
        singular_values: `[T, k + oversample]` float64.
        seen: The number of updates taken in.
        skipped: The number of updates refused because a gradient was not finite.
        energy: `[T]`, the sum of squared gradients.
        discarded: `[T]`, the part of it that the rows do not hold.
    """

    def __init__(self, layout: Layout, k: int, oversample: int = 4, device: torch.device | str = "cpu"):
        self.layout, self.k, self.width = layout, k, k + oversample
        self.rows = torch.zeros(self.width, layout.size, device=device)
        self.singular_values = torch.zeros(layout.T, self.width, dtype=torch.float64, device=device)
        self.energy = torch.zeros(layout.T, dtype=torch.float64, device=device)
        self.discarded = torch.zeros(layout.T, dtype=torch.float64, device=device)
        self.seen = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, grads: Sequence[Tensor]) -> None:
        """Takes in one gradient (a tensor per parameter of the layout). No N-sized temporary, no host synchronisation.

        A gradient that is not finite changes nothing but `skipped`.
        """
        q = self.decide(self.layout.gram(self.rows, grads))
        self.layout.rotate_(self.rows, grads, q)

    def decide(self, measured: Tensor) -> Tensor:
        """The rotation of one update, and its numbers counted; the rows are the caller's to rotate.

        Args:
            measured: Gram matrix `[T, W, W]` float64 of the rows and the gradient, W = rows + 1.

        Returns:
            q `[T, W - 1, W]`: new rows are `q [rows; g]`.
        """
        q, values, discarded = pca_core(measured, self.singular_values, 1.0)
        finite = discarded.isfinite().all()
        self.singular_values.copy_(values)
        self.energy += torch.where(finite, measured[..., -1, -1], 0.0)
        self.discarded += torch.where(finite, discarded, 0.0)
        self.seen += finite
        self.skipped += ~finite
        return q

    def directions(self) -> tuple[Tensor, Tensor]:
        """The leading k rows `[k, N]` (a view) and their singular values `[T, k]`."""
        return self.rows[: self.k], self.singular_values[:, : self.k]

    def state_dict(self) -> dict[str, Any]:
        numbers = {name: getattr(self, name).clone() for name in _NUMBERS}
        return {"rows": self.layout.unpack(self.rows), **numbers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.layout.pack_(self.rows, state["rows"])
        for name in _NUMBERS:
            getattr(self, name).copy_(state[name])
