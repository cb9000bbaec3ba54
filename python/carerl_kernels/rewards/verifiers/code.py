"""Code judged by tests, in the sandbox. The right answers stay outside: what a program prints or returns is compared here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from ...task import Example
from ..log import LOGGER
from ..reasoning import StripReasoning, graded_text
from ._launch import parsed_object
from .fences import extract_code
from .sandbox import Outcome, Sandbox, SandboxedReward

_CALLS = Path(__file__).with_name("_calls.py").read_text(encoding="utf-8")
_ASSERT = "_assert.py"
_MARK = "all tests passed"
_TOLERANCE = 1e-6  # of numbers that a call returns
_KINDS = ("stdout", "call", "assert")
_MISTAKEN = {"arg", "arguments", "input", "inputs", "kwarg", "output", "outputs", "result", "return", "returns"}


@dataclass(eq=False)
class CodeTests(SandboxedReward):
    """Reward: whether a completion's program passes the tests of its example.

    `example.info["tests"]` is a list of

    - {"stdin": text, "stdout": text}: the program is run; what it prints is compared line by line, blanks at the ends of
      lines and blank lines at the end aside.
    - {"call": name, "args": [...], "kwargs": {...}, "expected": value}: the function, or method of a class Solution, is called;
      values are JSON (a tuple is a list), numbers compared to a relative and absolute tolerance of 1e-6. Each call has the
      sandbox's limits of time to itself.
    - {"assert": program text}: run after the solution in its module, passed if it ends without an exception. The weakest kind:
      a solution can look at the tests, or end the interpreter and look like success; prefer the others.

    The first test that fails ends it, unless `partial`. The logger `carerl_kernels.rewards` says why at DEBUG.

    Args:
        sandbox: Where programs run; by default one that refuses to run anything without isolation.
        partial: The share of tests passed instead of all or nothing.
        budget: Seconds, of processor time and of the clock, that all tests of a completion may take; those beyond have
            failed.
        strip_reasoning: See `rewards.reasoning.strip_reasoning`; an unfinished trace is worth 0.
    """

    sandbox: Sandbox = field(default_factory=Sandbox)
    _: KW_ONLY
    partial: bool = False
    budget: float = 60.0
    strip_reasoning: StripReasoning = True

    def __post_init__(self) -> None:
        self.__name__ = "code_tests"

    def check(self, example: Example) -> None:
        """Refuses an example that cannot be judged, before anything is trained on it.

        Raises:
            ValueError: It has no tests, or one that is not understood; names it.
        """
        tests = example.info.get("tests")
        if not isinstance(tests, Sequence) or isinstance(tests, str) or not tests:
            raise ValueError(f'CodeTests: expected tests in example.info["tests"], {example.prompt!r} has none')
        for number, test in enumerate(tests):
            problem = _problem(test)
            if problem:
                raise ValueError(f"CodeTests: tests[{number}]: {problem}, found {test!r}")

    def _reward(self, example: Example, completion: str) -> float:
        self.check(example)
        text = graded_text(completion, self.strip_reasoning)
        if text is None:
            return 0.0
        tests = example.info["tests"]
        passed = self.results(extract_code(text, [t["call"] for t in tests if "call" in t]), tests)
        share = sum(passed) / len(passed)
        return share if self.partial else float(share == 1)

    def results(self, program: str, tests: Sequence[Mapping[str, Any]]) -> list[bool]:
        """Which tests a program passes; unless `partial`, those after a failed one count as failed.

        Raises:
            SandboxError: The sandbox failed.
        """
        passed = [False] * len(tests)
        left = self.budget
        calls = [i for i, test in enumerate(tests) if "call" in test]
        while calls and left > 0:
            results, used = self._call(program, [tests[i] for i in calls], left)
            left -= used
            for i, result in zip(calls, results, strict=False):
                passed[i] = result
            if not self.partial and not (all(results) and len(results) == len(calls)):
                return passed
            calls = calls[len(results) :]  # the last one of `results` has ended the program: the others run without it
        for i, test in enumerate(tests):
            if "call" in test:
                continue
            if left <= 0:
                break
            ended = self._run(program, test, left)
            left -= ended.used
            if ended.status == "ok" and "stdout" in test:
                passed[i] = _lines(ended.stdout) == _lines(str(test["stdout"]))
            elif ended.status == "ok":
                passed[i] = ended.stdout.endswith("\n" + _MARK)
            if not passed[i]:
                LOGGER.debug("test %d failed: %s %s", i, ended.status, ended.stderr[-500:])
                if not self.partial:
                    break
        if left <= 0:
            LOGGER.info(
                "a program used up its budget of %g s; what it had not passed by then counts as failed", self.budget
            )
        return passed

    def _call(self, program: str, tests: Sequence[Mapping[str, Any]], budget: float) -> tuple[list[bool], float]:
        """Results of the calls up to the one that ended the program, and the seconds used."""
        lines = [{"call": t["call"], "args": t.get("args", []), "kwargs": t.get("kwargs", {})} for t in tests]
        stdin = "".join(json.dumps(line) + "\n" for line in lines)
        ended = self.sandbox.run(_CALLS, stdin, {"solution.py": program}, parts=len(tests), budget=budget)
        results: list[bool] = []
        for test, line in zip(tests, ended.stdout.split("\n")[:-1], strict=False):
            answer = parsed_object(line) or {}
            right = "value" in answer and _same(answer["value"], test["expected"])
            if not right:
                said = answer.get("failed") or answer.get("error") or f"returned {line[:200]}"
                LOGGER.debug("%s: %s", test["call"], said)
            if "failed" in answer:  # the solution cannot be loaded
                return [False] * len(tests), ended.used
            results.append(right)
        if len(results) < len(tests):
            LOGGER.debug("%s: ended the program (%s)", tests[len(results)]["call"], ended.status)
            results.append(False)
        return results, ended.used

    def _run(self, program: str, test: Mapping[str, Any], budget: float) -> Outcome:
        if "stdout" in test:
            return self.sandbox.run(program, str(test.get("stdin", "")), budget=budget)
        after = (
            f"{_CALLS.removesuffix('main()' + chr(10))}\nmodule = load()\n"
            f"exec(compile(open({_ASSERT!r}).read(), {_ASSERT!r}, 'exec'), module.__dict__)\n"
            f"sys.stdout.write({chr(10) + _MARK!r})\n"
        )
        return self.sandbox.run(after, "", {"solution.py": program, _ASSERT: str(test["assert"])}, budget=budget)


def _problem(test: Any) -> str | None:
    """What is wrong with a test, or None."""
    kind = next((k for k in _KINDS if k in test), None) if isinstance(test, Mapping) else None
    if kind is None:
        return "expected stdin/stdout, call/expected or assert in a test"
    if kind == "call":
        if "expected" not in test:
            return 'expected "expected", the value that the call returns'
        if _MISTAKEN & set(test):
            return f"expected args, kwargs and expected beside call, not {', '.join(sorted(_MISTAKEN & set(test)))}"
        if not isinstance(test["call"], str) or not test["call"].isidentifier():
            return "expected a function's name as call"
        if not isinstance(test.get("args", []), (list, tuple)) or not isinstance(test.get("kwargs", {}), Mapping):
            return "expected a list as args and an object as kwargs"
        try:
            json.dumps([test.get("args"), test.get("kwargs"), test["expected"]])
        except (TypeError, ValueError) as error:
            return f"expected values that JSON knows ({error})"
    return None


def _lines(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.split("\n")).rstrip("\n")


def _same(found: Any, expected: Any) -> bool:
    """Equality of JSON values; true is not 1, and lists may have been tuples."""
    if isinstance(found, bool) or isinstance(expected, bool) or found is None or expected is None:
        return found is expected
    if isinstance(found, (int, float)) and isinstance(expected, (int, float)):
        if isinstance(found, int) and isinstance(expected, int):
            return found == expected
        try:
            return math.isclose(found, expected, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
        except OverflowError:  # an integer beyond every float
            return False
    if isinstance(expected, (list, tuple)):
        return (
            isinstance(found, list)
            and len(found) == len(expected)
            and all(_same(a, b) for a, b in zip(found, expected, strict=True))
        )
    if isinstance(expected, dict):
        return (
            isinstance(found, dict)
            and found.keys() == {str(k) for k in expected}
            and all(_same(found[str(k)], v) for k, v in expected.items())
        )
    return type(found) is type(expected) and found == expected
