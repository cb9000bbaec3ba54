"""The ops as somebody writes them who knows PyTorch and looks at bytes: all rows in one product, in place, no copies.

Several ways per op, because none is best for every dtype and BLAS: one product over all rows where they lie (`mm`),
the same as matrix times vector (`mv`), or tiles of columns that stay in cache (`tiles`), cast there where the dtype
has no fast product. The benchmark times all of them first and takes the fastest correct one as `sharp`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..linalg import pca_core
from .cases import ALIGNED, CONFLICT, SCALE, Inputs
from .cost import SCALE_BLOCK
from .textbook import weights

TILE_BYTES = {"tiles 1M": 1 << 20, "tiles 8M": 8 << 20}
"""Of the fp32 tile of all rows: small for the caches, large for the calls."""

Coefficients = Callable[[Inputs], Tensor]
Edit = Callable[[Inputs, Tensor, float], None]
Way = Callable[[Inputs], Tensor | None]
"""Changes the inputs in place as the op does, and returns what it returns."""


def tiles(rows: Tensor, scales: Tensor | None, grads: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Columns of rows and gradients in fp32, and where they stand: views where they are fp32 already, else casts into one small
    buffer."""
    n = rows.shape[1]
    width = min(max(size // 4 // (rows.shape[0] + grads.shape[0]) // SCALE_BLOCK, 1) * SCALE_BLOCK, n)
    buffers = [None if t.dtype == torch.float32 else torch.empty(t.shape[0], width) for t in (rows, grads)]
    for start in range(0, n, width):
        at = slice(start, min(start + width, n))
        u, g = (_cast(t[:, at], buffer) for t, buffer in zip((rows, grads), buffers, strict=True))
        if scales is not None:
            first, whole = start // SCALE_BLOCK, u.shape[1] // SCALE_BLOCK
            part = scales[:, first : first + whole + 1].unsqueeze(2)
            u[:, : whole * SCALE_BLOCK].unflatten(1, (whole, SCALE_BLOCK)).mul_(part[:, :whole])
            if u.shape[1] % SCALE_BLOCK:
                u[:, whole * SCALE_BLOCK :].mul_(part[:, whole])
        yield u, g, at


def _cast(tile: Tensor, buffer: Tensor | None) -> Tensor:
    return tile if buffer is None else buffer[:, : tile.shape[1]].copy_(tile)


def _pieces(x: Inputs) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Gradients `[B, n]` as they lie, with the columns of rows and scales that belong to them: one piece, or one per tensor."""
    rows, scales = x.bases.flatten(0, 1), None if x.scales is None else x.scales.flatten(0, 1)
    if not x.tensors:
        yield x.grads, rows, scales
    for tensor, o in zip(x.tensors, x.offsets, strict=True):
        part = None if scales is None else scales[:, o // SCALE_BLOCK :]
        yield tensor.view(1, -1), rows[:, o : o + tensor.numel()], part


def _tiles(x: Inputs, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """fp32 rows and gradients of every tile, and the place of the gradients themselves."""
    for grads, rows, scales in _pieces(x):
        for u, g, at in tiles(rows, scales, grads, size):
            yield u, g, grads[:, at]


# ------------------------------------------------------------------------------------------------------ coefficients


def coeffs_mm(x: Inputs) -> Tensor:
    return (x.grads.to(x.bases.dtype) @ x.bases.flatten(0, 1).T).float()


def coeffs_mm_rows_first(x: Inputs) -> Tensor:
    return (x.bases.flatten(0, 1) @ x.grads.to(x.bases.dtype).T).float().T


def coeffs_mv(x: Inputs) -> Tensor:
    parts = [torch.mv(rows, grads[0].to(rows.dtype)).float() for grads, rows, _ in _pieces(x)]
    return torch.stack(parts).sum(0, keepdim=True)


def coeffs_tiles(size: int, x: Inputs) -> Tensor:
    c = torch.zeros(x.case.B, x.case.K)
    for rows, grads, _ in _tiles(x, size):
        c.addmm_(grads, rows.T)
    return c


# -------------------------------------------------------------------------------------------------------------- edits


def edit_mm(x: Inputs, mix: Tensor, scale: float) -> None:
    x.grads.addmm_((scale * mix).to(x.grads.dtype), x.bases.flatten(0, 1).to(x.grads.dtype), beta=scale)


def edit_mv(x: Inputs, mix: Tensor, scale: float) -> None:
    low = (scale * mix[0]).to(x.grads.dtype)
    for grads, rows, _ in _pieces(x):
        grads[0].addmv_(rows.to(grads.dtype).T, low, beta=scale)


def edit_tiles(size: int, x: Inputs, mix: Tensor, scale: float) -> None:
    scaled = scale * mix
    for rows, grads, place in _tiles(x, size):
        if grads.data_ptr() == place.data_ptr():
            grads.addmm_(scaled, rows, beta=scale)
        else:
            place.copy_(torch.addmm(grads, scaled, rows, beta=scale))


def sign_rule(c: Tensor) -> Tensor:
    """What the sign rule adds along each direction."""
    return (weights(c, ALIGNED, CONFLICT) - 1) * c


def input_edit(rows_at_once: int, x: Inputs) -> None:
    """Some rows of a matrix at a time: both products, and one cast each way where it is not fp32."""
    u = x.bases[0]
    for start in range(0, x.case.B, rows_at_once):
        at = slice(start, start + rows_at_once)
        part = x.grads[at]
        w = part.float()
        c = w @ u.T
        if x.case.op == "input_confine_":
            d = c.neg_().add_(x.anchor[at])
            mix = d - torch.clamp(d, -x.bound[at], x.bound[at])
        else:
            mix = sign_rule(c)
        w.addmm_(mix, u)
        if w is not part:
            part.copy_(w)


# ------------------------------------------------------------------------------------------ rows of one domain


def turned_mm(x: Inputs) -> Tensor:
    rows, k = x.bases[0], x.case.k
    q = x.q.to(rows.dtype)
    return torch.addmm(q[:, k:] @ x.grads.to(rows.dtype), q[:, :k], rows)


def rotate_mm(x: Inputs) -> None:
    x.bases[0].copy_(turned_mm(x))


def rotate_tiles(size: int, x: Inputs, q: Tensor | None = None) -> None:
    q, k = x.q if q is None else q, x.case.k
    for rows, grads, at in tiles(x.bases[0], None, x.grads, size):
        x.bases[0][:, at] = torch.addmm(q[:, k:] @ grads, q[:, :k], rows)


def edit_rotate_tiles(size: int, x: Inputs) -> None:
    """One pass over memory: both products of a tile while it is in cache."""
    k, mix = x.case.k, SCALE * x.mix
    for rows, grads, at in tiles(x.bases.flatten(0, 1), None, x.grads, size):
        turned = torch.addmm(x.q[:, k:] @ grads, x.q[:, :k], rows[:k])
        x.grads[:, at] = torch.addmm(grads, mix, rows, beta=SCALE)
        x.bases[0][:, at] = turned


def gram_mm(x: Inputs) -> Tensor:
    """Blocks instead of a stack: nothing of size N is copied."""
    rows = x.bases.flatten(0, 1)
    g = x.grads.to(rows.dtype)
    cross = rows @ g.T
    return torch.cat([torch.cat([rows @ rows.T, cross], 1), torch.cat([cross.T, g @ g.T], 1)]).float()


def gram_tiles(size: int, x: Inputs) -> Tensor:
    """Products of tiles are added up in float64."""
    both = x.case.K + x.case.B
    out = torch.zeros(both, both, dtype=torch.float64)
    for u, g, _ in _tiles(x, size):
        stack = torch.cat([u, g])
        out += stack @ stack.T
    return out


def pca(size: int, gram: Coefficients, x: Inputs) -> None:
    """The Gram trick in PyTorch: two passes over memory and the same small core."""
    q, values, _ = pca_core(gram(x).double(), x.singular_values, 1.0)
    rotate_tiles(size, x, q.float())
    x.singular_values.copy_(values)


# ---------------------------------------------------------------------------------------------------------- candidates


def halves(x: Inputs, sizes: Mapping[str, int]) -> tuple[dict[str, Coefficients], dict[str, Edit]]:
    """Ways of computing coefficients, and ways of editing, by name; `sizes`: bytes of tiles."""
    coeffs: dict[str, Coefficients] = {name: partial(coeffs_tiles, size) for name, size in sizes.items()}
    edits: dict[str, Edit] = {name: partial(edit_tiles, size) for name, size in sizes.items()}
    if x.scales is None and not x.tensors:
        coeffs["mm"], coeffs["mmT"], edits["mm"] = coeffs_mm, coeffs_mm_rows_first, edit_mm
    if x.scales is None and x.case.B == 1:
        coeffs["mv"], edits["mv"] = coeffs_mv, edit_mv
    return coeffs, edits


def ruled(coeffs: Coefficients, edit: Edit, x: Inputs) -> Tensor:
    c = coeffs(x)
    edit(x, sign_rule(c), 1.0)
    return c


def edited(edit: Edit, x: Inputs) -> None:
    edit(x, x.mix, SCALE)


def apart(edit: Edit, x: Inputs) -> None:
    """Both products of `edit_rotate_`, each by itself."""
    rows = turned_mm(x)  # from the raw gradient; stored last, because the edit reads the old rows
    edited(edit, x)
    x.bases[0].copy_(rows)


def seconds(x: Inputs, call: Callable[[], Any], check: Callable[[Any], Any] = lambda outputs: None) -> float:
    """Of the fastest of three calls, each checked."""
    best = float("inf")
    for _ in range(3):
        x.reset()
        started = time.perf_counter()
        outputs = call()
        best = min(best, time.perf_counter() - started)
        check(outputs)
    return best


def _ways(x: Inputs) -> dict[str, Way]:
    op, sizes = x.case.packet, TILE_BYTES
    coeffs, edits = halves(x, sizes)
    if op in ("project", "input_project"):
        return dict(coeffs)
    if op in ("input_confine_", "input_dacsp_"):
        rows = {"mm": x.case.B} | {name: max(size // (4 * x.case.N), 1) for name, size in sizes.items()}
        return {name: partial(input_edit, count) for name, count in rows.items()}
    if op == "edit_":
        return {name: partial(edited, edit) for name, edit in edits.items()}
    if op == "dacsp_":
        first = {name: seconds(x, partial(way, x)) for name, way in coeffs.items()}
        second = {name: seconds(x, partial(edit, x, x.mix, 1.0)) for name, edit in edits.items()}
        pairs = sorted(((a, b) for a in first for b in second), key=lambda pair: first[pair[0]] + second[pair[1]])
        return {f"{a} + {b}": partial(ruled, coeffs[a], edits[b]) for a, b in pairs[:3]}
    if op == "gram":
        return {"mm": gram_mm, **{name: partial(gram_tiles, size) for name, size in sizes.items()}}
    if op == "rotate_":
        return {"mm": rotate_mm, **{name: partial(rotate_tiles, size) for name, size in sizes.items()}}
    if op == "edit_rotate_":
        together: dict[str, Way] = {name: partial(edit_rotate_tiles, size) for name, size in sizes.items()}
        return together | {"mm + " + name: partial(apart, edits[name]) for name in ("mm", "mv") if name in edits}
    return {  # pca_update_
        before + name: partial(pca, size, gram)
        for name, size in sizes.items()
        for before, gram in (("mm + ", gram_mm), ("", partial(gram_tiles, size)))
    }


def computed(x: Inputs, way: Way) -> Callable[[], dict[str, Any]]:
    """The way as a competitor, which says what it has computed."""
    return lambda: x.outputs(way(x))


def candidates(x: Inputs) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every way worth trying for this case by name; of `dacsp_` those whose two halves were the fastest by themselves."""
    return {name: computed(x, way) for name, way in _ways(x).items()}
