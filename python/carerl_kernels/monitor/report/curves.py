"""Curves of a run's record, one for each domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .chart import Chart, Line, Points, line_chart, smooth
from .record import RunRecord

SHARE: dict[str, Any] = {"y_range": (0.0, 1.0), "percent": True}


def curves(
    record: RunRecord,
    title: str,
    of: str | Mapping[str, Points],
    caption: str = "",
    names: Sequence[str] | None = None,
    *,
    smoothed: bool = False,
    **look: Any,
) -> list[Chart]:
    """A chart with a line per name; none where nothing of it was recorded.

    Args:
        record: What is known of the run.
        title, caption: Those of the figure.
        of: Where the figures are in a line of the metrics, "*" standing for the name ("monitor.budget.step.*"); or the
            points of every name.
        names: The lines' names; the domains by default.
        smoothed: A moving average over a thirtieth of the run.
        look: Further arguments of `line_chart`.
    """
    window = moving(record) if smoothed else 1
    lines = []
    for i, name in enumerate(record.domains if names is None else names):
        if isinstance(of, str):
            points: Points = record.series(*(name if key == "*" else key for key in of.split(".")))
        else:
            points = of.get(name, [])
        lines.append(Line(name, smooth(points, window), i))
    if not any(line.points for line in lines):
        return []
    return [line_chart(title, lines, stages=record.stages, caption=caption, **look)]


def moving(record: RunRecord) -> int:
    """Steps of the moving average."""
    return max(1, len(record.lines) // 30)
