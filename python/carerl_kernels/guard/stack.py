"""The stacked directions of all domains with history, and the frames of every set of them that acts together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._ops import SCALED_DTYPES
from ..subspace import BasisError, DomainBasis, Layout
from .rules import Combine, Frame


class BasisStack:
    """The rows A of every domain with history as one ``[D, k, N]`` tensor, so that one pass serves all of them.

    Args:
        layout: of the guarded parameters.
        combine: rule for overlapping rows.
        dtype: float32, bfloat16, float16, int8 or float8_e4m3fn (both block-scaled) storage.
        device: of the parameters.
    """

    def __init__(self, layout: Layout, combine: Combine, dtype: torch.dtype, device: torch.device):
        self.layout, self.combine, self.dtype, self.device = layout, combine, dtype, device
        self.names: list[str] = []
        self.infos: dict[str, DomainBasis] = {}
        self.bases = torch.zeros(0, layout.k, layout.size, dtype=dtype, device=device)  # [D, k, N]
        self.scales: Tensor | None = None
        self.displacement = torch.zeros(layout.T, 0, dtype=torch.float64, device=device)  # h [T, K]
        self.overlap = torch.zeros(layout.T, 0, 0, dtype=torch.float64, device=device)  # S [T, K, K]
        self._frames: dict[str | None, Frame] = {}

    def __len__(self) -> int:
        return len(self.names)

    @property
    def rows(self) -> int:
        """K, all rows of all domains."""
        return len(self) * self.layout.k

    def columns(self, domain: str) -> slice:
        """The rows of one domain among the K."""
        at = self.names.index(domain) * self.layout.k
        return slice(at, at + self.layout.k)

    def put(self, basis: DomainBasis, parameters: Sequence[Tensor]) -> None:
        """Adds a domain, or replaces its earlier recording."""
        if (basis.info.kind, basis.info.k) != (self.layout.kind, self.layout.k):
            raise BasisError(
                f"basis of domain {basis.info.domain!r}: expected kind {self.layout.kind} with k = {self.layout.k}, found "
                f"{basis.info.kind} with k = {basis.info.k}; all domains of a guard share both"
            )
        rows, scales = self._converted(basis)
        name = basis.info.domain
        others = [i for i, other in enumerate(self.names) if other != name]
        self.names = [self.names[i] for i in others] + [name]
        self.bases = torch.cat([self.bases[others], rows.unsqueeze(0)])
        if scales is not None:
            old = [] if self.scales is None else [self.scales[others]]
            self.scales = torch.cat([*old, scales.unsqueeze(0)])
        split = self.displacement.unflatten(1, (-1, self.layout.k))[:, others].flatten(1) if others else None
        new = basis.displacement.to(self.device, torch.float64)
        self.displacement = new if split is None else torch.cat([split, new], dim=1)
        light = DomainBasis(basis.info, torch.empty(0), basis.singular_values, basis.displacement)
        self.infos = {**{self.names[i]: self.infos[self.names[i]] for i in range(len(others))}, name: light}
        self.overlap = self.layout.gram(self.bases, parameters, self.scales)[:, : self.rows, : self.rows].contiguous()
        self._frames.clear()

    def get(self, domain: str) -> DomainBasis:
        """One domain's basis as stored here; views, not copies."""
        at, light = self.names.index(domain), self.infos[domain]
        scales = None if self.scales is None else self.scales[at]
        return DomainBasis(light.info, self.bases[at], light.singular_values, light.displacement, scales)

    def _converted(self, basis: DomainBasis) -> tuple[Tensor, Tensor | None]:
        if self.dtype in SCALED_DTYPES:
            basis = basis.quantized(dtype=self.dtype)
            assert basis.scales is not None
            return basis.directions.to(self.device), basis.scales.to(self.device)
        return basis.dequantized().directions.to(self.device, self.dtype), None

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
            self._frames[key] = Frame.of(self.overlap, self.active(key), self.combine)
        return self._frames[key]

    def project(self, tensors: Sequence[Tensor]) -> Tensor:
        """Coefficients ``[T, K]`` float64."""
        return self.layout.project(tensors, self.bases, self.scales)

    def project_domain(self, tensors: Sequence[Tensor], domain: str) -> Tensor:
        """Coefficients ``[T, k]`` float64 on one domain's rows only."""
        at = self.names.index(domain)
        scales = None if self.scales is None else self.scales[at : at + 1]
        return self.layout.project(tensors, self.bases[at : at + 1], scales)

    def edit_(self, tensors: Sequence[Tensor], mix: Tensor, scale: Tensor | None = None) -> None:
        """``tensor <- scale*(tensor + A^T mix)`` in place; nothing moves where mix or scale is not finite."""
        if scale is None:
            if mix.device.type == "cpu" and not mix.any():
                return  # nothing to correct; asking costs nothing where it needs no synchronisation
            scale = torch.ones(mix.shape[0], device=mix.device)
        self.layout.edit_(tensors, self.bases, mix, scale, self.scales)
