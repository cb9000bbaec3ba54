"""Tensors of a checkpoint a few at a time, so that no more than some megabytes of it are in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from math import prod

from torch import Tensor

from .._ops import GRAD_DTYPES
from .correspond import Unit
from .weights import Copy, Entry, Weights, flattened

GROUP = 64 << 20
"""Bytes of float32 numbers of one checkpoint at a time; about six times as many are in memory."""


@dataclass(frozen=True)
class Portion:
    """A part of a tensor that is handled at once: a matrix `[m, n]`, or some rows or columns of one."""

    key: str
    entry: Entry
    unit: Unit | None  # where its directions are; None where it has none
    at: int | None = None  # the number of the slice of a stack of matrices
    rows: slice = field(default_factory=lambda: slice(None))
    columns: slice = field(default_factory=lambda: slice(None))

    @property
    def shape(self) -> tuple[int, int]:
        m, n = flattened(self.entry.shape if self.at is None else self.entry.shape[1:])
        return len(range(*self.rows.indices(m))), len(range(*self.columns.indices(n)))

    @property
    def left(self) -> bool:
        """Whether its columns, not its rows, have nothing to do with each other."""
        return self.unit is not None and self.unit.side == "left"

    def read(self, weights: Weights, key: str | None = None) -> Tensor:
        """`[m, n]` in the dtype of the file."""
        return weights.read(key or self.key, self.at, self.rows, self.columns).reshape(self.shape).contiguous()

    def write(self, copy: Copy, values: Tensor) -> None:
        """Puts `[m, n]` into the copy of a file, in its dtype."""
        copy.write(self.key, values.to(self.entry.dtype), self.at, self.rows, self.columns)


def portions(weights: Weights, units: Mapping[str, Sequence[Unit]]) -> Iterator[list[Portion]]:
    """All floating-point tensors, file by file and in the order of their bytes, in groups of one dtype and about GROUP
    bytes. ValueError: a matrix with directions in another dtype than float32, bfloat16 and float16."""

    def parts() -> Iterator[Portion]:
        for key, entry in weights.entries.items():
            covered = units.get(key, ())
            if covered and entry.dtype not in GRAD_DTYPES:
                raise ValueError(
                    f"{weights.path}: expected {key} in float32, bfloat16 or float16, found {entry.kind}; save the model "
                    "unquantised"
                )
            if entry.dtype is None:
                continue
            if covered and covered[0].at is not None:
                by_slice = {unit.at: unit for unit in covered}
                for at in range(entry.shape[0]):
                    yield from _cut(Portion(key, entry, by_slice.get(at), at))
            else:
                yield from _cut(Portion(key, entry, covered[0] if covered else None))

    most = GROUP // 4
    for _, same in groupby(parts(), key=lambda portion: (portion.entry.file, portion.entry.dtype)):
        group: list[Portion] = []
        for portion in same:
            if group and sum(prod(p.shape) for p in (*group, portion)) > most:
                yield group
                group = []
            group.append(portion)
        yield group


def _cut(portion: Portion) -> Iterator[Portion]:
    """Parts of at most GROUP bytes, along the side on which rows or columns have nothing to do with each other."""
    m, n = portion.shape
    size, each = (n, m) if portion.left else (m, n)
    dims = len(portion.entry.shape) - (portion.at is not None)
    step = max(1, GROUP // (4 * max(each, 1)))
    if step >= size or dims < 2 or (portion.left and dims > 2):
        yield portion
        return
    for first in range(0, size, step):
        part = slice(first, min(first + step, size))
        yield replace(portion, columns=part) if portion.left else replace(portion, rows=part)
