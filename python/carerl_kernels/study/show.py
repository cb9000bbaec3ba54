"""Cells while they run: a bar for all, one for each in progress, a line for each as it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cells import RAW, Record, read_records, recorded, run_cells
from .grid import Cell

if TYPE_CHECKING:
    from rich.console import Console


def run_shown(
    cells: Sequence[Cell], out: Path, workers: int, console: Console, line: Callable[[Record], str], **options: Any
) -> list[Record]:
    """As `run_cells`; `line` says what is printed of a cell that has ended."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<28}"), BarColumn(), TextColumn("{task.completed:g}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        done = {} if options.get("again") else recorded(cells, read_records(out / RAW))
        overall = progress.add_task(f"[bold]of {len(cells)} cells", total=len(cells), completed=len(done))
        bars: dict[str, Any] = {}
        lengths = {c.name: sum(s.steps for s in c.recipe.stages) for c in cells if c.setting.kind == "grpo"}

        def on_event(key: str, kind: str, payload: Any) -> None:
            if kind == "start":
                bars[key] = progress.add_task(key, total=lengths.get(key))
            elif kind == "progress":
                progress.update(bars[key], completed=payload)
            else:
                progress.update(bars[key], visible=False)
                progress.advance(overall)
                console.print(line(payload), highlight=False)

        return run_cells(cells, out, workers=workers, on_event=on_event, **options)
