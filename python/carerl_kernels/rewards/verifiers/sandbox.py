"""Running programs that a policy wrote: no network, no files, limited processor, memory, processes, output and time.

On Linux every program gets namespaces of its own (processes, network, mounts, shared memory; users too unless this runs as
root) with an empty file system around the interpreter. Where the machine does not allow that (many containers), the sandbox
refuses to run anything unless `allow_unisolated=True` is passed; then limits and clean killing remain, and the program sees the
host's files and network. `Sandbox.isolation` says what is in force.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

_CHILD = Path(__file__).with_name("_sandbox_child.py")
Isolation = Literal["namespaces", "none"]
Status = Literal["ok", "error", "timeout", "cpu", "output", "killed"]


class SandboxError(RuntimeError):
    """The sandbox itself failed, or cannot be had here; says nothing about the program."""


class SandboxLimits(BaseModel):
    """What a program may use.

    Args:
        wall: Seconds until everything is killed.
        cpu: Seconds of processor time per process.
        memory: Bytes of address space per process: altogether at most `processes` times as much.
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


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        status: "ok": exit code 0. "error": another one. "timeout", "cpu", "output": over that limit. "killed": by a signal.
        code: Exit code, negative for a signal; None when it was stopped.
        stdout, stderr: What it wrote, up to the limit.
        seconds: Wall-clock time, set-up included.
    """

    status: Status
    code: int | None
    stdout: str
    stderr: str
    seconds: float


class Sandbox:
    """Runs Python programs apart from everything else.

    Args:
        limits: Of each run.
        allow_unisolated: Run with limits only where isolation cannot be had. The program then reads what this user can
            read and reaches the network.
        packages: Directories that programs may import from, read-only, readable for everybody (say, one with numpy);
            nothing else but the standard library is there.
        isolation: "namespaces" or "none" instead of the best that works; "none" needs `allow_unisolated`.
        python: Interpreter of the programs; by default the one that runs this, outside of its virtual environment.

    Attributes:
        isolation: What is in force.

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
        self.python = python or getattr(sys, "_base_executable", None) or sys.executable
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

    def run(self, program: str, stdin: str = "", files: dict[str, str] | None = None) -> Outcome:
        """Runs a Python program to its end or to a limit; afterwards no process of it is left.

        Args:
            program: Source text.
            stdin: Its standard input.
            files: Further files in its working directory.

        Raises:
            SandboxError: The sandbox failed.
        """
        return _run(
            self.python, self.isolation == "namespaces", self.limits, self.packages, program, stdin, files or {}
        )


@cache
def why_not_isolated(python: str) -> str | None:
    """Why programs cannot be isolated on this machine, or None when they can: a program is run to find out."""
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} has no namespaces"
    probe = "import os; print(sorted(os.listdir('/')), os.getpid())"
    try:
        outcome = _run(python, True, SandboxLimits(), (), probe, "", {})
    except SandboxError as error:
        return str(error)
    seen = outcome.stdout.strip()
    if outcome.status != "ok" or "home" in seen or "proc" in seen:
        return f"a trial ended with {outcome.status}: {seen or outcome.stderr.strip()}"
    return None


def _run(
    python: str,
    isolated: bool,
    limits: SandboxLimits,
    packages: Sequence[str],
    program: str,
    stdin: str,
    files: dict[str, str],
) -> Outcome:
    python, *library = _interpreter(python)
    directory = None if isolated else tempfile.mkdtemp(prefix="carerl-sandbox-")
    # root gives every run a user of its own: limits on processes count per user, and do not hold for root
    uid = 20000 + time.monotonic_ns() // 1000 % 40000 if os.geteuid() == 0 else None
    job: dict[str, Any] = {
        "isolated": isolated,
        "python": python,
        "readable": [python, *library, *packages],
        "path": list(packages),
        "directory": directory,
        "files": {**files, "main.py": program},
        "uid": uid,
        "wall": limits.wall,
        "disk": limits.disk,
        "limits": {
            "CPU": limits.cpu,
            "AS": limits.memory,
            "NPROC": limits.processes,
            "FSIZE": limits.disk,
            "NOFILE": limits.files,
            "CORE": 0,
        },
    }
    text = json.dumps(job).encode()
    started = time.monotonic()
    try:
        if directory is not None and uid is not None:
            os.chown(directory, uid, uid)
        status_read, status_write = os.pipe()
        try:
            child = subprocess.Popen(
                [python, "-I", "-S", str(_CHILD), str(status_write)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(status_write,),
                env={},
                start_new_session=True,
            )
        except OSError as error:
            os.close(status_read)
            raise SandboxError(f"the sandbox could not be started: {error}") from error
        finally:
            os.close(status_write)
        full = True
        try:
            full, out, err = _talk(child, b"%08d" % len(text) + text + stdin.encode(), limits)
            with os.fdopen(status_read, "rb") as file:
                raw = file.read() if not full else b""
        finally:
            _stop(child, isolated, at_once=full)
    finally:
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)
    seconds = time.monotonic() - started
    stdout, stderr = out.decode(errors="replace"), err.decode(errors="replace")
    if full:
        return Outcome("output", None, stdout, stderr, seconds)
    ended = json.loads(raw) if raw else {"timeout": True}
    if "sandbox" in ended:
        raise SandboxError(ended["sandbox"])
    if "timeout" in ended:
        return Outcome("timeout", None, stdout, stderr, seconds)
    if "signal" in ended:
        number = ended["signal"]
        cpu = number in (signal.SIGXCPU, signal.SIGKILL) and seconds >= 0.9 * limits.cpu
        return Outcome("cpu" if cpu else "killed", -number, stdout, stderr, seconds)
    return Outcome("ok" if ended["code"] == 0 else "error", ended["code"], stdout, stderr, seconds)


