"""The directions of all domains with history, acting together: rows over all parameters, or factors per weight matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .._ops import SCALED_DTYPES
from ..subspace.layout import Layout
from ..subspace.matrices import MatrixLayout
from ..subspace.store import BasisError, BasisInfo, DomainBasis, StoredBasis
from .frames import Combine, Frame

ROUNDING = {
    torch.float32: 0.0,
    torch.float16: 0.0002,
    torch.bfloat16: 0.0017,
    torch.int8: 0.0065,
    torch.float8_e4m3fn: 0.026,
}
"""Relative error of directions stored like this (the last two: with a scale per block of 128)."""

TIMES_CHANCE = 3.0


def noise_floor(chance: float) -> float:
    """What a basis has to explain to know something: thrice what random directions explain, or half of what those leave over."""
    return min(TIMES_CHANCE * chance, (1 + chance) / 2)


L = TypeVar("L", Layout, MatrixLayout)
B = TypeVar("B", bound=StoredBasis)


class Stack(ABC, Generic[L, B]):
    """What the guard asks of the directions A of every domain, whatever they look like: one interface for all bases.

    Coefficients are ``[T, K]`` float64: T rows of the layout, K = D * width columns, domain after domain. S = A A^T.

    Args:
        layout: of the guarded parameters.
        combine: rule for overlapping rows.
        device: of the parameters.

    Attributes:
        names: domains with history, oldest first; infos: what is known about their bases.
        displacement: h ``[T, K]``, at least zero: how far each recorded stage moved along its directions.
    """

    def __init__(self, layout: L, combine: Combine, device: torch.device):
        self.layout: L = layout
        self.combine, self.device = combine, device
        self.names: list[str] = []
        self.infos: dict[str, BasisInfo] = {}
        self.displacement = torch.zeros(layout.T, 0, dtype=torch.float64, device=device)
        self._frames: dict[str | None, Frame] = {}

    def __len__(self) -> int:
        return len(self.names)

    @property
    def rows(self) -> int:
        """K, coefficients of all domains per row of the layout."""
        return len(self) * self.layout.width

    @property
    def rounding(self) -> float:
        """Relative error of the stored directions."""
        return 0.0

    def chance(self, domain: str) -> float:
        """Share of a displacement's energy that random directions, as many as the domain has, would hold."""
        return self.layout.chance

    def acting(self, domain: str) -> float:
        """Share of what the domain's directions hold that acts: less than 1 where others took the room."""
        return 1.0

    def present(self, domain: str) -> Tensor:
        """``[T, width]`` bool: coefficients whose direction acts."""
        return torch.ones(self.layout.T, self.layout.width, dtype=torch.bool, device=self.device)

    @property
    def blocks(self) -> Sequence[slice]:
        """Coefficient rows that are decided on at a time, together all of them; no row has to do with those of other blocks."""
        return (slice(0, self.layout.T),)

    def columns(self, domain: str) -> slice:
        """The coefficients of one domain among the K."""
        at = self.names.index(domain) * self.layout.width
        return slice(at, at + self.layout.width)

    def put(self, basis: B, parameters: Sequence[Tensor]) -> None:
        """Adds a domain, or replaces its earlier recording, given the local parts of the parameters.

        Raises:
            BasisError: another kind or number of directions.
        """
        self._check_kind(basis)
        info = basis.info
        others = [i for i, other in enumerate(self.names) if other != info.domain]
        moved = self._put(basis, others, parameters)
        kept: list[Tensor] = (
            [self.displacement.unflatten(1, (-1, self.layout.width))[:, others].flatten(1)] if others else []
        )
        self.displacement = torch.cat([*kept, moved.to(self.device, torch.float64)], dim=1)
        self.names = [self.names[i] for i in others] + [info.domain]
        self.infos = {**{name: self.infos[name] for name in self.names[:-1]}, info.domain: info}
        self._frames.clear()

    def _check_kind(self, basis: B) -> None:
        info = basis.info
        if (info.kind, info.k) != (self.layout.kind, self.layout.k):
            raise BasisError(
                f"basis of domain {info.domain!r}: expected kind {self.layout.kind} with k = {self.layout.k}, found "
                f"{info.kind} with k = {info.k}; all domains of a guard share both"
            )

    def active(self, own: str | None) -> Tensor:
        """``[K]`` bool: every row but those of the batch's own domain."""
        mask = torch.ones(self.rows, dtype=torch.bool, device=self.device)
        if own in self.names:
            mask[self.columns(own)] = False
        return mask

    def frame(self, own: str | None) -> Frame:
        """The cached frame of the rows that act on a batch of this domain."""
        key = own if own in self.names else None
        if key not in self._frames:
            self._frames[key] = self._frame(key)
        return self._frames[key]

    @abstractmethod
    def _put(self, basis: B, others: list[int], parameters: Sequence[Tensor]) -> Tensor:
        """Stores directions after those of the other domains (positions to keep); returns h ``[T, width]``."""

    @abstractmethod
    def _frame(self, own: str | None) -> Frame: ...

    @abstractmethod
    def get(self, domain: str) -> B:
        """One domain's basis as stored here; views where possible."""

    @abstractmethod
    def project(self, tensors: Sequence[Tensor], domain: str | None = None, out: Tensor | None = None) -> Tensor:
        """Coefficients ``A t``: ``[T, K]``, or ``[T, width]`` on one domain's directions only; perhaps in ``out``."""

    @abstractmethod
    def edit_(self, tensors: Sequence[Tensor], mix: Tensor, scale: Tensor | None = None) -> None:
        """``t <- scale*(t + A^T mix)`` in place, scale 0-d; nothing moves where mix or scale is not finite."""

    @abstractmethod
    def overlap_times(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """``S x``, all of it ``[T, K]`` or one of the blocks."""

    @abstractmethod
    def memory(self) -> int:
        """Bytes of directions, overlaps and cached frames in this process."""

    def column_sums(self, values: Tensor) -> Tensor:
        """Sums ``[..., K]`` over all coefficient rows of values ``[..., T, K]``, those of other processes included."""
        return self.summed(self.own_sums(values))

    def own_sums(self, values: Tensor, rows: slice = slice(None)) -> Tensor:
        """What all rows here, or those of a block, add to the sums."""
        return values.sum(-2)

    def summed(self, sums: Tensor) -> Tensor:
        """Own sums of all processes together."""
        return sums

    def all_finite(self, coeffs: Tensor) -> Tensor:
        """0-d bool, the same in every process: whether coefficients are finite everywhere."""
        return torch.ops.carerl.all_finite([coeffs.contiguous()])

    def unpack(self, rows: Tensor) -> Any:
        """Numbers per coefficient row ``[T, ...]``, as a checkpoint can keep them; :meth:`pack_` takes them back."""
        return rows.clone()

    def pack_(self, rows: Tensor, parts: Any) -> None:
        rows.copy_(parts)

    def _frames_memory(self) -> int:
        return sum(frame.memory() for frame in self._frames.values())


class RowStack(Stack[Layout, DomainBasis]):
    """Flat and per-matrix bases: one ``[D, k, N]`` tensor, so that one pass serves all domains.

    Args:
        layout, combine, device: see :class:`Stack`.
        dtype: float32, bfloat16, float16, int8 or float8_e4m3fn (both block-scaled) storage.
    """

    def __init__(self, layout: Layout, combine: Combine, dtype: torch.dtype, device: torch.device):
        super().__init__(layout, combine, device)
        self.dtype = dtype
        self.bases = torch.zeros(0, layout.k, layout.size, dtype=dtype, device=device)  # [D, k, N]
        self.scales: Tensor | None = None
        self.overlap = torch.zeros(layout.T, 0, 0, dtype=torch.float64, device=device)  # S [T, K, K]
        self._spectra: dict[str, Tensor] = {}

    @property
    def rounding(self) -> float:
        return ROUNDING[self.dtype]

    def _put(self, basis: DomainBasis, others: list[int], parameters: Sequence[Tensor]) -> Tensor:
        rows, scales = self._converted(basis)
        self.bases = torch.cat([self.bases[others], rows.unsqueeze(0)])
        if scales is not None:
            old = [] if self.scales is None else [self.scales[others]]
            self.scales = torch.cat([*old, scales.unsqueeze(0)])
        self._spectra[basis.info.domain] = basis.singular_values
        K = (len(others) + 1) * self.layout.k
        self.overlap = self.layout.gram(self.bases, parameters, self.scales)[:, :K, :K].contiguous()
        return basis.displacement

    def _converted(self, basis: DomainBasis) -> tuple[Tensor, Tensor | None]:
        basis = basis.part_of(self.layout)
        if self.dtype in SCALED_DTYPES:
            basis = basis.quantized(dtype=self.dtype)
            assert basis.scales is not None
            return basis.directions.to(self.device), basis.scales.to(self.device)
        return basis.dequantized().directions.to(self.device, self.dtype), None

    def _frame(self, own: str | None) -> Frame:
        everything = (slice(0, self.layout.T), 1, self.overlap)
        return Frame.dense([everything], self.active(own), self.combine, self.layout.T)

    def get(self, domain: str) -> DomainBasis:
        at = self.names.index(domain)
        scales = None if self.scales is None else self.scales[at]
        moved = self.displacement[:, self.columns(domain)]
        layout = self.layout if self.layout.shards.sharded else None
        return DomainBasis(self.infos[domain], self.bases[at], self._spectra[domain], moved, scales, layout)

    def project(self, tensors: Sequence[Tensor], domain: str | None = None, out: Tensor | None = None) -> Tensor:
        if domain is None:
            return self.layout.project(tensors, self.bases, self.scales)
        at = self.names.index(domain)
        scales = None if self.scales is None else self.scales[at : at + 1]
        return self.layout.project(tensors, self.bases[at : at + 1], scales)

    def edit_(self, tensors: Sequence[Tensor], mix: Tensor, scale: Tensor | None = None) -> None:
        if scale is None:
            if mix.device.type == "cpu" and not mix.any():
                return  # nothing to correct; asking costs nothing where it needs no synchronisation
            scale = torch.ones((), device=mix.device)
        self.layout.edit_(tensors, self.bases, mix, scale.float().expand(mix.shape[0]).contiguous(), self.scales)

    def overlap_times(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        return (self.overlap[rows] @ x.unsqueeze(-1)).squeeze(-1)

    def memory(self) -> int:
        tensors = [self.bases, self.overlap] + ([] if self.scales is None else [self.scales])
        return sum(t.numel() * t.element_size() for t in tensors) + self._frames_memory()
