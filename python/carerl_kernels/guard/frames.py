"""How coefficients of overlapping rows become components, and components become an edit (MATH: combine rule)."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Literal, get_args

import torch
from torch import Tensor

from ..linalg import RCOND, loewdin_root, pinv_power

Combine = Literal["symmetric", "sum", "min_norm"]
COMBINES: tuple[Combine, ...] = get_args(Combine)
Which = Literal["into", "out", "root"]


class Span:
    """The maps of some coefficient rows; the identity, unless a subclass knows better.

    Args:
        rows: of the coefficients.
    """

    def __init__(self, rows: slice):
        self.rows = rows

    def apply(self, which: Which, coeffs: Tensor) -> Tensor:
        """Maps coefficients ``[..., rows, A]`` of active columns."""
        return coeffs

    def part(self, first: int, last: int) -> Span:
        """The same of some of its rows."""
        out = copy(self)
        out.rows = slice(0, last - first)
        return out

    def tensors(self) -> list[Tensor]:
        """What it keeps."""
        return []


class DenseSpan(Span):
    """Maps from overlaps ``[G, A, A]`` float64, ``each`` coefficient rows to one of them."""

    def __init__(self, rows: slice, each: int, overlap: Tensor, combine: Combine):
        super().__init__(rows)
        self.each = each
        self.root = self.into = self.out = loewdin_root(overlap)
        if combine != "symmetric":
            self.into = self.out = torch.diag_embed((overlap.diagonal(dim1=-2, dim2=-1) > 0).to(overlap.dtype))
        if combine == "min_norm":
            self.out = pinv_power(overlap, -1.0)
        square = (self.into @ overlap @ self.into.mT).diagonal(dim1=-2, dim2=-1)
        self.reach = square.clamp_min(0.0).sqrt().repeat_interleave(each, dim=0)

    def apply(self, which: Which, coeffs: Tensor) -> Tensor:
        if not coeffs.numel():
            return coeffs
        parts = coeffs.unflatten(-2, (-1, self.each)).movedim(
            -3, 0
        )  # [G, ..., each, A]: a map is read once for all of them
        mapped = parts.flatten(1, -2) @ getattr(self, which).mT
        return mapped.view(parts.shape).movedim(0, -3).flatten(-3, -2)

    def part(self, first: int, last: int) -> Span:
        """Rows of whole matrices, or rows within one."""
        out = copy(self)
        out.rows, out.reach = slice(0, last - first), self.reach[first:last]
        out.each = min(self.each, last - first)
        some = slice(first // self.each, -(-last // self.each))
        out.root, out.into, out.out = self.root[some], self.into[some], self.out[some]
        return out

    def tensors(self) -> list[Tensor]:
        return [self.root, self.into, self.out]


class PackedSpan(DenseSpan):
    """The same maps in a quarter of the memory and of the time to read it: of each the upper triangle in float32.

    Vectors and sums stay float64, so that maps are linear to float64 and rounded once, by 2^-24, for good.
    """

    def __init__(self, rows: slice, each: int, overlap: Tensor, combine: Combine):
        super().__init__(rows, each, overlap, combine)
        size = overlap.shape[-1]
        row, column = torch.triu_indices(size, size, device=overlap.device)
        packed = {id(map_): map_[:, row, column].float() for map_ in (self.root, self.into, self.out)}
        self.root, self.into, self.out = (packed[id(map_)] for map_ in (self.root, self.into, self.out))

    def apply(self, which: Which, coeffs: Tensor) -> Tensor:
        """See :class:`Span`; one coefficient row to each overlap."""
        flat = coeffs.reshape(-1, *coeffs.shape[-2:]).contiguous()
        return torch.ops.carerl.packed_times(getattr(self, which), flat).view(coeffs.shape)


class PairSpan(Span):
    """Maps of two domains' blocks, in closed form.

    Blocks overlap by the Kronecker product of A = U_1^T U_2 and B = V_1^T V_2. In the singular vectors of both,
    ``A = P a Q^T`` and ``B = P' b Q'^T``, S falls apart into 2 x 2 matrices with ones on the diagonal and s = a_i b_j beside
    it, whose eigenvalues are 1 + s and 1 - s: no matrix of r^2 x r^2 is ever built.

    Args:
        rows: one per matrix.
        left, right: A and B ``[G, r, r]`` float64. Factors are orthonormal, or zero in empty slots, whose coefficients are zero.
        combine: rule for overlapping rows.
    """

    def __init__(self, rows: slice, left: Tensor, right: Tensor, combine: Combine):
        super().__init__(rows)
        P, a, Qh = torch.linalg.svd(left)
        P2, b, Qh2 = torch.linalg.svd(right)
        self._turns = ((P, P2), (Qh.mT, Qh2.mT))  # of the first domain, of the second
        s = (a.unsqueeze(-1) * b.unsqueeze(-2)).clamp_max(1.0)
        values = torch.stack([1 + s, 1 - s])
        keep = values > RCOND * values.amax(dim=(0, -1, -2), keepdim=True)
        kept = torch.where(keep, values, 1.0)
        root = _even_odd(torch.where(keep, kept.rsqrt(), 0.0))
        self._maps: dict[Which, tuple[Tensor, Tensor] | None] = {"into": None, "out": None, "root": root}
        self.reach = torch.ones(left.shape[0], 2, *left.shape[1:], dtype=left.dtype, device=left.device)
        if combine == "symmetric":
            self._maps = {"into": root, "out": root, "root": root}
            inside = _even_odd(keep.to(left.dtype))[0]  # diagonal of the projector on the range of S
            for domain, (U, V) in enumerate(self._turns):
                self.reach[:, domain] = (U.square() @ inside @ V.square().mT).clamp_min(0.0).sqrt()
        elif combine == "min_norm":
            self._maps["out"] = _even_odd(torch.where(keep, 1 / kept, 0.0))
        self.reach = self.reach.flatten(1)

    def apply(self, which: Which, coeffs: Tensor) -> Tensor:
        maps = self._maps[which]
        if maps is None:
            return coeffs
        r = self._turns[0][0].shape[-1]
        X = coeffs.unflatten(-1, (2, r, r))
        x, y = (U.mT @ X[..., domain, :, :] @ V for domain, (U, V) in enumerate(self._turns))
        even, odd = maps
        turned = (even * x + odd * y, odd * x + even * y)
        out = [U @ z @ V.mT for (U, V), z in zip(self._turns, turned, strict=True)]
        return torch.stack(out, dim=-3).flatten(-3)

    def tensors(self) -> list[Tensor]:
        return [t for pair in (*self._turns, *(m for m in self._maps.values() if m is not None)) for t in pair]


def _even_odd(values: Tensor) -> tuple[Tensor, Tensor]:
    """Diagonal and off-diagonal of 2 x 2 matrices with eigenvectors (1, 1) and (1, -1), from their eigenvalues."""
    return (values[0] + values[1]) / 2, (values[0] - values[1]) / 2


class Frame:
    """Of one set of active rows with overlap S: symmetric ``into = out = (S^+)^(1/2)``, sum ``into = out = I``, min_norm
    ``into = I, out = S^+``. All maps take and give ``[..., T, K]`` float64; inactive rows count as zero and come out as zero.

    Args:
        active: ``[K]`` bool.
        spans: that together cover the coefficient rows.
        reach: ``[T, K]``, ``sqrt(diag(into S into^T))``: how far a unit displacement along a row is in the frame. Duplicated
            rows share one displacement in the symmetric frame; bounds scale with this so that they count once.
        sign: ``[T, K]`` orientation of rows whose directions are stored without it; the maps are those of oriented rows.
    """

    def __init__(self, active: Tensor, spans: Sequence[Span], reach: Tensor, sign: Tensor | None = None):
        self.active, self.spans, self.reach, self.sign = active, tuple(spans), reach, sign
        self._columns = active.nonzero().squeeze(1)  # once per set of active rows, never in a step
        self._parts: dict[tuple[int, int], Frame] = {}

    @classmethod
    def dense(
        cls,
        overlaps: Sequence[tuple[slice, int, Tensor]],
        active: Tensor,
        combine: Combine,
        T: int,
        sign: Tensor | None = None,
    ) -> Frame:
        """From overlaps ``[G, K, K]`` float64, each with its coefficient rows and how many of them belong to one matrix."""
        columns = active.nonzero().squeeze(1)
        reach = torch.zeros(T, active.numel(), dtype=torch.float64, device=active.device)
        spans = []
        for rows, each, overlap in overlaps:
            span = DenseSpan(rows, each, overlap[:, columns][:, :, columns], combine)
            reach[rows.start : rows.stop, columns] = span.reach
            spans.append(span)
        return cls(active, spans, reach, sign)

    def part(self, rows: slice) -> Frame:
        """The frame of a block of coefficient rows."""
        first, last, _ = rows.indices(self.reach.shape[0])
        if (first, last) == (0, self.reach.shape[0]):
            return self
        if (first, last) not in self._parts:
            spans = []
            for span in self.spans:
                start, stop = max(first, span.rows.start), min(last, span.rows.stop)
                if start < stop:
                    piece = span.part(start - span.rows.start, stop - span.rows.start)
                    piece.rows = slice(start - first, stop - first)
                    spans.append(piece)
            part = copy(self)
            part.spans, part.reach, part._parts = tuple(spans), self.reach[rows], {}
            part.sign = None if self.sign is None else self.sign[rows]
            self._parts[first, last] = part
        return self._parts[first, last]

    def into(self, coeffs: Tensor) -> Tensor:
        """Components of coefficients."""
        return self._apply("into", coeffs)

    def out(self, components: Tensor) -> Tensor:
        """Edit coefficients x of changes of components."""
        return self._apply("out", components)

    def inside(self, coeffs: Tensor) -> Tensor:
        """Components in the orthonormal frame whatever the combine: their norm is that of the part in the span of the rows."""
        return self._apply("root", coeffs)

    def memory(self) -> int:
        """Bytes of what it keeps."""
        kept = {t.data_ptr(): t for span in self.spans for t in span.tensors()}
        return sum(t.numel() * t.element_size() for t in (*kept.values(), self.reach))

    def _apply(self, which: Which, coeffs: Tensor) -> Tensor:
        if self.sign is not None:
            coeffs = self.sign * coeffs
        everything = self._columns.numel() == coeffs.shape[-1]
        inner = coeffs if everything else coeffs[..., self._columns]
        mapped = torch.empty_like(inner)
        for span in self.spans:
            mapped[..., span.rows, :] = span.apply(which, inner[..., span.rows, :])
        out = mapped
        if not everything:
            out = torch.zeros_like(coeffs)
            out[..., self._columns] = mapped
        return out if self.sign is None else out.mul_(self.sign)
