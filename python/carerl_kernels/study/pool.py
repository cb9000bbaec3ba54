"""Jobs spread over processes: live progress, and no process left behind whatever happens."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

Report = Callable[[Any], None]


@dataclass(frozen=True)
class Job:
    """A call in some process: `function(*arguments, report)`, where `report(message)` reaches the caller at once.

    Attributes:
        key: Names the job.
        function: At module level, so that another process can import it.
        arguments: Picklable.
    """

    key: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


def usable_cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


class WorkerError(RuntimeError):
    """A job failed or its process died; the message holds the job's name and its traceback."""


def run_jobs(
    jobs: Sequence[Job],
    workers: int,
    on_event: Callable[[str, str, Any], None] | None = None,
) -> dict[str, Any]:
    """Run all jobs, each in one of `workers` processes with one torch thread.

    Args:
        jobs: Started in this order as processes become free.
        workers: Processes; 1 runs everything here.
        on_event: `on_event(key, kind, payload)`: kind "start" (None), "progress" (the message), "done" (the result).

    Returns:
        Results by key.

    Raises:
        WorkerError: A job raised, or its process died. All others are stopped.
    """
    notify = on_event or (lambda key, kind, payload: None)
    if workers <= 1 or len(jobs) == 1:
        return _run_here(jobs, notify)
    return _run_elsewhere(list(jobs), min(workers, len(jobs)), notify)


def _run_here(jobs: Sequence[Job], notify: Callable[[str, str, Any], None]) -> dict[str, Any]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    try:
        for job in jobs:
            notify(job.key, "start", None)

            def report(message: Any, key: str = job.key) -> None:
                notify(key, "progress", message)

            try:
                results[job.key] = job.function(*job.arguments, report)
            except Exception as e:
                raise WorkerError(f"{job.key} failed: {type(e).__name__}: {e}") from e
            notify(job.key, "done", results[job.key])
            gc.collect()  # models and optimizers refer to each other through hooks: their memory is needed now
    finally:
        torch.set_num_threads(threads)
    return results


@dataclass
class _Worker:
    process: Any
    connection: Connection
    job: Job | None = None


def _run_elsewhere(waiting: list[Job], workers: int, notify: Callable[[str, str, Any], None]) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")  # fork would copy torch's thread pools in an undefined state
    pool: list[_Worker] = []
    results: dict[str, Any] = {}
    total = len(waiting)
    try:
        with _without_interrupts():
            for _ in range(workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs,), daemon=True)
                process.start()
                theirs.close()  # so that a dead process reads as end of file here
                pool.append(_Worker(process, ours))
        while len(results) < total:
            for worker in pool:
                if worker.job is None and waiting:
                    worker.job = waiting.pop(0)
                    worker.connection.send((worker.job.function, worker.job.arguments))
                    notify(worker.job.key, "start", None)
            busy = {w.connection: w for w in pool if w.job is not None}
            for ready in wait(list(busy)):
                worker = busy[ready]  # type: ignore[index]
                job = worker.job
                assert job is not None
                try:
                    kind, payload = worker.connection.recv()
                except (EOFError, OSError) as e:
                    worker.process.join(5)
                    raise WorkerError(
                        f"{job.key}: its process died with exit code {worker.process.exitcode} "
                        "(negative: a signal; -9 is usually the system running out of memory, try fewer workers)"
                    ) from e
                if kind == "error":
                    raise WorkerError(f"{job.key} failed in its process:\n{payload}")
                notify(job.key, kind, payload)
                if kind == "done":
                    results[job.key] = payload
                    worker.job = None
    finally:
        for worker in pool:
            worker.connection.close()  # an idle worker reads end of file and leaves by itself
            if worker.job is not None:
                worker.process.terminate()
        for worker in pool:
            worker.process.join(5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
    return results


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Children started inside ignore ctrl-C (the disposition survives exec): the parent alone reacts and stops them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(connection: Connection) -> None:
    """A worker's life: jobs until the other end closes."""
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            result = ("done", function(*arguments, lambda message: connection.send(("progress", message))))
        except BrokenPipeError:
            return  # the parent is gone
        except BaseException:
            result = ("error", traceback.format_exc())
        connection.send(result)
        gc.collect()  # as above
