"""`carerl train`: a recipe, from the command line or under torchrun."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .._command import plain_errors


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file; docs/training.md says what stands in it.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[PLACE=VALUE]...", help="Changes, such as train.lr=1e-5.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in run_dir, or start.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe and print what it needs; no weights.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="With --dry-run: plan for so many; torchrun's number otherwise.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print JSON.")] = False,
) -> None:
    """Train what a recipe says: GRPO over its domains, stage by stage, guarded and recorded.

    Several processes: torchrun --nproc-per-node 8 -m carerl_kernels train RECIPE
    """
    if not dry_run and (processes is not None or as_json):
        option = "--json" if processes is None else "--processes"
        raise typer.BadParameter("belongs to --dry-run; start several processes with torchrun", param_hint=option)
    stopped = "stopped; the same command with --resume goes on from the last checkpoint"
    with plain_errors("train", "train", stopped=stopped):
        from .recipe import load_recipe

        loaded = load_recipe(recipe, overrides or ())
        if loaded.run_dir is None:
            raise ValueError(f"{recipe}: run_dir: expected the directory of the run's records, found none")
        if dry_run:
            from .plan import lines, plan_run

            plan = plan_run(loaded, processes or int(os.environ.get("WORLD_SIZE", "1")))
            typer.echo(plan.as_json() if as_json else "\n".join(lines(loaded, plan)))
            return
        from .run import open_run

        with open_run(loaded) as run:
            history = run.train(resume=resume)
            first = run.trainer.ranks.first
    if first:
        scores = [line["eval"] for line in history if "eval" in line]
        for name, value in scores[-1].items() if scores else ():
            typer.echo(f"{name}: {scores[0][name]:.3f} -> {value:.3f}")
        typer.echo(f"{len(history) - 1} steps in {loaded.run_dir}")
