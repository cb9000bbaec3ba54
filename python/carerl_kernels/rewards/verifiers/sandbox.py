"""Running programs that a policy wrote: no network, no files, limited processor, memory, processes, output and time.

On Linux every program gets namespaces of its own (processes, network, mounts, shared memory; users too unless this runs as
root) with an empty file system around the interpreter. Where the machine does not allow that (many containers), the sandbox
refuses to run anything unless `allow_unisolated=True` is passed; then limits, clean killing and what the kernel offers without
privileges remain. `Sandbox.protections` says what is in force.
"""

from __future__ import annotations

import math
import os
import signal
import stat
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ...task import Example
from ..log import LOGGER
from ._launch import START_PATIENCE, Bounds, Launched, SandboxError, Turns, interpreter, own_interpreter, talk

__all__ = ["Outcome", "Sandbox", "SandboxError", "SandboxLimits", "SandboxedReward", "why_not_isolated"]

Isolation = Literal["namespaces", "none"]
Status = Literal["ok", "error", "timeout", "cpu", "memory", "output", "killed"]
_TURNS = Turns()
_PATIENCE = 3.0  # times its limit that a program may be kept from its end by a busy machine


class SandboxLimits(BaseModel):
    """What a program may use.

    Args:
        wall: Seconds until everything is killed, not counting those in which the program waits for a processor.
        cpu: Seconds of processor time, of the program and all it starts.
        memory: Bytes, of address space of each process, and resident in all of them together (looked at 20 times a second).
        processes: Processes and threads at once.
        disk: Bytes in its /tmp (in memory); also of the largest file.
        output: Bytes of standard output, and of standard error, after which it is killed.
        files: Open at once.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    wall: float = Field(default=10.0, gt=0)
    cpu: int = Field(default=5, ge=1)
    memory: int = Field(default=512 << 20, ge=64 << 20)
    processes: int = Field(default=8, ge=1)
    disk: int = Field(default=16 << 20, ge=1 << 16)
    output: int = Field(default=1 << 20, ge=1)
    files: int = Field(default=32, ge=8)

    def resources(self, cpu: float) -> dict[str, int]:
        """The kernel's limits of each process."""
        return {
            "CPU": math.ceil(cpu),
            "AS": self.memory,
            "NPROC": self.processes,
            "FSIZE": self.disk,
            "NOFILE": self.files,
            "CORE": 0,
            "MSGQUEUE": 0,
            "MEMLOCK": 0,
        }


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        status: "ok": exit code 0. "error": another one. "timeout", "cpu", "memory", "output": over that limit. "killed": by a
            signal.
        code: Exit code, negative for a signal; None when it was stopped.
        stdout, stderr: What it wrote, up to the limit.
        used: Seconds that count against a budget: of processor time of the whole tree, or of the clock if those are more.
    """

    status: Status
    code: int | None
    stdout: str
    stderr: str
    used: float = 0.0


class Sandbox:
    """Runs Python programs apart from everything else.

    Args:
        limits: The limits of each run.
        allow_unisolated: Run with limits only where isolation cannot be had. `protections` says what the program then
            cannot do.
        packages: Directories that programs may import from, read-only, readable for everybody (say, one with numpy);
            nothing else but the standard library is there.
        isolation: "namespaces" or "none" instead of the best that works; "none" needs `allow_unisolated`.
        python: Interpreter of the programs; by default the one that runs this, outside of its virtual environment.

    Attributes:
        isolation: What is in force.
        protections: By name, whether it is in force: "namespaces", "system calls" (seccomp), "files" and "network" (out of
            reach), "user" (one of its own for every program), "processor" (time counted over all processes of a program),
            "memory" (limited over all processes, too).

    Raises:
        SandboxError: There is no isolation on this machine and `allow_unisolated` is False; says why.
    """

    def __init__(
        self,
        limits: SandboxLimits | None = None,
        *,
        allow_unisolated: bool = False,
        packages: Sequence[Path | str] = (),
        isolation: Isolation | None = None,
        python: str | None = None,
    ) -> None:
        self.limits = limits or SandboxLimits()
        self.packages = tuple(str(Path(p).resolve()) for p in packages)
        self.python = python or own_interpreter()
        problem = None if isolation == "none" else why_not_isolated(self.python)
        if isolation == "namespaces" and problem is not None:
            raise SandboxError(f"namespaces cannot be had here: {problem}")
        self.isolation: Isolation = "none" if isolation == "none" or problem is not None else "namespaces"
        if self.isolation == "none" and not allow_unisolated:
            raise SandboxError(
                f"programs of the policy cannot be isolated here: {problem or 'isolation is switched off'}; allow user "
                f"namespaces, run as root with CAP_SYS_ADMIN, or accept limits only with allow_unisolated=True"
            )
        if self.isolation == "none" and os.geteuid() == 0 and not _everybody_can_run(self.python):
            raise SandboxError(
                f"without isolation programs run as a user of their own, who cannot reach {self.python}, and they shall not "
                f"run as root; pass python= an interpreter for everybody (/usr/bin/python3), or do not run this as root"
            )

    @property
    def isolated(self) -> bool:
        """Whether programs have namespaces of their own."""
        return self.isolation == "namespaces"

    @property
    def protections(self) -> Mapping[str, bool]:
        """What is in force on this machine; a program is run to find out."""
        return _protections(self.python, self.isolated)

    def run(
        self,
        program: str,
        stdin: str = "",
        files: Mapping[str, str] | None = None,
        *,
        parts: int = 0,
        budget: float = math.inf,
    ) -> Outcome:
        """Runs a Python program to its end or to a limit; afterwards no process of it is left.

        A program that the machine kept from its time is run again while no other one runs.

        Args:
            program: Source text.
            stdin: Its standard input.
            files: Further files in its working directory.
            parts: With this many, a byte that the program writes to descriptor 3 begins the next one: `wall` and `cpu` are
                limits of each.
            budget: Seconds, of the clock and of processor time, for all of it.

        Raises:
            SandboxError: The sandbox failed, or the machine is too busy to say anything about the program.
        """
        _warn_of_missing(self.python, self.isolated)
        texts = {**(files or {}), "main.py": program}
        for alone in (False, True):
            with _TURNS.take(alone):
                outcome = _run(self.python, self.isolated, self.limits, texts, stdin, self.packages, parts, budget)
            if outcome is not None:
                return outcome
        raise SandboxError(
            "a program got too little of the processor, also while no other one ran: the machine is too busy"
        )


def _run(
    python: str,
    isolated: bool,
    limits: SandboxLimits,
    files: Mapping[str, str],
    stdin: str = "",
    packages: Sequence[str] = (),
    parts: int = 0,
    budget: float = math.inf,
) -> Outcome | None:
    """One run; None if the machine, not the program, used the time up."""
    budget = min(budget, max(1, parts) * max(limits.wall, limits.cpu))
    cpu = min(float(limits.cpu), budget)
    bounds = Bounds(limits.memory, min(limits.wall, budget), cpu, budget, _PATIENCE * limits.wall, parts)
    resources = limits.resources(budget if parts else cpu)
    launched = Launched(python, isolated, resources, packages, files, disk=limits.disk, bounds=bounds)
    most = START_PATIENCE + _PATIENCE * max(budget, limits.wall)
    full = True
    try:
        full, out, err = talk(launched, stdin.encode(errors="surrogatepass"), most, limits.output)
    finally:
        ended = launched.stop(at_once=full)
    stdout, stderr = out.decode(errors="replace"), err.decode(errors="replace")
    used = max(ended.get("cpu", 0.0), ended.get("clock", 0.0))

    def outcome(status: Status, code: int | None = None) -> Outcome:
        return Outcome(status, code, stdout, stderr, used)

    if full:
        return outcome("output")
    if ended.get("starved"):
        return None
    if "code" in ended:
        return outcome("ok" if ended["code"] == 0 else "error", ended["code"])
    if "signal" in ended:
        # half of the limit, for the kernel counts by ticks
        over = ended["signal"] in (signal.SIGXCPU, signal.SIGKILL) and ended["cpu"] >= 0.5 * cpu
        return outcome("cpu" if over else "killed", -ended["signal"])
    stopped = ended.get("stopped")
    return outcome(stopped if stopped in ("cpu", "memory") else "timeout")


@cache
def why_not_isolated(python: str) -> str | None:
    """Why programs cannot be isolated on this machine, or None when they can: a program is run to find out."""
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} has no namespaces"
    probe = "import os; print(sorted(os.listdir('/')), os.getpid())"
    try:
        outcome = _run(python, True, SandboxLimits(), {"main.py": probe})
    except SandboxError as error:
        return str(error)
    if outcome is None:
        return "a trial got no processor time"
    seen = outcome.stdout.strip()
    if outcome.status != "ok" or "home" in seen or "proc" in seen:
        return f"a trial ended with {outcome.status}: {seen or outcome.stderr.strip()}"
    return None


_TRY = f"""
import ctypes, os, socket
libc = ctypes.CDLL(None)
def tried(function):
    try:
        function()
        return True
    except OSError:
        return False
