"""Code judged by tests, in the sandbox. The right answers stay outside: what a program prints or returns is compared here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..log import LOGGER
from .sandbox import Outcome, Sandbox, SandboxError

if TYPE_CHECKING:
    from ...grpo.domain import Example

# Calls come in as JSON lines and go out as JSON lines on a descriptor of their own, so that prints of the solution do not
# mix with results. A solution that forges results gains nothing: it would have to know the right ones.
_CALLS = """
import json, os, sys
results = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
space = {"__name__": "solution"}
exec(compile(open("solution.py").read(), "solution.py", "exec"), space)
for line in sys.stdin:
    call = json.loads(line)
    try:
        value = json.dumps({"value": space[call["call"]](*call["args"], **call["kwargs"])})
    except Exception as error:
        value = json.dumps({"error": repr(error)[:200]})
    results.write(value + "\\n")
    results.flush()
"""


def extract_code(completion: str) -> str:
    """The last fenced code block of a completion, or all of it."""
    blocks = re.findall(r"```[ \t]*(?:python|py|python3)?[ \t]*\n(.*?)```", completion, re.DOTALL | re.IGNORECASE)
    return blocks[-1] if blocks else completion


class CodeTests:
    """Reward: whether a completion's program passes the tests of its example.

    `example.info["tests"]` is a list of

    - {"stdin": text, "stdout": text}: the program is run; what it prints is compared line by line, blanks at the ends of
      lines and blank lines at the end aside.
    - {"call": name, "args": [...], "kwargs": {...}, "expected": value}: the function is called; values are JSON (a tuple is a
      list), numbers compared to `tolerance`.
    - {"assert": program text}: run after the solution in the same interpreter, passed if it ends without an exception.
      The weakest kind: a solution can look at the tests, or end the interpreter and look like success; prefer the others.

    Args:
        sandbox: Where programs run; by default one that refuses to run anything without isolation.
        partial: The share of tests passed instead of all or nothing.
        tolerance: Relative and absolute, of numbers.
    """

    def __init__(self, sandbox: Sandbox | None = None, *, partial: bool = False, tolerance: float = 1e-6) -> None:
        self.sandbox = sandbox or Sandbox()
        self.partial, self.tolerance = partial, tolerance
        self.__name__ = "code_tests"

    def __call__(self, example: Example, completion: str) -> float | None:
        """The reward in [0, 1]; None if the sandbox failed.

        Raises:
            ValueError: The example has no tests, or one of an unknown kind.
        """
        tests = example.info.get("tests")
        if not tests:
            raise ValueError(f'CodeTests: expected tests in example.info["tests"], {example.prompt!r} has none')
        try:
            passed = self.results(extract_code(completion), tests)
        except SandboxError as error:
            LOGGER.warning("not judged: %s", error)
            return None
        share = sum(passed) / len(passed)
        return share if self.partial else float(share == 1)

    def results(self, program: str, tests: Sequence[Mapping[str, Any]]) -> list[bool]:
        """Which tests a program passes.

        Raises:
            ValueError: A test of an unknown kind.
            SandboxError: The sandbox failed.
        """
        calls = [t for t in tests if "call" in t]
        returned = iter(self._call(program, calls))
        out = []
        for test in tests:
            if "call" in test:
                out.append(next(returned))
            elif "stdout" in test:
                ended = self.sandbox.run(program, str(test.get("stdin", "")))
                out.append(ended.status == "ok" and _lines(ended.stdout) == _lines(str(test["stdout"])))
            elif "assert" in test:
                out.append(self._assert(program, str(test["assert"])))
            else:
                raise ValueError(f"CodeTests: expected stdin/stdout, call/expected or assert in a test, found {test!r}")
        return out

    def _call(self, program: str, calls: Sequence[Mapping[str, Any]]) -> list[bool]:
        if not calls:
            return []
        lines = [{"call": t["call"], "args": t.get("args", []), "kwargs": t.get("kwargs", {})} for t in calls]
        stdin = "".join(json.dumps(line) + "\n" for line in lines)
        ended: Outcome = self.sandbox.run(_CALLS, stdin, {"solution.py": program})
        values: list[Any] = []
        for line in ended.stdout.splitlines():
            try:
                values.append(json.loads(line))
            except (ValueError, RecursionError):
                values.append(None)
        values += [None] * (len(calls) - len(values))  # it ended before them
        return [
            isinstance(v, dict) and "value" in v and _same(v["value"], test.get("expected"), self.tolerance)
            for v, test in zip(values, calls, strict=False)
        ]

    def _assert(self, program: str, test: str) -> bool:
        mark = "all tests passed"
        after = f"{program}\n\n{test}\n\nimport sys as _sys\n_sys.stdout.write({chr(10) + mark!r})\n"
        ended = self.sandbox.run(after)
        return ended.status == "ok" and ended.stdout.endswith("\n" + mark)


def _lines(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _same(found: Any, expected: Any, tolerance: float) -> bool:
    """Equality of JSON values; true is not 1, and lists may have been tuples."""
    if isinstance(found, bool) or isinstance(expected, bool) or found is None or expected is None:
        return found is expected
    if isinstance(found, (int, float)) and isinstance(expected, (int, float)):
        if isinstance(found, int) and isinstance(expected, int):
            return found == expected
        return math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance)
    if isinstance(expected, (list, tuple)):
        return (
            isinstance(found, list)
            and len(found) == len(expected)
            and all(_same(a, b, tolerance) for a, b in zip(found, expected, strict=True))
        )
    if isinstance(expected, dict):
        return (
            isinstance(found, dict)
            and found.keys() == {str(k) for k in expected}
            and all(_same(found[str(k)], v, tolerance) for k, v in expected.items())
        )
    return type(found) is type(expected) and found == expected
