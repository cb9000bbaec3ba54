"""Acting directions of two-sided block bases."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..subspace.matrices import Group
from .factored_stack import FactoredStack
from .frames import DenseSpan, Frame, PackedSpan, PairSpan, Span


class BlockStack(FactoredStack):
    """Two-sided blocks: coefficients `U_d^T G V_d` of every domain, r x r each.

    S factors into small matrices: `(d, i, j)` and `(e, k, l)` overlap by `(U_d^T U_e)_ik (V_d^T V_e)_jl`, so `S x` costs
    next to nothing. A root of S is needed only where several domains act at once: two have one in closed form.
    """

    def _sum_(self, coeffs: Tensor) -> None:
        self.layout.shards.sum_(coeffs)

    def _coefficients(
        self, out: Tensor, number: int, group: Group, tensors: Sequence[Tensor], domain: str | None
    ) -> None:
        matrices = self.layout.local(group, tensors)
        left, right = self._factors(number, domain)
        domains = len(self) if domain is None else 1
        out[group.rows] = torch.ops.carerl.block_project(matrices, left, right, domains).flatten(1)

    def _add_(self, number: int, group: Group, tensors: Sequence[Tensor], mix: Tensor) -> None:
        r = self.layout.k
        left, right = self._factors(number, None)
        mixes = mix.view(-1, len(self), r, r)
        torch.ops.carerl.block_edit_(self.layout.local(group, tensors), left, mixes, right)

    def _gram_times(self, number: int, x: Tensor, matrices: slice) -> Tensor:
        left, right = (gram[matrices] for gram in self._by_domain(number))
        half = torch.einsum("gdiek,gekl->gdiel", left, x.reshape(-1, len(self), self.layout.k, self.layout.k))
        return torch.einsum("gdiel,gdjel->gdij", half, right).reshape(x.shape)

    def _by_domain(self, number: int) -> list[Tensor]:
        """Overlaps of the left and of the right factors of a group, `[G, D, r, D, r]` each."""
        grams = [gram for side in self.grams.values() if (gram := side[number]) is not None]
        return [gram.unflatten(2, (-1, self.layout.k)).unflatten(1, (-1, self.layout.k)) for gram in grams]

    def _frame(self, own: str | None) -> Frame:
        active = self.active(own)
        domains = [i for i, name in enumerate(self.names) if name != own]
        D, width = len(domains), self.layout.width
        far = torch.zeros(self.layout.T, self.rows, dtype=torch.float64, device=self.device)
        spans: list[Span] = []
        columns = active.nonzero().squeeze(1)
        for number, group in enumerate(self.layout.groups):
            GL, GR = (gram[:, domains][:, :, :, domains] for gram in self._by_domain(number))
            if D <= 1:  # orthonormal factors: S is the identity
                far[group.rows, columns] = 1.0
                spans.append(Span(group.rows))
                continue
            if D == 2:
                pair = PairSpan(group.rows, GL[:, 0, :, 1], GR[:, 0, :, 1])
                far[group.rows, columns] = pair.reach
                spans.append(pair)
                continue
            for start in range(0, len(group.indices), 16):  # dense overlaps are large: some matrices at a time
                overlap = torch.einsum("gdiek,gdjel->gdijekl", GL[start : start + 16], GR[start : start + 16])
                rows = slice(group.first + start, group.first + start + overlap.shape[0])
                kind = PackedSpan if self.device.type == "cpu" else DenseSpan
                span = kind(rows, 1, overlap.reshape(-1, D * width, D * width))
                far[rows, columns] = span.reach
                spans.append(span)
        return Frame(active, spans, far, self.sign)
