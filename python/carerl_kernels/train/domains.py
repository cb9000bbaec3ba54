"""Domains of a recipe: where prompts come from and what judges the completions, by kind."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from .._json import nested_tuples
from .._rows import read_rows
from ..rewards.pa_grm import Endpoint, Limits, Scorer
from ..rewards.reasoning import StripReasoning
from ..rewards.verifiers import CodeTests, MathMatch, Sandbox, exact_match, gym_domain, instructions_followed
from ..task import Domain, Example, checked_rewards
from ..tasks.characters import character_domain
from ..tasks.split import Reward, domain_of, split_domain
from ..tasks.words import word_domain


def holding(placeholder: str, ask: str) -> str:
    """The text, if it holds the placeholder."""
    if placeholder not in ask:
        raise ValueError(f"expected {placeholder} in it, where the data go")
    return ask


class DomainSpec(BaseModel):
    """What all kinds share."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    chat: bool = False  # prompts go through the tokenizer's chat template as a user's message
    system: str | None = None  # system message before it; needs chat, and prompts as text
    seed: int = 0  # splits the examples, or draws them, and draws the noise
    # training examples with answers that are stored: for a guard's rule "probed", for rehearsal, for replay
    probes: int = Field(default=0, ge=0)
    # what of the domain is drawn in later stages (`train.replay_fraction`): of all its prompts, or of the stored ones
    replay: Literal["all", "stored"] = "all"
    noise: float = Field(default=0.0, ge=0)  # standard deviation of what is added to every reward in training
    scale: float = Field(
        default=1.0, gt=0
    )  # of every reward in training and its noise; evaluation sees them as they are
    # A completion with at least this reward counts as right and may be rehearsed (`self_rehearsal_weight`), whoever gave it;
    # None: of verifiers those with a reward of 1, of judges none.
    right_from: float | None = None

    @model_validator(mode="after")
    def _system_needs_chat(self) -> DomainSpec:
        if self.system is not None and not self.chat:
            raise ValueError("system: a system message needs chat: true")
        return self

    @abstractmethod
    def plain(self, name: str, folder: Path, cache: Path | None) -> Domain:
        """The domain with prompts as text."""

    def build(self, name: str, folder: Path, cache: Path | None) -> Domain:
        """The domain.

        Args:
            folder: What relative paths of data are relative to: the recipe's.
            cache: File for what a judge was paid for, where the recipe names none; None: memory.

        Raises:
            ValueError: Data that cannot be used; names file and line.
            OSError: A file cannot be read.
            ImportError: A package is missing; says what to install.
        """
        domain = self.plain(name, folder, cache)
        if self.chat:
            draw = domain.sample
            domain = replace(
                domain,
                sample=lambda rng, n: [self._as_chat(e) for e in draw(rng, n)],
                eval_examples=[self._as_chat(e) for e in domain.eval_examples],
            )
        if self.probes and not domain.probe_examples:
            drawn = domain.draw(random.Random(f"probes of {name}"), self.probes)
            domain = replace(domain, probe_examples=drawn)
        if self.noise or self.scale != 1:
            domain = replace(domain, reward=NoisyReward(domain, self.noise, self.scale, self.seed))
        return domain if self.right_from is None else replace(domain, verify=self.right_from)

    def _as_chat(self, example: Example) -> Example:
        if not isinstance(example.prompt, str):
            return example
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return replace(example, prompt=(*system, {"role": "user", "content": example.prompt}))


