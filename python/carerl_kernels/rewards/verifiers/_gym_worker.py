"""Runs reasoning-gym's graders: one JSON line in, one out. Imports nothing of ours.

Some of them evaluate the answer as Python, or let sympy do so. An answer is only shown to those if it is made of what their
answers are made of: numbers, names, operators, known functions, lists of such. And they see it in a process of its own, so
that it cannot change how the next one is graded.
"""

from __future__ import annotations

import ast
import base64
import gc
import json
import keyword
import os
import pickle
import re
import select
import signal
import sys
from typing import Any

LITERALS = (
    ast.Expression, ast.Name, ast.Load, ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.UnaryOp, ast.UAdd, ast.USub,
    ast.BinOp, ast.Add, ast.Sub,
)  # fmt: skip
FUNCTIONS = frozenset(
    """sin cos tan cot sec csc asin acos atan acot asec acsc sinh cosh tanh coth sech csch asinh acosh atanh acoth exp log ln
    sqrt cbrt root Abs sign erf erfc erfi gamma factorial binomial floor ceiling Rational Integer Float Min Max Mod Pow Add Mul
    Ei Si Ci li""".split()  # noqa: SIM905
)
FORMULA = re.compile(r"[0-9A-Za-z\s+\-*/^().,!]{0,5000}")


def harmless_literal(text: str) -> bool:
    """Whether `eval` of a text makes no call and reads no attribute; what is no Python cannot be evaluated."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError):
        return True
    return all(isinstance(node, LITERALS) for node in ast.walk(tree))


def harmless_formula(text: str) -> bool:
    """Whether sympy's `parse_expr`, which rewrites a text and then evaluates it, meets numbers, symbols and known functions."""
    squeezed = "".join(text.split())
    if not FORMULA.fullmatch(text) or re.search(r"[0-9A-Za-z)!.]\.[A-Za-z.]", squeezed):
        return False
    called = set(re.findall(r"([0-9A-Za-z]{1,60})\(", squeezed))
    words = set(re.findall(r"[A-Za-z]{2,60}", text))
    return all(name in FUNCTIONS or len(name) == 1 or name.isdigit() for name in called) and not words & set(
        keyword.kwlist
    )


def grade(dataset: Any, job: dict[str, Any]) -> dict[str, Any]:
    answer, evaluates = job["answer"], job["evaluates"]
    if (evaluates == "python" and not harmless_literal(answer)) or (
        evaluates == "sympy" and not harmless_formula(answer)
    ):
        return {"score": 0.0, "error": "not an answer that may be evaluated"}
    try:
        return {"score": float(dataset.score_answer(answer, pickle.loads(base64.b64decode(job["entry"]))))}
    except Exception as error:
        return {"score": 0.0, "error": f"{type(error).__name__}: {error}"[:200]}


def in_a_process(dataset: Any, job: dict[str, Any]) -> dict[str, Any]:
    """The grade from a process of its own; 0 where the answer keeps it busy or kills it."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            os.write(write, json.dumps(grade(dataset, job)).encode())
        finally:
            os._exit(0)
    os.close(write)
    data, error = b"", "it ended its process"
    while len(data) < 65536:
        if not select.select([read], [], [], job["seconds"])[0]:
            error = "it took too long"
            break
        part = os.read(read, 65536)
        if not part:
            break
        data += part
    os.close(read)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        return json.loads(data)
    except ValueError:
        return {"score": 0.0, "error": error}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    import reasoning_gym

    datasets = {}

    def answer(result: dict[str, Any]) -> None:
        answers.write(json.dumps(result) + "\n")
        answers.flush()

    gc.freeze()  # collecting would write to, and so copy, what processes share
    answer({"ready": True})
    for line in sys.stdin:
        job = json.loads(line)
        if "settings" in job:
            settings = pickle.loads(base64.b64decode(job["settings"]))
            datasets[job["task"]] = reasoning_gym.create_dataset(job["task"], **settings)
            answer({"ready": True})
        else:
            answer((in_a_process if job["evaluates"] else grade)(datasets[job["task"]], job))


if __name__ == "__main__":
    main()
