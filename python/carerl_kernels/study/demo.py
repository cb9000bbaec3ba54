"""`carerl demo`: a small language model learns three verifiable domains in sequence, plainly and guarded; every run is kept."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..train.recipe import RecipeError
from .grid import Cell, Grid
from .pool import Job, Report, run_jobs, usable_cores

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class RunResult:
    """What one variant did with one seed. Accuracies are exact success probabilities at temperature 1.

    Attributes:
        variant: Name of the method.
        seed: Of the cell.
        curve: (step, {domain: accuracy}) at every evaluation, step 0 included.
        after_own_stage: Accuracy of each domain right after its own stage.
        final: Accuracy of each domain at the end.
        seconds: Wall-clock seconds of training and evaluation.
        guard_time_share: Share of those spent in the guard, probes included.
        touched_share: Energy of the guard's corrections over energy of all raw updates it saw; None without guard.
    """

    variant: str
    seed: int
    curve: list[tuple[int, dict[str, float]]]
    after_own_stage: dict[str, float]
    final: dict[str, float]
    seconds: float
    guard_time_share: float
    touched_share: float | None


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
        seeds: How many; default 2, or 1 with `fast`.
        fast: Fewer steps.
        json_path: Where to write the returned summary.
        workers: Processes; default the usable cores.
        variants: Names of methods; default all.
        console: Where to print; default the terminal.
        preset: A grid whose first run is the demonstration, and whose second is the fast one.

    Returns:
        {"domains": [...], "seeds": n, "seconds": s, "variants": {name: {"final": {domain: {"mean", "values"}},
        "after_own_stage": {domain: {...}}, "guard_time_share": x, ...}}}

    Raises:
        RecipeError: Unknown variants, numbers out of range, or `out` holds something else.
        WorkerError: A run failed; its traceback is in the message.
        ImportError: transformers or matplotlib is missing.
    """
    from rich.console import Console

    from .demo_report import Summary, plot_curves, print_summary

    console, grid = console or Console(), Grid.load(preset)
    plan = grid.runs[fast]
    seeds = len(plan.seeds) if seeds is None else seeds
    if seeds < 1:
        raise RecipeError(f"expected one seed or more, found {seeds}")
    unknown = [name for name in variants or () if name not in plan.methods]
    if unknown or (variants is not None and not variants):
        raise RecipeError(f"expected variants out of {', '.join(plan.methods)}, found {', '.join(unknown) or 'none'}")
    _require_libraries()
    names = dict.fromkeys(variants or plan.methods)
    cells = {
        name: [grid.cell(f"{plan.setting}/{name}@{grid.methods[name].lr[0]}/{s}") for s in range(seeds)]
        for name in names
    }
    started = time.perf_counter()
    with ExitStack() as stack:
        if out is None:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="carerl-demo-")))
            picture = Path("carerl-demo.png")
        else:
            root = Path(out)
            picture = root / "accuracy.png"
            _claim(root, grid.settings[plan.setting].recipe)
        try:
            results = _run(cells, root, out is not None, workers if workers is not None else usable_cores(), console)
        except KeyboardInterrupt:
            if out is not None:
                console.print(f"[yellow]Interrupted.[/] The same command continues from what is in {root}.")
            raise
    shown = [runs[0] for runs in cells.values()]
    summary = Summary.of(results, list(cells), seeds, time.perf_counter() - started)
    print_summary(console, summary, shown)
    data = summary.as_dict()
    for path in ([] if out is None else [root / "summary.json"]) + ([] if json_path is None else [Path(json_path)]):
        _write_json(path, data)
    plot_curves(picture, results, shown)  # last: numbers are safe by then
    console.print(f"Accuracy over time: [bold]{picture}[/]")
    return data


