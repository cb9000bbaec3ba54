"""What is on disk of a run: a directory with metrics.jsonl, of the trainer or of a `JsonLines` sink."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from ..._json import parse_json
from ...grpo.rundir import RunDirectory
from .shape import CONFIG, GUARD, LINE, fitting, printable


class RunError(ValueError):
    """A directory holds no run, or a damaged one."""


@dataclass(frozen=True)
class Span:
    """A stage: its name, and the first and last step that were trained in it."""

    name: str
    first: int
    last: int


@dataclass
class RunRecord:
    """A run as recorded.

    Attributes:
        path: its directory.
        lines: The lines of metrics.jsonl, in the order of steps.
        config: config.json; None if there is none.
        guard_reports: `CapabilityGuard.report()` at the end of each stage, by stage.
        notes: what a reader should know about the files.
        missing: what the report cannot show, and what would have recorded it; its sections fill this in.
    """

    path: Path
    lines: list[dict[str, Any]]
    config: dict[str, Any] | None = None
    guard_reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | str) -> RunRecord:
        """Reads a run's directory; a RunError says which file or line is wrong, and what to do."""
        directory, notes = RunDirectory(path), list[str]()
        if not directory.metrics_path.is_file():
            raise RunError(_no_run(directory.path))
        lines = list(_metrics(directory.metrics_path, notes))
        if not lines:
            raise RunError(f"{directory.metrics_path} is empty: expected a line per step; nothing was trained yet")
        config = None
        if directory.config_path.is_file():
            config = _json(directory.config_path, CONFIG, notes)
        else:
            notes.append("config.json is missing: settings and stages that were not reached are unknown.")
        suffix = ".report.json"
        reports = {
            printable(p.name.removesuffix(suffix)): _json(p, GUARD, notes)
            for p in sorted((directory.path / "bases").glob(f"*{suffix}"))
        }
        order = {span.name: i for i, span in enumerate(_spans(lines))}
        reports = dict(sorted(reports.items(), key=lambda item: order.get(item[0], len(order))))
        return cls(directory.path, lines, config, reports, notes)

    @cached_property
    def spans(self) -> list[Span]:
        """Stages in order; none where lines name no stage."""
        return _spans(self.lines)

    @property
    def stages(self) -> list[tuple[str, float, float]]:
        """The spans as charts show them: name, and where on the axis of steps the stage begins and ends."""
        return [(s.name, float(max(s.first - 1, 0)), float(s.last)) for s in self.spans]

    @cached_property
    def domains(self) -> list[str]:
        """Names of all domains that were evaluated or rewarded, in order of configuration, else of appearance."""
        seen: dict[str, None] = dict.fromkeys((self.config or {}).get("domains", ()))
        for line in self.lines:
            for key in ("eval", "rewards"):
                seen.update(dict.fromkeys(line.get(key, ())))
        return list(seen)

    @cached_property
    def span(self) -> float | None:
        """Size of the score range; where no monitor recorded it, 1 if all scores are from 0 to 1, else None."""
        told = self.series("monitor", "span")
        if told:
            return told[0][1]
        scores = [y for name in self.domains for _, y in self.series("eval", name)]
        return 1.0 if all(0 <= y <= 1 for y in scores) else None

    def difference(self, value: float) -> str:
        """A difference of scores as text: in points, hundredths of the score range, only where the range has size 1."""
        return f"{100 * value:.1f} points" if self.span == 1 else f"{value:.3g}"

    @property
    def last_step(self) -> int:
        step: int = self.lines[-1]["step"]
        return step

    def series(self, *keys: str) -> list[tuple[int, float]]:
        """(step, number) wherever `line[keys[0]][keys[1]]...` is there."""
        return [(step, float(value)) for step, value in self.found(*keys)]

    def found(self, *keys: str) -> list[tuple[int, Any]]:
        """(step, value) wherever `line[keys[0]][keys[1]]...` is there; values have the forms of `shape.LINE`."""
        out = []
        for line in self.lines:
            value: Any = line
            for key in keys:
                value = (value or {}).get(key)
            if value is not None:
                out.append((line["step"], value))
        return out

    @cached_property
    def alerts(self) -> list[Mapping[str, Any]]:
        """Of the monitor, in order."""
        return [alert for _, alerts in self.found("monitor", "alerts") for alert in alerts]


def _spans(lines: list[dict[str, Any]]) -> list[Span]:
    spans: list[Span] = []
    staged = (line for line in lines if line.get("stage") is not None)
    for name, own in groupby(staged, key=itemgetter("stage")):
        steps = [line["step"] for line in own]
        spans.append(Span(name, steps[0], steps[-1]))
    return spans


def _metrics(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    text = path.read_text(errors="replace")
    last = -1
    lines = text.split("\n")
    unread: dict[str, int] = {}  # places, and the first line where each is not as written by this package
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = parse_json(line, lenient=True)
            step = value.get("step") if isinstance(value, dict) else None
            if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**53:
                raise ValueError('expected an object with an integer "step" of at least 0')
        except ValueError as e:
            if number == len(lines):  # no newline yet: being written, or cut short by a kill
                notes.append(
                    f"The last line of {path.name} is incomplete and was left out: the run is being written, or was killed."
                )
                break
            raise RunError(
                f"{path}, line {number}: expected a JSON object, found {line[:60]!r} ({e}); the file is damaged: restore it, or "
                "remove the line if you know that nothing else is wrong"
            ) from e
        if value["step"] <= last:
            raise RunError(
                f"{path}, line {number}: expected a step after {last}, found {value['step']}; two runs wrote to "
                "this file: give every run a directory of its own, and split the file before this line to read the two"
            )
        last = value["step"]
        fitted, faults = fitting(value, LINE)
        for place in faults:
            if "." in place:  # other loops have one number, say, where the trainer has one per domain
                unread.setdefault(place, number)
        yield fitted
    if unread:
        first = ", ".join(f"{place} (line {number})" for place, number in list(unread.items())[:5])
        notes.append(f"Left out of {path.name}, being no such number or object as this package writes: {first}.")


def _json(path: Path, shape: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    try:
        value = parse_json(path.read_bytes(), lenient=True)
        if not isinstance(value, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as e:
        raise RunError(f"{path}: expected a JSON object, found something unreadable ({e}); restore or remove it") from e
    fitted, faults = fitting(value, shape)
    if faults:
        notes.append(f"Left out of {path.name}, being none such as this package writes: {', '.join(faults[:5])}.")
    return fitted


def _no_run(path: Path) -> str:
    if not path.exists():
        return f"{path} does not exist; expected the directory of a run, with a file metrics.jsonl"
    inside = [str(p.parent) for pattern in ("*/*", "*") for p in sorted(path.glob(f"{pattern}/metrics.jsonl"))]
    more = f"; it holds {len(inside)} runs, choose one: {', '.join(inside[:4])}" if inside else ""
    return f"expected the directory of a run, with a file metrics.jsonl, found {path} without{more}"
