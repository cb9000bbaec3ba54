"""Processes that tests start. They are forked from one that has imported torch, transformers and the package, once for every test
process: an import of its own takes each of them five seconds, and most of these processes work for less."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
from collections.abc import Sequence
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

PRELOADED = (
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers.models.qwen3.modeling_qwen3",
    "carerl_kernels.grpo",
    "carerl_kernels.monitor",
)


def start(call: str, *arguments: object, log: Path, **environment: str) -> BaseProcess:
    """Calls `module.function(*arguments)` in a process with one thread and these environment variables, which writes to `log`.

    The module is imported there, after the variables are set. The process can do whatever one of its own could (kill itself, make
    a process group, fork), but for reading environment variables that torch looks at when it is imported.
    """
    process = server().Process(target=call_in, args=(call, arguments, log, environment))
    process.start()
    return process


def server() -> BaseContext:
    """Where processes are forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def call_in(call: str, arguments: tuple, log: Path, environment: dict[str, str]) -> None:
    """What such a process does."""
    os.environ.update(environment)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    module, _, function = call.rpartition(".")
    getattr(importlib.import_module(module), function)(*arguments)


def wait(processes: Sequence[BaseProcess], timeout: float = 400) -> list[int | None]:
    """Exit codes of processes, negative signals where one was killed; whoever takes longer than `timeout` seconds is killed."""
    deadline = time.monotonic() + timeout
    try:
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0))
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
