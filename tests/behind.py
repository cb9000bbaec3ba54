"""What compilers take long for is made behind the tests, by a process that uses what these leave of the processor.

`@pytest.mark.behind(made=function)` says that a test needs what `function()` makes: files under `build/`, each once
(:func:`once`). The process begins when the tests are known and calls every such function; a test that needs a file before it
is there waits for it, or makes it. These tests come last.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path


def once(target: Path, make: Callable[[Path], None]) -> Path:
    """A file that is made unless it exists; test processes and threads that want the same one wait for the first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            partial = target.with_suffix(".partial")
            make(partial)
            partial.rename(target)
    return target


def start(functions: Iterable[Callable[[], object]]) -> subprocess.Popen:
    calls = [f"{function.__module__}.{function.__name__}" for function in functions]
    return subprocess.Popen(
        [sys.executable, __file__, *calls],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},  # the folders of tests that pytest has found
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # A group, so that compilers end with it; not a session: between sessions the scheduler minds no priority.
        process_group=0,
    )


def end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    os.nice(19)
    for call in sys.argv[1:]:
        module, _, function = call.rpartition(".")
        with contextlib.suppress(Exception):  # the test that needs it will fail in the same way, and say why
            getattr(importlib.import_module(module), function)()
