"""From a model to what the guard works with: named parameters, a layout, a stack, a recorder."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

import torch
from torch import nn

from ..subspace.layout import Kind, Layout, RowKind
from ..subspace.matrices import FactoredKind, MatrixLayout, Side
from ..subspace.sites import guess_sides, plain_name, unwrapped, wrappers
from .checks import one_of
from .factored import BlockStack, InputStack
from .frames import Combine
from .stack import RowStack, Stack

RANKS: dict[Kind, int] = {"flat": 64, "per_matrix": 64, "block": 16, "input": 32}
"""Default k or r. Of 32 input directions as few act as hold the guard's share of the inputs' energy."""


def trainable(model: nn.Module | Iterable[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    """Trainable parameters under the names they have without wrappers, so that a basis fits the model wrapped or not."""
    named = unwrapped(model).named_parameters() if isinstance(model, nn.Module) else model
    return [(plain_name(name), parameter) for name, parameter in named if parameter.requires_grad]


def architecture_of(model: Any) -> str:
    """Class name of a model, without what fully_shard makes of it."""
    if not isinstance(model, nn.Module):
        return "parameters"
    names = [c.__name__ for c in type(model).__mro__]
    return names[names.index("FSDPModule") + 1] if "FSDPModule" in names else names[0]


def kind_of(basis: Kind | None, *, seen: bool = True, k: int | None = None, dtype: torch.dtype = torch.float32) -> Kind:
    """The kind of basis where none is named: "input", or "per_matrix" where rows are asked for or no inputs can be seen.

    Args:
        basis: as named, or None.
        seen: whether the model has layers whose inputs can be watched; pairs of names and parameters have none.
        k: directions of a row basis, if given.
        dtype: storage of the directions; that of factors is float32.
    """
    if basis is not None:
        return basis
    return "input" if seen and k is None and dtype == torch.float32 else "per_matrix"


def rank_of(kind: Kind, k: int | None, r: int | None) -> int:
    """Directions of a row basis, or rank of a factored one.

    Raises:
        ValueError: the other kind's number was given.
    """
    one_of("basis kind", kind, get_args(Kind))
    wrong, right, number = ("r", "k", r) if kind in get_args(RowKind) else ("k", "r", k)
    if number is not None:
        raise ValueError(f"{wrong}: expected {right} with basis={kind!r}, found {wrong}={number}")
    number = k if kind in get_args(RowKind) else r
    return RANKS[kind] if number is None else number


def lay_out(
    named: list[tuple[str, nn.Parameter]],
    kind: Kind,
    k: int,
    group: Any,
    sides: dict[str, Side] | None,
) -> Layout | MatrixLayout:
    """The layout of a kind of basis over these parameters."""
    if kind in get_args(FactoredKind):
        return MatrixLayout.of(named, kind, k, group, sides)  # type: ignore[arg-type]
    return Layout.of(named, kind, k, group)  # type: ignore[arg-type]


def sides_of(model: Any, named: list[tuple[str, nn.Parameter]]) -> dict[str, Side] | None:
    """From which side each weight is multiplied; None where there are no modules to tell."""
    return guess_sides(unwrapped(model), named) if isinstance(model, nn.Module) else None


def new_stack(
    layout: Layout | MatrixLayout, combine: Combine, dtype: torch.dtype, device: torch.device, room: float = 1.0
) -> Stack:
    """The acting directions of a layout, none yet; ``room`` as input bases have it.

    Raises:
        ValueError: factored bases in another storage than float32.
    """
    if isinstance(layout, Layout):
        return RowStack(layout, combine, dtype, device)
    if dtype != torch.float32:
        raise ValueError(
            f"basis_dtype: expected torch.float32 with basis={layout.kind!r} (its factors are small), found {dtype}"
        )
    return BlockStack(layout, combine, device) if layout.kind == "block" else InputStack(layout, combine, device, room)


def data_group(model: Any, layout: Layout | MatrixLayout) -> Any:
    """The process group over which batches are spread: DDP's, or that of the shards."""
    for module in wrappers(model) if isinstance(model, nn.Module) else ():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            return module.process_group
    return layout.shards.group
