"""`pca_update_` against scikit-learn's IncrementalPCA: the same update of the same state, and the same stream.

Both are primed with k rows. scikit-learn centres, our op does not: every batch here has zero mean, so that both solve
the same problem.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .cost import Case
from .expect import judged, relative
from .variants import OURS, Variant

TOLERANCE = 1e-4  # relative, of singular values


class SharedStream:
    """A stream of gradients `[B, N]` fp32 with a low-rank signal in noise, and both PCA states after k rows of it.

    Args:
        case: `pca_update_` with D = 1, fp32; k and B even.
        batches: length of the stream whose captured energy is compared.
    """

    def __init__(self, case: Case, batches: int = 8):
        from sklearn.decomposition import IncrementalPCA

        self.case = case
        draw = torch.Generator().manual_seed(0)
        signal = torch.randn(2 * case.k, case.N, generator=draw) * torch.linspace(2.0, 0.2, 2 * case.k).unsqueeze(1)

        def batch(rows: int) -> Tensor:
            g = torch.randn(rows, 2 * case.k, generator=draw) @ signal + torch.randn(rows, case.N, generator=draw)
            return g - g.mean(0)

        self.first = batch(case.k)
        self.stream = [batch(case.B) for _ in range(batches)]
        self._sklearn = IncrementalPCA(n_components=case.k)
        self._sklearn.partial_fit(self.first.numpy())
        self.sklearn = copy.deepcopy(self._sklearn)
        self._rows = torch.zeros(case.k, case.N)
        self._values = torch.zeros(case.k, dtype=torch.float64)
        torch.ops.carerl.pca_update_(self._rows, self._values, self.first)
        self.rows, self.values = self._rows.clone(), self._values.clone()
        seen = torch.cat([self.first, self.stream[0]]).double()
        # k rows and one batch more: the best k directions of k + B rows, exactly.
        self.expected = torch.linalg.eigvalsh(seen @ seen.T)[-case.k :].flip(0).sqrt()

    def reset(self) -> None:
        self.rows.copy_(self._rows)
        self.values.copy_(self._values)
        self.sklearn = copy.deepcopy(self._sklearn)

    def variants(self) -> dict[str, Variant]:
        def carerl() -> dict[str, Any]:
            torch.ops.carerl.pca_update_(self.rows, self.values, self.stream[0])
            return {"singular_values": self.values}

        def sklearn() -> dict[str, Any]:
            self.sklearn.partial_fit(batch)
            return {"singular_values": torch.from_numpy(self.sklearn.singular_values_)}

        batch = self.stream[0].numpy()
        return {OURS: Variant(carerl, exact=True), "scikit-learn": Variant(sklearn)}

    def check(self, variant: str, outputs: Mapping[str, Any], exact: bool) -> dict[str, float]:
        """Singular values after one update, against those of all rows seen. WrongResult: further off than 1e-4."""
        errors = {"singular_values": relative(outputs["singular_values"], self.expected)}
        return judged(self.case, variant, errors, lambda name: TOLERANCE)

    def captured(self) -> dict[str, float]:
        """Share of the energy of the whole stream that each holds in its k directions at the end, 0..1."""
        self.reset()
        for batch in self.stream:
            torch.ops.carerl.pca_update_(self.rows, self.values, batch)
            self.sklearn.partial_fit(batch.numpy())
        every = torch.cat([self.first, *self.stream])
        total = float(every.double().square().sum())
        directions = {OURS: self.rows, "scikit-learn": torch.from_numpy(self.sklearn.components_).float()}
        return {name: float((every @ rows.T).double().square().sum()) / total for name, rows in directions.items()}
