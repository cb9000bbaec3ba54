"""What a front of plain learning rates loses at equal new learning, and tables of settings that measure more than one thing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

from .report import FRONT, Row, short, signed
from .stats import Estimate, estimate


def rates(rows: Sequence[Row]) -> list[Row]:
    """The front of plain learning rates."""
    return [row for row in rows if row.method == FRONT]


def interpolated(rows: Sequence[Row]) -> list[Row]:
    """The front of points between the start and the plain end of a stage."""
    return [row for row in rows if row.variant == f"{FRONT}@1" or row.method.startswith("interpolate")]


def at_equal_new(row: Row, front: Sequence[Row]) -> Estimate | None:
    """What a row forgets more than a front does where that learns new domains as well, paired by seed.

    Between two of its points the front is a straight line; a row that learns better than the best of them is compared with
    that one, a choice in the front's favour. Seeds on which it learns worse than all of them are left out.

    Returns:
        The difference; None with fewer than two seeds that can be compared, or where the row is part of the front.
    """
    gaps: list[float] = []
    if any(row.variant == other.variant for other in front):
        return None
    for seed, record in row.records.items():
        points = sorted((r.records[seed].new, r.records[seed].forgetting) for r in front if seed in r.records)
        if len(points) < 2 or record.new < points[0][0]:
            continue
        plain = points[-1][1]
        for (x0, y0), (x1, y1) in pairwise(points):
            if x0 <= record.new <= x1 and x1 > x0:
                plain = y0 + (y1 - y0) * (record.new - x0) / (x1 - x0)
        gaps.append(record.forgetting - plain)
    return estimate(gaps) if len(gaps) > 1 else None


def measures_table(rows: Sequence[Row]) -> str:
    """A Markdown table of everything that was measured at the end, below a line of the start; empty without further measures."""
    if not any(record.extras for row in rows for record in row.records.values()):
        return ""
    first = next(iter(rows[0].records.values()))
    names = [*first.domains, *first.extras]
    fronts = rates(rows), interpolated(rows)
    lines = [
        "| method@lr | seeds | "
        + " | ".join(names)
        + " | guard's time | forget - plain at equal new | - interpolated |",
        "|---" * (len(names) + 5) + "|",
        "| before |  | "
        + " | ".join(short(v) for v in (*first.scores[0], *(v[0] for v in first.extras.values())))
        + " |  |  |  |",
    ]
    for row in rows:
        records = row.records.values()
        ends = [[*r.scores[-1], *(v[-1] for v in r.extras.values())] for r in records]
        gaps = [at_equal_new(row, front) for front in fronts]
        share = row.mean("guard_share")
        cells = [
            row.variant,
            str(len(row.records)),
            *(short(fmean(values)) for values in zip(*ends, strict=True)),
            "" if share is None else short(share),
            *("" if gap is None else f"{signed(gap.mean)} ± {short(gap.half)} ({gap.n})" for gap in gaps),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
