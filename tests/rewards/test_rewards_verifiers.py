"""Verifiers: code by tests, mathematics by value, instructions by rule, procedural tasks."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest
from carerl_kernels.grpo import Example
from carerl_kernels.rewards.verifiers import (
    CHECKS,
    CodeTests,
    MathMatch,
    Sandbox,
    SandboxError,
    SandboxLimits,
    exact_match,
    extract_code,
    followed,
    gym_domain,
    instructions_followed,
)
from carerl_kernels.rewards.verifiers.code import _same
from hypothesis import given
from hypothesis import strategies as st

# ---------------------------------------------------------------------------------------------------------------- code

ADD = "def add(a, b):\n    return a + b\n"
CALLS = [{"call": "add", "args": [1, 2], "expected": 3}, {"call": "add", "args": ["a", "b"], "expected": "ab"}]


@pytest.fixture(scope="module")
def sandbox():
    limits = SandboxLimits(wall=30, cpu=1)
    for python in (None, "/usr/bin/python3"):
        try:
            return Sandbox(limits, allow_unisolated=True, python=python)
        except SandboxError as error:
            problem = error
    pytest.skip(str(problem))


def judged(sandbox, program, tests, **settings):
    return CodeTests(sandbox, **settings)(Example("Write it.", info={"tests": tests}), program)


def test_code_that_passes_and_code_that_does_not(sandbox):
    assert judged(sandbox, f"Here it is:\n```python\n{ADD}```\nDone.", CALLS) == 1
    assert judged(sandbox, ADD.replace("+", "*"), CALLS) == 0
    assert judged(sandbox, "def add(a, b): return 3", CALLS, partial=True) == 0.5
    for broken in ("", "def add(", "raise SystemExit(0)", "import os; os._exit(0)", "add = None", "while True: pass"):
        assert judged(sandbox, broken, CALLS) == 0


def test_programs_are_judged_by_what_they_print(sandbox):
    tests = [{"stdin": "3 4\n", "stdout": "7"}, {"stdin": "1 1\n", "stdout": "2\n\n"}]
    assert judged(sandbox, "print(sum(map(int, input().split())), ' ')", tests) == 1
    assert judged(sandbox, "print(7)", tests, partial=True) == 0.5
    assert judged(sandbox, "print(7); print('x')", tests) == 0
    assert judged(sandbox, "print(sum(map(int, input().split()))); import sys; sys.exit(1)", tests) == 0


def test_asserts(sandbox):
    assert judged(sandbox, ADD, [{"assert": "assert add(1, 1) == 2"}]) == 1
    assert judged(sandbox, ADD, [{"assert": "assert add(1, 1) == 3"}]) == 0
    assert judged(sandbox, "import sys; sys.exit(0)", [{"assert": "assert add(1, 1) == 2"}]) == 0


CHEATS = {
    "equal to everything": "class Any:\n    def __eq__(self, other): return True\ndef add(a, b): return Any()",
    "an integer equal to everything": "class Any(int):\n    def __eq__(self, other): return True\ndef add(a, b): return Any(0)",
    "prints results": """
import json
print(json.dumps({'value': 3}))
print(json.dumps({'value': 'ab'}))
def add(a, b): raise ValueError
""",
    "writes to every descriptor": """
import os
for d in range(32):
    try: os.write(d, b'{"value": true}\\n{"value": true}\\n')
    except OSError: pass
