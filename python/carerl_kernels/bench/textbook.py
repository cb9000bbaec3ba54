"""The ops as a paper's listing has them: domain by domain, in float32, results in new tensors.

All take grads `[B, N]` and bases `[D, k, N]`, int8 bases with their scales, and return what they compute by name (rows: of the
first domain).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cost import SCALE_BLOCK

Outputs = dict[str, Tensor]


def widen(rows: Tensor, scales: Tensor | None) -> Tensor:
    """Rows `[k, N]` of one domain in float32."""
    if scales is None:
        return rows.float()
    return rows.float() * scales.repeat_interleave(SCALE_BLOCK, dim=1)[:, : rows.shape[1]]


def weights(c: Tensor, aligned: float, conflict: float) -> Tensor:
    return torch.where(c > 0, aligned, torch.where(c < 0, conflict, 1.0))


def domains(bases: Tensor, scales: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    return [(bases[d], None if scales is None else scales[d]) for d in range(bases.shape[0])]


def project(grads: Tensor, bases: Tensor, scales: Tensor | None = None) -> Outputs:
    return {"coeffs": torch.cat([grads.float() @ widen(*domain).T for domain in domains(bases, scales)], dim=1)}


def edit(grads: Tensor, bases: Tensor, mix: Tensor, scale: Tensor, scales: Tensor | None = None) -> Outputs:
    g = grads.float()
    for domain, part in zip(domains(bases, scales), mix.split(bases.shape[1], 1), strict=True):
        g = g + part @ widen(*domain)
    return {"grads": (scale.unsqueeze(1) * g).to(grads.dtype)}


def dacsp(grads: Tensor, bases: Tensor, aligned: float, conflict: float, scales: Tensor | None = None) -> Outputs:
    """The sign rule with the sum combine."""
    g = grads.float()
    edit, coeffs = torch.zeros_like(g), []
    for domain in domains(bases, scales):
        rows = widen(*domain)
        c = g @ rows.T
        edit = edit + ((weights(c, aligned, conflict) - 1) * c) @ rows
        coeffs.append(c)
    return {"coeffs": torch.cat(coeffs, dim=1), "grads": (g + edit).to(grads.dtype)}


def confine(grads: Tensor, rows: Tensor, anchor: Tensor, lower: Tensor, upper: Tensor) -> Outputs:
    """A matrix `[B, N]` whose displacement along each row from the anchor `[B, K]` is put back into its box."""
    w = grads.float()
    d = anchor - w @ rows.T
    return {"grads": (w + (d - torch.clamp(d, -lower, upper)) @ rows).to(grads.dtype)}


def gram(grads: Tensor, bases: Tensor) -> Outputs:
    stack = torch.cat([bases.flatten(0, 1).float(), grads.float()])
    return {"gram": stack @ stack.T}


def rotate(grads: Tensor, rows: Tensor, q: Tensor) -> Outputs:
    return {"rows": (q @ torch.cat([rows.float(), grads.float()])).to(rows.dtype)}


def edit_rotate(grads: Tensor, bases: Tensor, mix: Tensor, scale: Tensor, q: Tensor) -> Outputs:
    return edit(grads, bases, mix, scale) | rotate(grads, bases[0], q)


def pca_update(grads: Tensor, rows: Tensor, singular_values: Tensor) -> Outputs:
    """Incremental SVD as it is usually written: decompose the weighted rows and the new data together."""
    stack = torch.cat([singular_values.float().unsqueeze(1) * rows.float(), grads.float()])
    _, s, vh = torch.linalg.svd(stack, full_matrices=False)
    return {"rows": vh[: rows.shape[0]].to(rows.dtype), "singular_values": s[: rows.shape[0]].double()}
