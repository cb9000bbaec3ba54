"""Tables, pictures and sentences out of records: what is significant and what is not."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from contextlib import suppress
from math import isnan
from pathlib import Path

from .._files import write_bytes_atomically
from ..train.recipe import RecipeError
from .cells import Record, current
from .grid import Grid
from .pictures import HEADLINES, POOLED, SEQUENCE, draw_headline, draw_setting
from .tables import guard_table, measures_table, pooled_table, rows_of, table, verdicts, versus

CANDIDATES = ("input-bounded", "recorded-every8", "shown-every8", "shown-end", "merge-confined70")
"""Methods that are compared with every other row: the guard as it came first and as it is now, from prompts
alone, on finished checkpoints, and on merged experts."""


def write_report(grid: Grid, records: Sequence[Record], out: Path) -> str:
    """report.md, cells.csv and a picture per setting, beside the raw lines; returns the report's text.

    Records of cells that the grid defines otherwise by now, or not at all, are named and left out.

    Raises:
        RecipeError: None is left; nothing was written.
    """
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
        if rows:
            own = pooled_table(setting, rows) if pooled else table(grid, setting, rows)
            parts += [own, "", *verdicts(rows), ""]
        if rows and not pooled:
            parts += [measures_table(rows), ""] if measures_table(rows) else []
            for row in rows if len(rows) > 1 else []:
                if row.method in CANDIDATES and len(row.records) > 1:
                    parts += [f"{row.variant} minus each other row:", "", versus(rows, row.variant), ""]
            parts += [guard_table(rows), ""] if guard_table(rows) else []
        if chosen:
            own = pooled_table(setting, chosen) if pooled else table(grid, setting, chosen)
            parts += [f"Seeds used for choosing (no part of the verdicts), {setting}:", "", own, ""]
        try:
            draw_setting(out / f"{setting}.png", setting, rows or chosen, POOLED if pooled else SEQUENCE)
        except ImportError as e:
            parts += [f"No picture: {e}", ""]
    with suppress(ImportError):  # was said above
        for headline in HEADLINES:
            draw_headline(headline, records, out)
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
    "Accuracy: exact probability of the right answer at temperature 1 on held-out examples; in the settings sft it is minus"
    " nats a token. average: over all domains at the end. forget: drop since the end of a domain's own stage, over the "
    "domains that the last stage did not bring. new: accuracy at the end of a domain's own stage, over the domains after "
    "the first stage. window: drop from the start until right before a domain's own stage, while no history protects it, "
    "over the same domains. touched: energy of the guard's corrections over energy of all updates it saw. keeps: what is "
    "kept of earlier domains' data. beyond the plain run: sequences that a whole run takes besides those that the plain run"
    " trains on, relative to these, and what else it stores. ±: half of the 95 % interval over seeds (Student's t; "
    "differences are paired). p: of the difference to the best plain learning rate, Holm over the table. \\*: not dominated "
    "in retention and new learning. One cell: `carerl replicate --cell NAME`. Tables of guards: time, its share of training"
    " time; displacement along earlier domains' directions over the last stage, relative to the recorded stages' own; share"
    " of fresh gradients of earlier domains that their directions explain as the next stage begins and at the end. Pooled "
    "settings: lowest - start, the domain that fell most, at its lowest evaluation, against before; worst domain - alone, "
    "the domain that ends furthest below where it ends by itself on as many samples. At equal new: beside the front of "
    "plain learning rates, or of interpolated checkpoints, where that learns as much, on so many seeds; of it: the share of"
    " what the front loses."
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