""",
    "looks for the answers": (
        "import sys, gc\nfound = [o for o in gc.get_objects() if isinstance(o, dict) and 'expected' in o]\n"
        "def add(a, b): return found[0]['expected'] if found else None"
    ),
    "patches json": "import json\njson.dumps = lambda x: '{\"value\": NaN}'\ndef add(a, b): return 0",
}


@pytest.mark.parametrize("name", CHEATS)
def test_the_answers_are_not_in_the_sandbox(sandbox, name):
    assert judged(sandbox, CHEATS[name], CALLS) == 0


@pytest.mark.parametrize(
    "end",
    [
        "while True: pass",
        "exit()",
        "quit(1)",
        "raise SystemExit",
        "__import__('os')._exit(0)",
        "raise KeyboardInterrupt",
    ],
)
def test_a_call_that_hangs_or_ends_the_program_costs_its_own_test_only(sandbox, end):
    program = (
        f"def f(x):\n    if x == 2: {end}\n    return x"
        if "while" not in end
        else "def f(x):\n    while x == 2: pass\n    return x"
    )
    tests = [{"call": "f", "args": [i], "expected": i} for i in (1, 2, 3)]
    assert judged(sandbox, program, tests, partial=True) == pytest.approx(2 / 3)
    assert judged(sandbox, program, tests) == 0


ONE = [{"call": "f", "args": [1], "expected": 1}]
PRINTS = [{"stdin": "1 2\n", "stdout": "3"}]
ORDINARY = {
    "exit": ("print(sum(map(int, input().split())))\nexit()", PRINTS),
    "quit": ("import sys\nprint(sum(map(int, input().split())))\nquit(0)", PRINTS),
    "/dev/stdin": ("print(sum(map(int, open('/dev/stdin').read().split())))", PRINTS),
    "/dev/stdin as a path": (
        "from pathlib import Path\nprint(sum(map(int, Path('/dev/stdin').read_text().split())))",
        PRINTS,
    ),
    "descriptor 0": ("import os\nprint(sum(map(int, os.read(0, 99).split())))", PRINTS),
    "/dev/stdout": ("open('/dev/stdout', 'w').write(str(sum(map(int, open(0).read().split()))))", PRINTS),
    "a main guard": ("def main(): print(sum(map(int, input().split())))\nif __name__ == '__main__': main()", PRINTS),
    "a module of its own": ("open('own.py', 'w').write('def f(x): return x')\nfrom own import f", ONE),
    "future annotations": (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n"
        "def f(x): return P(x).x",
        ONE,
    ),
    "pickle": ("import pickle\nclass P:\n    x = 1\ndef f(x): return pickle.loads(pickle.dumps(P())).x", ONE),
    "its own module": ("import solution\ndef g(x): return x\ndef f(x): return solution.g(x)", ONE),
    "type hints": ("from typing import get_type_hints, List\ndef f(x: List[int]): return len(get_type_hints(f))", ONE),
    "class Solution": ("class Solution:\n    def f(self, x):\n        return x", ONE),
    "ends itself after defining": ("def f(x): return x\nprint(f(1))\nexit()", ONE),
    "reads while loading": ("import sys\nlines = sys.stdin.read()\ndef f(x): return x", ONE),
    "prints while loading": ("print('hello')\ndef f(x):\n    print('result')\n    return x", ONE),
    "threads": (
        "from concurrent.futures import ThreadPoolExecutor\ndef f(x): return ThreadPoolExecutor(2).submit(lambda: x).result()",
        ONE,
    ),
    "a range": ("def f(x): return range(1, 3)", [{"call": "f", "args": [1], "expected": [1, 2]}]),
    "order of a set": (
        "print({'a', 'b'} == set(input().split()), hash('a') == hash('a'))",
        [{"stdin": "b a", "stdout": "True True"}],
    ),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_what_ordinary_python_has(sandbox, name):
    program, tests = ORDINARY[name]
    assert judged(sandbox, program, tests) == 1


def test_hashes_are_the_same_in_every_run(sandbox):
    assert len({sandbox.run("print(hash('a'))").stdout for _ in range(3)}) == 1


def test_numpy_needs_no_more_threads_than_there_are(sandbox):
    numpy = pytest.importorskip("numpy")
    if sandbox.isolation == "none":
        pytest.skip("the packages of this user may not be readable for others")
    lent = Sandbox(SandboxLimits(wall=60, cpu=20, memory=1 << 30), packages=[Path(numpy.__file__).parents[1]])
    assert lent.run("import numpy as np; print(np.linalg.inv(np.eye(3) * 2)[0, 0])").stdout == "0.5\n"


def test_why_a_program_failed_is_in_the_log(sandbox, caplog):
    caplog.set_level("DEBUG", "carerl_kernels.rewards")
    for program, message in (
        ("x = 1\ndef f(x)\n    return x", "solution.py, line 2: SyntaxError"),
        ("import nothing_here", "solution.py, line 1: ModuleNotFoundError"),
        ("def f(x):\n    return y", "solution.py, line 2: NameError"),
        ("def f(x): return 2", "returned"),
    ):
        assert judged(sandbox, program, ONE) == 0 and message in caplog.text
        caplog.clear()


def test_a_value_beyond_every_float_is_a_wrong_one(sandbox):
    assert judged(sandbox, "def f(x): return 10 ** 400", [{"call": "f", "args": [1], "expected": 0.5}]) == 0
    assert judged(sandbox, "def f(x): return 10 ** 5000", [{"call": "f", "args": [1], "expected": 0.5}]) == 0


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        (1.0, 1, True),
        (0.1 + 0.2, 0.3, True),
        (1.1, 1, False),
        (True, 1, False),
        (None, None, True),
        (None, 0, False),
        ([1, [2.0]], (1, [2]), True),
        ([1], [1, 1], False),
        ({"1": [2]}, {1: (2,)}, True),
        ({"a": 1}, {"b": 1}, False),
        ("1", 1, False),
        (10**30, 10**30 + 1, False),
        (float("nan"), 1.0, False),
    ],
)
def test_values_are_compared_as_json(found, expected, same):
    assert _same(found, expected) is same


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"),
        ("a ```py\nx\n``` b ```python\ny\n``` c", "y\n"),
        ("```\nz\n```", "z\n"),
        ("```json\n{}\n```", "```json\n{}\n```"),
    ],
)
def test_the_last_block_is_the_program(text, code):
    assert extract_code(text) == code


def test_a_mistake_in_the_tests_is_an_error_and_a_broken_sandbox_is_none(sandbox):
    with pytest.raises(ValueError, match=r'tests in example.info\["tests"\]'):
        CodeTests(sandbox)(Example("x"), ADD)
    for test, message in (
        ({"input": 1}, r"tests\[1\]: expected stdin/stdout, call/expected or assert"),
        ({"call": "f", "args": [1], "output": 7}, r'tests\[1\]: expected "expected", the value'),
        ({"call": "f", "arg": [1], "expected": 7}, "expected args, kwargs and expected beside call, not arg"),
        ({"call": "f", "args": 1, "expected": 7}, "a list as args"),
        ({"call": "f()", "args": [], "expected": 7}, "a function's name"),
        ({"call": "f", "args": [{1}], "expected": 7}, "values that JSON knows"),
        ("assert f(1)", "call/expected or assert"),
    ):
        with pytest.raises(ValueError, match=message):
            CodeTests(sandbox).check(Example("x", info={"tests": [CALLS[0], test]}))
        with pytest.raises(ValueError, match=message):
            judged(sandbox, ADD, [CALLS[0], test])

    class Broken:
        def run(self, *a, **k):
            raise SandboxError("no room")

    assert judged(Broken(), ADD, CALLS) is None


# --------------------------------------------------------------------------------------------------------- mathematics


@pytest.fixture(scope="module")
def math_match():
    pytest.importorskip("math_verify")
    verifier = MathMatch()
    yield verifier
    verifier.close()


@pytest.mark.parametrize(
    ("answer", "completion", "reward"),
    [
        ("1/2", r"So it is \boxed{\frac{1}{2}}.", 1),
        (r"\frac{1}{2}", "The answer is 0.5", 1),
        ("42", "42", 1),
        ("42", "41", 0),
        ("42", "I do not know", 0),
        ("42", "", 0),
        ("x^2 + 2x + 1", "$(x+1)^2$", 1),
        (r"\{1, 2\}", r"$\{2, 1\}$", 1),
        ("7", r"First 5, then \boxed{7}", 1),
    ],
)
def test_mathematics_by_value(math_match, answer, completion, reward):
    assert math_match(Example("?", answer), completion) == reward


def test_an_expression_that_never_ends_is_wrong_and_the_next_one_is_judged(math_match):
    quick = MathMatch(timeout=1.0)

    def judged(answer: str, completion: str):
        """None says that other processes kept it waiting: then it is asked again."""
        return next((r for _ in range(5) if (r := quick(Example("?", answer), completion)) is not None), None)

    try:
        assert judged("2", "2") == 1
        started = time.monotonic()
        assert judged("2", r"$9^{9^{9^{9}}}$") == 0
        assert judged("3", r"$\int_0^1 x^{x^{x}} \sin(x^{99}) dx + 10000000!$") == 0
        assert time.monotonic() - started < 60
        assert judged("2", "$1+1$") == 1
    finally:
        quick.close()


def test_mathematics_in_a_thread(math_match):
    """math-verify's own time limit works in the main thread only."""
    results = []
    thread = threading.Thread(target=lambda: results.append(math_match(Example("?", "0.25"), r"\boxed{1/4}")))
    thread.start()
    thread.join()
    assert results == [1]


