"""The process pool: results, failures that surface, no process left behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from carerl_kernels.study.pool import Job, WorkerError, run_jobs
from processes import server


def double(number, report):
    report(number)
    return 2 * number


def explode(report):
    raise RuntimeError("the third wheel came off")


def die(report):
    os.kill(os.getpid(), signal.SIGKILL)


def linger(path, report):
    path.write_text(str(os.getpid()))
    time.sleep(60)


@pytest.fixture
def forked(monkeypatch):
    """The pool's processes come from the server of `processes`, which has imported torch; the last test has them as they are."""
    context = server()
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)


@pytest.mark.parametrize("workers", [1, 2])
def test_pool_returns_results_and_progress(forked, workers):
    events = []
    jobs = [Job("a", double, (1,)), Job("b", double, (2,)), Job("c", double, (3,))]
    results = run_jobs(jobs, workers, lambda *event: events.append(event))
    assert results == {"a": 2, "b": 4, "c": 6}
    assert ("c", "progress", 3) in events


def test_failing_job_surfaces_and_stops_the_others(forked, tmp_path):
    with pytest.raises(WorkerError, match=r"bad failed.*third wheel"):
        run_jobs([Job("bad", explode)], 1)
    started = time.monotonic()
    with pytest.raises(WorkerError, match=r"(?s)bad failed in its process.*third wheel"):
        run_jobs([Job("slow", linger, (tmp_path / "pid",)), Job("bad", explode)], 2)
    assert time.monotonic() - started < 45
    assert not (tmp_path / "pid").exists() or not alive(int((tmp_path / "pid").read_text()))
    with pytest.raises(WorkerError, match=r"killed: its process died with exit code -9"):
        run_jobs([Job("killed", die), Job("a", double, (1,))], 2)


def test_interrupt_leaves_no_process_behind(tmp_path):
    script = textwrap.dedent(
        f"""
        import signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests in the background has it ignored
        sys.path[:0] = [{os.path.dirname(__file__)!r}]
        from pathlib import Path
        from carerl_kernels.study.pool import Job, run_jobs
        from test_pool import linger
        if __name__ == "__main__":
            run_jobs([Job("a", linger, (Path({str(tmp_path / "a")!r}),)), Job("b", linger, (Path({str(tmp_path / "b")!r}),))], 2)
        """
    )
    (tmp_path / "main.py").write_text(script)
    parent = subprocess.Popen([sys.executable, tmp_path / "main.py"], stderr=subprocess.PIPE)
    files = [tmp_path / "a", tmp_path / "b"]
    deadline = time.monotonic() + 60
    while not all(f.exists() and f.read_text() for f in files) and time.monotonic() < deadline:
        time.sleep(0.1)
    parent.send_signal(signal.SIGINT)
    errors = parent.communicate(timeout=20)[1].decode()
    assert "KeyboardInterrupt" in errors
    assert "Process SpawnProcess" not in errors
    assert not any(alive(int(f.read_text())) for f in files)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
