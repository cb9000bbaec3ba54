"""How weight matrices lie under factored bases.

A factored basis has directions for every weight matrix W `[m, n]`: a tensor of two dimensions, a slice `W[e]` of a stack of
matrices `[E, m, n]` (fused experts), or a tensor of more dimensions flattened to `[shape[0], rest]` (convolutions, in block
bases). Vectors (biases, norms) are not covered and move freely.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .._errors import one_of
from ..thin import workspace
from .layout import FactoredKind, checked
from .shards import Shards, local

Side = Literal["both", "right", "left"]


@dataclass(frozen=True)
class Group:
    """Matrices of equal shape, handled together."""

    indices: tuple[int, ...]  # of the parameters, one for each matrix: a stack of matrices has its index several times
    m: int  # rows that live here
    whole: int  # rows of the whole matrix
    n: int  # columns
    side: Side  # the factors of a direction: "both" (u v^T), "right" (any column times v^T), "left" (u times any row)
    first: int  # coefficient row of all
    each: int  # coefficient rows per matrix
    slices: tuple[int | None, ...]  # which slice of its parameter each matrix is; None where it is the whole of it

    @property
    def rows(self) -> slice:
        """Coefficient rows of the group."""
        return slice(self.first, self.first + self.each * len(self.indices))

    def chunks(self, device: torch.device) -> Iterator[slice]:
        """Positions to stack at a time, the same in every process."""
        step = max(1, workspace(device) // max(4 * self.whole * self.n, 1))
        for start in range(0, len(self.indices), step):
            yield slice(start, min(start + step, len(self.indices)))


@dataclass(frozen=True)
class MatrixLayout:
    """Names, shapes and groups of the parameters under a factored basis.

    `block`: directions u_i v_j^T, r x r coefficients `U^T G V` in one row per matrix. `input`: directions e_a v_j^T for
    every output a, coefficients `G V`, one row of r per output (for embeddings and other weights that multiply from the other
    side `U^T G`, one row per column). Sharded along dimension 0, right-sided coefficients belong to the process that has the
    output; all others are summed over processes.

    Attributes:
        names, shapes: The names and shapes of the whole parameters, in order.
        k: rank r.
        T: coefficient rows here.
        shards: what of every parameter lives here.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    kind: FactoredKind
    k: int
    groups: tuple[Group, ...] = field(compare=False)
    T: int
    shards: Shards = field(compare=False)

    @classmethod
    def of(
        cls,
        named: Iterable[tuple[str, Tensor]],
        kind: FactoredKind,
        k: int,
        group: Any = None,
        sides: Mapping[str, Side] | None = None,
    ) -> MatrixLayout:
        """Lays out named tensors.

        Args:
            group: process group of plain local parts.
            sides: of input bases, by name; a matrix that is not named is not covered. None: all are right-sided. Tensors of
                three dimensions that are named are stacks of matrices, in block bases, too.

        Raises:
            ValueError: as :meth:`Layout.of`; no matrix among the tensors; parts of matrices that are not whole rows.
        """
        one_of("basis kind", kind, get_args(FactoredKind))
        parts, shards = checked(named, k, group)
        if group is not None and shards.sharded:
            raise ValueError(
                f"a {kind} basis needs whole rows of matrices: expected DTensors or whole parameters, found plain local "
                "parts of a process group; use basis='per_matrix', or FSDP2"
            )
        return cls._over([name for name, _ in parts], [tensor for _, tensor in parts], kind, k, shards, sides)

    def with_sides(self, sides: Mapping[str, Side], parameters: Sequence[Tensor]) -> MatrixLayout:
        """The layout of the same parameters (local parts) with these sides; itself where nothing changes."""
        out = self._over(self.names, parameters, self.kind, self.k, self.shards, sides)
        return self if out.groups == self.groups else out

    @classmethod
    def _over(
        cls,
        names: Sequence[str],
        parameters: Sequence[Tensor],
        kind: FactoredKind,
        k: int,
        shards: Shards,
        sides: Mapping[str, Side] | None,
    ) -> MatrixLayout:
        buckets: dict[tuple[Any, ...], list[tuple[int, int | None]]] = {}
        spread: list[str] = []  # stacks of matrices whose slices live in several processes
        for index, (name, tensor, piece) in enumerate(zip(names, parameters, shards.pieces, strict=True)):
            known = None if sides is None else sides.get(name)
            side: Side | None = "both" if kind == "block" else "right" if sides is None else known
            if side is None or len(piece.shape) < 2 or piece.numel == 0:
                continue
            stacked = len(piece.shape) == 3 and known is not None
            if stacked and shards.sharded:
                spread.append(name)
                continue
            whole, inner = piece.shape[1:] if stacked else (piece.shape[0], piece.numel // piece.shape[0])
            m = whole if stacked else tensor.numel() // inner
            bucket = buckets.setdefault((side, whole, m, inner, str(tensor.dtype), str(tensor.device)), [])
            bucket += [(index, e) for e in range(piece.shape[0])] if stacked else [(index, None)]
        if spread:
            warnings.warn(
                f"a {kind} basis does not cover {some(spread)}: stacks of matrices (fused experts) that FSDP2 splits over "
                "processes; they move freely. Leave these modules out of fully_shard, or use basis='per_matrix'",
                stacklevel=4,
            )
        if not buckets:
            raise ValueError(
                f"a {kind} basis covers weight matrices: expected at least one trainable one, found none among "
                f"{len(names)} parameters; use basis='per_matrix'"
            )
        groups: list[Group] = []
        end = 0
        for (side, whole, m, inner, *_), units in sorted(buckets.items(), key=lambda item: item[1][0][0]):
            each = {"both": 1, "right": m, "left": inner}[side]
            indices, slices = zip(*units, strict=True)
            groups.append(Group(indices, m, whole, inner, side, end, each, slices))
            end += each * len(units)
        return cls(
            names=tuple(names),
            shapes=tuple(piece.shape for piece in shards.pieces),
            kind=kind,
            k=k,
            groups=tuple(groups),
            T=end,
            shards=shards,
        )

    @property
    def width(self) -> int:
        """Coefficients per domain and row: r^2 or r."""
        return self.k * self.k if self.kind == "block" else self.k

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(piece.numel for piece in self.shards.pieces)

    @property
    def covered(self) -> int:
        """Parameters that a basis of this kind has directions for: those in matrices."""
        return sum(group.whole * group.n * len(group.indices) for group in self.groups)

    @property
    def covered_names(self) -> list[str]:
        """Names of the parameters among them."""
        return list(dict.fromkeys(self.names[i] for group in self.groups for i in group.indices))

    @property
    def chance(self) -> float:
        """Share of a displacement's energy that random directions would hold."""
        rows = sum(len(g.indices) * {"both": 1, "right": g.whole, "left": g.n}[g.side] for g in self.groups)
        return min(1.0, self.width * rows / self.parameters)

    def labels(self, group: Group, at: slice = slice(None)) -> list[str]:
        """Names of the group's matrices: the parameter's, `name[e]` of a slice."""
        return [label(self.names[i], e) for i, e in zip(group.indices[at], group.slices[at], strict=True)]

    def matrices(self, group: Group) -> Iterator[tuple[int, str, slice]]:
        """Position in the group, label and coefficient rows of each matrix."""
        for position, name in enumerate(self.labels(group)):
            start = group.first + position * group.each
            yield position, name, slice(start, start + group.each)

    def rows_of(self, index: int) -> slice:
        """Coefficient rows of a parameter, all of its slices; none where it is not covered."""
        for group in self.groups:
            if index in group.indices:
                start = group.first + group.indices.index(index) * group.each
                return slice(start, start + group.each * group.indices.count(index))
        return slice(0, 0)

    def local(
        self, group: Group, tensors: Sequence[Tensor] | Callable[[int], Tensor], at: slice = slice(None)
    ) -> list[Tensor]:
        """Matrices `[m, n]` of the group, all or those at these positions: views of the tensors; see :meth:`each`."""
        return list(self.each(group, tensors, at))

    def each(
        self, group: Group, tensors: Sequence[Tensor] | Callable[[int], Tensor], at: slice = slice(None)
    ) -> Iterator[Tensor]:
        """The matrices of :meth:`local` one at a time.

        Args:
            tensors: of all parameters, or a function that gives one; asked once where slices of one follow each other.
        """
        last = (-1, torch.empty(0))
        for i, e in zip(group.indices[at], group.slices[at], strict=True):
            if last[0] != i:
                last = i, tensors(i) if callable(tensors) else tensors[i]
            yield (last[1] if e is None else last[1][e]).view(group.m, group.n)

    def unpack(self, rows: Tensor) -> Any:
        """Numbers per coefficient row `[T, ...]` for checkpoints: where rows are spread over processes, by parameter."""
        if self.kind == "block" or self.shards.mesh is None:
            return rows.clone()
        out = {}
        for group in self.groups:
            for position, name, at in self.matrices(group):
                part = rows[at].clone()
                out[name] = self.shards.spread(group.indices[position], part) if group.side == "right" else part
        return out

    def pack_(self, rows: Tensor, parts: Any) -> None:
        """The inverse of :meth:`unpack`."""
        if isinstance(parts, Tensor):
            rows.copy_(parts)
            return
        for group in self.groups:
            for _, name, at in self.matrices(group):
                rows[at] = local(parts[name]).to(rows)


def label(name: str, index: int | None) -> str:
    """Of a matrix: the parameter's name, with the slice where it is one of a stack."""
    return name if index is None else f"{name}[{index}]"


def unlabel(text: str) -> tuple[str, int | None]:
    """The inverse of :func:`label`."""
    if not text.endswith("]"):
        return text, None
    name, _, index = text[:-1].rpartition("[")
    return name, int(index)


def some(names: Sequence[str], most: int = 3) -> str:
    """A few of the names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