class NoisyReward:
    """A domain's reward with the noise and scale of its `DomainSpec`: of training alone. It says of no completion that it is
    right.
    """

    def __init__(self, domain: Domain, noise: float, scale: float, seed: int) -> None:
        self.name, self.reward, self.noise, self.scale = domain.name, domain.reward, noise, scale
        self.rng = random.Random(f"judge-{domain.name}-{seed}")

    def score_batch(self, examples: Sequence[Example], completions: Sequence[str]) -> list[float | None]:
        rewards = checked_rewards(self.name, self.reward, examples, completions)
        return [None if r is None else self.scale * (r + self.rng.gauss(0.0, self.noise)) for r in rewards]

    def evaluate_batch(self, examples: Sequence[Example], completions: Sequence[str]) -> list[float | None]:
        return checked_rewards(self.name, self.reward, examples, completions, training=False)

    def state_dict(self) -> dict[str, Any]:
        inner = self.reward.state_dict() if hasattr(self.reward, "state_dict") else None
        return {"rng": self.rng.getstate(), "reward": inner}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rng.setstate(nested_tuples(state["rng"]))
        if hasattr(self.reward, "load_state_dict"):
            self.reward.load_state_dict(state["reward"])


class Gym(DomainSpec):
    """Procedural tasks of reasoning-gym; for the last four see `gym_domain`."""

    kind: Literal["gym"]
    # names of its data sets; None: the ready mixture of the domain's name (arithmetic, algebra, logic, ...)
    tasks: tuple[str, ...] | None = None
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)  # settings per task
    # turns a question into the prompt; contains {question} and asks for <answer> tags
    ask: Annotated[str, AfterValidator(partial(holding, "{question}"))] | None = None
    train_size: int = Field(default=10_000, ge=1)
    eval_size: int = Field(default=64, ge=1)
    timeout: float = Field(default=5.0, gt=0)
    allow_unisolated: bool = False

    def plain(self, name: str, folder: Path, cache: Path | None) -> Domain:
        ask = self.ask
        return gym_domain(
            name,
            self.tasks,
            ask=None if ask is None else lambda question: ask.replace("{question}", question),
            **self.model_dump(include={"seed", "train_size", "eval_size", "options", "timeout", "allow_unisolated"}),
        )


class Characters(DomainSpec):
    """A one-line task of `carerl demo` (code, chat, math, ...), for models built from nothing."""

    kind: Literal["characters"]
    task: str | None = None  # its name; None: the domain's

    def plain(self, name: str, folder: Path, cache: Path | None) -> Domain:
        return character_domain(name, self.task or name, self.seed, self.probes)


class Words(DomainSpec):
    """An easy task on pairs of words (first, second, swap, alphabet), for pretrained models."""

    kind: Literal["words"]
    task: str | None = None  # its name; None: the domain's
    shots: int = Field(default=2, ge=0)  # solved examples in every prompt

    def plain(self, name: str, folder: Path, cache: Path | None) -> Domain:
        return word_domain(name, self.task or name, self.seed, self.probes, self.shots)


class Rows(DomainSpec):
    """Prompts from a file of JSON lines: "prompt" (text or chat messages), "answer" where there is one, and what the verifier
    reads besides."""

    train: Path
    eval: Path | None = None  # held-out examples; None: `eval_size` rows of the training file are kept out of training
    eval_size: int = Field(default=64, ge=0)
    # turns the prompt of a row into the prompt of the policy; contains {prompt}, and needs prompts as text
    ask: Annotated[str, AfterValidator(partial(holding, "{prompt}"))] | None = None

    @abstractmethod
    def reward(self, cache: Path | None) -> Reward:
        """What judges the completions."""

    needs: ClassVar[tuple[str, ...]] = ()

    def plain(self, name: str, folder: Path, cache: Path | None) -> Domain:
        reward = self.reward(cache)
        train = self._examples(folder / self.train, reward)
        if self.eval is None:
            return split_domain(name, train, reward, self.eval_size, self.seed)
        return domain_of(name, train, self._examples(folder / self.eval, reward), reward)

    def _examples(self, path: Path, reward: Reward) -> list[Example]:
        """The rows as examples, each looked at by the verifier that will judge it (`check`), if it looks at any."""
        examples: list[Example] = []

        def add(row: dict[str, Any]) -> None:
            examples.append(self._example(row))
            getattr(reward, "check", lambda example: None)(examples[-1])

        for _ in read_rows(path, ("prompt", *self.needs), add):
            pass
        if not examples:
            raise ValueError(f"{path}: expected one row or more, found none")
        return examples

    def _example(self, row: Mapping[str, Any]) -> Example:
        prompt, answer = row["prompt"], row.get("answer")
        changed_by = [name for name in ("ask", "system") if getattr(self, name) is not None]
        if changed_by and not isinstance(prompt, str):
            raise ValueError(
                f"expected a prompt as text, which {' and '.join(changed_by)} would change, found chat messages; write into them "
                "what is to be asked, and leave the option out"
            )
        if self.ask is not None:
            prompt = self.ask.replace("{prompt}", prompt)
        return Example(prompt, None if answer is None else str(answer), row)


