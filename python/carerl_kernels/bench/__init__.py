"""Overhead benchmarks: the ops against what a practitioner would write, in one run on one machine.

Times on shared machines mean little, so everything here is a ratio taken within one run: against PyTorch written three
ways, and against the machine's own streaming-read bandwidth measured in the same rounds. Every timed call is checked.

Nothing is imported before it is wanted, because the command line imports this package for `carerl info` too.
"""

from typing import Any

__all__ = ["PRESETS", "BenchError", "run_bench"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(name)
    from . import run

    return getattr(run, name)