_ASK = """
import os, sys, sysconfig
paths = sysconfig.get_paths(vars={"base": sys.base_prefix, "platbase": sys.base_prefix})
library = [v or "" for v in (sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("INSTSONAME"))]
print(os.path.realpath(sys.executable), paths["stdlib"], paths["platstdlib"], os.path.join(*library), sep="\\0", end="")
"""


@cache
def _interpreter(python: str) -> list[str]:
    """What has to be visible for an interpreter to start: itself, its standard library, shared libraries.

    Raises:
        SandboxError: It does not run.
    """
    try:
        asked = subprocess.run([python, "-I", "-S", "-c", _ASK], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise SandboxError(f"the interpreter {python} does not run: {error}") from error
    wanted = [*asked.stdout.split("\0"), "/lib", "/lib64", "/usr/lib", "/usr/lib64"]
    return [p for p in dict.fromkeys(wanted) if os.path.exists(p) and not (p.count("/") == 1 and os.path.islink(p))]


def _everybody_can_run(python: str) -> bool:
    """Whether a user without rights can reach the interpreter and its standard library."""
    executable, library, *_ = _interpreter(python)
    return all(Path(p).stat().st_mode & stat.S_IROTH for p in (executable, library)) and all(
        place.stat().st_mode & stat.S_IXOTH for p in (executable, library) for place in Path(p).parents
    )


def _talk(child: subprocess.Popen[bytes], stdin: bytes, limits: SandboxLimits) -> tuple[bool, bytes, bytes]:
    """Feeds and reads the child until its outputs close; True first if one of them was over the limit.

    A program may leave its output open in a process that outlives it, so the child's own end counts too.
    """
    assert child.stdin is not None and child.stdout is not None and child.stderr is not None
    streams = {child.stdout: bytearray(), child.stderr: bytearray()}
    deadline = time.monotonic() + limits.wall + 10.0  # the child keeps the time; this is for a child that hangs
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            os.set_blocking(stream.fileno(), False)
            selector.register(stream, selectors.EVENT_READ)
        os.set_blocking(child.stdin.fileno(), False)
        selector.register(child.stdin, selectors.EVENT_WRITE)
        while selector.get_map():
            over = child.poll() is not None
            for key, _ in selector.select(0 if over else 0.05):
                ready: Any = key.fileobj
                if ready is child.stdin:
                    try:
                        stdin = stdin[os.write(ready.fileno(), stdin[:65536]) :]
                    except BlockingIOError:
                        continue
                    except OSError:
                        stdin = b""
                    if not stdin:
                        selector.unregister(ready)
                        ready.close()
                    continue
                try:
                    part = os.read(ready.fileno(), 65536)
                except BlockingIOError:
                    continue
                if not part:
                    selector.unregister(ready)
                streams[ready] += part
                if len(streams[ready]) > limits.output:
                    out, err = (bytes(s[: limits.output]) for s in streams.values())
                    return True, out, err
            if over or time.monotonic() > deadline:
                break
    out, err = (bytes(s) for s in streams.values())
    return False, out, err


def _stop(child: subprocess.Popen[bytes], isolated: bool, at_once: bool) -> None:
    """Ends the child and everything below it: by its namespace, or by the child's own hand."""
    try:
        if at_once and child.poll() is None:
            child.send_signal(signal.SIGKILL if isolated else signal.SIGTERM)
        child.wait(5.0)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    for stream in (child.stdin, child.stdout, child.stderr):
        if stream is not None:
            with suppress(OSError):
                stream.close()
