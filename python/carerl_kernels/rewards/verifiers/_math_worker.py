"""Runs math-verify in a process of its own: one JSON line in, one out. Run by file name; imports nothing of ours.

A completion can contain an expression that keeps sympy busy for ever inside one C call, which no signal interrupts:
only a process can be stopped.
"""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import sys


def main() -> None:
    memory = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    answers = sys.stdout
    sys.stdout = sys.stderr
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)  # it warns on every call that its own timeouts are off
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        job = json.loads(line)
        result: dict[str, object] = {"gold": False}
        with contextlib.suppress(Exception):
            # The whole reference is the answer, but only what is marked as mathematics is read as a whole.
            marked = any(mark in job["gold"] for mark in ("$", "\\boxed", "\\(", "\\["))
            gold = [] if marked else parse(f"${job['gold']}$", parsing_timeout=None)
            gold = gold or parse(job["gold"], parsing_timeout=None)
            result = {"gold": bool(gold), "right": False}
            if gold:
                found = parse(job["completion"], parsing_timeout=None)
                result["right"] = bool(verify(gold, found, timeout_seconds=None))
        answers.write(json.dumps(result) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
