"""What is compared: settings, methods and seeds, declared in YAML; one cell is one of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

PRESETS = ("small", "full")
CHOOSING = 100
"""Seeds from here on chose methods and their numbers; those below confirm and are all that verdicts use."""


class GridError(ValueError):
    """A grid file, a name in it, or a cell that is not in it; the message says what was expected."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Method(_Strict):
    """One way to train.

    Attributes:
        text: What it is, for tables.
        lr: Times the setting's learning rate: a cell for each, so that a method is a front and not a point.
        train: Fields of `GRPOConfig`.
        guard: Options of `CapabilityGuard`, or None.
        experiment: "random": a control with random directions (`experiments.RandomGuard`).
        editor: Combines one gradient per domain of the batch; "guard": the guard acts on each, with the directions of the others.
        stored: Examples kept of every earlier domain, for rehearsal, probes and replay; None: all that the domain has.
        shown: Examples of every domain that its guard is shown once, when the domain's stage has ended, for the directions of
            their inputs; 0: the guard records stages as they are trained.
        alone: Pooled settings: every domain is trained by itself from the same start, on as many samples.
        ties: Settings of kind "merge": experts are merged by TIES, with this share of every change; None: their changes are
            summed, and confined off the other domains' inputs where the method has a guard.
    """

    text: str
    lr: tuple[float, ...] = (0.5,)
    train: dict[str, Any] = Field(default_factory=dict)
    guard: dict[str, Any] | None = None
    experiment: Literal["random"] | None = None
    editor: Literal["guard", "pcgrad", "modular_surgery"] | None = None
    stored: int | None = Field(default=32, ge=0)
    shown: int = Field(default=0, ge=0)
    alone: bool = False
    ties: float | None = Field(default=None, gt=0, le=1)

    @property
    def memory(self) -> str:
        """What it keeps of earlier domains' data, for tables."""
        uses = self.train.get("replay_fraction", 0) > 0 or self.train.get("rehearsal_weight", 0) > 0
        if not uses and (self.guard or {}).get("rule") != "probed":
            return "none"
        return "all prompts" if self.stored is None else f"{self.stored} a domain"


class Setting(_Strict):
    """One task: a model, and stages of one domain or of several mixed.

    Attributes:
        text: What it is, for the report.
        kind: Which runner: "lm" (the demonstration's language model), "bandit" (an MLP policy), "smollm2" (LoRA, GRPO),
            "sft" (the same model, supervised; scores are minus nats a token), "merge" (experts of the demonstration's model).
        stages: Domain names, or lists of names for mixed stages.
        steps: GRPO steps per stage.
        lr: Learning rate that methods scale.
        warm_up: Supervised steps before everything.
        earlier, earlier_steps: Domains of a plain mixed stage between the warm-up and everything, alike for all methods.
        shares: Of the batch, per domain of a mixed stage; None: equal.
        noise: Standard deviation of what is added to a domain's reward: a judge instead of a verifier.
        scale: What a domain's reward is multiplied by, its noise too.
        train: Fields of `GRPOConfig` for every method.
        k: Directions per domain of guards with row bases; None: the guard's default.
        lora_rank: Of adapters on all linear layers, for "sft"; 0: all parameters are trained.
    """

    text: str
    kind: Literal["lm", "bandit", "smollm2", "sft", "merge"]
    stages: tuple[str | tuple[str, ...], ...]
    steps: int = Field(ge=1)
    lr: float = Field(gt=0)
    warm_up: int = Field(default=60, ge=0)
    earlier: tuple[str, ...] = ()
    earlier_steps: int = Field(default=0, ge=0)
    shares: dict[str, float] | None = None
    noise: dict[str, float] = Field(default_factory=dict)
    scale: dict[str, float] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)
    k: int | None = None
    lora_rank: int = Field(default=0, ge=0)

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """The domains of each stage."""
        return [(s,) if isinstance(s, str) else s for s in self.stages]

    @property
    def pooled(self) -> bool:
        """Whether it is one mixed stage: no domain is new or old, and what counts is where each of them ends."""
        return len(self.groups) == 1 and len(self.groups[0]) > 1

    @property
    def domains(self) -> list[str]:
        """All of them, in the order in which they are first trained."""
        return list(dict.fromkeys(d for group in self.groups for d in group))


