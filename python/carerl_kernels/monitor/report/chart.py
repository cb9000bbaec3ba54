"""Line charts as inline SVG whose colours come from the page, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from markupsafe import Markup

WIDTH, HEIGHT = 340, 210
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 20, 36
COLOURS = 6  # classes c0 .. c5 of the page
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 2")
ROWS = 60  # of a chart's table of numbers
POINTS = 240  # of a line; longer ones are averaged in buckets

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One line.

    Attributes:
        colour: number of the page's colour and of the dash pattern.
        marks: draw the points.
        band: (x, low, high), shaded.
    """

    name: str
    points: Points
    colour: int = 0
    marks: bool = False
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Chart:
    """A chart with what stands around it.

    Attributes:
        legend: (name, colour, dashes) of each line that needs one.
        rows, head: the numbers as a table; empty where there is none.
    """

    title: str
    svg: Markup
    caption: str = ""
    legend: list[tuple[str, int, str]] = field(default_factory=list)
    head: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Matrix:
    """Numbers in rows and columns, shown as a table with coloured cells.

    Attributes:
        corner: What rows and columns are.
        columns, rows: The names of columns; of rows also the values, None where nothing was measured.
        full: The magnitude that gets the full colour.
        bad_above: numbers above 0 get the colour of harm, as losses do, instead of those below.
    """

    title: str
    caption: str
    corner: str
    columns: list[str]
    rows: list[tuple[str, list[float | None]]]
    full: float = 1.0
    style: str = "{:+.2f}"
    bad_above: bool = False

    def cell(self, value: float | None) -> tuple[str, str, int]:
        """Text, class and strength in percent of a cell's colour."""
        if value is None:
            return "–", "none", 0
        strength = math.sqrt(min(1.0, abs(value) / self.full))  # so that small ones are seen, too
        text = self.style.format(value)
        if not text.strip("-+0.%"):  # no negative zero
            text = text.replace("-", "+" if "+" in self.style else "")
        return text, "plus" if (value >= 0) != self.bad_above else "minus", round(70 * strength)


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    y_label: str = "",
    stages: Sequence[tuple[str, float, float]] = (),
    own: Sequence[str] = (),
    alerts: Sequence[tuple[float, str]] = (),
    level: tuple[float, str] | None = None,
    y_range: tuple[float, float] | None = None,
    percent: bool = False,
    caption: str = "",
) -> Chart:
    """Draws lines over steps.

    Args:
        lines: what to draw; at least one with points.
        y_label: What the y axis shows; the x axis shows steps.
        stages: (name, first, last) shown along the top.
        own: names of stages to be shaded.
        alerts: (x, text) marked by vertical lines.
        level: (y, name) of a horizontal line.
        y_range: limits that the axis must at least include.
        percent: label the y axis in percent.
    """
    drawn = [Line(n.name, thin(n.points), n.colour, n.marks, n.band) for n in lines if n.points]
    xs = [x for n in drawn for x, _ in n.points] + [x for _, a, b in stages for x in (a, b)]
    ys = [y for n in drawn for _, y in n.points] + [v for n in drawn for _, a, b in n.band for v in (a, b)]
    ys += list(y_range or ()) + ([level[0]] if level else [])
    x_ticks, y_ticks = ticks(min(xs), max(xs), 5), ticks(min(ys), max(ys), 5)
    x0, x1 = min(xs), max(max(xs), min(xs) + 1e-9)
    y0, y1 = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            round(LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM), 1),
        )

    bottom, top = HEIGHT - BOTTOM, TOP
    out = []
    for name, first, last in stages:
        a, b = at(first, y0)[0], at(last, y0)[0]
        if name in own:
            out.append(f'<rect class="own" x="{a}" y="{top}" width="{round(b - a, 1)}" height="{bottom - top}"/>')
        elif a > LEFT:
            out.append(f'<line class="stage" x1="{a}" x2="{a}" y1="{top}" y2="{bottom}"/>')
        shown = _fit(name, b - a)
        if shown:
            out.append(f'<text class="stage-name" x="{round((a + b) / 2, 1)}" y="{top - 7}">{escape(shown)}</text>')
    for y in y_ticks:
        _, py = at(x0, y)
        label = f"{100 * y:g} %" if percent else f"{round(y, 10):g}"
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py}" y2="{py}"/>')
        out.append(f'<text class="tick y" x="{LEFT - 6}" y="{round(py + 3.5, 1)}">{label}</text>')
    for x in x_ticks:
        px, _ = at(x, y0)
        if x0 <= x <= x1:
            out.append(f'<text class="tick x" x="{px}" y="{bottom + 15}">{round(x, 10):g}</text>')
    out.append(f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2:g}" y="{HEIGHT - 5}">step</text>')
    if y_label:
        middle = (top + bottom) / 2
        turned = f'transform="rotate(-90 11 {middle:g})" x="11" y="{middle:g}"'
        out.append(f'<text class="label" {turned}>{escape(y_label)}</text>')
    if level is not None:
        _, py = at(x0, level[0])
        out.append(
            f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py}" y2="{py}"><title>{escape(level[1])}</title></line>'
        )
    for n in drawn:
        colour = n.colour % COLOURS
        if n.band:
            upper = [at(x, high) for x, _, high in n.band]
            lower = [at(x, low) for x, low, _ in reversed(n.band)]
            out.append(f'<polygon class="c{colour} band" points="{_pairs([*upper, *lower])}"/>')
        solid = len(drawn) == 1 or not DASHES[colour]
        dash = "" if solid else f' stroke-dasharray="{DASHES[colour]}"'
        points = [at(x, y) for x, y in n.points]
        out.append(f'<polyline class="c{colour} line"{dash} points="{_pairs(points)}"/>')
        if n.marks:
            for (px, py), (x, y) in zip(points, n.points, strict=True):
                value = f"{100 * y:.1f} %" if percent else f"{y:.3g}"
                told = f"<title>{escape(n.name)}, step {x:g}: {value}</title>"
                out.append(f'<circle class="c{colour} mark" cx="{px}" cy="{py}" r="2.6">{told}</circle>')
    for x, text in alerts:
        px, _ = at(x, y0)
        out.append(
            f'<g class="alert"><line x1="{px}" x2="{px}" y1="{top}" y2="{bottom}"/>'
            f'<path d="M{px - 5} {top - 1} h10 l-5 8 z"/><title>{escape(text)}</title></g>'
        )
    described = f"{title}: {', '.join(n.name for n in drawn)} over step"
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(described)}">' + "".join(out) + "</svg>"
    legend = [(n.name, n.colour % COLOURS, DASHES[n.colour % COLOURS]) for n in drawn] if len(drawn) > 1 else []
    steps = sorted({x for n in drawn for x, _ in n.points})
    values = [dict(n.points) for n in drawn]
    few = steps[:: math.ceil(len(steps) / ROWS)]
    rows = [[f"{x:g}", *(f"{v[x]:.4g}" if x in v else "" for v in values)] for x in few]
    return Chart(title, Markup(svg), caption, legend, ["step", *(n.name for n in drawn)], rows)


def thin(points: Points, limit: int = POINTS) -> list[tuple[float, float]]:
    """At most `limit` points: means over buckets of consecutive ones; the last is kept where nothing had to be averaged."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(len(points) / limit)
    buckets = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in buckets]


def smooth(points: Points, window: int) -> list[tuple[float, float]]:
    """Centred moving average."""
    half = window // 2
    out = []
    for i, (x, _) in enumerate(points):
        near = points[max(0, i - half) : i + half + 1]
        out.append((x, sum(y for _, y in near) / len(near)))
    return out


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers that cover the interval."""
    span, size = high - low, max(abs(low), abs(high))
    if size < 1e-300:  # nothing, or what has no logarithm
        span = 1.0
    elif span <= 1e-9 * size:  # a constant
        span = size
    raw = span / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _pairs(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def _fit(name: str, width: float) -> str:
    """The name, or as much of it as fits in so many units; nothing where not even three letters do."""
    letters = int(width / 5.6)
    return name if len(name) <= letters else f"{name[: letters - 1]}…" if letters >= 4 else ""
