"""What a method of the grid is made of: its guard and its editor, over any model."""

from __future__ import annotations

from typing import Any, get_args

from ..guard import CapabilityGuard
from ..guard.editors import Editor, PCGrad, modular_surgery
from ..subspace.layout import RowKind
from .experiments import RandomGuard
from .grid import Method


def guard_of(method: Method, model: Any, seed: int, k: int | None = None) -> CapabilityGuard | None:
    """The method's guard, measuring what it touches; k is the setting's number of directions for row bases."""
    if method.guard is None:
        return None
    options = {**method.guard, "track_energy": True}
    if k is not None and options.get("basis") in get_args(RowKind):
        options = {"k": k, **options}
    if isinstance(options.get("bound"), list):
        options["bound"] = tuple(options["bound"])
    return RandomGuard(model, seed=seed, **options) if method.experiment else CapabilityGuard(model, **options)


def editor_of(method: Method, model: Any, seed: int) -> Editor | None:
    """The method's editor of gradients per domain."""
    if method.editor is None:
        return None
    return PCGrad(seed) if method.editor == "pcgrad" else modular_surgery(model, seed)
