"""What is compared: settings, methods and seeds, declared in YAML; one cell is one of each, and a recipe."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module, resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from ..subspace.layout import RowKind
from ..train.recipe import RecipeError, Section, checked, merged
from ..train.recipe_yaml import read_yaml
from .methods import Addition, addition

PRESETS = ("small", "full", "demo")
CHOOSING = 100
"""Seeds from here on chose methods and their numbers; those below confirm and are all that verdicts use."""


class Described(BaseModel):
    """A part of a recipe besides fields of its own; the recipe is checked where a cell puts it together."""

    model_config = ConfigDict(extra="allow", frozen=True)

    text: str

    @property
    def recipe(self) -> dict[str, Any]:
        """Everything that is no field, as in the file."""
        return dict(self.model_extra or {})


class Method(Described):
    """One way to train: changes of a setting's recipe, which is merged with them ("*" stands for every domain).

    Attributes:
        text: What it is, for tables.
        lr: Times the setting's learning rate: a cell for each, so that a method is a front and not a point.
        add: What it does beyond a recipe: a file in `methods`, by its name, or {name: ..., options of it}.
    """

    lr: tuple[float, ...] = (0.5,)
    add: str | dict[str, Any] | None = None


class Setting(Described):
    """One task: a recipe that methods change; its data files are relative to the working directory.

    Attributes:
        text: What it is, for the report.
        kind: Which recipe it is and who runs it: "grpo" (`carerl train`'s), "bandit" (an MLP policy), "sft" (SmolLM2,
            supervised; scores are minus nats a token), "merge" (experts of "grpo", merged).
        earlier: Changes of the recipe that make it a run before everything, alike for all methods, which start from its end.
        k: Directions per domain of guards with row bases; None: the guard's default.
    """

    kind: Literal["grpo", "bandit", "sft", "merge"] = "grpo"
    earlier: dict[str, Any] | None = None
    k: int | None = None


class Runs(Section):
    """A block of cells: every method with every seed in one setting."""

    setting: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass
class Cell:
    """One training run of the grid.

    Attributes:
        setting_name, setting, method_name, method: Of the grid.
        lr: Times the setting's learning rate.
        seed: Of everything.
        kept: Directory that keeps the run of a setting of kind "grpo"; None: it is not kept.
    """

    setting_name: str
    setting: Setting
    method_name: str
    method: Method
    lr: float
    seed: int
    kept: Path | None = None

    @property
    def kept_as(self) -> str:
        """Where a study keeps the run, in its directory."""
        return f"{self.method_name}/seed-{self.seed}"

    @property
    def variant(self) -> str:
        """Method and learning rate: a row of a table."""
        return f"{self.method_name}@{self.lr:g}"

    @property
    def name(self) -> str:
        """As on the command line: SETTING/METHOD@LR/SEED."""
        return f"{self.setting_name}/{self.variant}/{self.seed}"

    @cached_property
    def recipe(self) -> Any:
        """The setting's recipe with the method's changes, learning rate and seed.

        Raises:
            RecipeError: The two ask for something that is unknown or that would be ignored.
        """
        return self._checked(self.method.recipe, self.lr)

    @cached_property
    def earlier(self) -> Any:
        """The recipe of the run before everything, or None."""
        return None if self.setting.earlier is None else self._checked(self.setting.earlier, 1.0)

    @cached_property
    def plain(self) -> Any:
        """The setting's recipe as it is, for what all of its methods share."""
        return self._checked({}, 1.0)

    @cached_property
    def added(self) -> Addition:
        """What the method does beyond the recipe.

        Raises:
            RecipeError: There is no such file or option, or it does not go with the setting or the recipe.
        """
        found = addition(self.method.add, self.name)
        if self.setting.kind not in found.kinds:
            raise RecipeError(
                f"{self.name}: expected add: {self.method.add} in settings of kind {', '.join(found.kinds)}, found "
                f"{self.setting.kind}"
            )
        found.check(self.recipe, self.name)
        return found

    @cached_property
    def key(self) -> str:
        """Hash of everything that decides the result (what is left at its default apart): a cell that changed runs again."""
        content = {
            "kind": self.setting.kind,
            "recipe": self.recipe.model_dump(mode="json", exclude_defaults=True),
            "earlier": self.setting.earlier,
            "add": self.method.add,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    def check(self) -> None:
        """Look for what the cell would not honour, before anything runs.

        Raises:
            RecipeError: The setting or the method asks for something that would not happen.
        """
        _ = self.recipe, self.earlier, self.added

    @property
    def runner(self) -> Any:
        """The module of the setting's kind, with its `Recipe`, the place that the learning rate scales, and `run`."""
        return import_module(f".{self.setting.kind}", __package__)

    def _checked(self, changes: dict[str, Any], lr: float) -> Any:
        runner = self.runner
        data = merged(self.setting.recipe, changes)
        owned = [place for place in ("seed", "train.seed", "model.seed", "train.lr") if _at(changes, place) is not None]
        if owned:
            raise RecipeError(f"{self.name}: expected lr and seed from the cell's name, found {', '.join(owned)}")
        guard = data.get("guard")
        if self.setting.k is not None and guard is not None and guard.get("basis") in get_args(RowKind):
            data = merged(data, {"guard": {"k": self.setting.k, **guard}})
        scaled = lr * (_at(data, runner.SCALED) or 1.0)
        *way, last = runner.SCALED.split(".")
        data = merged(data, {way[0]: {last: scaled}} if way else {last: scaled})
        return checked(runner.Recipe, {**data, "seed": self.seed}, self.name)


class Grid(Section):
    """Everything a study compares."""

    settings: dict[str, Setting]
    methods: dict[str, Method]
    runs: tuple[Runs, ...] = Field(default=())

    @classmethod
    def load(cls, source: str | Path) -> Grid:
        """A preset by name, or a YAML file.

        A file holds `runs`, and may hold `settings` and `methods` that add to, or replace, those that ship with the package.

        Raises:
            RecipeError: No such file or preset, not YAML, or something in it that is not as it should be, by name.
            ImportError: yaml is missing; says what to install.
        """
        content = _preset("definitions")
        own = dict(_preset(str(source)) if str(source) in PRESETS else _read(Path(source), str(source)))
        for part in ("settings", "methods"):
            own[part] = {**content[part], **(own.get(part) or {})}
        grid = checked(cls, own, str(source))
        for run in grid.runs:
            grid._known(f"{source}: expected a setting", run.setting, grid.settings)
            for name in run.methods:
                grid._known(f"{source}: expected a method", name, grid.methods)
        return grid

    @staticmethod
    def _known(expected: str, name: str, among: dict[str, Any]) -> None:
        if name not in among:
            raise RecipeError(f"{expected} out of {', '.join(among)}, found {name!r}")

    def cells(self, settings: Sequence[str] = ()) -> Iterator[Cell]:
        """All cells of the runs, seed by seed so that an interrupted study has whole seeds; only of these settings if any."""
        seen: set[str] = set()
        for run in self.runs:
            if settings and run.setting not in settings:
                continue
            for seed in run.seeds:
                for name in run.methods:
                    for lr in self.methods[name].lr:
                        cell = self._cell(run.setting, name, lr, seed)
                        if cell.name not in seen:
                            seen.add(cell.name)
                            yield cell

    def cell(self, name: str) -> Cell:
        """Any cell of known settings and methods, in the runs or not.

        Raises:
            RecipeError: The name is not SETTING/METHOD@LR/SEED, or a part of it is unknown.
        """
        try:
            setting, variant, seed = name.split("/")
            method, _, lr = variant.partition("@")
            numbers = float(lr or 1), int(seed)
        except ValueError:
            raise RecipeError(f"expected a cell SETTING/METHOD@LR/SEED such as lm/none@0.5/0, found {name!r}") from None
        self._known(f"cell {name!r}: expected a setting", setting, self.settings)
        self._known(f"cell {name!r}: expected a method", method, self.methods)
        if not numbers[0] > 0 or numbers[1] < 0:
            raise RecipeError(
                f"cell {name!r}: expected a positive learning rate and a seed from 0, found {lr} and {seed}"
            )
        return self._cell(setting, method, *numbers)

    def _cell(self, setting: str, method: str, lr: float, seed: int) -> Cell:
        return Cell(setting, self.settings[setting], method, self.methods[method], lr, seed)


def _at(data: Any, place: str) -> Any:
    """What stands at a dotted place; None where there is nothing."""
    for step in place.split("."):
        data = data.get(step) if isinstance(data, dict) else None
    return data


@cache
def _preset(name: str) -> dict[str, Any]:
    return _read(resources.files(__package__).joinpath("presets", f"{name}.yaml"), f"preset {name}")


def _read(path: Traversable, source: str) -> dict[str, Any]:
    if not path.is_file():
        raise RecipeError(f"expected a preset ({', '.join(PRESETS)}) or a YAML file, found {str(path)!r}")
    content = read_yaml(path.read_text(encoding="utf-8-sig"), source)
    if not isinstance(content, dict):
        raise RecipeError(f"{source}: expected a mapping with `runs`, found {type(content).__name__}")
    return content
