"""The directions of all domains with history, acting together: rows over all parameters, or factors per weight matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence, Set
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .._ops import SCALED_DTYPES
from ..linalg import dacsp_core
from ..subspace.layout import Layout
from ..subspace.matrices import MatrixLayout
from ..subspace.store import BasisError, BasisInfo, DomainBasis, StoredBasis
from .frames import DenseSpan, Frame
from .rules import RuleParams, beyond

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

    Coefficients are `[T, K]` float64: T rows of the layout, K = D * width columns, domain after domain. S = A A^T.
    """

    def __init__(self, layout: L, device: torch.device):
        self.layout: L = layout
        self.device = device
        self.names: list[str] = []  # domains with history, oldest first
        self.infos: dict[str, BasisInfo] = {}  # of their bases
        self._frames: dict[str | None, Frame] = {}

    def __len__(self) -> int:
        return len(self.names)

    @property
    def rows(self) -> int:
        """K, coefficients of all domains per row of the layout."""
        return len(self) * self.layout.width

    @property
    @abstractmethod
    def displacement(self) -> Tensor:
        """h `[T, K]` float64, at least zero: how far each recorded stage moved along its directions."""

    @abstractmethod
    def recorded_size(self, domain: str) -> float:
        """Norm of what the recorded stage moved along its directions; 0 without a stage."""

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
        """`[T, width]` bool: coefficients whose direction acts."""
        return torch.ones(self.layout.T, self.layout.width, dtype=torch.bool, device=self.device)

    @property
    def chunks(self) -> Sequence[slice]:
        """Coefficient rows that are decided on at a time, together all of them; no row has to do with those of other chunks."""
        return (slice(0, self.layout.T),)

    def columns(self, domain: str) -> slice:
        """The coefficients of one domain among the K."""
        at = self.names.index(domain) * self.layout.width
        return slice(at, at + self.layout.width)

    def put(self, basis: B, parameters: Sequence[Tensor]) -> None:
        """Adds a domain, or replaces its earlier recording, given the local parts of the parameters."""
        self._check_kind(basis)
        info = basis.info
        others = [i for i, other in enumerate(self.names) if other != info.domain]
        self._put(basis, others, parameters)
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

    def explained(self, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Share of a gradient's energy along all directions, and the energy; 0-d float64."""
        inside = self.column_sums(self.frame(None).root(self.project(grads)).square()).sum()
        total = self.layout.shards.sum_(torch.stack([g.double().square().sum() for g in grads]).sum())
        return inside / total.clamp_min(1e-300), total

    def active(self, own: str | None) -> Tensor:
        """`[K]` bool: every row but those of the batch's own domain."""
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
    def _put(self, basis: B, others: list[int], parameters: Sequence[Tensor]) -> None:
        """Stores directions, and how far the stage moved, after those of the other domains (positions to keep)."""

    @abstractmethod
    def _frame(self, own: str | None) -> Frame: ...

    @abstractmethod
    def get(self, domain: str) -> B:
        """One domain's basis as stored here; views where possible."""

    @abstractmethod
    def project(self, tensors: Sequence[Tensor], domain: str | None = None, out: Tensor | None = None) -> Tensor:
        """Coefficients `A t`: `[T, K]`, or `[T, width]` on one domain's directions only; perhaps in `out`."""

    @abstractmethod
    def edit_(self, tensors: Sequence[Tensor], mix: Tensor, scale: Tensor | None = None) -> None:
        """`t <- scale*(t + A^T mix)` in place, scale 0-d; nothing moves where mix or scale is not finite."""

    def measure(self, parameters: Sequence[Tensor], domain: str | None = None) -> Tensor:
        """Coefficients of the parameters as the box remembers them: `[T, K]`, or `[T, width]` of one domain."""
        return self.project(parameters, domain)

    def confine_(
        self,
        parameters: Sequence[Tensor],
        anchor: Tensor,
        bounds: RuleParams | None,
        own: str | None,
        exempt: Set[int] = frozenset(),
        tight: Set[int] = frozenset(),
    ) -> Tensor:
        """Puts parameters back into the box around an anchor, in place (docs/math.md, "bounded displacement (box)").

        Args:
            parameters: local parts.
            anchor: The coefficients that the box is around, from :meth:`measure`.
            bounds: how far "bounded" lets every row move; None: nowhere.
            own: domain whose rows do not act.
            exempt: Indices of parameters that move freely.
            tight: Indices of parameters that no bound is for.

        Returns:
            0-d float64, the energy of the correction here; processes add up.
        """
        q, frame = self.project(parameters), self.frame(own)
        D = frame.root(torch.where(self.active(own) & self.all_finite(q), anchor - q, 0.0))
        out = D if bounds is None else beyond(D, bounds, frame.reach, self.displacement)
        self.edit_(parameters, frame.root(out))
        energy = out.square().sum()
        return energy if self.layout.shards.rank == 0 else torch.zeros_like(energy)

    # What lies along other domains' directions, to be taken out of gradients. Linear in them: parts may be added and subtracted.

    def seen(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Coefficients of tensors as :meth:`along` takes them, in as many parts as suits the directions."""
        return [self.project(tensors)]

    def along(self, parts: Sequence[Tensor], own: str | None) -> list[Tensor]:
        """From :meth:`seen`, what :meth:`remove_` has to take out so that nothing is left along directions of other domains."""
        frame = self.frame(own)
        return [frame.root(frame.root(part)) for part in parts]

    def remove_(self, tensors: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
        """Takes sums of :meth:`along` out of tensors, in place."""
        (mix,) = parts
        self.edit_(tensors, -mix)

    @abstractmethod
    def overlap_times(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """`S x`, all of it `[T, K]` or one of the chunks."""

    def column_sums(self, values: Tensor) -> Tensor:
        """Sums `[..., K]` over all coefficient rows of values `[..., T, K]`, those of other processes included."""
        return self.summed(self.own_sums(values))

    def own_sums(self, values: Tensor, rows: slice = slice(None)) -> Tensor:
        """Sums over the coefficient rows that are this process's to count, all of them or those of a chunk."""
        return values.sum(-2)

    def summed(self, sums: Tensor) -> Tensor:
        """:meth:`own_sums` added up over all processes."""
        return sums

    def all_finite(self, coeffs: Tensor) -> Tensor:
        """0-d bool, the same in every process: whether coefficients are finite everywhere."""
        return torch.ops.carerl.all_finite([coeffs.contiguous()])

    def unpack(self, rows: Tensor) -> Any:
        """Numbers per coefficient row `[T, ...]`, as a checkpoint can keep them; :meth:`pack_` takes them back."""
        return rows.clone()

    def pack_(self, rows: Tensor, parts: Any) -> None:
        rows.copy_(parts)


class RowStack(Stack[Layout, DomainBasis]):
    """Flat and per-matrix bases: one `[D, k, N]` tensor, so that one pass serves all domains; int8 and float8_e4m3fn are
    block-scaled."""

    def __init__(self, layout: Layout, dtype: torch.dtype, device: torch.device):
        super().__init__(layout, device)
        self.dtype = dtype
        self.bases = torch.zeros(0, layout.k, layout.size, dtype=dtype, device=device)  # [D, k, N]
        self.scales: Tensor | None = None
        self.overlap = torch.zeros(layout.T, 0, 0, dtype=torch.float64, device=device)  # S [T, K, K]
        self._moved = torch.zeros(layout.T, 0, dtype=torch.float64, device=device)
        self._spectra: dict[str, Tensor] = {}

    @property
    def displacement(self) -> Tensor:
        return self._moved

    def recorded_size(self, domain: str) -> float:
        return float(self._moved[:, self.columns(domain)].square().sum().sqrt())

    @property
    def rounding(self) -> float:
        return ROUNDING[self.dtype]

    def _put(self, basis: DomainBasis, others: list[int], parameters: Sequence[Tensor]) -> None:
        rows, scales = self._converted(basis)
        self.bases = torch.cat([self.bases[others], rows.unsqueeze(0)])
        if scales is not None:
            old = [] if self.scales is None else [self.scales[others]]
            self.scales = torch.cat([*old, scales.unsqueeze(0)])
        self._spectra[basis.info.domain] = basis.singular_values
        K = (len(others) + 1) * self.layout.k
        self.overlap = self.layout.gram(self.bases, parameters, self.scales)[:, :K, :K].contiguous()
        kept = [self._moved.unflatten(1, (-1, self.layout.k))[:, others].flatten(1)] if others else []
        self._moved = torch.cat([*kept, basis.displacement.to(self.device, torch.float64)], dim=1)

    def _converted(self, basis: DomainBasis) -> tuple[Tensor, Tensor | None]:
        basis = basis.part_of(self.layout)
        if self.dtype in SCALED_DTYPES:
            basis = basis.quantized(dtype=self.dtype)
            assert basis.scales is not None
            return basis.directions.to(self.device), basis.scales.to(self.device)
        return basis.dequantized().directions.to(self.device, self.dtype), None

    def _frame(self, own: str | None) -> Frame:
        everything = (slice(0, self.layout.T), 1, self.overlap)
        return Frame.dense([everything], self.active(own), self.layout.T)

    def get(self, domain: str) -> DomainBasis:
        at = self.names.index(domain)
        scales = None if self.scales is None else self.scales[at]
        moved = self.displacement[:, self.columns(domain)]
        layout = self.layout if self.layout.shards.sharded else None
        return DomainBasis(self.infos[domain], self.bases[at], self._spectra[domain], moved, scales, layout)

    def project(self, tensors: Sequence[Tensor], domain: str | None = None, out: Tensor | None = None) -> Tensor:
        at = slice(None)
        if domain is not None:
            at = slice(self.names.index(domain), self.names.index(domain) + 1)
        return self.layout.project(tensors, self.bases[at], None if self.scales is None else self.scales[at])

    def edit_(self, tensors: Sequence[Tensor], mix: Tensor, scale: Tensor | None = None) -> None:
        if scale is None:
            if mix.device.type == "cpu" and not mix.any():
                return  # nothing to correct; asking costs nothing where it needs no synchronisation
            scale = torch.ones((), device=mix.device)
        self.layout.edit_(tensors, self.bases, mix, scale.float().expand(mix.shape[0]).contiguous(), self.scales)

    def dacsp_(
        self, grads: Sequence[Tensor], own: str | None, params: RuleParams, floor: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """The sign rule on gradients in one op: projected, classified by sign, reweighted, edited in place.

        Args:
            grads: whole, finite or left alone.
            own: domain whose rows do not act.
            floor: smallest coefficient whose sign counts.

        Returns:
            Coefficients of the rows that act, and what was taken out along them: `[T, K]` float64.
        """
        active, T, K, root = self.active(own), self.layout.T, self.rows, self.root(own)
        threshold = torch.as_tensor(floor, dtype=torch.float32, device=self.device).expand(K).contiguous()
        weights = (params.aligned.float(), params.conflict.float(), threshold)
        c = torch.zeros(T, K, dtype=torch.float64, device=self.device)
        for call, some, offsets in self.layout.over(grads):
            rows = call.index(self.device)
            combine, each = root[rows] if call.per_tensor else root[call.rows[0]], call.per_tensor
            op = torch.ops.carerl.dacsp_.list_tensor
            found, _ = op(some, self.bases, offsets, *weights, combine, self.scales, each)
            c[rows] = found.view(len(call.rows), K).to(c)
        c = torch.where(active & c.isfinite().all(), c, 0.0)
        aligned, conflict, threshold = (w.double() for w in weights)
        _, x = dacsp_core(c, aligned, conflict, threshold, root)
        return c, -x

    def root(self, own: str | None) -> Tensor:
        """R `[T, K, K]` float64 of the rows that act on a domain's steps, zero for the others."""
        root = torch.zeros(self.layout.T, self.rows, self.rows, dtype=torch.float64, device=self.device)
        columns = self.active(own).nonzero().squeeze(1)
        (span,) = self.frame(own).spans
        assert isinstance(span, DenseSpan)
        root[:, columns.unsqueeze(1), columns] = span.root
        return root

    @property
    def one_call_each(self) -> bool:
        """Whether one call sees everything that belongs to a coefficient row: pooled tensors of several dtypes take several."""
        rows = [row for call in self.layout.calls for row in call.rows]
        return len(rows) == len(set(rows))

    def overlap_times(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        return (self.overlap[rows] @ x.unsqueeze(-1)).squeeze(-1)