def test_an_answer_that_is_no_mathematics_is_a_mistake_in_the_data(math_match):
    for answer in (None, "", "\\frac{"):
        with pytest.raises(ValueError, match="an answer that is mathematics or words"):
            math_match(Example("?", answer), "1")


def test_a_worker_that_cannot_start_gives_none(monkeypatch):
    pytest.importorskip("math_verify")
    monkeypatch.setattr("carerl_kernels.rewards.verifiers.worker.own_interpreter", lambda: "/bin/false")
    verifier = MathMatch()
    assert verifier(Example("?", "x"), "$x$") is None
    assert verifier(Example("?", "1"), "1") == 1  # numbers need no worker


def test_exact_match():
    assert exact_match(Example("?", "a"), " a\n") == 1 and exact_match(Example("?", "a"), "b") == 0


# -------------------------------------------------------------------------------------------------------- instructions

TEXT = "# Summary\n\nThe cat sat. It slept!\n\n- one\n- two\n\n## End\nBye."


@pytest.mark.parametrize(
    ("text", "instruction", "expected"),
    [
        ("one two, three - !", {"check": "words", "at_least": 3, "at_most": 3}, True),
        ("one two", {"check": "words", "at_least": 3}, False),
        ("One. Two? Three!", {"check": "sentences", "at_least": 3, "at_most": 3}, True),
        ("Pi is 3.14 today", {"check": "sentences", "at_most": 1}, True),
        ("你好。再见。", {"check": "sentences", "at_least": 2, "at_most": 2}, True),
        ("a\n\nb\n \nc", {"check": "paragraphs", "at_least": 3, "at_most": 3}, True),
        (TEXT, {"check": "bullets", "at_least": 2, "at_most": 2}, True),
        ("1. a\n2) b\n3c", {"check": "bullets", "at_least": 2, "at_most": 2}, True),
        ("The Cat", {"check": "contains", "phrases": ["cat"]}, True),
        ("concatenate", {"check": "contains", "phrases": ["cat"]}, False),
        ("cat cat", {"check": "contains", "phrases": ["cat"], "at_most": 1}, False),
        ("C++ rules", {"check": "contains", "phrases": ["c++"]}, True),
        ("a dog", {"check": "avoids", "phrases": ["cat", "bird"]}, True),
        ("a Bird.", {"check": "avoids", "phrases": ["cat", "bird"]}, False),
        ("  Dear", {"check": "starts_with", "phrase": "Dear"}, True),
        ("dear", {"check": "starts_with", "phrase": "Dear"}, False),
        ("Bye.\n", {"check": "ends_with", "phrase": "Bye."}, True),
        ("all lower 1!", {"check": "letter_case", "case": "lower"}, True),
        ("123", {"check": "letter_case", "case": "upper"}, False),
        ('```json\n{"a": 1}\n```', {"check": "is_json", "keys": ["a"]}, True),
        ('{"a": 1}', {"check": "is_json", "keys": ["b"]}, False),
        ("[1", {"check": "is_json"}, False),
        ("[" * 100_000, {"check": "is_json"}, False),
        ("a b", {"check": "characters", "forbidden": ","}, True),
        ("a,b", {"check": "characters", "forbidden": ","}, False),
        ("0110", {"check": "characters", "allowed": "01"}, True),
        (TEXT, {"check": "sections", "titles": ["Summary", "End"]}, True),
        (TEXT, {"check": "sections", "titles": ["End", "Summary"]}, False),
        ("", {"check": "avoids", "phrases": ["x"]}, False),
    ],
)
def test_instructions(text, instruction, expected):
    assert followed(text, [instruction]) == [expected]


