"""Tables, pictures and sentences out of records: what is significant and what is not."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from statistics import fmean

from .._files import write_atomically, write_bytes_atomically
from ..train.recipe import RecipeError
from .cells import Record, current
from .costs import beyond, kept
from .grid import Grid
from .stats import Estimate, estimate, holm, pareto

FRONT = "none"
"""The method whose learning rates are the front that everything has to beat."""
CANDIDATES = ("input-bounded", "recorded-every8", "shown-every8", "shown-end", "merge-confined70")
"""Methods that are compared with every other row: the guard as it came first and as it is now, from prompts
alone, on finished checkpoints, and on merged experts."""
ALPHA = 0.05


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

    def of(self, measure: str) -> Estimate:
        """Over seeds: average, forgetting, retention, new or window."""
        return estimate([getattr(r, measure) for r in self.records.values()])

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
        for (row, difference), p in zip(compared, holm([d.p for _, d in compared]), strict=True):
            rows[rows.index(row)] = Row(row.variant, row.records, difference, p)
    return sorted(rows, key=lambda r: -r.of("average").mean)


def table(grid: Grid, setting: str, rows: Sequence[Row]) -> str:
    """A Markdown table; behind every row the name of a cell to rerun."""
    front = [r for r in rows if r.method == FRONT and r.against is None]
    best = front[0].variant if front else "-"
    lines = [
        "| method@lr | keeps | beyond the plain run | seeds | average | forget | new | window | touched | "
        f"average - {best} | p (Holm) | one cell |",
        "|---" * 12 + "|",
    ]
    optimal = {rows[i].variant for i in pareto([(r.of("retention").mean, r.of("new").mean) for r in rows])}
    for row in rows:
        star = "\\*" if row.variant in optimal else ""
        touched, cell = row.mean("touched"), grid.cell(next(iter(row.records.values())).cell)
        difference = "" if row.against is None else f"{signed(row.against.mean)} ± {short(row.against.half)}"
        cells = [
            f"{row.variant}{star}",
            kept(cell),
            beyond(cell),
            str(len(row.records)),
            spread(row.of("average")),
            spread(row.of("forgetting")),
            spread(row.of("new")),
            short(row.of("window").mean),
            "" if touched is None else short(touched),
            difference,
            "" if row.corrected is None else probability(row.corrected),
            f"`{setting}/{row.variant}/{min(row.records)}`",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


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


def versus(rows: Sequence[Row], candidate: str) -> str:
    """A Markdown table: one row minus every other, paired; Holm over these comparisons."""
    own = next(r for r in rows if r.variant == candidate)
    lines = ["| minus | seeds | average | forget | new | p (average, Holm) |", "|---|---|---|---|---|---|"]
    others = [(o, d) for o in rows if o is not own and (d := paired(own, o, "average")) is not None]
    for (other, d), p in zip(others, holm([d.p for _, d in others]), strict=True):
        forget, new = (paired(own, other, m) for m in ("forgetting", "new"))
        assert forget is not None and new is not None
        cells = [other.variant, str(d.n), *(f"{signed(e.mean)} ± {short(e.half)}" for e in (d, forget, new))]
        lines.append("| " + " | ".join([*cells, probability(p)]) + " |")
    return "\n".join(lines)


def guard_table(rows: Sequence[Row]) -> str:
    """A Markdown table of what the guards did; empty without guards."""
    lines = [
        "| guard | touched | time | displacement | explained at first | at the end | by random directions |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        records = row.records.values()
        if row.mean("touched") is None:
            continue
        last = [stage for r in records for stage in list(r.displacement.values())[-1:]]
        moved = [v for stage in last for v in stage.values() if v is not None]
        looks = [look for r in records for look in r.validity.values() if len(look) == 3]
        values = [row.mean("touched"), row.mean("guard_share"), fmean(moved) if moved else None]
        values += [fmean(look[i] for look in looks) if looks else None for i in range(3)]
        lines.append("| " + " | ".join([row.variant, *("" if v is None else short(v) for v in values)]) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def write_report(grid: Grid, records: Sequence[Record], out: Path) -> str:
    """report.md, cells.csv and a picture per setting, beside the raw lines; returns the report's text.

    Records of cells that the grid defines otherwise by now, or not at all, are named and left out.

    Raises:
        RecipeError: None is left; nothing was written.
    """
    from .measures import measures_table
    from .pooled import pooled_table

    records, left = current(grid, records)
    if not records:
        raise RecipeError(f"expected records of cells as the grid defines them, found none. {left_out(left)}".rstrip())
    parts = ["# Replication study", "", LEGEND, ""]
    parts += [left_out(left), ""] if left else []
    for setting in dict.fromkeys(r.setting for r in records):
        rows = rows_of(records, setting)
        chosen = rows_of(records, setting, confirming=False)
        parts += [f"## {setting}: {grid.settings[setting].text}", ""]
        pooled = any(r.pooled for r in records if r.setting == setting)
        if rows and pooled:
            parts += [pooled_table(setting, rows), "", *verdicts(rows), ""]
        elif rows:
            parts += [table(grid, setting, rows), "", *verdicts(rows), ""]
            parts += [measures_table(rows), ""] if measures_table(rows) else []
            for row in rows if len(rows) > 1 and not pooled else []:
                if row.method in CANDIDATES and len(row.records) > 1:
                    parts += [
                        f"{row.variant} minus each other row:",
                        "",
                        versus(rows, row.variant),
                        "",
                    ]
            parts += [guard_table(rows), ""] if guard_table(rows) else []
        if chosen:
            parts += [
                f"Seeds used for choosing (no part of the verdicts), {setting}:",
                "",
                pooled_table(setting, chosen) if pooled else table(grid, setting, chosen),
                "",
            ]
        try:
            plot(out / f"{setting}.png", setting, rows or chosen, PLOTTED_POOLED if pooled else PLOTTED)
        except ImportError as e:
            parts += [f"No picture: {e}", ""]
    text = "\n".join(parts)
    write_bytes_atomically(out / "report.md", (text + "\n").encode())
    write_bytes_atomically(out / "cells.csv", as_csv(records).encode())
    return text


def left_out(records: Iterable[Record]) -> str:
    """A sentence that names them by row; empty without any."""
    seeds: dict[str, list[str]] = {}
    for record in records:
        row, _, seed = record.cell.rpartition("/")
        seeds.setdefault(row, []).append(seed)
    if not seeds:
        return ""
    rows = "; ".join(f"{row} (seed{'s' * (len(s) > 1)} {', '.join(s)})" for row, s in seeds.items())
    return f"Left out, for the grid defines these cells otherwise by now or not at all: {rows}."


LEGEND = (
    "Accuracy: exact probability of the right answer at temperature 1 on held-out examples; in the settings sft it is"
    " minus nats a token. average: over all domains at the end. forget: drop since the end of a domain's own stage, "
    "over the domains that the last stage did not bring. new: accuracy at the end of a domain's own stage, over the "
    "domains after the first stage. window: drop from the start until right before a domain's own stage, while no "
    "history protects it, over the same domains. touched: energy of the guard's corrections over energy of all "
    "updates it saw. keeps: what is kept of earlier domains' data. beyond the plain run: sequences that a whole run "
    "takes besides those that the plain run trains on, relative to these, and what it stores besides data. ±: half of"
    " the 95 % interval over seeds (Student's t; differences are paired). p: of the difference to the best plain "
    "learning rate, Holm over the table. \\*: not dominated in retention and new learning. One cell: `carerl replicate"
    " --cell NAME`. Tables of guards: time, its share of training time; displacement along earlier domains' "
    "directions over the last stage, relative to the recorded stages' own; share of fresh gradients of earlier "
    "domains that their directions explain as the next stage begins and at the end. Pooled settings: lowest - start, "
    "the domain that fell most, at its lowest evaluation, against before; worst domain - alone, the domain that ends "
    "furthest below where it ends by itself on as many samples."
)


def as_csv(records: Iterable[Record]) -> str:
    """One line per cell."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    measures = ("average", "forgetting", "retention", "new", "window", "dip")
    writer.writerow(["cell", "key", *measures, "touched", "guard_share", "seconds"])
    for r in records:
        numbers = ["" if isnan(value := getattr(r, m)) else f"{value:.4f}" for m in measures]
        writer.writerow([r.cell, r.key, *numbers, r.touched, r.guard_share, r.seconds])
    return buffer.getvalue()


