"""The kinds of bases, one row each: what their rank is called, what they see, how they lie, how they are recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .._errors import one_of
from .block import BlockRecorder
from .layout import Kind, Layout
from .matrices import MatrixLayout, Side
from .recorder import Recorder, StageRecorder
from .replay import ReplayRecorder

Sees = Literal["gradients", "change", "inputs"]
Named = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class BasisKind:
    """One kind of basis.

    Attributes:
        rank: what its number of directions is called, "k" (rows over parameters) or "r" (factors per weight matrix).
        default: The number of directions where none is given.
        sees: where directions come from: the gradients of a stage, its parameter change, or the inputs of weight matrices.
        layout: `layout(named, kind, rank, process group, sides)`.
        recorder: Makes the recorder of a stage: `recorder(domain, layout, parameters, **options)`.
    """

    rank: Literal["k", "r"]
    default: int
    sees: Sees
    layout: Callable[[Named, Any, int, Any, Mapping[str, Side] | None], Layout | MatrixLayout]
    recorder: Callable[..., Recorder]


def _rows(named: Named, kind: Any, k: int, group: Any, sides: Any) -> Layout:
    return Layout.of(named, kind, k, group)


KINDS: dict[Kind, BasisKind] = {
    "flat": BasisKind("k", 64, "gradients", _rows, StageRecorder),
    "per_matrix": BasisKind("k", 64, "gradients", _rows, StageRecorder),
    "block": BasisKind("r", 16, "change", MatrixLayout.of, BlockRecorder),
    "input": BasisKind("r", 32, "inputs", MatrixLayout.of, ReplayRecorder),
}
"""Of 32 input directions as few act as hold the guard's share of the inputs' energy."""


def kind_of(basis: Kind | None, *, seen: bool = True, k: int | None = None, dtype: torch.dtype = torch.float32) -> Kind:
    """The kind of basis where none is named: "input", or "per_matrix" where rows are asked for or no inputs can be seen.

    Args:
        seen: whether the model has weights whose inputs can be watched; pairs of names and parameters have none.
        k: directions of a row basis, if given.
        dtype: storage of the directions; that of factors is float32.
    """
    if basis is not None:
        return basis
    return "input" if seen and k is None and dtype == torch.float32 else "per_matrix"


def rank_of(kind: Kind, k: int | None, r: int | None) -> int:
    """Directions of a row basis, or rank of a factored one. ValueError: an unknown kind, or the other sort's number was
    given."""
    one_of("basis kind", kind, KINDS)
    right = KINDS[kind].rank
    number, wrong, other = (k, "r", r) if right == "k" else (r, "k", k)
    if other is not None:
        raise ValueError(f"{wrong}: expected {right} with basis={kind!r}, found {wrong}={other}")
    return KINDS[kind].default if number is None else number
