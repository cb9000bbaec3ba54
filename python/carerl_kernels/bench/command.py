"""``carerl bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bench(
    preset: Annotated[str, typer.Option(help="quick, full, sweep or llm.")] = "quick",
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be repeated.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="File for everything measured.")] = None,
    plot: Annotated[Path | None, typer.Option(help="File for the roofline picture (PNG).")] = None,
) -> None:
    """The ops against PyTorch and against the memory bandwidth of this machine, every result checked."""
    from .run import run_bench

    try:
        run_bench(preset, json_path, plot, ops=op or ())
    except ModuleNotFoundError as error:
        message = f"{error.name} is not installed: pip install 'carerl-kernels[bench]'"
    except (ValueError, RuntimeError, OSError) as error:
        message = str(error)
    else:
        return
    typer.secho(f"carerl bench: {message}", err=True, fg=typer.colors.RED)
    raise typer.Exit(1)
