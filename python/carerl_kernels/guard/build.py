"""From a model to what the guard works with: named parameters, a layout, a stack."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .._wrapped import unwrapped, wrappers
from ..subspace.kinds import KINDS
from ..subspace.layout import Layout
from ..subspace.matrices import MatrixLayout, Side
from ..subspace.sites import guess_sides, plain_name
from .factored_stack import BlockStack
from .input_stack import InputStack
from .stack import RowStack, Stack


def named_parameters(model: nn.Module | Iterable[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    """All parameters under the names they have without wrappers, so that a basis fits the model wrapped or not."""
    named = unwrapped(model).named_parameters() if isinstance(model, nn.Module) else model
    return [(plain_name(name), parameter) for name, parameter in named]


def trainable(model: nn.Module | Iterable[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    """Those that are trained."""
    return [(name, p) for name, p in named_parameters(model) if p.requires_grad]


def architecture_of(model: Any) -> str:
    """Class name of a model, without what fully_shard makes of it."""
    if not isinstance(model, nn.Module):
        return "parameters"
    names = [c.__name__ for c in type(model).__mro__]
    return names[names.index("FSDPModule") + 1] if "FSDPModule" in names else names[0]


def sides_of(model: Any, named: list[tuple[str, nn.Parameter]]) -> dict[str, Side] | None:
    """From which side each weight is multiplied; None where there are no modules to tell."""
    return guess_sides(unwrapped(model), named) if isinstance(model, nn.Module) else None


def new_stack(
    layout: Layout | MatrixLayout, dtype: torch.dtype, device: torch.device, room: float = 1.0
) -> Stack[Any, Any]:
    """The acting directions of a layout, none yet; `room` as input bases have it."""
    if isinstance(layout, Layout):
        return RowStack(layout, dtype, device)
    if dtype != torch.float32:
        raise ValueError(
            f"basis_dtype: expected torch.float32 with basis={layout.kind!r} (its factors are small), found {dtype}"
        )
    return BlockStack(layout, device) if KINDS[layout.kind].sees == "change" else InputStack(layout, device, room)


def data_group(model: Any, layout: Layout | MatrixLayout) -> Any:
    """The process group over which batches are spread: DDP's, or that of the shards; warns where copies may see others."""
    for part in wrappers(model) if isinstance(model, nn.Module) else ():
        if isinstance(part, nn.parallel.DistributedDataParallel):
            return part.process_group
    group = layout.shards.group
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if group is None and world > 1 and KINDS[layout.kind].sees == "inputs":
        warnings.warn(
            f"guard in {world} processes, built from a whole model outside of DistributedDataParallel: each sees the inputs "
            "of its own batches alone, and where these differ, copies drift apart. Build it from the wrapped model, or show "
            "every process the same batches",
            stacklevel=4,
        )
    return group