class Exact(Rows):
    """The completion is the row's "answer"."""

    kind: Literal["exact"]
    needs: ClassVar[tuple[str, ...]] = ("answer",)

    def reward(self, cache: Path | None) -> Reward:
        return exact_match


class Math(Rows):
    """The completion's result equals the row's "answer" in value (math-verify)."""

    kind: Literal["math"]
    needs: ClassVar[tuple[str, ...]] = ("answer",)

    def reward(self, cache: Path | None) -> Reward:
        return MathMatch()


class Instructions(Rows):
    """The share of the row's "instructions" that the completion follows."""

    kind: Literal["instructions"]
    needs: ClassVar[tuple[str, ...]] = ("instructions",)

    def reward(self, cache: Path | None) -> Reward:
        return instructions_followed


class Code(Rows):
    """The completion's program passes the row's "tests", in a sandbox."""

    kind: Literal["code"]
    partial: bool = False  # the share of tests passed instead of all or nothing
    # run programs where the machine offers no isolation: they read and reach what this user can
    allow_unisolated: bool = False
    needs: ClassVar[tuple[str, ...]] = ("tests",)

    def reward(self, cache: Path | None) -> Reward:
        return CodeTests(Sandbox(allow_unisolated=self.allow_unisolated), partial=self.partial)


class JudgeSpec(BaseModel):
    """A language model behind an OpenAI-compatible endpoint; its key comes from CARERL_JUDGE_API_KEY."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str  # up to and including /v1
    model: str  # the model's name on the server
    writer_model: str | None = None  # writes the protocols; None: the judge does
    max_in_flight: int = Field(default=64, ge=1)  # this and the next two: see `Endpoint`
    timeout: float = Field(default=120.0, gt=0)
    attempts: int = Field(default=6, ge=1)
    scale: int = Field(default=4, ge=1, le=9)  # highest level of a criterion
    # these four: see `Scorer`
    calibration: Literal["scale", "anchors", "group"] = "scale"
    on_signs: Literal["lower", "zero", "note"] = "lower"
    rejudge: float = Field(default=0.0, ge=0, le=1)
    strip_reasoning: StripReasoning = True
    cache: Path | None = None  # SQLite file of protocols and verdicts; None: one in the run's directory


class Judged(Rows):
    """A language model judges the completion by a protocol of its own (PA-GRM)."""

    kind: Literal["judged"]
    judge: JudgeSpec

    def reward(self, cache: Path | None) -> Reward:
        spec = self.judge
        settings = spec.model_dump(include={"max_in_flight", "timeout", "attempts"})
        return Scorer(
            Endpoint(spec.url, spec.model, **settings),
            writer=None if spec.writer_model is None else Endpoint(spec.url, spec.writer_model, **settings),
            cache=None if spec.cache is None and cache is None else str(spec.cache or cache),
            limits=Limits(scale=spec.scale),
            **spec.model_dump(include={"calibration", "on_signs", "rejudge", "strip_reasoning"}),
        )


AnyDomain = Annotated[
    Gym | Characters | Words | Exact | Math | Instructions | Code | Judged,
    Field(discriminator="kind", description="by kind"),
]