def test_every_check_is_tested_above():
    tested = {m["check"] for mark in test_instructions.pytestmark for _, m, _ in mark.args[1]}
    assert tested == set(CHECKS) and len(CHECKS) >= 10


@given(st.text(), st.text(min_size=1))
def test_no_text_breaks_a_check(text, phrase):
    phrases = {"phrases": [phrase]}
    calls = [{"check": "contains", **phrases}, {"check": "avoids", **phrases}]
    got = followed(text, calls)
    assert not all(got)  # one says it is there, the other that it is not
    assert all(
        isinstance(x, bool)
        for x in followed(text, [{"check": c, "at_least": 0} for c in ("words", "sentences", "paragraphs", "bullets")])
    )


def test_the_share_is_the_reward():
    both = [{"check": "words", "at_most": 2}, {"check": "starts_with", "phrase": "Yes"}]
    example = Example("?", info={"instructions": both})
    assert [instructions_followed(example, t) for t in ("Yes sir", "No sir", "No my dear sir", "")] == [1, 0.5, 0, 0]


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ({"check": "rhyme"}, "one of words, sentences"),
        ({"check": "words"}, "'words' with {}: expected at_least, at_most or both"),
        ({"check": "words", "minimum": 3}, "unexpected keyword argument 'minimum'"),
        ({"check": "contains", "phrases": "cat"}, "a list of one or more texts, found 'cat'"),
        ({"check": "letter_case", "case": "title"}, "lower or upper, found 'title'"),
        ({"check": "characters"}, "allowed, forbidden or both"),
    ],
)
def test_a_mistake_in_an_instruction_is_named(instruction, message):
    with pytest.raises(ValueError, match=message):
        followed("text", [instruction])
    with pytest.raises(ValueError, match="expected instructions in"):
        instructions_followed(Example("?"), "x")


