"""Experts that were trained apart on one supervised task each, merged: baselines for settings of kind "sft".

Task arithmetic (Ilharco et al., "Editing models with task arithmetic", ICLR 2023) and TIES merging (Yadav et al., NeurIPS 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ...guard.sums import task_arithmetic, ties
from ...tasks.texts import TEXT
from ...train.recipe import RecipeError
from . import Addition, Extra

if TYPE_CHECKING:
    from ..grid import Cell


class Method(Addition):
    """Args:
    scale: Of the sum of changes, or of what TIES makes of them.
    ties: Share of every change that TIES keeps; None: task arithmetic.
    """

    kinds: ClassVar[tuple[str, ...]] = ("sft",)
    scale: float = Field(default=1.0, gt=0)
    ties: float | None = Field(default=None, gt=0, le=1)

    def check(self, recipe: Any, source: str) -> None:
        apart(recipe, f"{source}: add: merged")
        if recipe.scale != 1:
            raise RecipeError(
                f"{source}: expected @1 to go with add: merged, found @{recipe.scale:g}; its `scale` is of the changes"
            )

    def extra(self, recipe: Any) -> Extra:
        return Extra(stores=f"{len(recipe.stages)} models")

    def run(self, cell: Cell, cache: Path, report: Callable[[Any], None]) -> dict[str, Any]:
        from ..sft import Bed

        bed, tasks = Bed(cell, cache, report), list(cell.recipe.stages)
        start, measured = bed.weights(), [bed.measure()]
        experts = []
        for _ in bed.alone():
            measured.append(bed.measure())
            experts.append(bed.weights())
        merged = {}
        for name, first in start.items():
            others = [expert.pop(name) for expert in experts]
            whole = self.ties is None
            merged[name] = (
                task_arithmetic(first, others, self.scale)
                if whole
                else ties(first, others, self.scale, self.ties or 1.0)
            )
        bed.load(merged)
        return bed.found([*([task] for task in tasks), tasks], [*measured, bed.measure()])


def apart(recipe: Any, source: str) -> None:
    """Raises RecipeError unless the recipe is of two or more tasks that experts can learn apart, with nothing that protects."""
    if len(recipe.stages) < 2 or TEXT in recipe.stages or recipe.guard is not None:
        raise RecipeError(f"{source}: expected two or more tasks, no text and no guard; found another")
