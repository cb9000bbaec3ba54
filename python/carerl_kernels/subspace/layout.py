"""How the parameters of a model lie within the N-sized rows of a basis, and how list ops are called over them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .._errors import one_of
from .._ops import SEGMENT
from .shards import Shards, local

RowKind = Literal["flat", "per_matrix"]
FactoredKind = Literal["block", "input"]
Kind = Literal[RowKind, FactoredKind]


@dataclass(frozen=True)
class Call:
    """One call of a list op: these tensors, into these rows of the coefficients: one each per tensor, else one for all."""

    indices: tuple[int, ...]
    rows: tuple[int, ...]
    per_tensor: bool

    def index(self, device: torch.device) -> slice | Tensor:
        """What `rows` are of a tensor with rows, without a copy from the host in each call."""
        return _index(self.rows, device)


@dataclass(frozen=True)
class Layout:
    """Names, shapes and offsets of the parameters within basis rows of `size` elements.

    `flat`: one basis over all parameters, T = 1 row of coefficients. `per_matrix`: one basis per tensor; tensors with
    fewer than `8*k` elements are too small for k directions of their own and share one pooled basis in the last row.

    Sharded parameters (FSDP2, or plain local parts with a process group) lie here with their local part only; coefficients and
    Gram matrices are summed over the processes, so every process sees the same numbers.

    Attributes:
        names, shapes: The names and shapes of the whole parameters, in order.
        k: directions per domain and coefficient row.
        offsets: first element of each parameter within a local row; multiples of 128, zero-padded between.
        size: N, elements of a local row including padding.
        calls: list-op calls that together cover every parameter (split by dtype, device and pooling).
        T: rows of coefficients.
        shards: what of every parameter lives here.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    kind: RowKind
    k: int
    offsets: tuple[int, ...]
    size: int
    calls: tuple[Call, ...] = field(compare=False)
    T: int
    shards: Shards = field(compare=False)

    @classmethod
    def of(cls, named: Iterable[tuple[str, Tensor]], kind: RowKind, k: int, group: Any = None) -> Layout:
        """Lays out named tensors; `group` is the process group of plain local parts.

        Raises:
            ValueError: no tensors, an unknown kind, k < 1, or a tensor that is not dense, not floating, or sharded in another
                way than along dimension 0.
        """
        one_of("basis kind", kind, get_args(RowKind))
        named, shards = checked(named, k, group)
        offsets, end = [], 0
        for piece in shards.pieces:
            offsets.append(end)
            end += _padded(piece.stop - piece.start)

        buckets: dict[tuple[Any, ...], list[int]] = {}
        small = 8 * k
        for index, ((_, tensor), piece) in enumerate(zip(named, shards.pieces, strict=True)):
            apart = kind == "per_matrix" and piece.numel >= small
            buckets.setdefault((not apart, str(tensor.dtype), str(tensor.device)), []).append(index)
        # Rows follow the parameters' order whatever their dtype or device: a stored basis fits the model in any of them.
        large = sorted(index for (pooled, *_), indices in buckets.items() if not pooled for index in indices)
        calls = [
            Call(tuple(indices), (len(large),) if pooled else tuple(large.index(i) for i in indices), not pooled)
            for (pooled, *_), indices in sorted(buckets.items())
        ]
        has_pool = any(not call.per_tensor for call in calls)
        return cls(
            names=tuple(name for name, _ in named),
            shapes=tuple(piece.shape for piece in shards.pieces),
            kind=kind,
            k=k,
            offsets=tuple(offsets),
            size=end,
            calls=tuple(calls),
            T=len(large) + int(has_pool),
            shards=shards,
        )

    @property
    def width(self) -> int:
        """Coefficients per domain and row."""
        return self.k

    @property
    def parameters(self) -> int:
        """Number of parameters, whole and without padding."""
        return sum(piece.numel for piece in self.shards.pieces)

    covered = parameters  # those that a basis of this kind has directions for: all

    @property
    def covered_names(self) -> tuple[str, ...]:
        """Names of the parameters among them: all."""
        return self.names

    @property
    def chance(self) -> float:
        """Share of a displacement's energy that random directions would hold."""
        return self.k * self.T / self.parameters

    @property
    def file_columns(self) -> list[tuple[slice, slice]]:
        """Per parameter: its columns in a local row, and the same elements' columns in a row of a file, which is whole."""
        out, end = [], 0
        for piece, offset in zip(self.shards.pieces, self.offsets, strict=True):
            size = piece.stop - piece.start
            out.append((slice(offset, offset + size), slice(end + piece.start, end + piece.stop)))
            end += _padded(piece.numel)
        return out

    def places(self) -> Iterator[tuple[int, int, slice]]:
        """Index, coefficient row and columns in a local row of every parameter."""
        columns = self.file_columns
        for call in self.calls:
            for position, index in enumerate(call.indices):
                yield index, call.rows[position if call.per_tensor else 0], columns[index][0]

    def unpack(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows `[k, N]` as one tensor `[k, *shape]` per parameter, for checkpoints; DTensors where parameters are."""
        out = {}
        places = zip(self.names, self.shards.pieces, self.file_columns, strict=True)
        for index, (name, piece, (here, _)) in enumerate(places):
            part = rows[:, here].clone()
            if not self.shards.sharded or self.shards.mesh is not None:
                part = part.view(rows.shape[0], *piece.local_shape)
            out[name] = self.shards.spread(index, part, 1) if part.dim() > 1 else part
        return out

    def pack_(self, rows: Tensor, parts: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`unpack`."""
        for name, (here, _) in zip(self.names, self.file_columns, strict=True):
            rows[:, here] = local(parts[name]).to(rows).reshape(rows.shape[0], -1)

    @property
    def file_size(self) -> int:
        """Elements of a row of a file."""
        return sum(_padded(piece.numel) for piece in self.shards.pieces)

    def over(self, tensors: Sequence[Tensor]) -> Iterator[tuple[Call, list[Tensor], list[int]]]:
        """Every call, with its tensors and their offsets."""
        for call in self.calls:
            yield call, [tensors[i] for i in call.indices], [self.offsets[i] for i in call.indices]

    def gather(
        self,
        tensors: Sequence[Tensor],
        op: Callable[[list[Tensor], list[int], bool], Tensor],
        trailing: tuple[int, ...],
    ) -> Tensor:
        """Runs a coefficient op over all calls: float64 `[T, *trailing]`; pooled calls, and processes, add up."""
        out = torch.zeros(self.T, *trailing, dtype=torch.float64, device=tensors[0].device)
        for call, some, offsets in self.over(tensors):
            part = op(some, offsets, call.per_tensor)
            out[call.index(out.device)] += part.view(-1, *trailing).to(out.device)
        return self.shards.sum_(out)

    def project(self, tensors: Sequence[Tensor], bases: Tensor, scales: Tensor | None = None) -> Tensor:
        """Coefficients `[T, D*k]` float64 of tensors laid out like the parameters on bases `[D, k, N]`."""
        op = torch.ops.carerl.project.list
        return self.gather(
            tensors,
            lambda some, offsets, each: op(some, bases, offsets, scales, torch.float64, each),
            (bases.shape[0] * bases.shape[1],),
        )

    def gram(self, bases: Tensor, tensors: Sequence[Tensor], scales: Tensor | None = None) -> Tensor:
        """Gram matrices `[T, K+1, K+1]` float64 of the rows and the tensors."""
        op, rows = torch.ops.carerl.gram.list, bases.shape[:-1].numel() + 1
        return self.gather(tensors, lambda some, offsets, each: op(bases, some, offsets, scales, each), (rows, rows))

    def edit_(
        self, tensors: Sequence[Tensor], bases: Tensor, mix: Tensor, scale: Tensor, scales: Tensor | None = None
    ) -> None:
        """`tensor <- scale*(tensor + mix U)` in place; mix `[T, D*k]`, scale `[T]`."""
        mix, scale = mix.float(), scale.float()
        for call, some, offsets in self.over(tensors):
            rows = call.index(mix.device)
            torch.ops.carerl.edit_.list(some, bases, offsets, mix[rows], scale[rows], scales, call.per_tensor)

    def edit_rotate_(self, tensors: Sequence[Tensor], bases: Tensor, mix: Tensor, domain: int, q: Tensor) -> None:
        """`tensor <- tensor + mix U` and `U_domain <- q [U_domain; tensor]` of the tensor as it was, in one pass."""
        mix, q = mix.float(), q.float()
        seed = 0  # no random rounding: rows are float32
        for call, some, offsets in self.over(tensors):
            rows, ones = call.index(mix.device), mix.new_ones(len(call.rows))
            turn = (q[rows] if call.per_tensor else q[call.rows[0]]).contiguous()
            each = call.per_tensor
            torch.ops.carerl.edit_rotate_.list(some, bases, offsets, mix[rows], ones, domain, turn, each, seed)

    def rotate_(self, bases: Tensor, tensors: Sequence[Tensor], q: Tensor) -> None:
        """`U <- q [U; g]` in place on one domain's rows `[k, N]`; q `[T, k', k+1]`."""
        q = q.float()
        for call, some, offsets in self.over(tensors):
            part = q[call.index(q.device)] if call.per_tensor else q[call.rows[0]]
            seed = 0  # no random rounding: rows are float32
            torch.ops.carerl.rotate_.list(bases, some, offsets, part.contiguous(), call.per_tensor, seed)


def checked(named: Iterable[tuple[str, Tensor]], k: int, group: Any) -> tuple[list[tuple[str, Tensor]], Shards]:
    """Local parts of named tensors that a basis can lie over, and where the other parts are; errors as :meth:`Layout.of`."""
    if k < 1:
        raise ValueError(f"k: expected at least one direction per domain, found {k}")
    named = list(named)
    if not named:
        raise ValueError("expected a model with at least one trainable parameter, found none (all frozen?)")
    shards = Shards.of(named, group)
    parts = [(name, local(tensor)) for name, tensor in named]
    for name, tensor in parts:
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"parameter {name!r}: expected float32, bfloat16 or float16, found {tensor.dtype}")
        if not tensor.is_contiguous():
            raise ValueError(f"parameter {name!r}: expected a contiguous tensor, found strides {tensor.stride()}")
    return parts, shards


@functools.lru_cache(maxsize=256)
def _index(rows: tuple[int, ...], device: torch.device) -> slice | Tensor:
    if rows == tuple(range(rows[0], rows[-1] + 1)):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)  # once: from the host to a GPU, which the host waits for


def _padded(numel: int) -> int:
    return -(-numel // SEGMENT) * SEGMENT
