"""`carerl bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .._command import plain_errors
from .._files import write_json


def bench(
    preset: Annotated[str, typer.Option(help="quick, full, sweep or llm.")] = "quick",
    op: Annotated[
        list[str] | None, typer.Option(help="Only this op, or llm settings of this name; may be repeated.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="File for everything measured.")] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Time the ops on this machine's GPU instead of a preset.")] = False,
    device: Annotated[
        str | None, typer.Option("--predict", help="Print what a100, h100 or b200 should take; measures nothing.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="File for the roofline picture (PNG).")] = None,
) -> None:
    """The ops against PyTorch and against the memory bandwidth of this machine, every result checked."""
    with plain_errors("bench", "bench", RuntimeError):
        if plot is not None and (gpu or device or preset not in ("quick", "full")):
            raise ValueError("--plot: expected the preset quick or full, whose competitors the picture compares")
        if device is not None:
            if op or json_path or gpu:
                raise ValueError(
                    "--predict: expected no --op, --json or --gpu beside it; it prints one table and measures nothing"
                )
            from .roofline import report

            typer.echo(report(device))
            return
        if gpu:
            from .gpu import run_gpu

            found = run_gpu(op or (), say=typer.echo)
            if json_path is not None:
                write_json(json_path, found)
            wrong = [result["wrong"] for result in found["results"] if result["wrong"]]
            if wrong:
                raise RuntimeError("; ".join(wrong))
            return
        from .run import run_bench

        run_bench(preset, json_path, plot, ops=op or ())
