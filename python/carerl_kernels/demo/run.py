"""`carerl demo`: every variant and seed, spread over the cores, and what came out."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .pool import Job, Report, run_jobs
from .report import Summary, plot_curves, print_summary
from .tasks import DOMAINS
from .variants import FAST, FULL, VARIANTS, RunResult, Scale, Variant, run_variant, warm_start

if TYPE_CHECKING:
    from rich.console import Console


class DemoError(ValueError):
    """The demonstration cannot run as asked."""


def run_demo(
    out: Path | str | None = None,
    *,
    seeds: int | None = None,
    fast: bool = False,
    json_path: Path | str | None = None,
    workers: int | None = None,
    variants: Sequence[str] | None = None,
    console: Console | None = None,
    scale: Scale | None = None,
) -> dict[str, Any]:
    """Train a small language model on three domains in sequence, every variant from the same checkpoints, and compare.

    Args:
        out: Keeps every run (settings, metrics, bases, checkpoints, picture). The same call continues an interrupted
            demonstration there. None: only the picture is kept, as carerl-demo.png in the current directory.
        seeds: How many; default 2, or 1 with `fast`.
        fast: Fewer steps.
        json_path: Where to write the returned summary.
        workers: Processes; default the usable cores.
        variants: Names from `VARIANTS`; default all.
        console: Where to print; default the terminal.
        scale: Sizes other than those of `fast`.

    Returns:
        {"domains": [...], "seeds": n, "seconds": s, "variants": {name: {"final": {domain: {"mean", "values"}},
        "after_own_stage": {domain: {...}}, "guard_time_share": x, ...}}}

    Raises:
        DemoError: Unknown variants, numbers out of range, or `out` holds something else.
        WorkerError: A run failed; its traceback is in the message.
        ImportError: transformers or matplotlib is missing.
    """
    from rich.console import Console

    console = console or Console()
    seeds = (1 if fast else 2) if seeds is None else seeds
    if seeds < 1:
        raise DemoError(f"expected one seed or more, found {seeds}")
    unknown = [name for name in variants or () if name not in VARIANTS]
    if unknown or (variants is not None and not variants):
        raise DemoError(f"expected variants out of {', '.join(VARIANTS)}, found {', '.join(unknown) or 'none'}")
    chosen = [VARIANTS[name] for name in dict.fromkeys(variants or VARIANTS)]
    scale = scale or (FAST if fast else FULL)
    _require_libraries()
    started = time.perf_counter()
    with ExitStack() as stack:
        if out is None:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="carerl-demo-")))
            picture = Path("carerl-demo.png")
        else:
            root = Path(out)
            picture = root / "accuracy.png"
            _claim(root, scale)
        jobs = _jobs(chosen, seeds, scale, root, keep=out is not None)
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
        try:
            done = _run(jobs, workers if workers is not None else usable, scale, console)
        except KeyboardInterrupt:
            if out is not None:
                console.print(f"[yellow]Interrupted.[/] The same command continues from what is in {root}.")
            raise
    results = [result for result in done.values() if isinstance(result, RunResult)]
    summary = Summary.of(results, chosen, DOMAINS, seeds, time.perf_counter() - started)
    print_summary(console, summary, chosen, scale)
    data = summary.as_dict()
    if out is not None:
        _write_json(root / "summary.json", data)
    if json_path is not None:
        _write_json(Path(json_path), data)
    plot_curves(picture, results, chosen, DOMAINS, scale.steps)  # last: numbers are safe by then
    console.print(f"Accuracy over time: [bold]{picture}[/]")
    return data


def _jobs(variants: Sequence[Variant], seeds: int, scale: Scale, root: Path, keep: bool) -> list[Job]:
    """Warm-ups first; then, seed by seed, the guarded variants before the quicker plain ones, for even ends."""
    starts = {seed: root / "warm-up" / f"seed-{seed}.safetensors" for seed in range(seeds)}
    jobs = [Job(f"warm-up seed {seed}", _warm_up, (seed, scale, path)) for seed, path in starts.items()]
    for seed, path in starts.items():
        for variant in sorted(variants, key=lambda v: v.guard is None):
            run_dir = root / variant.name / f"seed-{seed}" if keep else None
            arguments = (variant, seed, scale, path, run_dir)
            jobs.append(Job(f"{variant.name} seed {seed}", _variant, arguments, after=f"warm-up seed {seed}"))
    return jobs


def _preload() -> None:
    """Import the model's code while other workers warm up."""
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401


def _warm_up(seed: int, scale: Scale, path: Path, report: Report) -> None:
    warm_start(seed, scale, path)


def _variant(variant: Variant, seed: int, scale: Scale, start: Path, run_dir: Path | None, report: Report) -> RunResult:
    """A run, or its result from an earlier call that was interrupted later."""
    finished = None if run_dir is None else run_dir / "result.json"
    if finished is not None and finished.exists():
        stored = json.loads(finished.read_text())
        return RunResult(**{**stored, "curve": [(step, scores) for step, scores in stored["curve"]]})
    result = run_variant(variant, seed, scale, start, run_dir, lambda line: report(line["step"]))
    if finished is not None:
        _write_json(finished, dataclasses.asdict(result))
    return result


def _run(jobs: list[Job], workers: int, scale: Scale, console: Console) -> dict[str, Any]:
    """The jobs behind a live display: one bar per run in progress, one for all of them."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    length = scale.steps * len(DOMAINS)
    columns = (TextColumn("{task.description:<20}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        overall = progress.add_task("[bold]all runs", total=length * len([j for j in jobs if j.after]))
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

        return run_jobs(jobs, workers, on_event, _preload)


def _claim(root: Path, scale: Scale) -> None:
    """Make `out` ours, or recognise it as a demonstration of the same sizes to continue.

    Raises:
        DemoError: It holds something else.
    """
    marker = root / "demo.json"
    settings = json.loads(json.dumps(dataclasses.asdict(scale)))
    if marker.exists():
        try:
            stored = json.loads(marker.read_text())
        except ValueError:
            stored = None
        if stored != settings:
            raise DemoError(
                f"{root} holds a demonstration of other sizes: expected {settings}, found {stored}; "
                "choose another directory, or call it as before to continue that one"
            )
        return
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise DemoError(f"expected a new or empty directory to keep the runs in, found {root} with other contents")
    root.mkdir(parents=True, exist_ok=True)
    _write_json(marker, settings)


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
