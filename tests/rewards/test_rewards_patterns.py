"""Every regular expression that meets a policy's text takes time linear in it: a policy would find the one that does not.

They are found in the source, so that a new one is tested too.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import carerl_kernels.rewards
import pytest
from carerl_kernels.rewards.reasoning import graded_text
from carerl_kernels.rewards.verifiers import CHECKS, extract_code, followed
from carerl_kernels.rewards.verifiers.answers import Answer, committed_answer, is_words, same_words
from carerl_kernels.rewards.verifiers.math import formula
from carerl_kernels.rewards.verifiers.numbers import last_measure, number
from growth import attacks, superlinear

ROOT = Path(carerl_kernels.rewards.__file__).parent
FUNCTIONS = {"compile", "search", "match", "fullmatch", "findall", "finditer", "sub", "subn", "split"}
# What stands in patterns that are made while running: names and phrases of the data, not of the policy.
SAMPLES = {"one": "add|multiply", "phrase": "a phrase", "f": "response_format"}


MODULES = {path: list(ast.walk(ast.parse(path.read_text()))) for path in sorted(ROOT.rglob("*.py"))}


def namespace(path: Path) -> dict:
    """The module's names; what runs inside of the sandbox is loaded by its file."""
    name = ".".join(("carerl_kernels.rewards", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    if path.name in ("_calls.py", "_sandbox_child.py"):  # run when loaded
        return {"re": re}
    return vars(importlib.import_module(name))


def calls(nodes: Iterable[ast.AST]) -> Iterator[tuple[ast.Call, str, str]]:
    """Calls of the form `name.method(...)` with a method that patterns have: the call, name, method."""
    for node in nodes:
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.attr in FUNCTIONS
        ):
            yield node, node.func.value.id, node.func.attr


def used() -> dict[str, set[str]]:
    """By name: the methods that anything calls on a pattern of this name."""
    found: dict[str, set[str]] = {}
    for nodes in MODULES.values():
        for _, name, method in calls(nodes):
            found.setdefault(name, set()).add(method)
    return found


def patterns() -> Iterator[tuple[str, re.Pattern[str], str]]:
    """Where, what, and how it is applied: at the beginning of a text, or anywhere in it."""
    methods_of = used()
    for path, nodes in MODULES.items():
        names = namespace(path) | SAMPLES
        assigned = {
            id(node.value): node.targets[0].id
            for node in nodes
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        for node, owner, method in calls(nodes):
            if owner != "re":
                continue
            place = f"{path.relative_to(ROOT)}:{node.lineno}"
            flags = [a for a in (*node.args[1:], *(k.value for k in node.keywords)) if ast.unparse(a).startswith("re.")]
            pattern = eval(compile(ast.Expression(node.args[0]), place, "eval"), names)
            flag = eval(compile(ast.Expression(flags[0]), place, "eval"), names) if flags else 0
            if method == "compile":
                methods = methods_of.get(assigned.get(id(node), ""), {"finditer"})
                method = "match" if methods <= {"match", "fullmatch"} else "finditer"
            elif method in ("match", "fullmatch"):
                method = "match"
            else:
                method = "finditer"
            yield place, re.compile(pattern, flag), method


FOUND = list(patterns())


def test_patterns_are_found():
    files = {place.partition(":")[0] for place, _, _ in FOUND}
    assert (
        len(FOUND) > 30
        and {"reasoning.py", "verifiers/fences.py", "verifiers/numbers.py", "pa_grm/untrusted.py"} <= files
    )


@pytest.mark.parametrize(("place", "pattern", "method"), FOUND, ids=[place for place, _, _ in FOUND])
def test_patterns_take_linear_time(place, pattern, method):
    def work(text):
        text = text.encode() if isinstance(pattern.pattern, bytes) else text
        for _ in [getattr(pattern, method)(text)] if method == "match" else pattern.finditer(text):
            pass

    of_text = re.compile(pattern.pattern.decode()) if isinstance(pattern.pattern, bytes) else pattern
    for texts in attacks(of_text):
        problem = superlinear(work, texts)
        assert problem is None, f"{place} {pattern.pattern!r}: {problem}"


CHECKED = [{"check": name, "at_least": 1} for name in ("words", "sentences", "paragraphs", "bullets")] + [
    {"check": "contains", "phrases": ["a"]},
    {"check": "is_json"},
    {"check": "sections", "titles": ["a"]},
]
assert {c["check"] for c in CHECKED} <= set(CHECKS)

READERS = {
    "graded_text": graded_text,
    "extract_code": extract_code,
    "extract_code for a function": lambda text: extract_code("```python\n" + text, ["add"]),
    "committed_answer": committed_answer,
    "committed_answer in words": lambda text: same_words("east", committed_answer(text, words=True)),
    "number": number,
    "last_measure": last_measure,
    "formula": lambda text: formula(text[:4000]),  # as long as a boxed answer can be
    "words": lambda text: (is_words(text[:4000]), same_words("a", Answer(text[:4000], "clause"))),
    **{c["check"]: (lambda text, c=c: followed(text, [c])) for c in CHECKED},
}
UNITS = (
    "```", "```python\n", "```py ", "~~~\n", '"""\n```\n', "\\boxed{", "\\boxed{1} and ", "\\boxed{1}, ", "<answer>",
    "</answer>", "the answer is ", "the answer is: 1\n", "therefore ", "so 1. ", "wait ", "<think>", "</think>\n", "<|im_end|>",
    "<|channel|>final<|message|>",
    "1,234", "1 1/2 ", "\\frac{1}{2}", "#### 1\n", "$1$ ", "# a\n", "- a\n", "1. ", "。", "...", '."', "5 cm ", "a = ", "> ",
)  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_what_reads_a_completion_takes_linear_time(name):
    for texts in (*attacks(), *(lambda n, u=u: u * n for u in UNITS), *(lambda n, u=u: u + "a" * n for u in UNITS)):
        problem = superlinear(READERS[name], texts)
        assert problem is None, f"{name}: {problem}"


def measured(pattern):
    return next(
        (p for texts in attacks(pattern) if (p := superlinear(lambda t: list(pattern.finditer(t)), texts))), None
    )


@pytest.mark.parametrize(
    "bad", [r"\s*x", "a+b", r"\s+$", "a++b", "(?:a+){1,3}b", "(?:a|a)*b", r"```[^\n]*\n(.*?)```", r"(\w+\s?)+:"]
)
def test_the_measure_sees_what_is_not_linear(bad):
    """Squares of the cheapest steps, higher powers, and what would never end."""
    assert measured(re.compile(bad))


@pytest.mark.parametrize("good", ["(?<!a)a++b", "a{1,40}b", r"\bscore\b", r"(?m)^[^\n]{0,80}\n", "(?:ab){1,5}+c"])
def test_the_measure_leaves_what_is_linear_alone(good):
    assert measured(re.compile(good)) is None


def test_the_measure_sees_readers_that_start_over():
    assert superlinear(lambda text: [text.count("<", start) for start in range(len(text))], lambda n: "<" * n)
    assert superlinear(lambda text: text.count("<"), lambda n: "<" * n) is None
