"""`carerl demo`: a small language model learns three verifiable domains in sequence, plainly and guarded; every run is kept."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._errors import require
from .._files import write_json
from ..train.recipe import RecipeError
from .cells import Record
from .grid import Grid
from .pool import usable_cores
from .show import run_shown

if TYPE_CHECKING:
    from rich.console import Console


def run_demo(
    out: Path | str | None = None,
    *,
    seeds: int | None = None,
    fast: bool = False,
    json_path: Path | str | None = None,
    workers: int | None = None,
    variants: Sequence[str] | None = None,
    console: Console | None = None,
    preset: Path | str = "demo",
) -> dict[str, Any]:
    """Train a small language model on three domains in sequence, every variant from the same checkpoints, and compare.

    Args:
        out: Keeps every run (settings, metrics, bases, checkpoints, picture). The same call continues an interrupted
            demonstration there. None: only the picture is kept, as carerl-demo.png in the current directory.
        seeds, fast, json_path, workers, variants: Options of the command.
        console: Where to print; default the terminal.
        preset: A grid whose first block of runs is the demonstration, and whose second is the fast one.

    Returns:
        {"domains": [...], "seeds": n, "seconds": s, "variants": {name: {"final": {domain: {"mean", "values"}},
        "after_own_stage": {domain: {...}}, "guard_time_share": x, ...}}}

    Raises:
        RecipeError: Unknown variants, numbers out of range, or `out` holds something else.
        WorkerError: A run failed; its traceback is in the message.
        ImportError: transformers or matplotlib is missing.
    """
    from rich.console import Console

    from .demo_report import Summary, Variant, plot_curves, print_summary

    console, grid = console or Console(), Grid.load(preset)
    plan = grid.runs[fast]
    seeds = len(plan.seeds) if seeds is None else seeds
    if seeds < 1:
        raise RecipeError(f"expected one seed or more, found {seeds}")
    unknown = [name for name in variants or () if name not in plan.methods]
    if unknown or (variants is not None and not variants):
        raise RecipeError(f"expected variants out of {', '.join(plan.methods)}, found {', '.join(unknown) or 'none'}")
    for package in ("transformers", "tokenizers", "matplotlib"):
        require(package, "the demo")
    names = list(dict.fromkeys(variants or plan.methods))
    variants_at = [f"{plan.setting}/{name}@{grid.methods[name].lr[0]:g}" for name in names]
    cells = [grid.cell(f"{variant}/{seed}") for seed in range(seeds) for variant in variants_at]
    started = time.perf_counter()
    with ExitStack() as stack:
        if out is None:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="carerl-demo-")))
            picture = Path("carerl-demo.png")
        else:
            root = Path(out)
            picture = root / "accuracy.png"
            _claim(root, grid.settings[plan.setting].recipe)
        # seed by seed, the guarded variants before the quicker plain ones, for even ends
        order = sorted(cells, key=lambda cell: (cell.seed, cell.recipe.guard is None))
        try:
            records = run_shown(order, root, workers or usable_cores(), console, _line, keep=True)
        except KeyboardInterrupt:
            if out is not None:
                console.print(f"[yellow]Interrupted.[/] The same command continues from what is in {root}.")
            raise
        lines = {cell.name: (root / cell.kept_as / "metrics.jsonl").read_text().splitlines() for cell in cells}
    by_name = {record.cell: record for record in records}
    found = [
        Variant.of([(cell, by_name[cell.name], [json.loads(line) for line in lines[cell.name]]) for cell in own])
        for own in zip(*(cells[i : i + len(names)] for i in range(0, len(cells), len(names))), strict=True)
    ]
    summary = Summary(seeds, time.perf_counter() - started, found)
    print_summary(console, summary)
    data = summary.as_dict()
    for path in ([] if out is None else [root / "summary.json"]) + ([] if json_path is None else [Path(json_path)]):
        write_json(path, data)
    plot_curves(picture, found)  # last: numbers are safe by then
    console.print(f"Accuracy over time: [bold]{picture}[/]")
    return data


def _line(record: Record) -> str:
    scores = "  ".join(f"{domain} {value:.2f}" for domain, value in record.final.items())
    return f"{record.variant + ' seed ' + str(record.seed):<20} {scores}   [dim]{record.seconds:.0f} s[/]"


def _claim(root: Path, setting: dict[str, Any]) -> None:
    """Make `out` ours, or recognise it as a demonstration of the same sizes to continue.

    Raises:
        RecipeError: It holds something else.
    """
    marker = root / "demo.json"
    if marker.exists():
        try:
            stored = json.loads(marker.read_text())
        except ValueError:
            stored = None
        if stored != setting:
            raise RecipeError(
                f"{root} holds a demonstration of other sizes: expected {setting}, found {stored}; "
                "choose another directory, or call it as before to continue that one"
            )
        return
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise RecipeError(f"expected a new or empty directory to keep the runs in, found {root} with other contents")
    write_json(marker, setting)
