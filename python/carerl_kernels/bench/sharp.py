"""The ops as somebody writes them who knows PyTorch and looks at bytes: all rows in one product, in place, no copies.

Several ways per op, because none is best for every dtype and BLAS: one product over all rows where they lie (`mm`),
the same as matrix times vector (`mv`), or tiles of columns that stay in cache (`tiles`), cast there where the dtype
has no fast product. The benchmark times all of them first and takes the fastest correct one as `sharp`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..linalg import pca_core
from .cases import ALIGNED, CONFLICT, Inputs
from .cost import SCALE_BLOCK
from .textbook import weights

TILE_BYTES = {
    "tiles 1M": 1 << 20,
    "tiles 8M": 8 << 20,
}  # fp32 tile of all rows: small for the caches, large for the calls

Outputs = dict[str, Tensor | list[Tensor]]


class Tiles:
    """Columns of rows and gradients in fp32: views where they are fp32 already, else casts into one small buffer."""

    def __init__(self, rows: Tensor, scales: Tensor | None, grads: Tensor, size: int):
        self.rows, self.scales, self.grads = rows, scales, grads
        width = max(size // 4 // (rows.shape[0] + grads.shape[0]) // SCALE_BLOCK, 1) * SCALE_BLOCK
        self.width = min(width, rows.shape[1])
        self._rows = None if rows.dtype == torch.float32 else torch.empty(rows.shape[0], self.width)
        self._grads = None if grads.dtype == torch.float32 else torch.empty(grads.shape[0], self.width)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, slice]]:
        n = self.rows.shape[1]
        for start in range(0, n, self.width):
            at = slice(start, min(start + self.width, n))
            rows = _cast(self.rows[:, at], self._rows)
            if self.scales is not None:
                self._scale(rows, start)
            yield rows, _cast(self.grads[:, at], self._grads), at

    def _scale(self, rows: Tensor, start: int) -> None:
        assert self.scales is not None
        first, whole = start // SCALE_BLOCK, rows.shape[1] // SCALE_BLOCK
        part = self.scales[:, first : first + whole + 1].unsqueeze(2)
        rows[:, : whole * SCALE_BLOCK].unflatten(1, (whole, SCALE_BLOCK)).mul_(part[:, :whole])
        if rows.shape[1] % SCALE_BLOCK:
            rows[:, whole * SCALE_BLOCK :].mul_(part[:, whole])


def _cast(tile: Tensor, buffer: Tensor | None) -> Tensor:
    return tile if buffer is None else buffer[:, : tile.shape[1]].copy_(tile)


def _tiles(x: Inputs, size: int) -> Tiles:
    return Tiles(x.bases.flatten(0, 1), None if x.scales is None else x.scales.flatten(0, 1), x.grads, size)


# ------------------------------------------------------------------------------------------------------ coefficients


def coeffs_mm(x: Inputs) -> Tensor:
    return (x.grads.to(x.bases.dtype) @ x.bases.flatten(0, 1).T).float()


def coeffs_mm_rows_first(x: Inputs) -> Tensor:
    return (x.bases.flatten(0, 1) @ x.grads.to(x.bases.dtype).T).float().T


def coeffs_mv(x: Inputs) -> Tensor:
    return torch.mv(x.bases.flatten(0, 1), x.grads[0].to(x.bases.dtype)).float().unsqueeze(0)


def coeffs_tiles(size: int, x: Inputs) -> Tensor:
    c = torch.zeros(x.case.B, x.case.D * x.case.k)
    for rows, grads, _ in _tiles(x, size):
        c.addmm_(grads, rows.T)
    return c


# -------------------------------------------------------------------------------------------------------------- edits


def edit_mm(x: Inputs, mix: Tensor, scale: float) -> None:
    x.grads.addmm_((scale * mix).to(x.grads.dtype), x.bases.flatten(0, 1).to(x.grads.dtype), beta=scale)


def edit_mv(x: Inputs, mix: Tensor, scale: float) -> None:
    x.grads[0].addmv_(x.bases.flatten(0, 1).to(x.grads.dtype).T, (scale * mix[0]).to(x.grads.dtype), beta=scale)


def edit_tiles(size: int, x: Inputs, mix: Tensor, scale: float) -> None:
    scaled = scale * mix
    for rows, grads, at in _tiles(x, size):
        if grads.data_ptr() == x.grads[:, at].data_ptr():
            grads.addmm_(scaled, rows, beta=scale)
        else:
            x.grads[:, at] = torch.addmm(grads, scaled, rows, beta=scale)


def _mix(c: Tensor) -> Tensor:
    return (weights(c, ALIGNED, CONFLICT) - 1) * c


# ------------------------------------------------------------------------------------------ rows of one domain


def turned_mm(x: Inputs) -> Tensor:
    rows, k = x.bases[0], x.case.k
    q = x.q.to(rows.dtype)
    return torch.addmm(q[:, k:] @ x.grads.to(rows.dtype), q[:, :k], rows)


def rotate_mm(x: Inputs) -> None:
    x.bases[0].copy_(turned_mm(x))


def rotate_tiles(size: int, x: Inputs, q: Tensor | None = None) -> None:
    q, k = x.q if q is None else q, x.case.k
    for rows, grads, at in Tiles(x.bases[0], None, x.grads, size):
        x.bases[0][:, at] = torch.addmm(q[:, k:] @ grads, q[:, :k], rows)


def edit_rotate_tiles(size: int, x: Inputs) -> None:
    """One pass over memory: both products of a tile while it is in cache."""
    k, scale = x.case.k, float(x.scale[0])
    mix = scale * x.mix
    for rows, grads, at in _tiles(x, size):
        turned = torch.addmm(x.q[:, k:] @ grads, x.q[:, :k], rows[:k])
        x.grads[:, at] = torch.addmm(grads, mix, rows, beta=scale)
        x.bases[0][:, at] = turned


def gram_mm(x: Inputs, rows: Tensor) -> Tensor:
    """Blocks instead of a stack: nothing of size N is copied."""
    g = x.grads.to(rows.dtype)
    cross = rows @ g.T
    return torch.cat([torch.cat([rows @ rows.T, cross], 1), torch.cat([cross.T, g @ g.T], 1)]).float()


def gram_tiles(size: int, x: Inputs, rows: Tensor) -> Tensor:
    """Products of tiles are added up in float64."""
    both = rows.shape[0] + x.case.B
    out = torch.zeros(both, both, dtype=torch.float64)
    for u, g, _ in Tiles(rows, None, x.grads, size):
        stack = torch.cat([u, g])
        out += stack @ stack.T
    return out


def pca(size: int, x: Inputs, gram: Callable[[Inputs, Tensor], Tensor]) -> Outputs:
    """The Gram trick in PyTorch: two passes over memory and the same small core."""
    q, values, _ = pca_core(gram(x, x.bases[0]).double(), x.singular_values, 1.0)
    rotate_tiles(size, x, q.float())
    return {"rows": x.bases[0], "singular_values": values}


def input_edit(x: Inputs, rows_at_once: int) -> Outputs:
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
            mix = _mix(c)
        w.addmm_(mix, u)
        if w is not part:
            part.copy_(w)
    return {"grads": x.grads}


# ---------------------------------------------------------------------------------------------------------- list forms


def list_coeffs(x: Inputs) -> Tensor:
    rows = x.bases.flatten(0, 1)
    c = torch.zeros(rows.shape[0])
    for tensor, o in zip(x.tensors, x.offsets, strict=True):
        c += torch.mv(rows[:, o : o + tensor.numel()], tensor.to(rows.dtype))
    return c.unsqueeze(0)


def list_edit(x: Inputs, mix: Tensor, scale: float) -> None:
    rows, x_low = x.bases.flatten(0, 1), mix[0].to(x.case.grad)
    for tensor, o in zip(x.tensors, x.offsets, strict=True):
        tensor.addmv_(rows[:, o : o + tensor.numel()].to(tensor.dtype).T, x_low)


def _list_tiles(x: Inputs, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """fp32 rows and gradient of every tile of every tensor, and the piece of the tensor itself."""
    rows, scales = x.bases.flatten(0, 1), None if x.scales is None else x.scales.flatten(0, 1)
    for tensor, o in zip(x.tensors, x.offsets, strict=True):
        part = None if scales is None else scales[:, o // SCALE_BLOCK :]
        for u, g, at in Tiles(rows[:, o : o + tensor.numel()], part, tensor.view(1, -1), size):
            yield u, g, tensor.view(1, -1)[:, at]


def list_coeffs_tiles(size: int, x: Inputs) -> Tensor:
    c = torch.zeros(1, x.case.D * x.case.k)
    for rows, grads, _ in _list_tiles(x, size):
        c.addmm_(grads, rows.T)
    return c


def list_edit_tiles(size: int, x: Inputs, mix: Tensor, scale: float) -> None:
    for rows, grads, piece in _list_tiles(x, size):
        piece.copy_(torch.addmm(grads, mix, rows))


# ---------------------------------------------------------------------------------------------------------- candidates

Coefficients = Callable[[Inputs], Tensor]
Edit = Callable[[Inputs, Tensor, float], None]


def halves(x: Inputs) -> tuple[dict[str, Coefficients], dict[str, Edit]]:
    """Ways of computing coefficients, and ways of editing, by name."""
    coeffs: dict[str, Coefficients] = {}
    edits: dict[str, Edit] = {}
    for name, size in TILE_BYTES.items():
        coeffs[name] = partial(list_coeffs_tiles if x.tensors else coeffs_tiles, size)
        edits[name] = partial(list_edit_tiles if x.tensors else edit_tiles, size)
    if x.scales is not None:
        return coeffs, edits
    if x.tensors:
        coeffs["loop"], edits["loop"] = list_coeffs, list_edit
        return coeffs, edits
    coeffs["mm"], coeffs["mmT"], edits["mm"] = coeffs_mm, coeffs_mm_rows_first, edit_mm
    if x.case.B == 1:
        coeffs["mv"], edits["mv"] = coeffs_mv, edit_mv
    return coeffs, edits


def _measured(x: Inputs, way: Coefficients) -> Outputs:
    return {"coeffs": way(x)}


def _gram(x: Inputs, rows: Tensor, way: Callable[[Inputs, Tensor], Tensor]) -> Outputs:
    return {"gram": way(x, rows)}


def _ruled(x: Inputs, coeffs: Coefficients, edit: Edit) -> Outputs:
    c = coeffs(x)
    edit(x, _mix(c), 1.0)
    return {"coeffs": c, "grads": x.tensors if x.tensors else x.grads}


def _edited(x: Inputs, edit: Edit) -> Outputs:
    edit(x, x.mix, float(x.scale[0]))
    return {"grads": x.grads}


def _turned(x: Inputs, way: Callable[[Inputs], None]) -> Outputs:
    way(x)
    return {"rows": x.bases[0], "grads": x.grads}


def _apart(edit: Edit, x: Inputs) -> None:
    rows = turned_mm(x)  # from the raw gradient; stored last, because the edit reads the old rows
    edit(x, x.mix, float(x.scale[0]))
    x.bases[0].copy_(rows)


def _seconds(x: Inputs, call: Callable[[], Any]) -> float:
    best = float("inf")
    for _ in range(3):
        x.reset()
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best


def candidates(x: Inputs) -> dict[str, Callable[[], Outputs]]:
    """Every way worth trying for this case by name; of `dacsp_` in the order of the time of the two halves."""
    op, rows = x.case.op.split(".")[0], x.bases.flatten(0, 1)
    coeffs, edits = halves(x)
    if op in ("input_confine_", "input_dacsp_"):
        sizes = {"mm": x.case.B} | {name: max(size // (4 * x.case.N), 1) for name, size in TILE_BYTES.items()}
        return {name: partial(input_edit, x, size) for name, size in sizes.items()}
    if op in ("project", "input_project"):
        return {name: partial(_measured, x, way) for name, way in coeffs.items()}
    if op == "edit_":
        return {name: partial(_edited, x, edit) for name, edit in edits.items()}
    if op == "dacsp_":
        first = {name: _seconds(x, partial(way, x)) for name, way in coeffs.items()}
        second = {name: _seconds(x, partial(edit, x, x.mix, 1.0)) for name, edit in edits.items()}
        pairs = sorted(((a, b) for a in first for b in second), key=lambda pair: first[pair[0]] + second[pair[1]])
        return {f"{a} + {b}": partial(_ruled, x, coeffs[a], edits[b]) for a, b in pairs[:3]}
    ways: dict[str, Callable[[], Outputs]] = {}
    if op == "gram":
        ways["mm"] = partial(_gram, x, rows, gram_mm)
    for name, size in TILE_BYTES.items():
        if op == "gram":
            ways[name] = partial(_gram, x, rows, partial(gram_tiles, size))
        elif op == "pca_update_":
            ways["mm + " + name] = partial(pca, size, x, gram_mm)
            ways[name] = partial(pca, size, x, partial(gram_tiles, size))
        else:
            way = edit_rotate_tiles if op == "edit_rotate_" else rotate_tiles
            ways[name] = partial(_turned, x, partial(way, size))
    if op == "rotate_":
        ways["mm"] = partial(_turned, x, rotate_mm)
    if op == "edit_rotate_":
        ways |= {"mm + " + n: partial(_turned, x, partial(_apart, edits[n])) for n in ("mm", "mv") if n in edits}
    return ways
