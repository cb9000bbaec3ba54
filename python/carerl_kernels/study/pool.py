"""Jobs spread over processes: live progress, and no process left behind whatever happens."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass
from typing import Any

import torch

from .._errors import require

Notify = Callable[[str, str, Any], None]


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

    def run(self, notify: Notify) -> Any:
        """Its result; says of its start, and passes on what it reports."""
        notify(self.key, "start", None)
        try:
            return self.function(*self.arguments, lambda message: notify(self.key, "progress", message))
        finally:
            gc.collect()  # models and optimizers refer to each other through hooks: their memory is needed now


def usable_cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


class WorkerError(RuntimeError):
    """A job failed or its process died; the message holds the job's name and its traceback."""


def run_jobs(jobs: Sequence[Job], workers: int, on_event: Notify | None = None) -> dict[str, Any]:
    """Run all jobs, each in one of `workers` processes with one torch thread.

    Args:
        jobs: Started in this order as processes become free.
        workers: Processes; 1 runs everything here.
        on_event: `on_event(key, kind, payload)`: kind "start" (None), "progress" (the message), "done" (the result).

    Returns:
        Results by key.

    Raises:
        WorkerError: A job raised, or its process died. All others are stopped.
        ImportError: pebble is missing, and there is more than one process.
    """
    notify = on_event or (lambda key, kind, payload: None)
    if workers <= 1 or len(jobs) == 1:
        return _run_here(jobs, notify)
    return _run_elsewhere(jobs, min(workers, len(jobs)), notify)


def _run_here(jobs: Sequence[Job], notify: Notify) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    try:
        for job in jobs:
            try:
                results[job.key] = job.run(notify)
            except Exception as e:
                raise WorkerError(f"{job.key} failed: {type(e).__name__}: {e}") from e
            notify(job.key, "done", results[job.key])
    finally:
        torch.set_num_threads(threads)
    return results


def _run_elsewhere(jobs: Sequence[Job], workers: int, notify: Notify) -> dict[str, Any]:
    require("pebble", "running in several processes")
    from pebble import ProcessExpired, ProcessPool

    context = multiprocessing.get_context("spawn")  # fork would copy torch's thread pools in an undefined state
    events = context.SimpleQueue()
    results: dict[str, Any] = {}
    pool = ProcessPool(workers, initializer=_prepare, initargs=(events,), context=context)
    try:
        running: dict[Any, Job] = {pool.schedule(_serve, [job]): job for job in jobs}
        while running:
            done, _ = wait(running, timeout=0.1, return_when=FIRST_COMPLETED)
            while not events.empty():
                notify(*events.get())
            for future in done:
                job = running.pop(future)
                try:
                    results[job.key] = future.result()
                except ProcessExpired as e:
                    raise WorkerError(
                        f"{job.key}: its process died with exit code {e.exitcode} "
                        "(negative: a signal; -9 is usually the system running out of memory, try fewer workers)"
                    ) from e
                except Exception as e:
                    raise WorkerError(f"{job.key} failed in its process:\n{getattr(e, 'traceback', e)}") from e
                notify(job.key, "done", results[job.key])
    finally:
        pool.stop()  # after a failure or ctrl-C, to which the processes themselves do not listen, jobs are under way
        pool.join()
    return results


_notify: Notify


def _prepare(events: Any) -> None:
    """The beginning of a process: where its jobs' events go."""
    global _notify
    torch.set_num_threads(1)
    _notify = lambda *event: events.put(event)  # noqa: E731


def _serve(job: Job) -> Any:
    return job.run(_notify)
