"""A short refresh at the end: what was learned before the last stage is trained again for a tenth of its own steps.

That a short stage on a domain brings back much of what later ones took is reported in arXiv:2606.02398. Here all domains before
the last share the batches of one further stage, so that none of them is the one before last again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ...tasks.texts import TEXT
from ...train.recipe import Recipe, RecipeError
from . import Addition, Extra

if TYPE_CHECKING:
    from ..grid import Cell


class Method(Addition):
    """Args:
    share: Of every earlier stage's own steps.
    """

    kinds: ClassVar[tuple[str, ...]] = ("grpo", "sft")
    share: float = Field(default=0.1, gt=0)

    def check(self, recipe: Any, source: str) -> None:
        mixed = any(getattr(stage, "mixed", False) for stage in recipe.stages)
        if len(recipe.stages) < 2 or mixed or recipe.guard is not None:
            raise RecipeError(
                f"{source}: expected two or more stages of one domain each and no guard to go with add: refresh"
            )

    def run(self, cell: Cell, cache: Path, report: Callable[[Any], None]) -> dict[str, Any]:
        stages = cell.recipe.stages
        again = replace(cell)
        again.added = Addition()
        supervised = cell.setting.kind == "sft"
        changes = {"refresh": self.share} if supervised else {"stages": (*stages, self._last(stages))}
        again.recipe = cell.recipe.model_copy(update=changes)
        return super().run(again, cache, report)

    def _last(self, stages: Any) -> Any:
        domains = tuple(dict.fromkeys(stage.domain for stage in stages[:-1]))
        steps = max(1, round(self.share * sum(stage.steps for stage in stages[:-1])))
        return replace(stages[0], domain=domains if len(domains) > 1 else domains[0], steps=steps)

    def extra(self, recipe: Any) -> Extra:
        train = recipe.train
        if not isinstance(recipe, Recipe):
            from ..sft import BATCH

            again = [stage for stage in recipe.stages[:-1] if stage != TEXT]
            return Extra(both=max(1, round(self.share * recipe.steps * len(again))) * BATCH)
        return Extra(trained=self._last(recipe.stages).steps * train.prompts_per_step * train.group_size)

    def keeps(self, recipe: Any) -> str:
        return "all prompts"
