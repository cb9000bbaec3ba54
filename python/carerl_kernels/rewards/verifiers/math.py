"""Mathematical answers compared by value: 1/2, 0.5 and \\frac{1}{2} are the same. Answers that are words as words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..._errors import require
from ...task import Example
from ..log import LOGGER
from ..reasoning import StripReasoning, graded_text
from .answers import Answer, beginnings, committed_answer, is_words, same_words
from .numbers import Number, last_measure, number, plain, same_number, undelimited
from .sandbox import SandboxedReward, SandboxError
from .worker import Worker

# What people write without LaTeX, as LaTeX.
_NAMES = re.compile(
    r"(?<![\\A-Za-z])(pi|theta|alpha|beta|sin|cos|tan|cot|log|ln|exp|infty|sqrt|arcsin|arccos|arctan)(?![A-Za-z])"
)
_REWRITES = (
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\\sqrt ?\(([^()]{1,100})\)"), r"\\sqrt{\1}"),
    (re.compile(r"\^ ?\(([^()]{1,100})\)"), r"^{\1}"),
    (re.compile(r"\^ ?(-?\d{2,40}|-\d)"), r"^{\1}"),
    (re.compile(r"(?<![\w.])(\d{1,40}\.\d{0,40}|\d{1,40})[eE]([+-]?\d{1,3})(?!\w)"), r"\1*10^{\2}"),
    (re.compile(r"(?<![\w\\])infinity(?!\w)"), r"\\infty"),
    (re.compile(r"(?<![\w./}])(\d{1,40}) (\d{1,40}) ?/ ?(\d{1,40})(?![\w./])"), r"(\1+\\frac{\2}{\3})"),
)


@dataclass(frozen=True)
class _Gold:
    """A right answer, read once: a number, words, or mathematics for math-verify."""

    number: Number | None
    words: bool
    formula: str


class MathMatch(SandboxedReward):
    """Reward: 1 if the answer a completion commits itself to equals `example.answer`, else 0.

    Numbers are compared in value and unit; answers that are words ("Paris", "no solution") as words; the rest by math-verify, in
    a process of its own in the sandbox, which is replaced when an expression takes longer than `timeout`. That counts as wrong:
    the policy wrote it.

    Args:
        timeout: Seconds for one completion.
        memory: Bytes of address space of the process.
        strip_reasoning: See `rewards.reasoning.strip_reasoning`; an unfinished trace is worth 0.

    Raises:
        ImportError: math-verify is missing; says what to install.
    """

    def __init__(self, timeout: float = 5.0, memory: int = 4 << 30, *, strip_reasoning: StripReasoning = True) -> None:
        require("math_verify", "checking mathematics", "carerl-kernels[verifiers]")
        self.strip_reasoning = strip_reasoning
        # math-verify evaluates nothing, so that it may run where there is no isolation
        source = Path(__file__).with_name("_math_worker.py")
        self._worker = Worker(source, timeout=timeout, memory=memory, isolated=False)
        self.__name__ = "math_match"

    def check(self, example: Example) -> None:
        """Refuses an example that cannot be judged, before anything is trained on it.

        Raises:
            ValueError: It has no answer, or one that is neither a number nor words nor anything that math-verify reads.
        """
        gold = self._gold(example)
        if gold.number is None and not gold.words:
            try:
                self._verified(gold, example, None)
            except SandboxError as error:
                LOGGER.warning("not checked: %s", error)

    def _reward(self, example: Example, completion: str) -> float:
        gold = self._gold(example)
        text = graded_text(completion, self.strip_reasoning)
        if text is None:
            return 0.0
        answer = committed_answer(text, words=gold.words)
        if gold.words:
            return float(same_words(str(example.answer), answer))
        if gold.number is not None:
            found = _number_in(answer, gold.number)
            if found is not None:
                return float(same_number(gold.number, found))
        return float(self._verified(gold, example, answer))

    def close(self) -> None:
        """Ends the process; the next call starts another."""
        self._worker.close()

    def _gold(self, example: Example) -> _Gold:
        if example.answer is None or not example.answer.strip():
            raise ValueError(
                f"MathMatch: expected an answer that is mathematics or words, {example.prompt!r} has {example.answer!r}"
            )
        return _read(example.answer)

    def _verified(self, gold: _Gold, example: Example, answer: Answer | None) -> bool:
        completion = None if answer is None else _sentence(answer)
        result = self._worker.ask({"gold": gold.formula, "completion": completion})
        if result is None:
            return False
        if not result.get("gold"):
            raise ValueError(f"MathMatch: expected an answer that is mathematics or words, found {example.answer!r}")
        return bool(result.get("right"))


@lru_cache(65536)
def _read(answer: str) -> _Gold:
    found = number(answer)
    return _Gold(found, found is None and is_words(answer), formula(answer))


def formula(text: str) -> str:
    """Mathematics as people write it, as LaTeX without its delimiters."""
    text = _NAMES.sub(r"\\\1", undelimited(plain(text).strip().strip("*`_")))
    for pattern, instead in _REWRITES:
        text = pattern.sub(instead, text)
    return text


def _number_in(answer: Answer, gold: Number) -> Number | None:
    """The number that an answer is, or gives in the gold's kind of unit; None where math-verify has to look for it."""
    for text in beginnings(answer):
        found = number(text, attached=bool(gold.unit))
        if found is not None:
            return found
    return last_measure(answer.text) if gold.unit and answer.kind != "whole" else None


def _sentence(answer: Answer) -> str:
    """An answer for math-verify to read, or to find in a clause."""
    written, text = formula(answer.text), plain(answer.text)
    nothing_else = answer.kind == "whole" or (len(text) < 200 and not re.search(r"(?<![\\A-Za-z])[A-Za-z]{3}", text))
    if nothing_else and "$" not in written:
        return f"${written}$"
    return f"The answer is {text}." if answer.kind == "clause" and "$" not in text and "\\" not in text else text
