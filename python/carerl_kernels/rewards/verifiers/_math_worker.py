"""Runs math-verify in a process of its own: one JSON line in, one out. Imports nothing of ours.

A completion can contain an expression that keeps sympy busy for ever inside one C call, which no signal interrupts:
only a process can be stopped.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)  # it warns on every call that its own timeouts are off

    def answer(result: dict[str, object]) -> None:
        answers.write(json.dumps(result) + "\n")
        answers.flush()

    @functools.lru_cache(1024)
    def right_answer(gold: str) -> list[object]:
        # The whole reference is the answer, but only what is marked as mathematics is read as a whole.
        marked = any(mark in gold for mark in ("$", "\\boxed", "\\(", "\\["))
        found = [] if marked else parse(f"${gold}$", parsing_timeout=None)
        found = found or parse(gold, parsing_timeout=None)
        return found if any(not isinstance(one, str) for one in found) else []  # a text alone has not been understood

    answer({"ready": True})
    for line in sys.stdin:
        job = json.loads(line)
        result: dict[str, object] = {"gold": False}
        with contextlib.suppress(Exception):
            gold = right_answer(job["gold"])
            result = {"gold": bool(gold), "right": False}
            if gold and job["completion"] is not None:
                found = parse(job["completion"], parsing_timeout=None)
                result["right"] = bool(verify(gold, found, timeout_seconds=None))
        answer(result)


if __name__ == "__main__":
    main()
