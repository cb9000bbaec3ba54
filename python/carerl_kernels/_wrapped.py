"""Models inside of what wraps them: `DistributedDataParallel`, `torch.compile`, adapters of peft."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn


def wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """The model and what is inside it, through any nesting of `DistributedDataParallel` and `torch.compile`."""
    yield model
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        else:
            return
        yield model


def unwrapped(model: nn.Module) -> nn.Module:
    """The innermost of :func:`wrappers`: the model itself."""
    return list(wrappers(model))[-1]


def forward_accepts(model: Any, name: str) -> bool:
    """Whether the model's forward takes this argument by name (`position_ids`, `logits_to_keep`: most models, not all).

    Wrappers and adapters take anything and pass it on, so what is inside of them is asked.
    """
    inner: Any = unwrapped(model) if isinstance(model, nn.Module) else model
    if hasattr(inner, "get_base_model"):  # peft's
        inner = inner.get_base_model()
    return name in inspect.signature(getattr(inner, "forward", inner)).parameters