def run_variant(
    cell: Cell, start: Path, run_dir: Path | None, on_step: Callable[[dict[str, Any]], None] = lambda line: None
) -> RunResult:
    """Train the stages one after the other; continue where an interrupted run in `run_dir` stopped.

    Args:
        cell: Of the demonstration.
        start: File of the warmed-up weights, made if need be.
        run_dir: Keeps the run, or None.
        on_step: Called with each line of metrics.
    """
    from .grpo import guard_share, opened

    with opened(cell, cell.recipe, start, on_step, run_dir) as run:
        history = run.train(resume=run_dir is not None)
        guard: Any = run.trainer.guard
    curve = [(int(line["step"]), dict(line["eval"])) for line in history if "eval" in line]
    last = {line["stage"]: line["eval"] for line in history if "eval" in line}
    return RunResult(
        variant=cell.method_name,
        seed=cell.seed,
        curve=curve,
        after_own_stage={stage.name: last[stage.name][stage.name] for stage in cell.recipe.stages},
        final=curve[-1][1],
        seconds=sum(sum(line["seconds"].values()) for line in history),
        guard_time_share=guard_share(history),
        touched_share=None if guard is None else guard.report()["touched_share"],
    )


def _warm_up(cell: Cell, start: Path, report: Report) -> None:
    from .grpo import opened

    with opened(cell, cell.plain, start, lambda line: None):
        pass


def _variant(cell: Cell, start: Path, run_dir: Path | None, report: Report) -> RunResult:
    """A run, or its result from an earlier call that was interrupted later."""
    finished = None if run_dir is None else run_dir / "result.json"
    if finished is not None and finished.exists():
        stored = json.loads(finished.read_text())
        return RunResult(**{**stored, "curve": [(step, scores) for step, scores in stored["curve"]]})
    result = run_variant(cell, start, run_dir, lambda line: report(line["step"]))
    if finished is not None:
        _write_json(finished, asdict(result))
    return result


def _run(cells: dict[str, list[Cell]], root: Path, keep: bool, workers: int, console: Console) -> list[RunResult]:
    """Everything behind a live display: one bar per run in progress, one for all of them.

    Warm-ups come first; then, seed by seed, the guarded variants before the quicker plain ones, for even ends.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    seeds = list(zip(*cells.values(), strict=True))
    starts = [root / "warm-up" / f"seed-{seed}.safetensors" for seed in range(len(seeds))]
    warm_ups = [
        Job(f"warm-up seed {seed}", _warm_up, (own[0], start))
        for seed, (own, start) in enumerate(zip(seeds, starts, strict=True))
    ]
    runs = [
        Job(
            f"{cell.method_name} seed {seed}",
            _variant,
            (cell, starts[seed], root / cell.method_name / f"seed-{seed}" if keep else None),
            after=warm_ups[seed].key,
        )
        for seed, own in enumerate(seeds)
        for cell in sorted(own, key=lambda cell: cell.recipe.guard is None)
    ]
    length = sum(stage.steps for stage in seeds[0][0].recipe.stages)
    columns = (TextColumn("{task.description:<20}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        overall = progress.add_task("[bold]all runs", total=length * len(runs))
        bars: dict[str, Any] = {}
        seen: dict[str, int] = {}

        def on_event(key: str, kind: str, payload: Any) -> None:
            if kind == "start":
                bars[key] = progress.add_task(key, total=length)
            elif kind == "progress":
                progress.update(bars[key], completed=payload)
                progress.advance(overall, payload - seen.get(key, 0))
                seen[key] = payload
            else:
                progress.update(bars[key], visible=False)
                if isinstance(payload, RunResult):
                    progress.advance(overall, length - seen.get(key, 0))
                    scores = "  ".join(f"{d} {v:.2f}" for d, v in payload.final.items())
                    console.print(f"{key:<20} {scores}   [dim]{payload.seconds:.0f} s[/]")

        done = run_jobs([*warm_ups, *runs], workers, on_event)
    return [result for result in done.values() if isinstance(result, RunResult)]


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
    root.mkdir(parents=True, exist_ok=True)
    _write_json(marker, setting)


def _write_json(path: Path, data: Any) -> None:
    from .._files import write_bytes_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomically(path, (json.dumps(data, indent=2) + "\n").encode())


def _require_libraries() -> None:
    """Find out now, and not at the end, that something is missing.

    Raises:
        ImportError: Says what to install.
    """
    from importlib.util import find_spec

    missing = [name for name in ("transformers", "tokenizers", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ImportError(f"the demo needs {', '.join(missing)}: pip install 'carerl-kernels[train]'")
