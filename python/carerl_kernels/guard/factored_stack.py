"""Acting directions of block bases, and what they share with those of input bases: factors per weight matrix, thin products."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..subspace.factored import FactoredBasis, orthonormal
from ..subspace.matrices import Group, MatrixLayout
from ..thin import full_precision
from .frames import DenseSpan, Frame, PackedSpan, PairSpan, Span
from .stack import Stack

UNORIENTED = 1e-3
"""Coefficients of the stage's change below this share of the matrix's largest give a direction no orientation."""


class FactoredStack(Stack[MatrixLayout, FactoredBasis]):
    """What block and input bases share. Factors are float32, orthonormal per domain and matrix, columns domain after domain."""

    def __init__(self, layout: MatrixLayout, device: torch.device):
        super().__init__(layout, device)
        none = [None] * len(layout.groups)
        # by side, of each group that has factors there: these `[G, m or n, D*r]`, and their overlaps `[G, D*r, D*r]` float64
        self.factors: dict[str, list[Tensor | None]] = {"left": list(none), "right": list(none)}
        self.grams: dict[str, list[Tensor | None]] = {"left": list(none), "right": list(none)}
        # float32, gradient convention; empty for a domain without a stage
        self._moved: dict[str, dict[str, Tensor]] = {}
        self._oriented: tuple[Tensor, Tensor] | None = None
        self._values: dict[str, Mapping[str, Tensor]] = {}

    def _put(self, basis: FactoredBasis, others: list[int], parameters: Sequence[Tensor]) -> None:
        layout, r = self.layout, self.layout.k
        basis = basis.part_of(layout)
        for number, group in enumerate(layout.groups):
            for side, by_name, shards in (("left", basis.left, layout.shards), ("right", basis.right, None)):
                if group.side not in ("both", side):
                    continue
                fresh = torch.stack([by_name[n].to(self.device, torch.float32) for n in layout.labels(group)])
                fresh = orthonormal(fresh, shards)  # also after rounding to bfloat16
                before = self.factors[side][number]
                kept = [] if before is None else [before.unflatten(2, (-1, r))[:, :, others].flatten(2)]
                factors = self.factors[side][number] = torch.cat([*kept, fresh], dim=2)
                wide = factors.double()
                gram = wide.mT @ wide
                self.grams[side][number] = gram if shards is None else shards.sum_(gram)
        moved = {name: t.to(self.device, torch.float32) for name, t in basis.moved.items()}
        self._moved[basis.info.domain] = moved if any(bool(t.any()) for t in moved.values()) else {}
        self._values[basis.info.domain] = basis.values
        self._oriented = None

    @property
    def displacement(self) -> Tensor:
        return self._orientation()[0]

    @property
    def sign(self) -> Tensor:
        """`[T, K]` orientation of the directions, 1 where there is none."""
        return self._orientation()[1]

    def recorded_size(self, domain: str) -> float:
        squares = torch.zeros(self.layout.T, self.layout.width, dtype=torch.float64, device=self.device)
        for group in self.layout.groups if self._moved[domain] else ():
            for _, name, rows in self.layout.matrices(group):
                squares[rows] = self._moved[domain][name].reshape(-1, self.layout.width).double().square()
        return float(self.column_sums(squares).sum().sqrt())

    def _orientation(self) -> tuple[Tensor, Tensor]:
        """Displacement and sign of every coefficient, made when a rule that decides step by step asks for them."""
        if self._oriented is None:
            moved = torch.zeros(self.layout.T, self.rows, dtype=torch.float64, device=self.device)
            for domain in self.names:
                for group in self.layout.groups if self._moved[domain] else ():
                    for _, name, rows in self.layout.matrices(group):
                        part = self._moved[domain][name].reshape(-1, self.layout.width)
                        moved[rows, self.columns(domain)] = part.to(moved.dtype)
            sign = torch.where(moved < 0, -1.0, 1.0).to(moved.dtype)
            for group in self.layout.groups:
                size = moved[group.rows].abs().unflatten(0, (-1, group.each)) if group.each else moved[group.rows]
                size = size.unflatten(-1, (-1, self.layout.width)) if size.numel() else size
                if size.numel():  # [G, each, D, width]
                    faint = size < UNORIENTED * size.amax(dim=(1, 3), keepdim=True)
                    sign[group.rows] = torch.where(faint.flatten(2).flatten(0, 1), 1.0, sign[group.rows])
            self._oriented = moved.abs(), sign
        return self._oriented

    def get(self, domain: str) -> FactoredBasis:
        r, at = self.layout.k, self.names.index(domain)
        factors: dict[str, dict[str, Tensor]] = {"left": {}, "right": {}}
        moved = {}
        signed = (self.sign * self.displacement)[:, self.columns(domain)]
        for number, group in enumerate(self.layout.groups):
            for position, name, rows in self.layout.matrices(group):
                for side, by_group in self.factors.items():
                    if (stored := by_group[number]) is not None:
                        factors[side][name] = stored[position, :, at * r : (at + 1) * r]
                moved[name] = signed[rows].reshape(-1, r)
        layout = self.layout if self.layout.shards.sharded else None
        return FactoredBasis(self.infos[domain], **factors, values=self._values[domain], moved=moved, layout=layout)

    def _factors(self, number: int, domain: str | None) -> tuple[Tensor | None, Tensor | None]:
        """Factors of a group, of all domains or of one."""
        both = self.factors["left"][number], self.factors["right"][number]
        if domain is None:
            return both
        first = self.names.index(domain) * self.layout.k
        left, right = (None if f is None else f[:, :, first : first + self.layout.k].contiguous() for f in both)
        return left, right

    def project(self, tensors: Sequence[Tensor], domain: str | None = None, out: Tensor | None = None) -> Tensor:
        D, width = len(self) if domain is None else 1, self.layout.width
        if out is None:
            out = torch.empty(self.layout.T, D * width, dtype=torch.float64, device=self.device)
        self._fill_(out.zero_(), tensors, domain)
        return out.mul_(self.sign if domain is None else self.sign[:, self.columns(domain)])

    def _fill_(self, out: Tensor, tensors: Sequence[Tensor], domain: str | None) -> None:
        """Coefficients without orientation, into zeros."""
        with full_precision(self.device):
            for number, group in enumerate(self.layout.groups):
                if group.m:
                    self._coefficients(out, number, group, tensors, domain)
        self._sum_(out)

    def edit_(self, tensors: Sequence[Tensor], mix: Tensor, scale: Tensor | None = None) -> None:
        if scale is not None:
            # Matrices without directions are scaled, too; a factor that is not finite moves nothing.
            factor = torch.where(scale.isfinite() & mix.isfinite().all(), scale, 1.0)
            for tensor in tensors:
                tensor.mul_(factor.to(tensor.device, tensor.dtype))
            mix = mix * factor
        elif mix.device.type == "cpu" and not mix.any():
            return  # nothing to correct
        finite = torch.ops.carerl.all_finite([mix.contiguous()])
        with full_precision(self.device):
            for number, group in enumerate(self.layout.groups):
                if group.m:
                    part = torch.where(finite, self.sign[group.rows] * mix[group.rows], 0.0).float()
                    self._add_(number, group, tensors, part)

    def overlap_times(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        first, last, _ = rows.indices(self.layout.T)
        sign, out = self.sign[rows], torch.zeros_like(x)
        signed = sign * x
        for number, group in enumerate(self.layout.groups):
            start, stop = max(first, group.rows.start), min(last, group.rows.stop)
            if start < stop:
                here, each = slice(start - first, stop - first), min(group.each, stop - start)
                matrices = slice((start - group.first) // group.each, -(-(stop - group.first) // group.each))
                part = signed[here].unflatten(0, (-1, each))
                out[here] = self._gram_times(number, part, matrices).flatten(0, 1)
        return out.mul_(sign)

    def unpack(self, rows: Tensor) -> Any:
        return self.layout.unpack(rows)

    def pack_(self, rows: Tensor, parts: Any) -> None:
        self.layout.pack_(rows, parts)

    # What differs.

    @abstractmethod
    def _sum_(self, coeffs: Tensor) -> None: ...

    @abstractmethod
    def _coefficients(
        self, out: Tensor, number: int, group: Group, tensors: Sequence[Tensor], domain: str | None
    ) -> None:
        """Puts the coefficients of a group into its rows of `out`."""

    @abstractmethod
    def _add_(self, number: int, group: Group, tensors: Sequence[Tensor], mix: Tensor) -> None:
        """Adds `A^T mix` to the matrices of a group; mix `[rows of the group, K]` float32."""

    @abstractmethod
    def _gram_times(self, number: int, x: Tensor, matrices: slice) -> Tensor:
        """`S x` of some matrices of a group, x `[matrices, rows of each, K]`."""


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