print(int(libc.prctl(21, 0, 0, 0, 0) == 2),
      int(not tried(lambda: os.listdir({str(Path(__file__).parent)!r})) and not tried(lambda: open("/proc/1/status"))),
      int(not tried(lambda: socket.socket())))
"""

_FILL = """
import os, time
for _ in range(5):
    if os.fork() == 0: break
held = b"x" * (14 << 20)
time.sleep(3)
"""


@cache
def _protections(python: str, isolated: bool) -> Mapping[str, bool]:
    outcome = _run(python, isolated, SandboxLimits(), {"main.py": _TRY})
    filled = _run(python, isolated, SandboxLimits(memory=64 << 20), {"main.py": _FILL})
    seen = outcome.stdout.split() if outcome is not None else []
    filtered, files, network = (word == "1" for word in seen) if len(seen) == 3 else (False, False, False)
    return {
        "namespaces": isolated,
        "system calls": filtered,
        "files": isolated or files,
        "network": isolated or network,
        "user": os.geteuid() == 0,
        "processor": Path("/proc/self/schedstat").exists(),
        "memory": filled is not None and filled.status == "memory",
    }


@cache
def _warn_of_missing(python: str, isolated: bool) -> None:
    """Names once what protects nobody here, and the remedy."""
    missing = [name for name, there in _protections(python, isolated).items() if not there and name != "user"]
    if missing:
        LOGGER.warning(
            "programs of the policy run without protection of %s: run this on Linux 6.12 or newer on x86_64 or aarch64, with "
            "seccomp, Landlock and /proc, and allow user namespaces or run as root with CAP_SYS_ADMIN",
            ", ".join(missing),
        )


def _everybody_can_run(python: str) -> bool:
    """Whether a user without rights can reach the interpreter and its standard library."""
    executable, library, *_ = interpreter(python)
    return all(Path(p).stat().st_mode & stat.S_IROTH for p in (executable, library)) and all(
        place.stat().st_mode & stat.S_IXOTH for p in (executable, library) for place in Path(p).parents
    )


class SandboxedReward(ABC):
    """A verifier that runs something in the sandbox; None where that fails, which says nothing about the completion."""

    verifies = True

    def __call__(self, example: Example, completion: str) -> float | None:
        """The reward in [0, 1]; None if the sandbox failed."""
        try:
            return self._reward(example, completion)
        except SandboxError as error:
            LOGGER.warning("not judged: %s", error)
            return None

    @abstractmethod
    def _reward(self, example: Example, completion: str) -> float:
        """The reward. SandboxError: the sandbox failed."""
