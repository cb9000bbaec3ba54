"""Starting the inside of the sandbox and talking to it: `sandbox.py` runs programs so, `worker.py` graders."""

from __future__ import annotations

import json
import os
import pwd
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..._errors import PlainError

_HERE = Path(__file__).parent
_PROGRAM = (_HERE / "_program.py").read_text(encoding="utf-8")
START_PATIENCE = 60.0  # seconds for the inside to start on a busy machine


class SandboxError(PlainError):
    """The sandbox itself failed, or cannot be had here; says nothing about the program."""


@dataclass(frozen=True)
class Bounds:
    """What the inside of a sandbox keeps of a program's time and memory.

    Attributes:
        memory: Bytes resident in the whole tree; without `wall` nobody looks.
        wall, cpu: Seconds of the clock, and of processor time of the whole tree, that a part may take. Without `wall`
            nobody inside keeps the time.
        budget: Seconds, of either kind, that all parts may take.
        patience: Seconds of the wall that a part may take, kept waiting for a processor as it may be.
        parts: How many parts with clocks of their own the program has.
    """

    memory: int = 0
    wall: float | None = None
    cpu: float = 0.0
    budget: float = 0.0
    patience: float = 0.0
    parts: int = 0


_UNWATCHED = Bounds()


class Launched:
    """A program inside of the sandbox, running.

    Args:
        python: Interpreter.
        isolated: Whether the program runs in namespaces of its own, or with limits only.
        limits: Resource limits of each process by name ("CPU", "AS", "NPROC", ...).
        packages: Directories to import from.
        files: Texts by name in the working directory; "main.py" is the program.
        disk: Bytes of the working directory.
        bounds: What is watched from inside.
        own_user: Whether root's programs run as a user of their own.

    Attributes:
        child: The inside; its streams are the program's.

    Raises:
        SandboxError: It could not be started.
    """

    def __init__(
        self,
        python: str,
        isolated: bool,
        limits: Mapping[str, int],
        packages: Sequence[str],
        files: Mapping[str, str],
        *,
        disk: int,
        bounds: Bounds = _UNWATCHED,
        own_user: bool = True,
    ) -> None:
        executable, *library = interpreter(python)
        self.isolated = isolated
        self._uid = _draw_uid() if own_user and os.geteuid() == 0 else None
        self._directory = None if isolated else tempfile.mkdtemp(prefix="carerl-sandbox-")
        job: dict[str, Any] = {
            "isolated": isolated,
            "python": executable,
            "start": f"{_PROGRAM}\n\nstart({list(packages)!r})\n",
            "readable": [executable, *library, *packages],
            "directory": self._directory,
            "files": dict(files),
            "uid": self._uid,
            "disk": disk,
            "limits": dict(limits),
            **asdict(bounds),
        }
        text = json.dumps(job).encode()
        self.header = b"%08d" % len(text) + text
        try:
            if self._directory is not None and self._uid is not None:
                os.chown(self._directory, self._uid, self._uid)
            self._status, status = os.pipe()
            inside = f"import sys; sys.path[:0] = [{str(_HERE)!r}]; import _sandbox_child; _sandbox_child.main()"
            try:
                self.child = subprocess.Popen(
                    [executable, "-I", "-S", "-c", inside, str(status)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    pass_fds=(status,),
                    env={},
                    start_new_session=True,
                )
            except OSError as error:
                os.close(self._status)
                raise SandboxError(f"the sandbox could not be started: {error}") from error
            finally:
                os.close(status)
        except BaseException:
            self._clean()
            raise

    def stop(self, *, at_once: bool) -> dict[str, Any]:
        """Ends the inside and everything below it: by its namespace, or by the inside's own hand.

        Returns:
            How the program ended, as `supervise` says it; {} if the inside was ended with it.

        Raises:
            SandboxError: It never ran.
        """
        try:
            if at_once and self.child.poll() is None:
                self.child.send_signal(signal.SIGKILL if self.isolated else signal.SIGTERM)
            self.child.wait(5.0)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        for stream in (self.child.stdin, self.child.stdout, self.child.stderr):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        os.set_blocking(self._status, False)
        data = b""
        with suppress(BlockingIOError):
            while part := os.read(self._status, 65536):
                data += part
        os.close(self._status)
        self._clean()
        said = data.removeprefix(b"started\n")
        ended: dict[str, Any] = json.loads(said) if said else {}
        if not data or "sandbox" in ended:
            raise SandboxError(f"the sandbox failed: {ended.get('sandbox', 'it ended before the program ran')}")
        return ended

    def _clean(self) -> None:
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
        _UIDS.discard(self._uid)


def talk(launched: Launched, stdin: bytes, seconds: float, limit: int) -> tuple[bool, bytes, bytes]:
    """Feeds and reads a program until its outputs close; True first if one of them was over `limit` bytes.

    A program may leave its output open in a process that outlives it, so the inside's own end counts too. The inside keeps the
    time; `seconds` is for one that hangs.
    """
    child = launched.child
    assert child.stdin is not None and child.stdout is not None and child.stderr is not None
    stdin = launched.header + stdin
    streams = {child.stdout: bytearray(), child.stderr: bytearray()}
    deadline = time.monotonic() + seconds
    sent, full = 0, False
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
                        sent += os.write(ready.fileno(), stdin[sent : sent + 65536])
                    except BlockingIOError:
                        continue
                    except OSError:
                        sent = len(stdin)
                    if sent >= len(stdin):
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
            full = any(len(written) > limit for written in streams.values())
            if full or over or time.monotonic() > deadline:
                break
    out, err = (bytes(written[:limit]) for written in streams.values())
    return full, out, err


def parsed_object(line: str | bytes | None) -> dict[str, Any] | None:
    """The JSON object that a program wrote as a line; None for anything else that it may be."""
    try:
        found = None if line is None else json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def own_interpreter() -> str:
    """The one that runs this, outside of its virtual environment."""
    return getattr(sys, "_base_executable", None) or sys.executable


_ASK = """
import os, sys, sysconfig
paths = sysconfig.get_paths(vars={"base": sys.base_prefix, "platbase": sys.base_prefix})
library = [v or "" for v in (sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("INSTSONAME"))]
print(os.path.realpath(sys.executable), paths["stdlib"], paths["platstdlib"], os.path.join(*library), sep="\\0", end="")
"""


@cache
def interpreter(python: str) -> list[str]:
    """What has to be visible for an interpreter to start, which is tried: itself, its standard library, shared libraries."""
    try:
        asked = subprocess.run([python, "-I", "-S", "-c", _ASK], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise SandboxError(f"the interpreter {python} does not run: {error}") from error
    wanted = [*asked.stdout.split("\0"), "/lib", "/lib64", "/usr/lib", "/usr/lib64"]
    return [p for p in dict.fromkeys(wanted) if os.path.exists(p) and not (p.count("/") == 1 and os.path.islink(p))]


# Users that nobody has: the range above every assigned one (systemd's UIDS-GIDS), or where a container knows no such numbers
# the one for dynamic users.
_RANGES = (range(1_900_000_000, 2_100_000_000), range(61_184, 65_520))
_UIDS: set[int | None] = set()
_UIDS_LOCK = threading.Lock()


def _draw_uid() -> int:
    """A user of its own for a program of root's: limits on processes count per user, and do not hold for root."""
    mapped = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    running = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError):
                running.add(os.stat(f"/proc/{name}").st_uid)
    for numbers in _RANGES:
        inside = [m for m in mapped if m[0] <= numbers.start and numbers.stop <= m[0] + m[2]]
        for _ in range(64 if inside else 0):
            uid = secrets.choice(numbers)
            with _UIDS_LOCK:
                if uid in running or uid in _UIDS or _has_name(uid):
                    continue
                _UIDS.add(uid)
                return uid
    raise SandboxError(f"no user number is free for programs in {_RANGES} as /proc/self/uid_map has them")


def _has_name(uid: int) -> bool:
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True


class Turns:
    """Programs run beside each other, or one alone: for one that a busy machine has kept from its time."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running, self._alone = 0, False

    @contextmanager
    def take(self, alone: bool) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._alone = alone  # nobody starts any more
            self._changed.wait_for(lambda: not (alone and self._running))
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._alone = self._alone and not alone
                self._changed.notify_all()
