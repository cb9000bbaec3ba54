"""How weight matrices lie under factored bases.

A factored basis has directions for every weight matrix W ``[m, n]`` (a tensor of two or more dimensions, flattened to
``[shape[0], rest]``); vectors (biases, norms) are not covered and move freely.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..thin import workspace
from .layout import checked
from .shards import Shards, local

FactoredKind = Literal["block", "input"]
Side = Literal["both", "right", "left"]


@dataclass(frozen=True)
class Group:
    """Matrices of equal shape, handled together.

    Attributes:
        indices: of the parameters.
        m: rows that live here; whole: rows of the whole matrix; n: columns.
        side: which factors a direction has: "both" (u v^T), "right" (any column times v^T), "left" (u times any row).
        first: first coefficient row; each: coefficient rows per matrix.
    """

    indices: tuple[int, ...]
    m: int
    whole: int
    n: int
    side: Side
    first: int
    each: int

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

    ``block``: directions u_i v_j^T, r x r coefficients ``U^T G V`` in one row per matrix. ``input``: directions e_a v_j^T for
    every output a, coefficients ``G V``, one row of r per output (for embeddings and other weights that multiply from the other
    side ``U^T G``, one row per column). Sharded along dimension 0, right-sided coefficients belong to the process that has the
    output; all others are summed over processes.

    Attributes:
        names, shapes: of the whole parameters, in order.
        kind: "block" or "input".
        k: rank r.
        groups: of covered matrices.
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
            named: names and parameters.
            kind, k: see the class.
            group: process group of plain local parts.
            sides: of input bases, by name; a matrix that is not named is not covered. None: all are right-sided.

        Raises:
            ValueError: as :meth:`Layout.of`; no matrix among the tensors; parts of matrices that are not whole rows.
        """
        if kind not in get_args(FactoredKind):
            raise ValueError(f"basis kind: expected one of {', '.join(get_args(FactoredKind))}, found {kind!r}")
        parts, shards = checked(named, k, group)
        if group is not None and shards.sharded:
            raise ValueError(
                f"a {kind} basis needs whole rows of matrices: expected DTensors or whole parameters, found plain local "
                "parts of a process group; use basis='per_matrix', or FSDP2"
            )
        buckets: dict[tuple, list[int]] = {}
        for index, ((name, tensor), piece) in enumerate(zip(parts, shards.pieces, strict=True)):
            side = "both" if kind == "block" else "right" if sides is None else sides.get(name)
            if side is None or len(piece.shape) < 2 or piece.numel == 0:
                continue
            inner = piece.numel // piece.shape[0]
            buckets.setdefault((side, piece.shape[0], inner, str(tensor.dtype), str(tensor.device)), []).append(index)
        if not buckets:
            raise ValueError(
                f"a {kind} basis covers weight matrices: expected at least one trainable one, found none among "
                f"{len(parts)} parameters; use basis='per_matrix'"
            )
        groups: list[Group] = []
        end = 0
        for (side, whole, inner, *_), indices in sorted(buckets.items(), key=lambda item: item[1][0]):
            m = parts[indices[0]][1].numel() // inner
            each = {"both": 1, "right": m, "left": inner}[side]
            groups.append(Group(tuple(indices), m, whole, inner, side, end, each))
            end += each * len(indices)
        return cls(
            names=tuple(name for name, _ in parts),
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
        return sum(self.shards.pieces[i].numel for group in self.groups for i in group.indices)

    @property
    def covered_names(self) -> list[str]:
        """Names of the parameters among them."""
        return [self.names[i] for group in self.groups for i in group.indices]

    @property
    def chance(self) -> float:
        """Share of a displacement's energy that random directions would hold."""
        rows = sum(len(g.indices) * {"both": 1, "right": g.whole, "left": g.n}[g.side] for g in self.groups)
        return min(1.0, self.width * rows / self.parameters)

    def matrices(self, group: Group) -> Iterator[tuple[int, str, slice]]:
        """Position in the group, parameter name and coefficient rows of each matrix."""
        for position, index in enumerate(group.indices):
            start = group.first + position * group.each
            yield position, self.names[index], slice(start, start + group.each)

    def rows_of(self, index: int) -> slice:
        """Coefficient rows of a parameter; none where it is not covered."""
        for group in self.groups:
            if index in group.indices:
                start = group.first + group.indices.index(index) * group.each
                return slice(start, start + group.each)
        return slice(0, 0)

    def local(self, group: Group, tensors: Sequence[Tensor], at: slice = slice(None)) -> list[Tensor]:
        """Matrices ``[m, n]`` of the group, all or those at these positions: views of the tensors."""
        return [tensors[i].view(group.m, group.n) for i in group.indices[at]]

    def unpack(self, rows: Tensor) -> Any:
        """Numbers per coefficient row ``[T, ...]`` for checkpoints: where rows are spread over processes, by parameter."""
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