# ----------------------------------------------------------------------------------------------------- procedural tasks


@pytest.fixture(scope="module")
def gym():
    pytest.importorskip("reasoning_gym")
    return gym_domain("sums", ["chain_sum", "propositional_logic"], eval_size=5, train_size=50)


def test_a_gym_domain_pays_for_right_answers(gym):
    for example in gym.draw(random.Random(0), 6):
        assert example.prompt.endswith("<answer> and </answer>.")
        answer = example.answer or example.info["entry"]["metadata"]["example_answer"]  # some tasks accept many answers
        assert gym.score(example, f"I think <answer>0 no</answer> <answer>{answer}</answer>") == 1
        assert gym.score(example, str(answer)) == 0  # without the tags
        assert gym.score(example, "<answer>nonsense</answer>") < 0.5


def test_gym_examples_are_repeatable_and_held_out(gym):
    drawn = [e.prompt for e in gym.draw(random.Random(3), 8)]
    again = gym_domain("sums", ["chain_sum", "propositional_logic"], eval_size=5, train_size=50)
    assert drawn == [e.prompt for e in again.draw(random.Random(3), 8)]
    assert len(gym.eval_examples) == 5 and {e.info["task"] for e in gym.eval_examples} == {
        "chain_sum",
        "propositional_logic",
    }
    everything = {gym.draw(random.Random(i), 1)[0].prompt for i in range(300)}
    assert not everything & {e.prompt for e in gym.eval_examples}


def test_ready_domains_exist_in_reasoning_gym():
    pytest.importorskip("reasoning_gym")
    from carerl_kernels.rewards.verifiers import GYM_DOMAINS
    from reasoning_gym.factory import DATASETS

    assert all(task in DATASETS for tasks in GYM_DOMAINS.values() for task in tasks)
    small = gym_domain("arithmetic", options={"chain_sum": {"max_terms": 2, "min_terms": 2}}, eval_size=4, train_size=4)
    assert small.name == "arithmetic" and len(small.eval_examples) == 4
    with pytest.raises(ValueError, match="expected one of arithmetic, algebra"):
        gym_domain("poetry")
    with pytest.raises(ValueError, match=r"no tasks \['haiku'\]"):
        gym_domain("poetry", ["haiku"])
