"""`carerl replicate`: run a grid, or one of its cells, and report."""

from __future__ import annotations

from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from .cells import Record


def replicate(
    preset: Annotated[
        str, typer.Option(help="small, full, demo, or a YAML file with settings, methods and runs.")
    ] = "small",
    out: Annotated[Path, typer.Option(help="Directory that keeps raw lines, report and pictures.")] = Path(
        "runs/replicate"
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what OUT holds; cells that are there stay.")
    ] = False,
    cell: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this cell, SETTING/METHOD@LR/SEED; may be repeated. Runs whatever OUT holds, unless --resume; compared "
            "with DATA."
        ),
    ] = None,
    setting: Annotated[list[str] | None, typer.Option(help="Only this setting; may be repeated.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Run nothing: tables from DATA.")] = False,
    data: Annotated[
        Path | None, typer.Option(help="Raw lines to report on or compare with; by default those of OUT.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; by default the usable cores.")] = None,
    list_cells: Annotated[bool, typer.Option("--list", help="Print the cells and which are done.")] = False,
) -> None:
    """Does it help? Guards, baselines and controls over tasks and seeds; every cell is recorded as it ends."""
    from .._command import plain_errors

    with plain_errors("replicate", "train"):
        from rich.console import Console

        from ..train.recipe import RecipeError
        from .cells import RAW, current, read_records, recorded
        from .grid import Grid
        from .pool import usable_cores
        from .report import left_out, write_report
        from .show import run_shown

        console, grid = Console(), Grid.load(preset)
        source = data or out / RAW
        unknown = [name for name in setting or () if name not in grid.settings]
        if unknown:
            raise RecipeError(
                f"{preset}: expected settings out of {', '.join(grid.settings)}, found {', '.join(unknown)}"
            )
        if cell and (setting or report):
            raise RecipeError(
                f"expected --cell alone, found it with {'--setting' if setting else '--report'}: a cell's name begins with "
                "its setting, and reports are of whole settings"
            )
        if report:
            records = read_records(source)
            if not records:
                raise RecipeError(
                    f"expected raw lines of cells in {source}, found none; run cells first, or name a file by --data"
                )
            print(write_report(grid, [r for r in records if not setting or r.setting in setting], out))
            return
        cells = [grid.cell(name) for name in dict.fromkeys(cell)] if cell else list(grid.cells(setting or ()))
        if not cells:
            raise RecipeError(f"{preset}: expected cells, found none in settings {', '.join(setting or grid.settings)}")
        done = recorded(cells, read_records(out / RAW))
        if list_cells:
            for one in cells:
                console.print(f"{'done' if one.name in done else '    '} {one.name}", highlight=False)
            return
        if done and not (resume or cell):
            raise RecipeError(
                f"{out} holds {len(done)} of these {len(cells)} cells: --resume goes on, or name another --out"
            )
        again = bool(cell) and not resume
        before, stale = current(grid, read_records(source))
        results = run_shown(cells, out, workers or usable_cores(), console, _line, again=again)
        rows = {(r.setting, r.variant) for r in results}
        stale = [r for r in stale if not cell or (r.setting, r.variant) in rows]
        if stale:
            console.print(left_out(stale), highlight=False, style="yellow", soft_wrap=True)
        if cell:
            for record in results:
                if resume and record.cell in done:
                    console.print(f"{record.cell}: recorded in {out}, not run again", highlight=False, soft_wrap=True)
                    if source.resolve() == (out / RAW).resolve():  # nothing to compare with itself
                        before = [r for r in before if r.cell != record.cell]
                compare(record, before, console)
        else:
            write_report(grid, read_records(out / RAW), out)
            console.print(f"{len(results)} cells; report, table and pictures in [bold]{out}[/]")


def _line(record: Record) -> str:
    return f"{record.cell:<36} {told(record)}  {record.seconds:.0f} s"


def told(record: Record) -> str:
    """The measures of a cell in a line."""
    return "  ".join(f"{name} {value:.3f}" for name, value in measures(record).items())


def measures(record: Record) -> dict[str, float]:
    """The numbers of a cell; of a pooled one, in which nothing is new or old, how far a domain fell instead."""
    found = {"average": record.average, "forget": record.forgetting, "new": record.new, "lowest - start": record.dip}
    return {name: value for name, value in found.items() if not isnan(value)}


def compare(record: Record, others: list[Record], console: Console) -> None:
    """Say where a cell lies among the recorded ones of its row: equal to its own record, or within the seeds' interval."""
    from .stats import estimate

    console.print(f"{record.cell}: {told(record)}", highlight=False)
    row = [r for r in others if (r.setting, r.variant) == (record.setting, record.variant)]
    same = next((r for r in row if r.cell == record.cell), None)
    if same is not None:
        verdict = "equal" if same.scores == record.scores else f"recorded: {told(same)}"
        console.print(f"  against its own record: {verdict}", highlight=False)
    rest = [r for r in row if r.seed != record.seed and r.confirms == record.confirms]
    if len(rest) < 2:
        console.print(f"  other recorded seeds: {len(rest)}, too few for an interval", highlight=False)
        return
    for measure, value in measures(record).items():
        e = estimate([measures(r)[measure] for r in rest])
        where = "inside" if e.holds(value) else "OUTSIDE"
        width = e.half * (e.n + 1) ** 0.5
        console.print(
            f"  {measure} {value:.3f} {where} {e.mean:.3f} ± {width:.3f}, where 95 % of single seeds lie by {e.n} others",
            highlight=False,
        )
