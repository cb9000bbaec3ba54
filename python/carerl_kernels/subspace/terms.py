"""What tensors consist of: weights, copies and views of them, and products of two of them, by where their elements lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .matrices import label
from .moments import Use


@dataclass(frozen=True)
class Weight:
    """A parameter as it lies in memory."""

    name: str | None  # None where it is not covered, and only matters as what adapters are added to
    offset: int  # of its elements in their storage, and so are the strides
    shape: tuple[int, ...]  # `[m, n]`, or a stack `[E, m, n]`
    stride: tuple[int, ...]
    dtype: torch.dtype

    def holds(self, view: Tensor) -> bool:
        """Whether a view of the same storage begins within the parameter."""
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return view.dtype == self.dtype and 0 <= view.storage_offset() - self.offset <= last


@dataclass(frozen=True)
class Leaf:
    """Elements of a weight, or a copy of them."""

    weight: Weight
    # a tensor of this shape whose offset and strides say where in the weight its elements are (itself, or on meta)
    view: Tensor
    pick: Tensor | None = None  # `[S]` which slice of a stack each of S matrices is, where they were gathered


@dataclass(frozen=True)
class Product:
    """A product of two weights `[.., o, r] @ [.., r, i]`, as adapters are that are added to a weight before it is used."""

    left: Tensor
    right: Tensor
    left_terms: tuple[Term, ...]
    right_terms: tuple[Term, ...]
    view: Tensor  # where in the product, as if it lay contiguously, the elements of a tensor are


Term = Leaf | Product


def without_memory(view: Tensor) -> Tensor:
    """The same shape, offset and strides, without memory."""
    if view.device.type == "meta":
        return view
    last = int(view.storage_offset()) + sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True) if n)
    return torch.empty(last + 1, device="meta").as_strided(view.shape, view.stride(), view.storage_offset())


def viewed(term: Term, view: Callable[[Tensor], Tensor]) -> Term:
    return replace(term, view=view(without_memory(term.view)))


def broadcast(terms: Sequence[Term], out: Tensor) -> tuple[Term, ...]:
    return tuple(viewed(term, lambda v: v.expand(out.shape)) for term in terms)


def at(term: Term, e: int) -> Term:
    """One matrix of a batch of them; what was picked stays with whoever knows which."""
    return replace(term, view=term.view[e])


def picked(term: Term, e: int) -> int | None:
    return int(term.pick[e]) if isinstance(term, Leaf) and term.pick is not None else None


def names_of(term: Term) -> list[str]:
    """Names of the covered weights in a term."""
    if isinstance(term, Leaf):
        return [] if term.weight.name is None else [term.weight.name]
    return [leaf for t in (*term.left_terms, *term.right_terms) for leaf in names_of(t)]


def locate(leaf: Leaf, c: int, o: int, pick: int | None) -> tuple[list[Use], int, Tensor | None] | None:
    """Which matrices a two-dimensional view of a weight belongs to, and how its inputs stand in theirs.

    Returns:
        The matrices (several where a view runs over slices of a stack) with the side of their inputs, the size of an input
        vector, and the positions of the view's inputs in it (None: all, in order). None: no such view.
    """
    weight, view = leaf.weight, leaf.view
    *stack, m, n = weight.shape
    *outer, row, column = weight.stride
    first, e = int(view.storage_offset()) - weight.offset, pick or 0
    if stack and outer[0] > 0:
        inside, first = divmod(first, outer[0])
        e = inside if pick is None else pick
    if row >= column:
        i, j = first // max(row, 1), first % max(row, 1) // max(column, 1)
    else:
        i, j = first % column // max(row, 1), first // column
    summed, other = (view.shape[c], view.stride(c)), (view.shape[o], view.stride(o))
    for side, n_in, step_in, first_in, n_out, step_out, first_out in (
        ("right", n, column, j, m, row, i),
        ("left", m, row, i, n, column, j),
    ):
        within = _span(*summed, step_in, first_in)
        outside = _span(*other, step_out, first_out)
        if within is None or outside is None or within.stop > n_in:
            continue
        slices = range(e, e + 1)
        if outside.stop > n_out:
            if not stack or side != "right" or outer[0] != m * row or pick is not None:
                continue
            slices = range(e, e + (outside.stop - 1) // m + 1)
            if slices.stop > stack[0]:
                continue
        columns = None if within == range(n_in) else torch.tensor(within)
        uses: list[Use] = [(label(str(weight.name), s if stack else None), side) for s in slices]  # type: ignore[misc]
        return uses, n_in, columns
    return None


def _span(size: int, stride: int, step: int, first: int) -> range | None:
    """Positions along a dimension of the weight that a dimension of a view runs over."""
    if size <= 1:
        return range(first, first + size)
    if step <= 0 or stride % step or stride <= 0:
        return None
    return range(first, first + (size - 1) * (stride // step) + 1, stride // step)
