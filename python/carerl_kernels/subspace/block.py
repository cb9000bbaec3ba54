"""Two-sided block bases: the leading singular vectors of a stage's change of every weight matrix."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ..thin import full_precision, times, times_transposed
from .factored import FactoredBasis, orthonormal
from .matrices import MatrixLayout
from .recorder import Recorder
from .shards import Shards

OVERSAMPLE = 8
ROUNDS = 12
SETTLED = 1e-4
"""Subspace iteration: extra columns, rounds at most, and the relative gain in captured energy at which it stops. Against the
exact SVD of spectra that decay as slowly as 1/sqrt(i) it captures .99 of the energy (tests)."""
NEGLIGIBLE = 1e-5
"""Singular values below this share of the first are rounding of float32 differences: no directions."""


class BlockRecorder(Recorder):
    """At the end of a stage factors the change of every matrix. Gradients are only counted."""

    layout: MatrixLayout

    @torch.no_grad()
    def finish(self, parameters: Sequence[Tensor]) -> FactoredBasis:
        """Factors the change of every matrix, a few matrices at a time."""
        self.check_steps(self.steps)
        layout, r = self.layout, self.layout.k
        left, right, values, moved = {}, {}, {}, {}
        for group in layout.groups:
            for at in group.chunks(parameters[group.indices[0]].device):
                names = layout.labels(group, at)
                deltas = layout.local(group, lambda i: self.start.delta(i, parameters[i]), at)
                with full_precision(deltas[0].device):
                    U, S, V = leading_factors(deltas, r, names, group.whole, layout.shards)
                    coefficients = U.double().mT @ times(deltas, V).double()
                layout.shards.sum_(coefficients)
                for name, *factors in zip(names, U, S, V, coefficients, strict=True):
                    left[name], values[name], right[name], moved[name] = factors
        captured = sum(float(c.square().sum()) for c in moved.values())
        held = captured / max(self.start.energy(parameters), 1e-300)
        info = self.info(parameters, steps=self.steps, displacement_capture=held)
        return FactoredBasis(info, left, right, values, moved, layout if layout.shards.sharded else None)


def leading_factors(
    matrices: Sequence[Tensor], r: int, names: Sequence[str], whole: int, shards: Shards
) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular vectors and values of c matrices `[m, n]` whose rows may be sharded.

    Subspace iteration: only `[n, r + 8]` per matrix and round travels between processes, never a matrix.

    Args:
        matrices: float32, local rows.
        names: seed the starting vectors, so that results do not depend on how many processes there are.
        whole: rows of the whole matrices.

    Returns:
        U `[c, m, r]` float32 (local rows), S `[c, r]` float64 descending, V `[c, n, r]` float32; columns are
        orthonormal, or zero beyond the numerical rank.
    """
    n = matrices[0].shape[1]
    device = matrices[0].device
    q = min(r + OVERSAMPLE, whole, n)
    draws = [torch.randn(n, q, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))) for name in names]
    V = torch.linalg.qr(torch.stack(draws).to(device))[0]
    before = torch.zeros(len(matrices), dtype=torch.float64, device=device)
    for _ in range(ROUNDS):
        Z = shards.sum_(times_transposed(matrices, times(matrices, V)))
        V, R = torch.linalg.qr(Z)
        energy = torch.linalg.svdvals(R)[:, :r].sum(-1).double()  # inside V; it only grows
        if bool((energy <= before * (1 + SETTLED)).all()):
            break
        before = energy
    Y = times(matrices, V)
    wide = Y.double()
    squares, turn = torch.linalg.eigh(shards.sum_(wide.mT @ wide))
    squares, turn = squares.flip(-1)[:, :r].clamp_min(0.0), turn.flip(-1)[..., :r]
    S = squares.sqrt()
    keep = (NEGLIGIBLE * S[:, :1] < S).unsqueeze(1)
    U = torch.where(keep, wide @ turn / S.clamp_min(1e-300).unsqueeze(1), 0.0)
    V = torch.where(keep, V.double() @ turn, 0.0)
    U, V = orthonormal(U, shards), orthonormal(V)
    missing = r - S.shape[1]  # matrices with fewer rows or columns than r have empty slots
    pad = torch.nn.functional.pad
    return pad(U, (0, missing)), pad(torch.where(keep.squeeze(1), S, 0.0), (0, missing)), pad(V, (0, missing))
