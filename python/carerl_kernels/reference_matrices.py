"""Ops over lists of weight matrices in plain PyTorch: what :mod:`reference` is for ops over rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from . import _ops
from .linalg import dacsp_core
from .thin import add_product_, full_precision, times, times_transposed, workspace


def _stacks(matrices: Sequence[Tensor]) -> Iterator[slice]:
    """Matrices that are stacked at a time."""
    step = max(1, workspace(matrices[0].device) // max(4 * matrices[0].numel(), 1))
    for start in range(0, len(matrices), step):
        yield slice(start, min(start + step, len(matrices)))


def block_project(matrices, left, right, domains=1):
    r = _ops.check_block_project(matrices, left, right, domains)
    out = left.new_empty((len(matrices), domains, r, r), dtype=torch.float64)
    for at in _stacks(matrices):
        products = times(matrices[at], right[at]).double().unflatten(2, (domains, r)).transpose(1, 2)  # [c, D, m, r]
        out[at] = left[at].double().unflatten(2, (domains, r)).permute(0, 2, 3, 1) @ products
    return out


def block_edit_(matrices, left, mix, right):
    _ops.check_block_edit(matrices, left, mix, right)
    domains, r = mix.shape[1:3]
    mix = torch.where(mix.isfinite().flatten(1).all(1)[:, None, None, None], mix, 0.0)
    for at in _stacks(matrices):
        mixed = left[at].unflatten(2, (domains, r)).transpose(1, 2) @ mix[at]  # [c, D, m, r]
        add_product_(matrices[at], mixed.transpose(1, 2).flatten(2), right[at])


def _input_products(matrices: Sequence[Tensor], directions: Tensor, left: bool) -> Tensor:
    """`W V^T` `[c, m, K]`, or `W^T U^T` `[c, n, K]`, float32."""
    with full_precision(directions.device):
        return (times_transposed if left else times)(matrices, directions.float().mT)


def input_project(matrices, directions, left=False):
    """Coefficients of the inputs of weight matrices, float32 `[G, outputs, K]`.

    Args:
        matrices: G of one shape `[m, n]` and dtype. A row is an output and its columns are inputs: `W V^T [G, m, K]`.
        directions: V `[G, K, n]` float32 or bfloat16, rows are directions.
        left: columns are the outputs instead (embeddings, Conv1D): directions `[G, K, m]`, result `W^T V^T [G, n, K]`.
    """
    out = directions.new_empty(_ops.check_input("input_project", matrices, directions, left), dtype=torch.float32)
    for at in _stacks(matrices):
        out[at] = _input_products(matrices[at], directions[at], left)
    return out


def _input_edit(
    matrices: Sequence[Tensor], directions: Tensor, left: bool, correction: Callable[..., tuple[Tensor, Tensor]]
) -> Tensor:
    """`W <- W + x V` with `x [c, outputs, K]` and whether it is finite `[c, outputs]` from `correction(at, W V^T)`.

    An output whose x is zero or not finite keeps its bits. Returns the sum of x^2 of every matrix.
    """
    energy = directions.new_zeros(len(matrices), dtype=torch.float64)
    for at in _stacks(matrices):
        some, rows = matrices[at], directions[at].float()
        x, finite = correction(at, _input_products(some, rows, left))
        x = torch.where((finite & x.isfinite().all(-1)).unsqueeze(-1), x, 0.0)
        moved = (x != 0).any(-1)
        energy[at] = x.double().square().sum((1, 2))
        with full_precision(rows.device):
            factors = (rows.mT, x) if left else (x, rows.mT)
            add_product_(some, *factors, moved.unsqueeze(1) if left else moved.unsqueeze(2))
    return energy


def input_confine_(matrices, directions, anchor, lower=None, upper=None, left=False):
    """Puts the displacement of every output along the directions back into its box, in one pass over each matrix.

    `d = anchor - w V^T` (gradient convention: positive repeats prior learning), `x = d - clip(d, -lower, upper)`,
    `w <- w + x V` with one rounding. A second call changes nothing but rounding where the directions of a matrix are
    orthonormal or zero, which is up to the caller. An output with x = 0, or with a number in d or in its bounds that is none,
    keeps its bits; an infinite bound leaves that way free.

    Args:
        matrices, directions, left: see :func:`input_project`.
        anchor: `[G, outputs, K]` float32, where the coefficients stood.
        lower, upper: the same shape, at least 0; None is 0.

    Returns:
        `[G]` float64, the sum of x^2: the squared length of each correction.
    """
    _ops.check_input_confine(matrices, directions, anchor, lower, upper, left)

    def correction(at: slice, products: Tensor) -> tuple[Tensor, Tensor]:
        d = anchor[at] - products
        zero = torch.zeros_like(d)
        low, high = (zero if bound is None else bound[at] for bound in (lower, upper))
        return d - torch.maximum(torch.minimum(d, high), -low), d.isfinite().all(-1)

    return _input_edit(matrices, directions, left, correction)


def input_dacsp_(matrices, directions, aligned, conflict, threshold, left=False):
    """The sign rule on matrices of gradients: `c = g V^T`, `g <- g + ((weight - 1) c) V` in one pass.

    The weight is `aligned` where c is above the threshold, `conflict` where it is below minus the threshold, else 1: a number
    each, or float32 `[K]`. What moves, what does not and what is returned: as :func:`input_confine_`.
    """
    _ops.check_input_dacsp(matrices, directions, aligned, conflict, threshold, left)

    def correction(at: slice, products: Tensor) -> tuple[Tensor, Tensor]:
        return dacsp_core(products, aligned, conflict, threshold)[1], products.isfinite().all(-1)

    return _input_edit(matrices, directions, left, correction)


def packed_times(packed, x):
    _ops.check_packed_times(packed, x)
    size = x.shape[-1]
    row, column = torch.triu_indices(size, size, device=x.device)
    out = torch.empty_like(x)
    for g in range(x.shape[1]):  # the square of one matrix at a time
        square = x.new_zeros(size, size)
        square[row, column] = packed[g].to(x.dtype)
        square[column, row] = square[row, column]
        out[:, g] = x[:, g] @ square
    return out
