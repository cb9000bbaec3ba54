"""How coefficients of overlapping rows become components, and components become an edit (docs/math.md, "overlapping bases").

With overlap S of the acting rows both maps are R = (S^+)^(1/2): the edit operator is symmetric, never reverses a component and
counts shared directions once (Loewdin 1950).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from ..linalg import RCOND, loewdin_root


class Span:
    """R of some coefficient rows; the identity, unless a subclass knows better."""

    def __init__(self, rows: slice):
        self.rows = rows

    def apply(self, coeffs: Tensor) -> Tensor:
        """`R c` of coefficients `[..., rows, A]` of active columns."""
        return coeffs

    def part(self, first: int, last: int) -> Span:
        """The same of some of its rows."""
        out = copy(self)
        out.rows = slice(0, last - first)
        return out


class DenseSpan(Span):
    """From overlaps `[G, A, A]` float64, `each` coefficient rows to one of them."""

    def __init__(self, rows: slice, each: int, overlap: Tensor):
        super().__init__(rows)
        self.each = each
        self.root = loewdin_root(overlap)
        self.reach = reach(self.root, overlap).repeat_interleave(each, dim=0)

    def apply(self, coeffs: Tensor) -> Tensor:
        if not coeffs.numel():
            return coeffs
        # [G, ..., each, A]: a map is read once for all rows and all leading dimensions.
        parts = coeffs.unflatten(-2, (-1, self.each)).movedim(-3, 0)
        mapped = parts.flatten(1, -2) @ self.root.mT
        return mapped.view(parts.shape).movedim(0, -3).flatten(-3, -2)

    def part(self, first: int, last: int) -> Span:
        """Rows of whole matrices, or rows within one."""
        out = copy(self)
        out.rows, out.reach = slice(0, last - first), self.reach[first:last]
        out.each = min(self.each, last - first)
        out.root = self.root[first // self.each : -(-last // self.each)]
        return out


class PackedSpan(DenseSpan):
    """The same map in a quarter of the memory and of the time to read it: the upper triangle in float32.

    Vectors and sums stay float64, so that the map is linear to float64 and rounded once, by 2^-24, for good.
    """

    def __init__(self, rows: slice, each: int, overlap: Tensor):
        super().__init__(rows, each, overlap)
        size = overlap.shape[-1]
        row, column = torch.triu_indices(size, size, device=overlap.device)
        self.root = self.root[:, row, column].float()

    def apply(self, coeffs: Tensor) -> Tensor:
        flat = coeffs.reshape(-1, *coeffs.shape[-2:]).contiguous()
        return torch.ops.carerl.packed_times(self.root, flat).view(coeffs.shape)


class PairSpan(Span):
    """R of two domains' block directions, in closed form.

    These overlap by the Kronecker product of A = U_1^T U_2 and B = V_1^T V_2. In the singular vectors of both,
    `A = P a Q^T` and `B = P' b Q'^T`, S falls apart into 2 x 2 matrices with ones on the diagonal and s = a_i b_j beside
    it, whose eigenvalues are 1 + s and 1 - s: no matrix of r^2 x r^2 is ever built.

    Args:
        rows: one per matrix.
        left, right: A and B `[G, r, r]` float64. Factors are orthonormal, or zero in empty slots, whose coefficients are zero.
    """

    def __init__(self, rows: slice, left: Tensor, right: Tensor):
        super().__init__(rows)
        P, a, Qh = torch.linalg.svd(left)
        P2, b, Qh2 = torch.linalg.svd(right)
        self._turns = ((P, P2), (Qh.mT, Qh2.mT))  # of the first domain, of the second
        s = (a.unsqueeze(-1) * b.unsqueeze(-2)).clamp_max(1.0)
        values = torch.stack([1 + s, 1 - s])
        keep = values > RCOND * values.amax(dim=(0, -1, -2), keepdim=True)
        self._root = _even_odd(torch.where(keep, torch.where(keep, values, 1.0).rsqrt(), 0.0))
        inside = _even_odd(keep.to(left.dtype))[0]  # diagonal of the projector on the range of S
        squares = [U.square() @ inside @ V.square().mT for U, V in self._turns]
        self.reach = torch.stack(squares, dim=1).clamp_min(0.0).sqrt().flatten(1)

    def apply(self, coeffs: Tensor) -> Tensor:
        r = self._turns[0][0].shape[-1]
        X = coeffs.unflatten(-1, (2, r, r))
        x, y = (U.mT @ X[..., domain, :, :] @ V for domain, (U, V) in enumerate(self._turns))
        even, odd = self._root
        turned = (even * x + odd * y, odd * x + even * y)
        out = [U @ z @ V.mT for (U, V), z in zip(self._turns, turned, strict=True)]
        return torch.stack(out, dim=-3).flatten(-3)


def reach(root: Tensor, overlap: Tensor) -> Tensor:
    """`sqrt(diag(R S R))` `[..., A]`: how far a unit displacement along a row is in the frame; 1 without overlap."""
    return (root @ overlap @ root).diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()


def _even_odd(values: Tensor) -> tuple[Tensor, Tensor]:
    """Diagonal and off-diagonal of 2 x 2 matrices with eigenvectors (1, 1) and (1, -1), from their eigenvalues."""
    return (values[0] + values[1]) / 2, (values[0] - values[1]) / 2


class Frame:
    """R of one set of active rows. It takes and gives `[..., T, K]` float64; inactive rows count as zero and come out as zero.

    Args:
        active: `[K]` bool.
        spans: Spans that together cover the coefficient rows.
        reach: `[T, K]`, see :func:`reach`. Duplicated rows share one displacement; bounds scale with this so that they count
            once.
        sign: `[T, K]` orientation of rows whose directions are stored without it; the map is that of oriented rows.
    """

    def __init__(self, active: Tensor, spans: Sequence[Span], reach: Tensor, sign: Tensor | None = None):
        self.spans, self.reach, self.sign = tuple(spans), reach, sign
        self._columns = active.nonzero().squeeze(1)  # once per set of active rows, never in a step
        self._parts: dict[tuple[int, int], Frame] = {}

    @classmethod
    def dense(
        cls, overlaps: Sequence[tuple[slice, int, Tensor]], active: Tensor, T: int, sign: Tensor | None = None
    ) -> Frame:
        """From overlaps `[G, K, K]` float64, each with its coefficient rows and how many of them belong to one matrix."""
        columns = active.nonzero().squeeze(1)
        far = torch.zeros(T, active.numel(), dtype=torch.float64, device=active.device)
        spans = []
        for rows, each, overlap in overlaps:
            span = DenseSpan(rows, each, overlap[:, columns][:, :, columns])
            far[rows.start : rows.stop, columns] = span.reach
            spans.append(span)
        return cls(active, spans, far, sign)

    def part(self, rows: slice) -> Frame:
        """The frame of a chunk of coefficient rows."""
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

    def root(self, coeffs: Tensor) -> Tensor:
        """`R c`: components of coefficients, and edit coefficients x of changes of components."""
        if self.sign is not None:
            coeffs = self.sign * coeffs
        everything = self._columns.numel() == coeffs.shape[-1]
        inner = coeffs if everything else coeffs[..., self._columns]
        mapped = torch.empty_like(inner)
        for span in self.spans:
            mapped[..., span.rows, :] = span.apply(inner[..., span.rows, :])
        out = mapped
        if not everything:
            out = torch.zeros_like(coeffs)
            out[..., self._columns] = mapped
        return out if self.sign is None else out.mul_(self.sign)
