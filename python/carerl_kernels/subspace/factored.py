"""The stored form of factored bases: per weight matrix the factors of its directions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from ..linalg import loewdin_root
from .layout import FactoredKind
from .matrices import MatrixLayout, unlabel
from .saving import Part
from .shards import Shards
from .store import BasisError, BasisInfo, StoredBasis


@dataclass(frozen=True)
class FactoredBasis(StoredBasis, kinds=get_args(FactoredKind)):
    """Factors per covered weight matrix W `[m, n]`, by parameter name (docs/math.md, "block directions" and "input directions").

    `block`: directions u_i v_j^T with U = `left` `[m, r]` and V = `right` `[n, r]`, the leading singular vectors of the
    stage's change theta_start - theta_end; all r x r of them act. `input`: directions e_a v_j^T (`right` alone) or u_j e_b^T
    (`left` alone). Columns are orthonormal, or zero where there are fewer.

    Attributes:
        left, right: factors, float32 or bfloat16.
        values: `[r]` float64: singular values of the stage's change (block) or of the inputs (input).
        moved: coefficients of the stage's change along the directions, gradient convention: `[r, r]` (block), `[m, r]` or
            `[n, r]` (input). Their signs orient the directions, their sizes are the displacement. All zero where no stage
            was recorded (`info.displacement_capture` is None); files leave them out then.
        layout: The layout of sharded parameters, when this is one process's part only; else None.
    """

    info: BasisInfo
    left: Mapping[str, Tensor]
    right: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    moved: Mapping[str, Tensor]
    layout: MatrixLayout | None = None

    def quantized(self) -> FactoredBasis:
        """The same basis with bfloat16 factors: half of fp32's memory. What acts is float32 and orthonormal again."""
        return replace(
            self,
            left={name: t.to(torch.bfloat16) for name, t in self.left.items()},
            right={name: t.to(torch.bfloat16) for name, t in self.right.items()},
        )

    def part_of(self, layout: MatrixLayout) -> FactoredBasis:
        """This process's part under a sharded layout; itself where it is that already, or nothing is sharded."""
        if self.layout is not None or not layout.shards.sharded:
            return self
        rows = dict(zip(layout.names, (piece.rows for piece in layout.shards.pieces), strict=True))
        return replace(
            self,
            left={name: t[rows[name]] for name, t in self.left.items()},
            moved={name: t[rows[name]] if self._by_output(name) else t for name, t in self.moved.items()},
            layout=layout,
        )

    def _by_output(self, name: str) -> bool:
        """Whether `moved` has a row per row of the matrix, which may be sharded."""
        return self.info.kind == "input" and name not in self.left

    def _parts(self) -> dict[str, Part]:
        parts: dict[str, Part] = {}
        layout = self.layout
        where = {} if layout is None else dict(zip(layout.names, layout.shards.pieces, strict=True))
        tensors = {"left": self.left, "right": self.right, "values": self.values}
        if self.info.displacement_capture is not None:
            tensors["moved"] = self.moved
        for what, by_name in tensors.items():
            for name, t in by_name.items():
                split = layout is not None and (what == "left" or (what == "moved" and self._by_output(name)))
                if split:
                    piece = where[name]
                    shape = (piece.shape[0], *t.shape[1:])
                    parts[f"{what}.{name}"] = Part(shape, t.dtype, 0, [(t, piece.rows)])
                else:
                    parts[f"{what}.{name}"] = Part.whole(t)
        return parts

    @classmethod
    def _read(cls, path: Path, info: BasisInfo, file: Any, layout: MatrixLayout | None) -> FactoredBasis:
        tensors: dict[str, dict[str, Tensor]] = {"left": {}, "right": {}, "values": {}, "moved": {}}
        for key in sorted(file.keys()):
            what, name = key.split(".", 1)
            tensors[what][name] = file.get_tensor(key)  # factors are small: read whole, cut below
        left, right, values, moved = tensors["left"], tensors["right"], tensors["values"], tensors["moved"]
        if info.displacement_capture is None and not moved:
            moved = {
                name: torch.zeros(_sides(info, name)[name in left], info.k, dtype=torch.float64) for name in values
            }
        basis = cls(info, left, right, values, moved)
        basis._check_numbers(path)
        return basis if layout is None else basis.part_of(layout)

    def _check_numbers(self, path: Path) -> None:
        r = self.info.k
        if not self.moved or set(self.moved) != set(self.values):
            raise BasisError(f"{path}: expected displacements and values of the same matrices, found others")
        for what, by_name in (("left", self.left), ("right", self.right), ("moved", self.moved)):
            for name, t in by_name.items():
                m, n = _sides(self.info, name)
                outputs = r if self.info.kind == "block" else n if name in self.left else m
                rows = {"left": m, "right": n}.get(what, outputs)
                if tuple(t.shape) != (rows, self.info.k):
                    raise BasisError(
                        f"{path}: damaged basis file: expected {what}.{name} {[rows, self.info.k]}, found {list(t.shape)}"
                    )
                if not t.isfinite().all():
                    raise BasisError(f"{path}: damaged basis file: {what}.{name} is not finite")
        for name, t in self.values.items():
            if tuple(t.shape) != (r,) or not t.isfinite().all() or (t < 0).any():
                raise BasisError(
                    f"{path}: damaged basis file: expected values.{name} [{r}], finite and at least 0, found {list(t.shape)}"
                )
        if not any(bool(t.any()) for by_name in (self.left, self.right) for t in by_name.values()):
            raise self._empty(path)

    def check_model(self, layout: Any, architecture: str) -> None:
        super().check_model(layout, architecture)
        for group in layout.groups:
            for _, name, _ in layout.matrices(group):
                found = {(True, True): "both", (True, False): "left", (False, True): "right"}.get(
                    (name in self.left, name in self.right)
                )
                if found != group.side:
                    raise BasisError(
                        f"basis of domain {self.info.domain!r}: expected factors {group.side!r} of {name}, found "
                        f"{found or 'none'!r}; record the stage on this model"
                    )


def _sides(info: BasisInfo, name: str) -> tuple[int, int]:
    """Rows and columns of the matrix with this label; (0, 0) where the model has none."""
    whole, index = unlabel(name)
    shape = info.shape_of.get(whole, ())
    shape = shape if index is None else shape[1:]
    return (shape[0], math.prod(shape[1:])) if shape else (0, 0)


def orthonormal(columns: Tensor, shards: Shards | None = None) -> Tensor:
    """The nearest orthonormal columns (Loewdin) of `[..., m, r]`, float32; zero columns stay zero.

    Computed in float64; sharded rows need one all-reduce of r x r numbers. Repeated once, because the first pass of nearly
    dependent columns loses digits.
    """
    for _ in range(2):
        wide = columns.double()
        gram = wide.mT @ wide
        if shards is not None:
            shards.sum_(gram)
        columns = wide @ loewdin_root(gram, rcond=1e-12)
    return columns.float()
