"""The `carerl` command. Every command imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._command import Json, plain_errors, show_json
from .basis_command import basis
from .bench.command import bench
from .confine_command import Several, confine, merge
from .report_command import diagnose, report
from .rewards.command import score
from .study.command import replicate
from .train.command import train

app = typer.Typer(
    help="Capability-aware RL post-training: projection kernels, capability guard, GRPO trainer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


@app.command()
def info(as_json: Json = False) -> None:
    """Versions, what serves every op, and what is missing and why."""
    from .info import collect, render

    report = collect()
    if as_json:
        show_json(report)
    else:
        render(report)


@app.command()
def demo(
    fast: Annotated[bool, typer.Option("--fast", help="One seed, fewer steps: under a minute on two cores.")] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="Seeds per variant; 2 by default, 1 with --fast.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory that keeps the run: metrics, bases, plots.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="File for the results as JSON.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; by default the usable cores.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="Only this variant; may be repeated.")] = None,
) -> None:
    """A small language model learns three domains in sequence, plainly and guarded: who forgets what."""
    with plain_errors("demo", "train"):
        from .study.demo import run_demo

        run_demo(out, fast=fast, seeds=seeds, json_path=json_path, workers=workers, variants=variant)


app.command()(bench)  # these import what they need when they run, too
app.command()(score)
app.command()(train)
app.command(cls=Several)(confine)
app.command(cls=Several)(merge)
app.command()(report)
app.command()(diagnose)
app.command()(replicate)
app.add_typer(basis, name="basis")
