"""Graders of other people's making: nothing of a policy's text is evaluated, and none of it holds the trainer up."""

from __future__ import annotations

import os
import threading
import time

import pytest
from carerl_kernels.grpo import Example
from carerl_kernels.rewards.verifiers import GYM_DOMAINS, MathMatch, SandboxError, gym_domain
from carerl_kernels.rewards.verifiers import worker as module
from carerl_kernels.rewards.verifiers._gym_worker import harmless_formula, harmless_literal
from carerl_kernels.rewards.verifiers.gym import evaluates
from carerl_kernels.rewards.verifiers.worker import Worker

EVALUATING = (
    "simple_integration", "intermediate_integration", "polynomial_multiplication", "countdown", "puzzle24", "n_queens",
    "spiral_matrix", "binary_matrix", "string_insertion",
)  # fmt: skip


@pytest.fixture(scope="module")
def gym():
    pytest.importorskip("reasoning_gym")
    domain = gym_domain("hostile", EVALUATING, eval_size=len(EVALUATING), train_size=4, timeout=4)
    yield domain
    domain.reward.close()


def test_graders_that_evaluate_are_known():
    factory = pytest.importorskip("reasoning_gym.factory")
    found = {task for task in factory.DATASETS if evaluates(task)}
    assert set(EVALUATING) <= found and "simple_integration" in GYM_DOMAINS["algebra"]
    assert not found & {"chain_sum", "propositional_logic", "zebra_puzzles", "basic_arithmetic", "word_sorting"}


@pytest.mark.parametrize("task", EVALUATING)
def test_right_answers_are_graded_and_programs_are_not_run(gym, task, tmp_path):
    example = next(e for e in gym.eval_examples if e.info["task"] == task)
    metadata = example.info["entry"]["metadata"]
    answer = example.answer or metadata.get("solution")
    if task == "countdown":
        answer = metadata["expression"]
    elif task == "puzzle24":
        pytest.skip("the data set knows no answer of its own") if answer is None else None
    target = tmp_path / "written"
    for text in (
        f"__import__('os').system('touch {target}')",
        f"[open({str(target)!r}, 'w')]",
        f"(lambda: open({str(target)!r}, 'w'))()",
        "().__class__.__base__.__subclasses__()",
        "exit()",
        "[x for x in (1,)]",
    ):
        assert gym.score(example, f"<answer>{text}</answer>") <= 0.05
    assert not target.exists()
    assert gym.score(example, f"<answer>{answer}</answer>") == 1


def test_what_never_ends_is_wrong_and_the_next_one_is_graded(gym):
    example = next(e for e in gym.eval_examples if e.info["task"] == "simple_integration")
    started = time.monotonic()
    assert gym.score(example, "<answer>9**9**9**9</answer>") == 0
    assert gym.score(example, f"<answer>{'(' * 4000}</answer>") == 0
    assert time.monotonic() - started < 60
    assert gym.score(example, f"<answer>{example.answer}</answer>") == 1


def test_unfinished_reasoning_and_answers_too_long_are_worth_nothing(gym):
    example = next(e for e in gym.eval_examples if e.info["task"] == "spiral_matrix")
    assert gym.score(example, f"<think><answer>0</answer></think><answer>{example.answer}</answer><|im_end|>") == 1
    assert gym.score(example, f"<think><answer>{example.answer}</answer>") == 0
    assert gym.score(example, f"<answer>{'1 ' * 20_000}</answer>") == 0


@pytest.mark.parametrize(
    ("text", "harmless"),
    [("2*x**3/3 + sin(x) + C", True), ("exp(2*x)*(x - 1)", True), ("5!", True), ("3.5*x", True), ("(5 + 3)*2", True), ("", True),
     ("x.diff(x)", False), ("x . diff(x)", False), ("x.\ndiff", False), ("f(x)", True), ("eval(x)", False), ("S('x')", False),
     ("lambda x: x", False), ("x if x else x", False), ("__import__", False), ("preview(x)", False), ("sympify(x)", False),
     ("x[0]", False), ("{x}", False), ("x; x", False), ("5 .real", False), ("5..real", False), ("1.e5", False)],
)  # fmt: skip
def test_what_may_be_evaluated_as_a_formula(text, harmless):
    assert harmless_formula(text) is harmless


