"""Procedural tasks with verifiers, from reasoning-gym, as domains. Its graders run in the sandbox."""

from __future__ import annotations

import ast
import base64
import inspect
import math
import pickle
import random
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ..._errors import require
from ...task import Domain, Example
from ..log import LOGGER
from ..reasoning import StripReasoning, graded_text
from .answers import tagged_answer
from .sandbox import SandboxedReward
from .worker import Worker

# Ready mixtures: what a small model can begin to learn, by skill.
GYM_DOMAINS: dict[str, tuple[str, ...]] = {
    "arithmetic": ("chain_sum", "basic_arithmetic", "products", "gcd", "lcm"),
    "algebra": ("simple_equations", "polynomial_equations", "simple_integration"),
    "logic": ("syllogism", "knights_knaves", "propositional_logic", "zebra_puzzles"),
    "text": ("letter_counting", "word_sorting", "spell_backward", "caesar_cipher", "letter_jumble"),
    "data": ("number_sorting", "number_filtering", "base_conversion", "count_bits"),
    "time": ("calendar_arithmetic", "time_intervals"),
}

ASK = "{question}\n\nGive the final answer between <answer> and </answer>."
MAX_ANSWER = 20_000


def gym_domain(
    name: str,
    tasks: Sequence[str] | None = None,
    *,
    seed: int = 0,
    train_size: int = 10_000,
    eval_size: int = 64,
    ask: Callable[[str], str] | None = None,
    options: dict[str, dict[str, Any]] | None = None,
    timeout: float = 5.0,
    allow_unisolated: bool = False,
    strip_reasoning: StripReasoning = True,
) -> Domain:
    """A domain of reasoning-gym tasks.

    Training and evaluation examples come from different seeds. The reward is the task's own score of what stands between
    the last answer tags, in [0, 1]; 0 without them, and for an answer that its grader does not come to an end with.

    Args:
        name: The name of the domain; one of `GYM_DOMAINS` unless `tasks` are given.
        tasks: Names of reasoning-gym data sets, drawn from evenly.
        train_size: Different training examples per task.
        eval_size: Held-out examples altogether, split over the tasks.
        ask: Turns a question into the prompt; by default it asks for the answer between tags.
        options: Settings per task, passed to reasoning-gym ({"chain_sum": {"max_terms": 3}}).
        timeout: Seconds for grading one answer.
        allow_unisolated: Grade where the machine keeps graders neither from files nor from the network.
        strip_reasoning: See `rewards.reasoning.strip_reasoning`; an unfinished trace is worth 0.

    Raises:
        ImportError: reasoning-gym is missing; says what to install.
        ValueError: An unknown name or task.
        SandboxError: Graders cannot be isolated on this machine; says why.
    """
    require("reasoning_gym", "a gym domain", "carerl-kernels[verifiers]")
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if tasks is None:
        if name not in GYM_DOMAINS:
            raise ValueError(f"gym_domain: expected one of {', '.join(GYM_DOMAINS)}, or tasks, found {name!r}")
        tasks = GYM_DOMAINS[name]
    unknown = [t for t in tasks if t not in DATASETS]
    if unknown or not tasks:
        raise ValueError(f"gym_domain: reasoning-gym has no tasks {unknown}; see reasoning_gym.factory.DATASETS")
    each = math.ceil(eval_size / len(tasks))
    settings = {t: {"size": train_size, "seed": seed, **(options or {}).get(t, {})} for t in tasks}
    reward = GymReward(settings, timeout=timeout, isolated=not allow_unisolated, strip_reasoning=strip_reasoning)
    train = {t: reasoning_gym.create_dataset(t, **settings[t]) for t in tasks}
    held = {t: reasoning_gym.create_dataset(t, **settings[t] | {"size": each, "seed": seed + 2**20}) for t in tasks}

    def example(task: str, entry: dict[str, Any]) -> Example:
        prompt = ask(entry["question"]) if ask else ASK.format(question=entry["question"])
        answer = entry["answer"]
        return Example(prompt, None if answer is None else str(answer), {"task": task, "entry": entry})

    def sample(rng: random.Random, n: int) -> list[Example]:
        drawn = []
        for _ in range(n):
            task = rng.choice(list(train))
            drawn.append(example(task, train[task][rng.randrange(train_size)]))
        return drawn

    evaluation = [example(task, held[task][i]) for i in range(each) for task in tasks][:eval_size]
    return Domain(name, sample, reward, eval_examples=evaluation)


class GymReward(SandboxedReward):
    """Reward: a reasoning-gym task's own score of an answer, in [0, 1]; None if its grader cannot be run. Arguments are those of
    `gym_domain`, `settings` those of the data sets by task.

    Raises:
        SandboxError: Graders cannot be isolated.
    """

    def __init__(
        self,
        settings: Mapping[str, Mapping[str, Any]],
        *,
        timeout: float = 5.0,
        isolated: bool = True,
        strip_reasoning: StripReasoning = True,
    ) -> None:
        self.timeout, self.strip_reasoning = timeout, strip_reasoning
        setup = [{"task": task, "settings": _packed(dict(given))} for task, given in settings.items()]
        source = Path(__file__).with_name("_gym_worker.py")
        self._worker = Worker(source, timeout=timeout, memory=4 << 30, processes=8, isolated=isolated, setup=setup)
        self.__name__ = "gym"

    def _reward(self, example: Example, completion: str) -> float:
        text = graded_text(completion, self.strip_reasoning)
        answer = None if text is None else tagged_answer(text)
        if answer is None or len(answer) > MAX_ANSWER:
            return 0.0
        task = example.info["task"]
        job = {"task": task, "answer": answer, "entry": _packed(example.info["entry"]), "seconds": 0.8 * self.timeout}
        graded = self._worker.ask(job | {"evaluates": evaluates(task)})
        if graded is None:
            return 0.0
        if "error" in graded:
            LOGGER.debug("%s: %s for %r", task, graded["error"], answer[:200])
        score = graded.get("score")
        return min(1.0, max(0.0, score)) if isinstance(score, (int, float)) and math.isfinite(score) else 0.0

    def close(self) -> None:
        """Ends the graders' process; the next call starts another."""
        self._worker.close()


@cache
def evaluates(task: str) -> Literal["python", "sympy"] | None:
    """Whether a task's grader evaluates the answer: with `eval`, or with sympy's parser, which does."""
    from reasoning_gym.factory import DATASETS

    kind = DATASETS[task][0]
    module = sys.modules[kind.__module__]
    names, seen = ["score_answer"], set()
    found: set[str] = set()
    while names:
        name = names.pop()
        function = getattr(kind, name, None) or getattr(module, name, None)
        if name in seen or not inspect.isfunction(function) or function.__module__ != kind.__module__:
            continue
        seen.add(name)
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
            if isinstance(node, ast.Call):
                called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                own = getattr(module, called, None)
                names.append(called)
                if called in ("eval", "exec"):
                    found.add("python")
                elif called in ("parse_expr", "sympify", "parse_latex", "simplify") and (
                    not isinstance(node.func, ast.Name) or getattr(own, "__module__", "").startswith("sympy")
                ):
                    found.add("sympy")
    return "python" if "python" in found else "sympy" if "sympy" in found else None


def _packed(value: Any) -> str:
    return base64.b64encode(pickle.dumps(value)).decode()
