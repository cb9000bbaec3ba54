"""What a method of the grid is made of: its guard and its editor, over any model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, get_args

from torch import Tensor

from ..guard import CapabilityGuard
from ..guard.editors import Editor, PCGrad, modular_surgery
from ..subspace.layout import RowKind
from .experiments import RandomGuard
from .grid import Method

Shown = Callable[[str], Iterable[Mapping[str, Tensor]]]
"""What a model is called with on a domain's prompts and answers."""


class ShownGuard(CapabilityGuard):
    """Looks at a finished domain's prompts where others record its stage.

    Args:
        model: As for `CapabilityGuard`.
        shown: Batches of a domain.
        options: As for `CapabilityGuard`.
    """

    def __init__(self, model: Any, shown: Shown, **options: Any) -> None:
        self._shown = shown
        super().__init__(model, **options)

    @contextmanager
    def stage(self, name: str, path: Any = None, *_: Any, **__: Any) -> Iterator[Any]:
        """Records nothing; at its end the domain is observed."""
        with self.domain(name):
            yield None
        self.settle()
        self.protect(name, self._shown(name), path, progress=False)


def guard_of(
    method: Method, model: Any, seed: int, k: int | None = None, shown: Shown | None = None, *, measure: bool = True
) -> CapabilityGuard | None:
    """The method's guard; k is the setting's number of directions for row bases, `measure` whether what it touches is."""
    if method.guard is None:
        return None
    options = {"track_energy": measure, **method.guard}
    if k is not None and options.get("basis") in get_args(RowKind):
        options = {"k": k, **options}
    if isinstance(options.get("bound"), list):
        options["bound"] = tuple(options["bound"])
    if method.experiment:
        return RandomGuard(model, seed=seed, **options)
    if method.shown:
        assert shown is not None
        return ShownGuard(model, shown, **options)
    return CapabilityGuard(model, **options)


def editor_of(method: Method, model: Any, seed: int) -> Editor | None:
    """The method's editor of gradients per domain; None where the guard is it."""
    if method.editor is None or method.editor == "guard":
        return None
    return PCGrad(seed) if method.editor == "pcgrad" else modular_surgery(model, seed)