@pytest.mark.parametrize(
    ("text", "harmless"),
    [("[1, -2]", True), ("[['A', 'B']]", True), ("ABC", True), ("1 2 3", True), ("1 + 2", True), ("f()", False), ("a.b", False),
     ("[x for x in y]", False), ("'a' * 10", False), ("f'{x}'", False), ("(a := 1)", False), ("*a", True)],
)  # fmt: skip
def test_what_may_be_evaluated_as_a_literal(text, harmless):
    assert harmless_literal(text) is harmless


# ------------------------------------------------------------------------------------------------------------- workers

ECHO = """
import json, os, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if job["do"] == "hang":
        while True: pass
    if job["do"] == "sleep": time.sleep(600)
    if job["do"] == "die": os._exit(3)
    if job["do"] == "flood": print("x" * (3 << 20), flush=True)
    if job["do"] == "garbage": print("[" * 5000, flush=True)
    print(json.dumps({"pid": os.getpid(), "seen": os.path.exists("/etc/passwd"), "user": os.getuid()}), flush=True)
"""


@pytest.fixture
def worker(tmp_path):
    source = tmp_path / "echo.py"
    source.write_text(ECHO)
    made = Worker(source, timeout=2, memory=256 << 20)
    yield made
    made.close()


@pytest.mark.parametrize("do", ["hang", "die", "flood", "garbage"])
def test_a_worker_that_breaks_is_replaced(worker, do):
    assert "pid" in worker.ask({"do": "echo"})
    assert worker.ask({"do": do}) is None
    assert "pid" in worker.ask({"do": "echo"})


def test_a_worker_kept_waiting_says_nothing_about_the_text(worker):
    """One that uses no processor time has been starved, as far as can be seen from here."""
    patience, worker.timeout = worker.timeout, 0.4
    with pytest.raises(SandboxError, match="too busy"):
        worker.ask({"do": "sleep"})
    worker.timeout = patience
    assert "pid" in worker.ask({"do": "echo"})


def test_a_worker_is_isolated(worker):
    answer = worker.ask({"do": "echo"})
    assert not answer["seen"] or worker._sandbox.isolation == "none"
    assert answer["user"] != 0


def test_a_worker_outlives_the_thread_that_started_it(worker):
    answers = []
    for _ in range(3):
        thread = threading.Thread(target=lambda: answers.append(worker.ask({"do": "echo"})))
        thread.start()
        thread.join()
        time.sleep(0.2)
    assert len({a["pid"] for a in answers}) == 1 and worker._running.child.poll() is None


def test_a_worker_is_not_shared_with_a_forked_process(worker):
    assert "pid" in worker.ask({"do": "echo"})
    child = os.fork()
    if child == 0:
        worker.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert worker._running.child.poll() is None and "pid" in worker.ask({"do": "echo"})


def test_graders_that_cannot_be_isolated_are_refused(monkeypatch):
    pytest.importorskip("reasoning_gym")
    pytest.importorskip("math_verify")
    monkeypatch.setattr(module, "_place", lambda: (None, "no namespaces"))
    with pytest.raises(SandboxError, match=r"cannot be isolated here \(no namespaces\): .*allow_unisolated=True"):
        gym_domain("algebra", eval_size=1, train_size=2)
    domain = gym_domain("arithmetic", ["chain_sum"], eval_size=1, train_size=2, allow_unisolated=True)
    assert domain.score(domain.eval_examples[0], f"<answer>{domain.eval_examples[0].answer}</answer>") == 1
    domain.reward.close()
    math = MathMatch()  # evaluates nothing
    assert math(Example("?", "x+1"), "$1+x$") == 1
    math.close()
