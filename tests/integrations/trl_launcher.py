"""One process that imports TRL, which takes seven seconds, and is forked into all that the distributed tests compare."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

import peft  # noqa: F401
import trl_helpers  # noqa: F401
from processes import call_in, wait


def main(folder: Path, port: int) -> None:
    """Every scenario in one process and in two, both at once."""
    context, processes = multiprocessing.get_context("fork"), []
    for world in (1, 2):
        for rank in range(world):
            environment = {"HF_HUB_OFFLINE": "1", "WORLD_SIZE": str(world), "RANK": str(rank)}
            if world > 1:
                environment |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            arguments = "trl_worker.main", (folder,), folder / f"log-{world}-{rank}", environment
            processes.append(context.Process(target=call_in, args=arguments))
            processes[-1].start()
    codes = wait(processes, timeout=600)
    sys.exit(f"exit codes {codes}" if any(codes) else 0)
