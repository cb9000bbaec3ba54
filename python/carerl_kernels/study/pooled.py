"""The table of settings that are one mixed stage: where every domain ends, how deep it fell, and what it would be alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .stats import estimate

if TYPE_CHECKING:
    from .cells import Record
    from .report import Row

ALONE = "alone"
"""The method that trains every domain by itself with the samples it has in the pooled run."""


def pooled_table(setting: str, rows: Sequence[Row]) -> str:
    """A Markdown table; rows best average first, compared with the best plain learning rate.

    Args:
        setting: Its name.
        rows: As `report.rows_of` gives them.
    """
    from .report import FRONT, probability, short, signed, spread

    first = next(iter(rows[0].records.values()))
    alone = {seed: record for row in rows if row.method == ALONE for seed, record in row.records.items()}
    best = next((row.variant for row in rows if row.method == FRONT and row.against is None), "-")
    start = _means([record.scores[0] for record in rows[0].records.values()])
    lines = [
        f"| method@lr | seeds | average | {' | '.join(first.domains)} | lowest - start | worst domain - alone | "
        f"average - {best} | p (Holm) | guard's time | one cell |",
        "|---" * (9 + len(first.domains)) + "|",
        f"| before | {len(rows[0].records)} | | {' | '.join(short(v) for v in start)} | | | | | | |",
    ]
    for row in rows:
        records = row.records.values()
        apart = [worst(record, alone[seed]) for seed, record in row.records.items() if seed in alone]
        share = row.mean("guard_share")
        cells = [
            row.variant,
            str(len(records)),
            spread(row.of("average")),
            *(short(v) for v in _means([r.scores[-1] for r in records])),
            spread(row.of("dip")),
            spread(estimate(apart)) if apart and row.method != ALONE else "",
            "" if row.against is None else f"{signed(row.against.mean)} ± {short(row.against.half)}",
            "" if row.corrected is None else probability(row.corrected),
            "" if share is None else short(share),
            f"`{setting}/{row.variant}/{min(row.records)}`",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def worst(record: Record, alone: Record) -> float:
    """The domain that ends furthest below, or least above, where it ends alone."""
    return min(own - single for own, single in zip(record.scores[-1], alone.scores[-1], strict=True))


def _means(scores: Sequence[Sequence[float]]) -> list[float]:
    return [estimate(values).mean for values in zip(*scores, strict=True)]
