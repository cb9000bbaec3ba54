"""One basis out of several: earlier domains compressed to the number of directions of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .factored import FactoredBasis, orthonormal
from .layout import Layout
from .store import BasisError, BasisInfo, DomainBasis, StoredBasis

CUT = 1e-12  # relative, on squared singular values


def merge(bases: Sequence[StoredBasis], domain: str, k: int | None = None) -> StoredBasis:
    """The directions with the most energy in the union, weighted by singular values (row bases) or displacement (block).

    Displacement is that of all stages together, so orientation and bounds speak of their sum. Captured shares are of directions
    that are partly given up, and not known any more: gradient None, displacement scaled by the energy kept.

    Args:
        bases: at least two, whole ones, of one model, kind and (unless `k` is given) number of directions.
        k: directions per row, or rank; that of the first by default.

    Raises:
        BasisError: bases that do not belong together.
    """
    if len(bases) < 2:
        raise BasisError(f"merge: expected at least two bases, found {len(bases)}")
    first = bases[0].info
    for basis in bases[1:]:
        info = basis.info
        if (info.kind, info.names, info.shapes) != (first.kind, first.names, first.shapes):
            raise BasisError(
                f"merge: expected a {first.kind} basis over the parameters of domain {first.domain!r}, found domain "
                f"{info.domain!r}, {info.kind}, over others or in another order"
            )
    k = first.k if k is None else k
    merged: StoredBasis
    if isinstance(bases[0], DomainBasis):
        merged, kept = _merge_rows([b.dequantized() for b in bases], k)  # type: ignore[attr-defined]
    else:
        merged, kept = _merge_factors(list(bases), k)  # type: ignore[arg-type]
    captured = [b.info.displacement_capture for b in bases if b.info.displacement_capture is not None]
    info = replace(
        first,
        domain=domain,
        k=k,
        end_hash=bases[-1].info.end_hash,
        steps=sum(b.info.steps for b in bases),
        skipped=sum(b.info.skipped for b in bases),
        gradient_capture=None,
        displacement_capture=kept * sum(captured) / len(captured) if captured else None,
    )
    return replace(merged, info=info)


def _merge_rows(bases: list[DomainBasis], k: int) -> tuple[DomainBasis, float]:
    first = bases[0]
    target = _layout_of(first.info, k)
    segments = [place[1:] for place in target.places()]
    if any(segments_of(b) != segments for b in bases):
        raise BasisError(
            f"merge: expected bases that pool the same small tensors as k = {k} does, found others; choose the bases' own k"
        )
    weights = torch.cat([b.singular_values for b in bases], dim=1)  # [T, sum k]
    moved = torch.cat([b.displacement for b in bases], dim=1)
    gram = torch.zeros(target.T, weights.shape[1], weights.shape[1], dtype=torch.float64)
    for row, columns in segments:
        part = torch.cat([b.directions[:, columns] for b in bases]).double()
        gram[row] += part @ part.mT
    weighted = gram * weights.unsqueeze(2) * weights.unsqueeze(1)
    values, vectors = torch.linalg.eigh(weighted)
    values, vectors = values.flip(-1)[:, :k].clamp_min(0.0), vectors.flip(-1)[..., :k]
    keep = values > CUT * values[:, :1]
    inverse = torch.where(keep, values.clamp_min(1e-300).rsqrt(), 0.0)
    mix = (vectors * inverse.unsqueeze(1)).mT * weights.unsqueeze(1)  # new rows [T, k, sum k]
    displacement = (mix @ gram @ moved.unsqueeze(-1)).squeeze(-1)
    mix = mix * torch.where(displacement < 0, -1.0, 1.0).unsqueeze(-1)
    directions = torch.zeros(mix.shape[1], target.size)
    for row, columns in segments:
        directions[:, columns] = (mix[row] @ torch.cat([b.directions[:, columns] for b in bases]).double()).float()
    missing = k - directions.shape[0]
    pad = torch.nn.functional.pad
    before = float((moved * (gram @ moved.unsqueeze(-1)).squeeze(-1)).sum())
    merged = DomainBasis(
        first.info,
        pad(directions, (0, 0, 0, missing)),
        pad(torch.where(keep, values, 0.0).sqrt(), (0, missing)),
        pad(displacement.abs(), (0, missing)),
    )
    return merged, float(displacement.square().sum()) / before if before > 0 else 0.0


def segments_of(basis: DomainBasis) -> list[tuple[int, slice]]:
    """Coefficient row and columns of every parameter of a whole row basis."""
    return [place[1:] for place in _layout_of(basis.info, basis.info.k).places()]


def _layout_of(info: BasisInfo, k: int) -> Layout:
    named = [(n, torch.empty(s, device="meta")) for n, s in zip(info.names, info.shapes, strict=True)]
    return Layout.of(named, info.kind, k)  # type: ignore[arg-type]


def _merge_factors(bases: list[FactoredBasis], k: int) -> tuple[FactoredBasis, float]:
    left, right, values, moved = (dict[str, Tensor]() for _ in range(4))
    before = 0.0
    for name in bases[0].moved:
        lefts = [b.left[name].double() for b in bases if name in b.left]
        rights = [b.right[name].double() for b in bases if name in b.right]
        if len(lefts) not in (0, len(bases)) or len(rights) not in (0, len(bases)):
            raise BasisError(f"merge: expected factors of {name} on the same side in all bases, found others")
        changes = [b.moved[name] for b in bases]
        if lefts and rights:  # the stages' changes, as far as they are known: U_d M_d V_d^T
            U, values[name] = _leading([u @ c for u, c in zip(lefts, changes, strict=True)], k)
            V, _ = _leading([v @ c.mT for v, c in zip(rights, changes, strict=True)], k)
            left[name], right[name] = U, V
            terms = zip(lefts, changes, rights, strict=True)
            moved[name] = sum(((U.double().mT @ u) @ c @ (v.mT @ V.double()) for u, c, v in terms), torch.zeros(()))
        else:  # the inputs, as far as they are known: V_d diag(values)
            factors = lefts or rights
            weighted = [f * b.values[name] for f, b in zip(factors, bases, strict=True)]
            W, values[name] = _leading(weighted, k)
            (left if lefts else right)[name] = W
            moved[name] = sum((c @ (f.mT @ W.double()) for c, f in zip(changes, factors, strict=True)), torch.zeros(()))
        before += sum(float(c.square().sum()) for c in changes)
    after = sum(float(c.square().sum()) for c in moved.values())
    return FactoredBasis(bases[0].info, left, right, values, moved), min(1.0, after / before) if before > 0 else 0.0


def _leading(parts: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Leading left singular vectors `[m, k]` and values `[k]` of stacked columns, zero beyond the rank."""
    U, S, _ = torch.linalg.svd(torch.cat(parts, dim=1), full_matrices=False)
    keep = (CUT**0.5 * S[:1] < S) & (S > 0)
    U, S = U * keep, torch.where(keep, S, 0.0)
    pad = torch.nn.functional.pad
    missing = max(0, k - S.numel())
    return pad(orthonormal(U[:, :k]), (0, missing)), pad(S[:k], (0, missing))
