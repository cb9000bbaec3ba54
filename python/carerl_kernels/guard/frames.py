"""How coefficients of overlapping rows become components, and components become an edit (MATH: combine rule)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..linalg import RCOND, loewdin_root, pinv_power

Combine = Literal["symmetric", "sum", "min_norm"]
COMBINES: tuple[Combine, ...] = get_args(Combine)


@dataclass(frozen=True)
class Span:
    """Coefficient rows that G matrices ``[G, A, A]`` belong to, ``each`` rows to one matrix. ``into`` None: the identity."""

    rows: slice
    each: int
    into: Tensor | None = None
    out: Tensor | None = None
    root: Tensor | None = None


class Frame:
    """Of one set of active rows with overlap S: symmetric ``into = out = (S^+)^(1/2)``, sum ``into = out = I``, min_norm
    ``into = I, out = S^+``. All maps take and give ``[T, K]`` float64; inactive rows count as zero and come out as zero.

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
            inner = overlap[:, columns][:, :, columns]
            spans.append(dense_span(rows, each, inner, combine))
            into = spans[-1].into
            assert into is not None
            reach[rows.start : rows.stop, columns] = _reach(into, inner).repeat_interleave(each, dim=0)
        return cls(active, spans, reach, sign)

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
        """Bytes of the matrices."""
        kept = {id(m): m for span in self.spans for m in (span.into, span.out, span.root) if m is not None}
        return sum(m.numel() * m.element_size() for m in kept.values()) + self.reach.numel() * 8

    def _apply(self, which: str, coeffs: Tensor) -> Tensor:
        if self.sign is not None:
            coeffs = self.sign * coeffs
        inner = coeffs[:, self._columns]
        mapped = torch.empty_like(inner)
        for span in self.spans:
            matrix, part = getattr(span, which), inner[span.rows]
            if matrix is not None and part.numel():
                part = (part.unflatten(0, (-1, span.each)) @ matrix.mT).flatten(0, 1)
            mapped[span.rows] = part
        out = torch.zeros_like(coeffs)
        out[:, self._columns] = mapped
        return out if self.sign is None else self.sign * out


def dense_span(rows: slice, each: int, overlap: Tensor, combine: Combine) -> Span:
    """Maps of one overlap ``[G, A, A]`` of active rows."""
    root = loewdin_root(overlap)
    if combine == "symmetric":
        return Span(rows, each, root, root, root)
    identity = torch.diag_embed((overlap.diagonal(dim1=-2, dim2=-1) > 0).to(overlap.dtype))
    if combine == "sum":
        return Span(rows, each, identity, identity, root)
    return Span(rows, each, identity, pinv_power(overlap, -1.0, RCOND), root)


def _reach(into: Tensor, overlap: Tensor) -> Tensor:
    return (into @ overlap @ into.mT).diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
