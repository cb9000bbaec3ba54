"""What methods do beyond a recipe: one file each, named by `add` in a row of the grid.

A file defines `Method`, a subclass of `Addition` whose fields are its options:

    # methods/pull.py, and in YAML `pull: {text: ..., lr: [1], add: {name: pull, weight: 0.1}}`
    class Method(Addition):
        weight: float = 1.0

        @contextmanager
        def during(self, run):
            start = [p.detach().clone() for p in run.trainer.model.parameters()]
            def add(optimizer, args, kwargs): ...  # to the gradients
            hook = register_optimizer_step_pre_hook(add)
            yield {}
            hook.remove()

One that acts from step to step, in settings of language models, is an `acting.Acting`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ...guard import CapabilityGuard
from ...train.recipe import RecipeError, Section, checked

if TYPE_CHECKING:
    from ...train.run import Run
    from ..acting import Actor, Trainee
    from ..grid import Cell


@dataclass
class Extra:
    """Costs of a whole run beyond the plain one.

    Attributes:
        trained, both, forward: Sequences sampled and trained on, passed forward and backward, passed forward.
        stores: Besides data.
    """

    trained: int = 0
    both: int = 0
    forward: int = 0
    stores: str = ""


class Addition(Section):
    """Nothing beyond the recipe; subclasses override what they need."""

    kinds: ClassVar[tuple[str, ...]] = ("grpo", "bandit", "sft", "merge")
    """Kinds of settings that it goes with."""

    def check(self, recipe: Any, source: str) -> None:
        """Raises RecipeError, beginning with `source`, where it does not go with the recipe."""

    def guard_class(self) -> type[CapabilityGuard]:
        """What the recipe's guard is one of."""
        return CapabilityGuard

    def guard_defaults(self, seed: int) -> dict[str, Any]:
        """Options of that class that no recipe knows."""
        return {}

    def during(self, run: Run) -> AbstractContextManager[dict[str, Any]]:
        """Around the training of a "grpo" cell, whose trainer has model, tokenizer, domains, history and guard.

        The block is given a mapping that holds, when the block is left, further fields of its `cells.Record`.
        """
        return nullcontext({})

    def actor(self, trainee: Trainee) -> Actor | None:
        """What acts on the steps of an "sft" cell."""
        return None

    def keeps(self, recipe: Any) -> str:
        """What it keeps of earlier domains' data, for tables; empty where the recipe says it."""
        return ""

    def extra(self, recipe: Any) -> Extra:
        """What it computes and stores beyond the plain run, for tables; without what the recipe says."""
        return Extra()

    def run(self, cell: Cell, cache: Path, report: Callable[[Any], None]) -> dict[str, Any]:
        """The whole cell: by the runner of its setting's kind."""
        return dict(cell.runner.run(cell, cache, report))


def addition(add: str | dict[str, Any] | None, source: str) -> Addition:
    """What `add` of a method names.

    Raises:
        RecipeError: There is no such file, or no such option of it.
    """
    if add is None:
        return Addition()
    options = {"name": add} if isinstance(add, str) else dict(add)
    name = str(options.pop("name", ""))
    if not name.isidentifier() or find_spec(f"{__name__}.{name}") is None:
        raise RecipeError(f"{source}: expected add to name a file of {__name__}, found {add!r}")
    return checked(import_module(f"{__name__}.{name}").Method, options, f"{source}: add {name}")
