"""The ``carerl`` command. Every command imports what it needs when it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Capability-aware RL post-training: projection kernels, capability guard, GRPO trainer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


@app.callback()
def main() -> None:
    """Makes every function below a command of its own name, however few there are."""


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False) -> None:
    """Versions, what serves every op, and what is missing and why."""
    from .info import collect, render

    report = collect()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        render(report)


def _extra_needed(error: ModuleNotFoundError, command: str, extra: str) -> typer.Exit:
    """Says which extra a command lacks; a module of this package that is missing is a bug and raised again."""
    if error.name is None or error.name.split(".")[0] == __package__:
        raise error
    typer.secho(
        f"carerl {command} needs {error.name}, which is not installed: pip install 'carerl-kernels[{extra}]'",
        err=True,
        fg=typer.colors.RED,
    )
    return typer.Exit(1)


@app.command()
def demo(
    fast: Annotated[
        bool, typer.Option("--fast", help="One seed and fewer steps: under a minute on two cores.")
    ] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="Seeds per variant; 2 by default, 1 with --fast.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory that keeps the run: metrics, bases, plots.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="File for the results as JSON.")] = None,
) -> None:
    """A small language model learns three domains in sequence, plainly and guarded: who forgets what."""
    try:
        from .demo import run_demo
    except ModuleNotFoundError as error:
        raise _extra_needed(error, "demo", "train") from None
    run_demo(fast=fast, seeds=seeds, out=out, json_path=json_path)
