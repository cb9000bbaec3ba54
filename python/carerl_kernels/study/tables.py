"""Rows of the study's tables, and the tables: one for settings in sequence, one for pooled ones, and what else was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from .cells import Record
from .costs import beyond, memory
from .grid import Grid
from .stats import Estimate, estimate, holm, pareto

FRONT = "none"
"""The method whose learning rates are the front that everything has to beat."""
ALPHA = 0.05
ALONE = "alone"
"""The method that trains every domain by itself with the samples it has in the pooled run."""


@dataclass(frozen=True)
class Row:
    """One method at one learning rate over the seeds of a setting.

    Attributes:
        variant: METHOD@LR.
        records: By seed.
        against: Paired difference of averages to the best learning rate of the front, and p after Holm over the table.
    """

    variant: str
    records: dict[int, Record]
    against: Estimate | None = None
    corrected: float | None = None

    @property
    def method(self) -> str:
        return self.variant.partition("@")[0]

    @property
    def rate(self) -> float:
        """The learning rate, as a multiple of the setting's."""
        return float(self.variant.partition("@")[2])

    def of(self, measure: str) -> Estimate:
        """Over seeds: average, forgetting, retention, new or window."""
        return estimate([getattr(r, measure) for r in self.records.values()])

    def compared(self, setting: str) -> list[str]:
        """The last cells of a line: difference, p, and the name of a cell to rerun."""
        gap = "" if self.against is None else difference(self.against)
        p = "" if self.corrected is None else probability(self.corrected)
        return [gap, p, f"`{setting}/{self.variant}/{min(self.records)}`"]

    def mean(self, field: str) -> float | None:
        """Of touched or guard_share, where recorded."""
        values = [v for r in self.records.values() if (v := getattr(r, field)) is not None]
        return fmean(values) if values else None


def paired(row: Row, other: Row, measure: str) -> Estimate | None:
    """Difference over the seeds that both have; None with fewer than two."""
    seeds = sorted(row.records.keys() & other.records.keys())
    if len(seeds) < 2:
        return None
    return estimate([getattr(row.records[s], measure) - getattr(other.records[s], measure) for s in seeds])


