"""Cells: run, recorded as JSON lines as they end, and never run twice."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import nan
from pathlib import Path
from statistics import fmean
from typing import Any

from ..train.recipe import RecipeError
from .grid import CHOOSING, Cell, Grid
from .pool import Job, run_jobs

RAW = "cells.jsonl"
DIGITS = 4


@dataclass(frozen=True)
class Record:
    """What one cell came to. Accuracies are exact success probabilities, or mean rewards where no single answer is right.

    Attributes:
        cell: Its name.
        key: Hash of its definition.
        stages: Domains of each stage.
        scores: A list over domains (in the order first trained) before everything and at the end of each stage.
        seconds: Wall-clock seconds.
        touched: Energy of the guard's corrections over energy of all raw updates it saw; None without guard.
        guard_share: Share of training time spent in the guard.
        displacement: Per stage and earlier domain: along its directions, relative to the recorded stage's own.
        validity: Per recorded domain: share of its fresh gradients that its directions explain as the next stage begins, the
            same at the end of the run, and what random directions explain then.
        lowest: Pooled settings: the lowest accuracy per domain at an evaluation after the start.
        extras: Further measures of some settings, higher is better: before everything and at the end of each stage.
    """

    cell: str
    key: str
    stages: list[list[str]]
    scores: list[list[float]]
    seconds: float
    touched: float | None = None
    guard_share: float | None = None
    displacement: dict[str, dict[str, float | None]] = field(default_factory=dict)
    validity: dict[str, list[float]] = field(default_factory=dict)
    lowest: list[float] = field(default_factory=list)
    extras: dict[str, list[float]] = field(default_factory=dict)

    @property
    def setting(self) -> str:
        return self.cell.split("/")[0]

    @property
    def variant(self) -> str:
        return self.cell.split("/")[1]

    @property
    def seed(self) -> int:
        return int(self.cell.split("/")[2])

    @property
    def confirms(self) -> bool:
        """Whether the seed is one that nothing was chosen on."""
        return self.seed < CHOOSING

    @property
    def pooled(self) -> bool:
        """Whether it is one mixed stage: no domain is new or old, and what counts is where each of them ends."""
        return len(self.stages) == 1 and len(self.stages[0]) > 1

    @property
    def domains(self) -> list[str]:
        return list(dict.fromkeys(d for stage in self.stages for d in stage))

    def own(self, domain: str) -> int:
        """Position among `scores` of the end of the domain's first stage."""
        return 1 + next(i for i, stage in enumerate(self.stages) if domain in stage)

    @property
    def final(self) -> dict[str, float]:
        return dict(zip(self.domains, self.scores[-1], strict=True))

    @property
    def average(self) -> float:
        """Mean final accuracy over domains."""
        return fmean(self.scores[-1])

    @property
    def forgetting(self) -> float:
        """Mean drop since the end of a domain's first stage, over the domains that the last stage did not bring."""
        drops = [self.scores[self.own(d)][i] - self.scores[-1][i] for i, d in enumerate(self.domains) if self._early(d)]
        return _mean(drops)

    @property
    def retention(self) -> float:
        """Mean final accuracy over the domains that the last stage did not bring."""
        return _mean([self.scores[-1][i] for i, d in enumerate(self.domains) if self._early(d)])

    @property
    def new(self) -> float:
        """Mean accuracy at the end of a domain's first stage, over the domains that were not there from the first."""
        return _mean([self.scores[self.own(d)][i] for i, d in enumerate(self.domains) if self.own(d) > 1])

    @property
    def window(self) -> float:
        """Mean drop from the start to right before a domain's own stage, while nothing is known of it to protect."""
        late = [(i, self.own(d)) for i, d in enumerate(self.domains) if self.own(d) > 1]
        return _mean([self.scores[0][i] - self.scores[own - 1][i] for i, own in late])

    @property
    def dip(self) -> float:
        """How far the domain that fell most, at its lowest, was from where it started: below zero where it fell."""
        if not self.lowest:
            return nan
        return min(low - start for low, start in zip(self.lowest, self.scores[0], strict=True))

    def _early(self, domain: str) -> bool:
        return self.own(domain) < len(self.stages)


