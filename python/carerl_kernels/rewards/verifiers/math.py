"""Mathematical answers compared by value: 1/2, 0.5 and \\frac{1}{2} are the same."""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..log import LOGGER

if TYPE_CHECKING:
    from ...grpo.domain import Example

_WORKER = Path(__file__).with_name("_math_worker.py")


class MathMatch:
    """Reward: 1 if the answer a completion gives equals `example.answer` by math-verify, else 0.

    The check runs in a process of its own that is killed and replaced when an expression takes longer than `timeout`, which
    counts as wrong: the policy wrote it.

    Args:
        timeout: Seconds for one completion.
        memory: Bytes of address space of the process.

    Raises:
        ImportError: math-verify is missing; says what to install.
    """

    def __init__(self, timeout: float = 5.0, memory: int = 4 << 30) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError("checking mathematics needs math-verify: pip install 'carerl-kernels[verifiers]'")
        self.timeout, self.memory = timeout, memory
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self.__name__ = "math_match"
        atexit.register(self.close)

    def __call__(self, example: Example, completion: str) -> float | None:
        """The reward; None if the process cannot be run.

        Raises:
            ValueError: The example has no answer, or one that math-verify cannot read: a mistake in the data.
        """
        if example.answer is None:
            raise ValueError(f"MathMatch: expected an example with an answer, {example.prompt!r} has none")
        result = self._ask(example.answer, completion)
        if result is None:
            return 0.0
        if "failed" in result:
            LOGGER.warning("not judged: the process of math-verify ended: %s", result["failed"])
            return None
        if not result["gold"]:
            raise ValueError(f"MathMatch: expected an answer that is mathematics, found {example.answer!r}")
        return float(bool(result["right"]))

    def _ask(self, gold: str, completion: str) -> dict[str, object] | None:
        """The worker's answer; None if it took too long or died of this job."""
        with self._lock:
            if self._worker is None or self._owner != os.getpid() or self._worker.poll() is not None:
                problem = self._start()
                if problem is not None:
                    return {"failed": problem}
            assert self._worker is not None and self._worker.stdin is not None
            try:
                self._worker.stdin.write(json.dumps({"gold": gold, "completion": completion}).encode() + b"\n")
                self._worker.stdin.flush()
            except BrokenPipeError:
                line = None
            else:
                line = self._line(self.timeout)
            if line is None:
                self._kill()
                return None
            return json.loads(line)

    def _start(self) -> str | None:
        """A new worker that has loaded sympy; why there is none otherwise."""
        self._owner = os.getpid()
        self._buffer = b""
        self._worker = subprocess.Popen(
            [sys.executable, "-I", str(_WORKER), str(self.memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if self._line(120.0) == b"ready":
            return None
        self._kill()
        return "it did not start"

    def _line(self, timeout: float) -> bytes | None:
        assert self._worker is not None and self._worker.stdout is not None
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._worker.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                part = os.read(self._worker.stdout.fileno(), 65536)
                if not part:
                    return None
                self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _kill(self) -> None:
        if self._worker is not None and self._owner == os.getpid():
            self._worker.kill()
            self._worker.wait()
            for stream in (self._worker.stdin, self._worker.stdout):
                if stream is not None:
                    stream.close()
        self._worker = None

    def close(self) -> None:
        """Ends the process; the next call starts another."""
        with self._lock:
            self._kill()