def rows_of(records: Iterable[Record], setting: str, confirming: bool = True) -> list[Row]:
    """Rows of a setting's table, best average first, compared with the best learning rate of the front.

    Args:
        records: Of any settings.
        setting: Which.
        confirming: Seeds that nothing was chosen on, or those that were used for choosing.
    """
    groups: dict[str, dict[int, Record]] = {}
    for record in records:
        if record.setting == setting and record.confirms == confirming:
            groups.setdefault(record.variant, {})[record.seed] = record
    rows = [Row(variant, by_seed) for variant, by_seed in groups.items()]
    front = [r for r in rows if r.method == FRONT]
    if front:
        best = max(front, key=lambda r: (len(r.records), r.of("average").mean))
        compared = [(r, d) for r in rows if r is not best and (d := paired(r, best, "average")) is not None]
        for (row, gap), p in zip(compared, holm([d.p for _, d in compared]), strict=True):
            rows[rows.index(row)] = Row(row.variant, row.records, gap, p)
    return sorted(rows, key=lambda r: -r.of("average").mean)


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Who is better, who is worse than the best learning rate after correction, and what cannot be told."""
    compared = [r for r in rows if r.against is not None and r.method != FRONT]
    if not compared:
        return ["Nothing to compare: too few seeds, or no plain learning rate."]

    def names(chosen: Iterable[Row]) -> str:
        return ", ".join(r.variant for r in chosen) or "none"

    def significant(row: Row) -> bool:
        return row.corrected is not None and row.corrected < ALPHA

    better = [r for r in compared if significant(r) and r.against and r.against.mean > 0]
    worse = [r for r in compared if significant(r) and r.against and r.against.mean < 0]
    rest = [r for r in compared if not significant(r)]
    return [
        f"Better average than the best plain learning rate (p < .05 after Holm): {names(better)}.",
        f"Worse: {names(worse)}.",
        f"Not told apart: {names(rest)}.",
    ]


def table(grid: Grid, setting: str, rows: Sequence[Row]) -> str:
    """A Markdown table; behind every row the name of a cell to rerun."""
    header = ["method@lr", "keeps", "beyond the plain run", "seeds", "average", "forget", "new", "window", "touched"]
    lines: list[list[str]] = []
    optimal = {rows[i].variant for i in pareto([(r.of("retention").mean, r.of("new").mean) for r in rows])}
    for row in rows:
        star = "\\*" if row.variant in optimal else ""
        cell = grid.cell(next(iter(row.records.values())).cell)
        gained = map(spread, map(row.of, ("average", "forgetting", "new")))
        measured = [*gained, short(row.of("window").mean), perhaps(row.mean("touched"))]
        told = [f"{row.variant}{star}", memory(cell), beyond(cell), str(len(row.records))]
        lines.append([*told, *measured, *row.compared(setting)])
    return markdown([*header, f"average - {best_of(rows)}", "p (Holm)", "one cell"], lines)


def versus(rows: Sequence[Row], candidate: str) -> str:
    """A Markdown table: one row minus every other, paired; Holm over these comparisons."""
    own = next(r for r in rows if r.variant == candidate)
    lines = []
    others = [(o, d) for o in rows if o is not own and (d := paired(own, o, "average")) is not None]
    for (other, d), p in zip(others, holm([d.p for _, d in others]), strict=True):
        forget, new = (paired(own, other, m) for m in ("forgetting", "new"))
        assert forget is not None and new is not None
        lines.append([other.variant, str(d.n), *map(difference, (d, forget, new)), probability(p)])
    return markdown(("minus", "seeds", "average", "forget", "new", "p (average, Holm)"), lines)


def guard_table(rows: Sequence[Row]) -> str:
    """A Markdown table of what the guards did; empty without guards."""
    header = ("guard", "touched", "time", "displacement", "explained at first", "at the end", "by random directions")
    lines: list[list[str]] = []
    for row in rows:
        records = row.records.values()
        if row.mean("touched") is None:
            continue
        last = [stage for r in records for stage in list(r.displacement.values())[-1:]]
        moved = [v for stage in last for v in stage.values() if v is not None]
        looks = [look for r in records for look in r.validity.values() if len(look) == 3]
        values = [row.mean("touched"), row.mean("guard_share"), fmean(moved) if moved else None]
        values += [fmean(look[i] for look in looks) if looks else None for i in range(3)]
        lines.append([row.variant, *map(perhaps, values)])
    return markdown(header, lines) if lines else ""


def pooled_table(setting: str, rows: Sequence[Row]) -> str:
    """A Markdown table of one mixed stage: where every domain ends, how deep it fell, and what it would be alone."""
    domains = next(iter(rows[0].records.values())).domains
    alone = {seed: record for row in rows if row.method == ALONE for seed, record in row.records.items()}
    start = means([record.scores[0] for record in rows[0].records.values()])
    header = ["method@lr", "seeds", "average", *domains, "lowest - start", "worst domain - alone"]
    lines: list[Sequence[str]] = []
    for row in rows:
        apart = [worst(record, alone[seed]) for seed, record in row.records.items() if seed in alone]
        gap, p, cell = row.compared(setting)
        lines.append(
            [
                row.variant,
                str(len(row.records)),
                spread(row.of("average")),
                *map(short, means([r.scores[-1] for r in row.records.values()])),
                spread(row.of("dip")),
                spread(estimate(apart)) if apart and row.method != ALONE else "",
                gap,
                p,
                perhaps(row.mean("guard_share")),
                cell,
            ]
        )
    text = markdown([*header, f"average - {best_of(rows)}", "p (Holm)", "guard's time", "one cell"], lines).split("\n")
    before = f"| before | {len(rows[0].records)} | | {' | '.join(map(short, start))} | | | | | | |"
    return "\n".join([*text[:2], before, *text[2:]])


def worst(record: Record, alone: Record) -> float:
    """The domain that ends furthest below, or least above, where it ends alone."""
    return min(own - single for own, single in zip(record.scores[-1], alone.scores[-1], strict=True))


def means(scores: Sequence[Sequence[float]]) -> list[float]:
    return [fmean(values) for values in zip(*scores, strict=True)]


def best_of(rows: Sequence[Row]) -> str:
    """The best learning rate of the front."""
    return next((row.variant for row in rows if row.method == FRONT and row.against is None), "-")


def measures_table(rows: Sequence[Row]) -> str:
    """A Markdown table of everything that was measured at the end, below a line of the start; empty without further measures."""
    measured = [(row, found) for row in rows if (found := [r for r in row.records.values() if r.extras])]
    if not measured:
        return ""
    first = measured[0][1][0]
    names, fronts = [*first.domains, *first.extras], ([row for row in rows if row.method == FRONT], interpolated(rows))
    compared = ["forget - plain at equal new", "of it", "- interpolated", "of it"]
    header = ["method@lr", "seeds", *names, "guard's time", *compared]
    start = [*first.scores[0], *(values[0] for values in first.extras.values())]
    lines = [["before", "", *map(short, start), *[""] * (1 + len(compared))]]
    for row, found in measured:
        ends = [[*r.scores[-1], *(v[-1] for v in r.extras.values())] for r in found]
        lines.append(
            [
                row.variant,
                str(len(found)),
                *map(short, means(ends)),
                perhaps(row.mean("guard_share")),
                *(cell for front in fronts for cell in beside(at_equal_new(row, front))),
            ]
        )
    return markdown(header, lines)


def interpolated(rows: Sequence[Row]) -> list[Row]:
    """The front of points between the start and the plain end of a stage."""
    return [row for row in rows if row.variant == f"{FRONT}@1" or row.method.startswith("interpolate")]


def at_equal_new(row: Row, front: Sequence[Row]) -> list[tuple[float, float]]:
    """What a row forgets, and what a front does where that learns new domains as well, by seed.

    Between two of its points the front is a straight line; a row that learns better than the best of them is compared with
    that one, a choice in the front's favour. Seeds on which it learns worse than all of them are left out.

    Returns:
        Nothing where the row is part of the front.
    """
    pairs: list[tuple[float, float]] = []
    if any(row.variant == other.variant for other in front):
        return pairs
    for seed, record in row.records.items():
        points = sorted((r.records[seed].new, r.records[seed].forgetting) for r in front if seed in r.records)
        if len(points) < 2 or record.new < points[0][0]:
            continue
        plain = points[-1][1]
        for (x0, y0), (x1, y1) in pairwise(points):
            if x0 <= record.new <= x1 and x1 > x0:
                plain = y0 + (y1 - y0) * (record.new - x0) / (x1 - x0)
        pairs.append((record.forgetting, plain))
    return pairs


def beside(pairs: Sequence[tuple[float, float]]) -> tuple[str, str]:
    """The difference with its number of seeds, and the share of the front's loss; empty with fewer than two seeds."""
    if len(pairs) < 2:
        return "", ""
    gap = estimate([own - plain for own, plain in pairs])
    lost, plain = map(sum, zip(*pairs, strict=True))
    return f"{difference(gap)} ({gap.n})", f"{lost / plain:.0%}" if plain > 0 else ""


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; an empty cell is a space wide."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def difference(value: Estimate) -> str:
    return f"{signed(value.mean)} ± {short(value.half)}"


def perhaps(value: float | None) -> str:
    return "" if value is None else short(value)


def short(value: float) -> str:
    """Three digits without the leading zero; "?" where a single seed says nothing."""
    if value == float("inf"):
        return "?"
    text = f"{value:.3f}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def probability(p: float) -> str:
    return "<.001" if p < 0.001 else short(p)


def signed(value: float) -> str:
    return ("+" if value >= 0 else "") + short(value)


def spread(value: Estimate) -> str:
    """Mean and half interval."""
    return short(value.mean) if value.n < 2 else f"{short(value.mean)} ± {short(value.half)}"