def run_cell(cell: Cell, cache: Path, report: Callable[[Any], None]) -> Record:
    """Train one cell; at module level so that another process can."""
    started = time.perf_counter()
    result = cell.added.run(cell, cache, report)
    return Record(cell.name, cell.key, seconds=round(time.perf_counter() - started, 1), **_rounded(result))


def _mean(values: Sequence[float]) -> float:
    """Not a number where a setting has no such domains: one whose stages are one has neither earlier nor new ones."""
    return fmean(values) if values else nan


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def read_records(path: Path) -> list[Record]:
    """Records of a file, the last of each cell; an unfinished last line, of a process that was killed, is left out.

    Raises:
        RecipeError: A line in the middle is not a record.
    """
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    records: dict[str, Record] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = Record(**json.loads(line))
        except (ValueError, TypeError) as e:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise RecipeError(f"{path}, line {number}: expected a record of a cell, found {line[:60]!r} ({e})") from e
        records[record.cell] = record
    return list(records.values())


def append_record(path: Path, record: Record) -> None:
    """Add a line; an unfinished one before it, of a process that was killed, is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {k: v for k, v in asdict(record).items() if v not in (None, {}, [])}
    with path.open("ab+") as file:
        file.seek(0)
        whole = file.read()
        file.truncate(whole.rfind(b"\n") + 1)
        file.write(json.dumps(data, separators=(",", ":")).encode() + b"\n")


def run_cells(
    cells: Iterable[Cell],
    out: Path,
    *,
    workers: int = 1,
    again: bool = False,
    keep: bool = False,
    on_event: Callable[[str, str, Any], None] | None = None,
) -> list[Record]:
    """Run the cells that `out` has no record of yet, or all; a line in its cells.jsonl for each as it ends.

    Args:
        cells: What to run.
        out: Directory of the study; its cache keeps warm-up checkpoints.
        workers: Processes.
        again: Run what is recorded, too; the later record counts.
        keep: Keep every run of kind "grpo", as METHOD/seed-SEED in `out`: settings, metrics, bases, checkpoints.
        on_event: As for `run_jobs`.

    Returns:
        Records of all these cells, in order.

    Raises:
        RecipeError: A cell asks for something that its kind of setting would ignore; nothing was run.
        WorkerError: A cell failed; what was done before is recorded.
    """
    cells = list(cells)
    for cell in cells:
        cell.check()
    done = {} if again else recorded(cells, read_records(out / RAW))

    def event(key: str, kind: str, payload: Any) -> None:
        if kind == "done":
            append_record(out / RAW, payload)
        if on_event is not None:
            on_event(key, kind, payload)

    jobs = [
        Job(cell.name, run_cell, (replace(cell, kept=out / cell.kept_as if keep else None), out / "cache"))
        for cell in cells
        if cell.name not in done
    ]
    results = run_jobs(jobs, workers, event) if jobs else {}
    return [done.get(cell.name) or results[cell.name] for cell in cells]


def current(grid: Grid, records: Iterable[Record]) -> tuple[list[Record], list[Record]]:
    """Records of cells as the grid defines them now, and the others: of cells that it defines otherwise, or not at all."""
    kept: list[Record] = []
    left: list[Record] = []
    for record in records:
        try:
            same = grid.cell(record.cell).key == record.key
        except RecipeError:
            same = False
        (kept if same else left).append(record)
    return kept, left


def recorded(cells: Sequence[Cell], records: Iterable[Record]) -> dict[str, Record]:
    """Records that belong to cells as they are defined now, by name."""
    keys = {cell.name: cell.key for cell in cells}
    return {r.cell: r for r in records if keys.get(r.cell) == r.key}
