"""The K x K cores between the two passes: float64, batched over leading dimensions, on the device of their input.

K is at most a few hundred. Nothing waits for the device but torch's eigenvalues, which ask CUDA whether they converged.
"""

from __future__ import annotations

import torch
from torch import Tensor

RCOND = 1e-4
"""Relative cut on eigenvalues of an overlap matrix S: directions this close to dependent count as one."""

PCA_CUT = 1e-6
"""Relative cut on eigenvalues of the unit-diagonal Gram matrix. Low enough to recover components of 1 %, high enough to
keep fp32 rows orthonormal to 1e-5 (1e-3 loses small components, 1e-8 loses orthonormality). A direction right at the cut
enters with coefficients of 1e3, which fp32 rounds to 6e-5 at worst (2.7e-5 seen): the next update measures and repairs it."""

SPECTRUM_CUT = 1e-12
"""Relative cut on squared singular values: below it float64 cannot tell them from zero after squaring."""


def loewdin_root(overlap: Tensor, rcond: float = RCOND) -> Tensor:
    """R = (S^+)^(1/2): turns coefficients of overlapping rows into coefficients of the nearest orthonormal frame.

    With it the edit operator `I + A^T R diag(w - 1) R A` is symmetric with spectrum in `[min w, max w] u {1}`, whatever
    the overlap of the rows of A (Loewdin 1950). Changes only when the bases change: compute once, cache.

    Args:
        overlap: S `[..., K, K]` float64, the Gram matrix `A A^T` of the stacked rows. Zero rows (empty slots) stay zero.
        rcond: relative cut on its eigenvalues, below which directions count as dependent.
    """
    values, vectors = torch.linalg.eigh(overlap)
    keep = values > rcond * values[..., -1:].clamp_min(torch.finfo(values.dtype).tiny)
    powered = torch.where(keep, values.clamp_min(torch.finfo(values.dtype).tiny) ** -0.5, 0.0)
    return (vectors * powered.unsqueeze(-2)) @ vectors.mT


def dacsp_core(
    coeffs: Tensor,
    aligned: Tensor | float,
    conflict: Tensor | float,
    threshold: Tensor | float,
    root: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Classes and edit coefficients of the sign rule (CARE-RL, arXiv:2606.00609), between the two passes.

    Args:
        coeffs: c `[..., K]` float64.
        aligned: weight of components with `c > threshold`; float or `[K]`.
        conflict: weight of components with `c < -threshold`; float or `[K]`.
        threshold: at least zero; float or `[K]`.
        root: R `[..., K, K]` of the symmetric combine; None for the sum combine.

    Returns:
        classes int8 `[..., K]` in {-1, 0, 1}, and x float64 `[..., K]`: the edit is `g <- g + A^T x`.
    """
    positive, negative = coeffs > threshold, coeffs < -threshold
    classes = positive.to(torch.int8) - negative.to(torch.int8)
    gain = torch.zeros_like(coeffs)
    gain = torch.where(positive, aligned - 1.0 + gain, gain)
    gain = torch.where(negative, conflict - 1.0 + gain, gain)
    if root is None:
        return classes, gain * coeffs
    root = root.to(coeffs.dtype)
    frame = (root @ coeffs.unsqueeze(-1)).squeeze(-1)
    return classes, (root @ (gain * frame).unsqueeze(-1)).squeeze(-1)


def pca_core(gram: Tensor, singular_values: Tensor, decay: float) -> tuple[Tensor, Tensor, Tensor]:
    """One exact incremental SVD update from the measured Gram matrix of `[U; G]` (docs/math.md, "streaming PCA").

    Using the measured `U U^T` instead of assuming the identity makes the process self-correcting.

    Args:
        gram: H `[..., k+B, k+B]` float64.
        singular_values: s `[..., k]` of the rows U.
        decay: factor on s before the update, 1 within a stage.

    Returns:
        q `[..., k, k+B]` (new rows are `q [U; G]`; unused rows are exact zeros), new singular values `[..., k]` in
        descending order, discarded energy `[...]`: what `decay^2 sum s^2 + sum |g|^2` had and the new rows do not.
        If H is not finite anywhere, all of q and discarded are NaN and the singular values come back unchanged.
    """
    k = singular_values.shape[-1]
    finite = gram.isfinite().all()
    gram = torch.where(finite, gram, 0.0)
    old = singular_values.to(gram.dtype)

    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    unit = torch.where(diagonal > 0, diagonal.clamp_min(torch.finfo(gram.dtype).tiny).rsqrt(), 0.0)
    values, vectors = torch.linalg.eigh(gram * unit.unsqueeze(-1) * unit.unsqueeze(-2))
    keep = values > PCA_CUT * values[..., -1:].clamp_min(torch.finfo(gram.dtype).tiny)
    inverse = torch.where(keep, values.clamp_min(torch.finfo(gram.dtype).tiny).rsqrt(), 0.0)
    frame = (vectors * inverse.unsqueeze(-2)).mT * unit.unsqueeze(-2)  # T: E = T [U; G] has orthonormal (or zero) rows

    weight = torch.cat([decay * old, torch.ones_like(gram[..., 0, k:])], dim=-1)
    coordinates = gram @ frame.mT * weight.unsqueeze(-1)  # Z: the weighted rows of [U; G] in E
    # Right singular vectors of Z through Z^T Z: half the time of an SVD, and the vectors are orthonormal whatever the spectrum.
    energies, right = torch.linalg.eigh(coordinates.mT @ coordinates)
    energies, right = energies.flip(-1)[..., :k].clamp_min(0.0), right.flip(-1)[..., :k]
    new = torch.where(energies > SPECTRUM_CUT * energies[..., :1], energies.sqrt(), 0.0)
    q = torch.where((new > 0).unsqueeze(-1), right.mT @ frame, 0.0)
    total = (decay * old).square().sum(-1) + diagonal[..., k:].sum(-1)
    discarded = (total - new.square().sum(-1)).clamp_min(0.0)

    nan = torch.full((), torch.nan, dtype=gram.dtype, device=gram.device)
    return (
        torch.where(finite, q, nan),
        torch.where(finite, new, old).to(singular_values.dtype),
        torch.where(finite, discarded, nan),
    )