class Run(_Strict):
    """A block of cells: every method with every seed in one setting."""

    setting: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Cell:
    """One training run of the grid."""

    setting_name: str
    setting: Setting
    method_name: str
    method: Method
    lr: float
    seed: int

    @property
    def variant(self) -> str:
        """Method and learning rate: a row of a table."""
        return f"{self.method_name}@{self.lr:g}"

    @property
    def name(self) -> str:
        """As on the command line: SETTING/METHOD@LR/SEED."""
        return f"{self.setting_name}/{self.variant}/{self.seed}"

    @property
    def key(self) -> str:
        """Hash of everything that decides the result (what is left at its default apart): a cell that changed runs again."""
        content = {
            "setting": self.setting.model_dump(mode="json", exclude={"text"}, exclude_defaults=True),
            "method": self.method.model_dump(mode="json", exclude={"text", "lr"}, exclude_defaults=True),
            "lr": self.lr,
            "seed": self.seed,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


class Grid(_Strict):
    """Everything a study compares."""

    settings: dict[str, Setting]
    methods: dict[str, Method]
    runs: tuple[Run, ...]

    @classmethod
    def load(cls, source: str | Path) -> Grid:
        """A preset by name, or a YAML file.

        A file holds `runs`, and may hold `settings` and `methods` that add to, or replace, those that ship with the package.

        Raises:
            GridError: No such file or preset, not YAML, or something in it that is not as it should be, by name.
            ImportError: yaml is missing; says what to install.
        """
        content = _read("definitions")
        own = _read(str(source)) if str(source) in PRESETS else _parse(Path(source))
        merged = {
            "settings": {**content["settings"], **own.get("settings", {})},
            "methods": {**content["methods"], **own.get("methods", {})},
            "runs": own.get("runs", []),
        }
        try:
            grid = cls.model_validate(merged)
        except ValidationError as e:
            raise GridError(f"{source}: {e}") from e
        grid._check(str(source))
        return grid

    def _check(self, source: str) -> None:
        for run in self.runs:
            if run.setting not in self.settings:
                raise GridError(
                    f"{source}: expected a setting out of {', '.join(self.settings)}, found {run.setting!r}"
                )
            for name in run.methods:
                if name not in self.methods:
                    raise GridError(f"{source}: expected methods out of {', '.join(self.methods)}, found {name!r}")

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
            GridError: The name is not SETTING/METHOD@LR/SEED, or a part of it is unknown.
        """
        try:
            setting, variant, seed = name.split("/")
            method, _, lr = variant.partition("@")
            numbers = float(lr or 1), int(seed)
        except ValueError:
            raise GridError(f"expected a cell SETTING/METHOD@LR/SEED such as lm/none@0.5/0, found {name!r}") from None
        for kind, known, found in (("setting", self.settings, setting), ("method", self.methods, method)):
            if found not in known:
                raise GridError(f"cell {name!r}: expected a {kind} out of {', '.join(known)}, found {found!r}")
        if not numbers[0] > 0 or numbers[1] < 0:
            raise GridError(
                f"cell {name!r}: expected a positive learning rate and a seed from 0, found {lr} and {seed}"
            )
        return self._cell(setting, method, *numbers)

    def _cell(self, setting: str, method: str, lr: float, seed: int) -> Cell:
        return Cell(setting, self.settings[setting], method, self.methods[method], lr, seed)


def _read(name: str) -> dict[str, Any]:
    return _load(resources.files(__package__).joinpath("presets", f"{name}.yaml").read_text(), f"preset {name}")


def _parse(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise GridError(f"expected a preset ({', '.join(PRESETS)}) or a YAML file, found {str(path)!r}")
    return _load(path.read_text(), str(path))


def _load(text: str, source: str) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as e:
        raise ImportError("reading a grid needs yaml: pip install 'carerl-kernels[train]'") from e
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise GridError(f"{source}: not YAML: {e}") from e
    if not isinstance(content, dict):
        raise GridError(f"{source}: expected a mapping with `runs`, found {type(content).__name__}")
    return content
