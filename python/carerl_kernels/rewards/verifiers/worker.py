"""Graders of other people's making in a process of their own: in the sandbox, ended and replaced when a text hangs them.

Such graders evaluate what the policy wrote, or parse it with no limit of time; neither happens in the trainer.
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ..log import LOGGER
from ._launch import START_PATIENCE, Launched, own_interpreter, parsed_object
from ._usage import Usage
from .sandbox import Sandbox, SandboxError, SandboxLimits

MAX_REPLY = 1 << 20
_BUSY = 0.1  # seconds of processor time below which a silent grader was kept waiting by the machine


class Worker:
    """A grader that answers JSON lines with JSON lines.

    Args:
        source: Its program; runs in the sandbox with this interpreter's packages. It writes a line when it is ready.
        timeout: Seconds for one answer.
        memory: Bytes of address space.
        processes: Processes and threads at once.
        isolated: Whether it is refused where neither namespaces nor Landlock keep it from files and network. Without, it runs
            with what the machine offers.
        setup: Jobs of ours that every new process is given first.

    Raises:
        SandboxError: It cannot be isolated, but shall be.
    """

    def __init__(
        self,
        source: Path,
        *,
        timeout: float,
        memory: int,
        processes: int = 4,
        isolated: bool = True,
        setup: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._source = source.read_text(encoding="utf-8")
        self.timeout, self._setup = timeout, list(setup)
        self._limits = SandboxLimits(memory=memory, processes=processes, files=64)
        self._sandbox, problem = _place()
        if problem is not None and isolated:
            raise SandboxError(
                f"graders that evaluate what the policy writes cannot be isolated here ({problem}): allow user namespaces, run "
                "as root with CAP_SYS_ADMIN or on a kernel with Landlock and seccomp, or accept it with allow_unisolated=True"
            )
        self._lock = threading.Lock()
        self._running: Launched | None = None
        self._owner = 0
        self._buffer = b""
        atexit.register(self.close)

    def ask(self, job: Mapping[str, Any]) -> dict[str, Any] | None:
        """The grader's answer; None if it took too long over this job, or died of it."""
        with self._lock:
            for patience in (1.0, 4.0):
                answer, idle = self._ask_once(job, patience * self.timeout)
                if answer is not None or not idle:
                    return answer
        raise SandboxError("the machine is too busy for the grader")

    def close(self) -> None:
        """Ends the process; the next call starts another."""
        with self._lock:
            self._kill()

    def _ask_once(self, job: Mapping[str, Any], timeout: float) -> tuple[dict[str, Any] | None, bool]:
        """The answer, or None and whether the process was kept waiting by the machine."""
        if self._running is None or self._owner != os.getpid() or self._running.child.poll() is not None:
            self._start()
        assert self._running is not None
        pid, line, idle = self._running.child.pid, b"", False
        if self._send(job):
            found = self._line(timeout / 2)
            if found is None:
                usage = Usage(None)
                before = usage.of_tree(str(pid))
                found = self._line(timeout / 2)
                idle = found is None and usage.of_tree(str(pid)) - before < _BUSY
            line = found or b""
        answer = parsed_object(line)
        if answer is None:
            self._kill()
        return answer, idle

    def _start(self) -> None:
        self._kill()
        self._owner, self._buffer = os.getpid(), b""
        limits = {k: v for k, v in self._limits.resources(0).items() if k != "CPU"}
        sandbox = self._sandbox
        try:
            self._running = Launched(
                own_interpreter(),
                sandbox is not None and sandbox.isolated,
                limits,
                [p for p in sys.path if p and os.path.isdir(p) and Path(p).name in ("site-packages", "dist-packages")],
                {"main.py": self._source},
                disk=self._limits.disk,
                own_user=sandbox is not None,
            )
            child = self._running.child
            assert child.stdin is not None
            child.stdin.write(self._running.header)
            child.stdin.flush()
            for job in ({}, *self._setup):
                if (job and not self._send(job)) or parsed_object(self._line(2 * START_PATIENCE)) is None:
                    raise SandboxError("it did not start")
        except (SandboxError, OSError) as error:
            self._kill()
            raise SandboxError(f"the grader cannot be run: {error}") from error

    def _send(self, job: Mapping[str, Any]) -> bool:
        assert self._running is not None and self._running.child.stdin is not None
        try:
            self._running.child.stdin.write(json.dumps(job).encode() + b"\n")
            self._running.child.stdin.flush()
        except BrokenPipeError:
            return False
        return True

    def _line(self, timeout: float) -> bytes | None:
        """The next line; empty if there will be none, None if there is none yet."""
        assert self._running is not None and self._running.child.stdout is not None
        stdout = self._running.child.stdout.fileno()
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                part = os.read(stdout, 65536)
                if not part or len(self._buffer) > MAX_REPLY:
                    return b""
                self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _kill(self) -> None:
        running, self._running = self._running, None
        if running is not None and self._owner == os.getpid():
            try:
                running.stop(at_once=True)
            except SandboxError as error:
                LOGGER.debug("a grader ended: %s", error)


@cache
def _place() -> tuple[Sandbox | None, str | None]:
    """Where graders run, None for a process of this user; and what is missing for them to be isolated."""
    try:
        sandbox = Sandbox(allow_unisolated=True, python=own_interpreter())
    except SandboxError as error:
        return None, str(error)
    there = sandbox.protections
    missing = [name for name in ("files", "network", "system calls") if not there[name]]
    return sandbox, f"no protection of {', '.join(missing)}" if missing else None
