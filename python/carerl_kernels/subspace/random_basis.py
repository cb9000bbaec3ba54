"""Random directions, as many as a recorded basis has: what a recorded basis has to beat."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .factored import FactoredBasis, orthonormal
from .layout import Layout
from .matrices import MatrixLayout
from .store import BasisInfo, DomainBasis, StoredBasis


def random_basis(
    layout: Layout | MatrixLayout,
    seed: int = 0,
    domain: str = "random",
    architecture: str = "",
    dtype: torch.dtype = torch.float32,
) -> StoredBasis:
    """A basis of random directions over a layout, moved by 1 along each; those of factored bases depend on the domain's
    name, too."""
    info = BasisInfo.of(layout, domain, architecture=architecture, displacement_capture=layout.chance)
    if isinstance(layout, MatrixLayout):
        return _factors(layout, seed, info)
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(layout.k, layout.size, generator=draw) * layout.size**-0.5
    ones = torch.ones(layout.T, layout.k, dtype=torch.float64)
    basis = DomainBasis(info, rows, ones, ones.clone(), None, layout if layout.shards.sharded else None)
    if dtype.is_floating_point and dtype.itemsize > 1:
        return replace(basis, directions=rows.to(dtype))
    return basis.quantized(dtype=dtype)


def as_random(basis: StoredBasis, fresh: StoredBasis) -> StoredBasis:
    """Random directions under the recorded domain's name, no more in any tensor than were recorded there."""
    fresh = replace(fresh, info=basis.info)  # type: ignore[type-var]
    if not isinstance(basis, FactoredBasis) or not isinstance(fresh, FactoredBasis):
        return fresh

    def as_many(fresh: Mapping[str, Tensor], recorded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: t * (recorded[name] != 0).any(0).to(t.device) for name, t in fresh.items()}

    return replace(fresh, left=as_many(fresh.left, basis.left), right=as_many(fresh.right, basis.right))


def _factors(layout: MatrixLayout, seed: int, info: BasisInfo) -> FactoredBasis:
    r = layout.k
    left, right, values, moved = {}, {}, {}, {}
    for group in layout.groups:
        for _, name, _ in layout.matrices(group):
            draw = torch.Generator().manual_seed(zlib.crc32(f"{info.domain}/{name}/{seed}".encode()))
            if group.side != "right":
                left[name] = _columns(group.whole, r, draw)
            if group.side != "left":
                right[name] = _columns(group.n, r, draw)
            values[name] = torch.ones(r, dtype=torch.float64)
            rows = {"both": r, "right": group.whole, "left": group.n}[group.side]
            moved[name] = torch.ones(rows, r, dtype=torch.float64)
    return FactoredBasis(info, left, right, values, moved)


def _columns(rows: int, r: int, draw: torch.Generator) -> Tensor:
    width = min(rows, r)
    return torch.nn.functional.pad(orthonormal(torch.randn(rows, width, generator=draw)), (0, r - width))
