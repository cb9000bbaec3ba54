"""Pictures out of records: one for each setting's table, and the two that docs/evidence.md opens with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._files import write_atomically
from ..grpo.plots import new_figure
from .cells import Record
from .tables import FRONT, Row, rows_of

Axis = tuple[str, str]
"""A measure of `Record`, and what the axis is called."""
SEQUENCE: tuple[Axis, Axis] = (
    ("new", "new domains, right after their stage"),
    ("retention", "earlier domains at the end"),
)
POOLED: tuple[Axis, Axis] = (
    ("average", "all domains at the end"),
    ("dip", "the domain that fell most, at its lowest, minus start"),
)


def draw_setting(path: Path, title: str, rows: Sequence[Row], axes_of: tuple[Axis, Axis]) -> None:
    """One measure against another, a point per row, the learning rates of the front joined.

    Args:
        path, title: Of the picture.
        rows: Of the table.
        axes_of: x and y.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = new_figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    points = {row.variant: tuple(row.of(measure).mean for measure, _ in axes_of) for row in rows}
    _draw_front(axes, [points[row.variant] for row in _front(rows)], "plain")
    for row in rows:
        x, y = points[row.variant]
        if row.method != FRONT:
            axes.plot([x], [y], "o", markersize=4)
        axes.annotate(row.variant, (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
    axes.legend()
    _save(figure, axes, path, title, axes_of[0][1], axes_of[1][1])


@dataclass(frozen=True)
class Headline:
    """A picture for readers: a few rows of one table under names that need no table, with the 95 % intervals of both axes.

    Attributes:
        name: Of the file, without its ending.
        setting: Whose rows.
        title: Above the picture.
        x, y: The axes; `-` before a measure turns it round.
        shown: Names by variant (METHOD@LR). What has no record is left out.
    """

    name: str
    setting: str
    title: str
    x: Axis
    y: Axis
    shown: Mapping[str, str]


HEADLINES = (
    Headline(
        "headline-retention",
        "lm",
        "Three domains in sequence: what is kept against what is learned (5 seeds)",
        ("new", "accuracy in a new domain, right after its stage"),
        ("retention", "accuracy in earlier domains, at the end"),
        {
            "shown-every8@1": "guard, from prompts alone",
            "rehearsal@0.5": "rehearsal of 32 stored answers a domain",
            "ewc100@1": "elastic weight consolidation",
            "cpo03@1": "L1 penalty on movement",
            "refresh@0.5": "refresh of earlier domains at the end",
            "distill@1": "distillation of experts",
            "interpolate@1": "half way back after each stage",
            "dacsp-delta@0.5": "pairs of stage changes, x1.2 and x.2",
        },
    ),
    Headline(
        "headline-text",
        "sft",
        "SmolLM2-135M, supervised on one task: general text against the task (3 seeds)",
        ("new", "log-probability of the task's answers, nats a token"),
        ("-forgetting", "general text: change of log-probability, nats a token"),
        {
            "shown-every8@1": "guard every 8th step",
            "shown-end@1": "guard on the finished checkpoint",
            "interpolate75@1": "a quarter of the way back",
            "interpolate@1": "half way back",
            "interpolate25@1": "three quarters of the way back",
            "shown-random-end@1": "as many random directions (2 seeds)",
        },
    ),
)


def draw_headline(headline: Headline, records: Iterable[Record], folder: Path) -> bool:
    """Draws it if records of its setting are there, and says whether they were.

    Raises:
        ImportError: matplotlib is missing.
    """
    rows = {row.variant: row for row in rows_of(records, headline.setting)}
    shown = [(rows[variant], name) for variant, name in headline.shown.items() if variant in rows]
    if not shown:
        return False
    figure = new_figure(figsize=(7.2, 5.2), layout="constrained")
    axes = figure.add_subplot()
    front = _front(rows.values())
    points = [(_along(row, headline.x[0])[0], _along(row, headline.y[0])[0]) for row in front]
    _draw_front(axes, points, "plain training, by learning rate")
    for row, point in zip(front, points, strict=True):
        axes.annotate(f"x{row.rate:g}", point, fontsize=7, xytext=(4, -9), textcoords="offset points")
    for row, name in shown:
        (x, across), (y, up) = (_along(row, measure) for measure, _ in (headline.x, headline.y))
        axes.errorbar([x], [y], [up], [across], "o", markersize=5, elinewidth=0.8, capsize=2, label=name)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    _save(figure, axes, folder / f"{headline.name}.png", headline.title, headline.x[1], headline.y[1])
    return True


def _along(row: Row, measure: str) -> tuple[float, float]:
    """Mean of a measure and half of its interval; 0 for a single seed, of which there is none."""
    found = row.of(measure.removeprefix("-"))
    return -found.mean if measure.startswith("-") else found.mean, found.half if found.n > 1 else 0.0


def _front(rows: Iterable[Row]) -> list[Row]:
    return sorted((row for row in rows if row.method == FRONT), key=lambda row: row.rate)


def _draw_front(axes: Any, points: Sequence[Sequence[float]], label: str) -> None:
    if points:
        axes.plot(*zip(*points, strict=True), "k.--", label=label)


def _save(figure: Any, axes: Any, path: Path, title: str, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=10)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
