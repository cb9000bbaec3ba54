"""From a model to what the guard works with: named parameters, a layout, a stack."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..subspace.inputs import input_sites
from ..subspace.kinds import KINDS
from ..subspace.layout import Kind, Layout
from ..subspace.matrices import MatrixLayout, Side
from .factored import BlockStack, InputStack
from .stack import RowStack, Stack

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # torch.compile, FSDP, checkpointing


def chain(model: Any) -> Iterator[Any]:
    """A model and what its wrappers (torch.compile, DDP, in any nesting) wrap, outermost first."""
    yield model
    while isinstance(model, nn.Module):
        inner = (
            model.module
            if isinstance(model, nn.parallel.DistributedDataParallel)
            else getattr(model, "_orig_mod", None)
        )
        if inner is None:
            return
        model = inner
        yield model


def unwrapped(model: Any) -> Any:
    """The model itself, without torch.compile and DDP around it."""
    return list(chain(model))[-1]


def named_parameters(model: nn.Module | Iterable[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    """All parameters under the names they have without wrappers, so that a basis fits the model wrapped or not."""
    model = unwrapped(model)
    named = list(model.named_parameters()) if isinstance(model, nn.Module) else list(model)
    out = []
    for name, parameter in named:
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        out.append((name, parameter))
    return out


def trainable(model: nn.Module | Iterable[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    """Those that are trained."""
    return [(name, p) for name, p in named_parameters(model) if p.requires_grad]


def architecture_of(model: Any) -> str:
    """Class name of a model, without what fully_shard makes of it."""
    if not isinstance(model, nn.Module):
        return "parameters"
    names = [c.__name__ for c in type(model).__mro__]
    return names[names.index("FSDPModule") + 1] if "FSDPModule" in names else names[0]


def sites_of(model: Any, named: list[tuple[str, nn.Parameter]], kind: Kind) -> dict[str, tuple[nn.Module, Side]] | None:
    """Whose inputs an input basis records; None where that is not known or not needed."""
    return input_sites(model, named) if KINDS[kind].sees == "inputs" and isinstance(model, nn.Module) else None


def lay_out(
    named: list[tuple[str, nn.Parameter]],
    kind: Kind,
    k: int,
    group: Any,
    sites: dict[str, tuple[nn.Module, Side]] | None,
) -> Layout | MatrixLayout:
    """The layout of a kind of basis over these parameters."""
    sides = None if sites is None else {name: side for name, (_, side) in sites.items()}
    return KINDS[kind].layout(named, kind, k, group, sides)


def new_stack(layout: Layout | MatrixLayout, dtype: torch.dtype, device: torch.device, room: float = 1.0) -> Stack:
    """The acting directions of a layout, none yet; ``room`` as input bases have it.

    Raises:
        ValueError: factored bases in another storage than float32.
    """
    if isinstance(layout, Layout):
        return RowStack(layout, dtype, device)
    if dtype != torch.float32:
        raise ValueError(
            f"basis_dtype: expected torch.float32 with basis={layout.kind!r} (its factors are small), found {dtype}"
        )
    return BlockStack(layout, device) if KINDS[layout.kind].sees == "change" else InputStack(layout, device, room)


def data_group(model: Any, layout: Layout | MatrixLayout) -> Any:
    """The process group over which batches are spread: DDP's, or that of the shards."""
    for part in chain(model):
        if isinstance(part, nn.parallel.DistributedDataParallel):
            return part.process_group
    return layout.shards.group