PLOTTED = (("new", "new domains, right after their stage"), ("retention", "earlier domains at the end"))
PLOTTED_POOLED = (
    ("average", "all domains at the end"),
    ("dip", "the domain that fell most, at its lowest, minus start"),
)
Axis = tuple[str, str]


def plot(path: Path, title: str, rows: Sequence[Row], axes_of: tuple[Axis, Axis] = PLOTTED) -> None:
    """One measure against another, a point per row, the learning rates of the front joined.

    Args:
        path, title: Of the picture.
        rows: Of the table.
        axes_of: A measure of `Record` and what the axis is called, for x and y: retention against new learning.

    Raises:
        ImportError: matplotlib is missing.
    """
    from ..grpo.plots import new_figure

    figure = new_figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    front = sorted((r for r in rows if r.method == FRONT), key=lambda r: float(r.variant.partition("@")[2]))
    points = {row.variant: tuple(row.of(measure).mean for measure, _ in axes_of) for row in rows}
    axes.plot(*zip(*(points[r.variant] for r in front), strict=True) if front else ([], []), "k.--", label="plain")
    for row in rows:
        x, y = points[row.variant]
        if row.method != FRONT:
            axes.plot([x], [y], "o", markersize=4)
        axes.annotate(row.variant, (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
    axes.set_xlabel(axes_of[0][1])
    axes.set_ylabel(axes_of[1][1])
    axes.set_title(title)
    axes.legend()
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


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
