"""Every domain of a mixed stage by itself, from the start that all share, with the samples it has in the mixed run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ...train.recipe import RecipeError
from . import Addition

if TYPE_CHECKING:
    from ..grid import Cell


class Method(Addition):
    """A run for each domain, in whole batches, so in fewer steps."""

    kinds: ClassVar[tuple[str, ...]] = ("grpo",)

    def check(self, recipe: Any, source: str) -> None:
        if len(recipe.stages) != 1 or not recipe.stages[0].mixed or recipe.guard is not None:
            raise RecipeError(f"{source}: expected one mixed stage and no guard to go with add: alone")

    def run(self, cell: Cell, cache: Path, report: Callable[[Any], None]) -> dict[str, Any]:
        from ..grpo import lowest_of, opened, scores_of, start_of

        (stage,) = cell.recipe.stages
        shares = stage.shares or (1.0,) * len(stage.domains)
        before, after, lowest = [], [], []
        for domain, share in zip(stage.domains, shares, strict=True):
            steps = max(1, round(stage.steps * share / sum(shares)))
            single = replace(stage, domain=domain, steps=steps, shares=None)
            recipe = cell.recipe.model_copy(update={"stages": (single,)})
            with opened(cell, recipe, start_of(cell, cache), lambda line: report(line["step"])) as run:
                history = run.train()
            (start,), (end,) = scores_of(history, [domain])
            before.append(start)
            after.append(end)
            lowest += lowest_of(history, cell, [domain])
        return {"stages": [list(stage.domains)], "scores": [before, after], "lowest": lowest}
