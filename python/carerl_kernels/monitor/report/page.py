"""From a run's record to one self-contained HTML page: what happened to each domain, who pulled where, what it cost."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..._files import write_bytes_atomically
from .chart import Chart, Line, Points, line_chart, smooth
from .record import RunRecord, Span

PHASES = {
    "sample": "sampling",
    "reward": "rewards",
    "loss": "forward and backward",
    "step": "optimizer",
    "guard": "guard",
    "probe": "guard's probes",
    "eval": "evaluation",
    "monitor": "monitor",
    "save": "checkpoints",
    "other": "training",
}


@dataclass(frozen=True)
class Matrix:
    """Numbers in rows and columns, shown as a table with coloured cells.

    Attributes:
        title, caption: plain text; corner: what rows and columns are.
        columns, rows: names; cells: per row, None where nothing was measured.
        full: magnitude that gets the full colour; style: Python format of a cell.
    """

    title: str
    caption: str
    corner: str
    columns: list[str]
    rows: list[tuple[str, list[float | None]]]
    full: float
    style: str = "{:+.2f}"

    def cell(self, value: float | None) -> tuple[str, str, int]:
        """Text, class and strength in percent of a cell's colour."""
        if value is None:
            return "–", "none", 0
        strength = math.sqrt(min(1.0, abs(value) / self.full))  # so that small ones are seen, too
        text = self.style.format(value)
        text = text.replace("-", "+" if "+" in self.style else "") if float(text) == 0 else text
        return text, "plus" if value >= 0 else "minus", round(70 * strength)


@dataclass
class DomainCard:
    """What the page says of one domain first."""

    name: str
    status: str
    verdict: str
    score: float | None = None
    start: float | None = None
    best: tuple[int, float] | None = None
    percent: bool = False
    chart: Chart | None = None

    def show(self, score: float) -> str:
        """A score as text: in percent where all are from 0 to 1."""
        return f"{100 * score:.1f} %" if self.percent else f"{score:.3g}"


@dataclass
class Page:
    """Everything that the template shows."""

    name: str
    summary: str
    facts: list[tuple[str, str]]
    cards: list[DomainCard]
    alerts: list[Mapping[str, Any]]
    monitored: bool
    interference: list[Matrix | Chart]
    shares: list[Chart]
    guard: list[Matrix | Chart]
    cost: list[tuple[str, float, float, int]]  # name, seconds, share, colour
    cost_text: str
    notes: list[str]
    config: str
    command: str = ""
    missing: list[tuple[str, str]] = field(default_factory=list)


def write_report(run: Path | str, target: Path | str | None = None) -> tuple[Path, Page]:
    """Writes a run's report.

    Args:
        run: its directory.
        target: HTML file; default report.html in the directory.

    Returns:
        Where the page is, and what it says.

    Raises:
        RunError: no run there, or a damaged file.
        OSError: the page could not be written.
    """
    record = RunRecord.read(run)
    page = build_page(record)
    path = record.path / "report.html" if target is None else Path(target)
    write_bytes_atomically(path, render(page).encode())
    return path, page


def render(page: Page) -> str:
    """The page as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("carerl_kernels.monitor.report", "."),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(page=page, is_matrix=lambda item: isinstance(item, Matrix))


def build_page(record: RunRecord) -> Page:
    """Everything that can be said of a run; what cannot is listed in ``missing`` with what would have to be recorded."""
    missing: list[tuple[str, str]] = []
    stages = [(s.name, float(max(s.first - 1, 0)), float(s.last)) for s in record.spans]
    tests = record.series("monitor", "alpha")
    alerts = [a for _, found in record.found("monitor", "alerts") for a in found]
    cards = [_card(record, name, stages, alerts) for name in record.domains]
    if not any(card.chart for card in cards):
        missing.append(
            ("Scores per domain", "give domains held-out examples (eval_examples), or evaluate=... to the monitor")
        )
    if not tests:
        missing.append(("A test of drift", "train with monitor=DriftMonitor(domains)"))
    interference = _interference(record, stages, missing)
    shares = _shares(record, stages, missing)
    guard = _guard(record, stages, missing)
    cost, cost_text = _cost(record)
    if not cost:
        missing.append(("Cost", 'lines with "seconds" per phase, which the trainer and JsonLines write'))
    facts = [("steps", f"{record.last_step:,}"), ("domains", str(len(record.domains)))]
    if record.spans:
        facts.append(("stages" if len(record.spans) > 1 else "stage", " → ".join(s.name for s in record.spans)))
    if record.config and isinstance(record.config.get("parameters"), int):
        facts.append(("parameters", f"{record.config['parameters']:,}"))
    if record.config:
        facts.append(("guard", "yes" if record.config.get("guarded") else "none"))
    return Page(
        name=record.path.resolve().name,
        summary=_summary(cards, alerts, tests[0][1] if tests else None),
        facts=facts,
        cards=cards,
        alerts=alerts,
        monitored=bool(tests),
        interference=interference,
        shares=shares,
        guard=guard,
        cost=cost,
        cost_text=cost_text,
        notes=record.notes,
        config="" if record.config is None else json.dumps(record.config, indent=2),
        missing=missing,
    )


# ------------------------------------------------------------------------------------------------------------------- domains


def _card(record: RunRecord, name: str, stages: list[tuple[str, float, float]], alerts: list[Any]) -> DomainCard:
    scores = record.series("eval", name)
    found = record.found("monitor", "domains", name)
    tested = [(step, f) for step, f in found if "p" in f]
    own = [a for a in alerts if a["domain"] == name]
    last = tested[-1][1] if tested else None
    if own:
        a = own[-1]
        status, verdict = (
            "fell",
            f"{_points(a['drop'])} below its baseline at step {a['step']}, p\u00a0=\u00a0{a['p']:.2g}",
        )
        if last is not None and not last["fallen"]:
            status, verdict = "recovered", f"fell at step {a['step']}; {_points(last['drop'])} below at the end"
    elif last is not None:
        status, verdict = "holds", f"no significant drop, p\u00a0=\u00a0{last['p']:.2g}"
    else:
        status, verdict = "untested", "not monitored"
    card = DomainCard(name, status, verdict)
    if not scores:
        card.verdict = "never evaluated"
        return card
    card.score, card.start = scores[-1][1], scores[0][1]
    card.best = max(scores, key=lambda p: p[1])
    errors = {step: f["error"] for step, f in found if isinstance(f.get("error"), (int, float))}
    band = [(x, y - 2 * errors[x], y + 2 * errors[x]) for x, y in scores if x in errors]
    card.percent = unit = all(0 <= y <= 1 for _, y in scores)
    card.chart = line_chart(
        name,
        [Line(name, scores, 0, marks=len(scores) <= 80, band=band)],
        y_label="" if unit else "score",
        stages=stages,
        own=[s for s, _, _ in stages if name in s.split("+") or s.rpartition("-")[0] == name],
        alerts=[(a["step"], f"{name} fell by {_points(a['drop'])}, p = {a['p']:.2g}") for a in own],
        level=(scores[0][1], f"start: {scores[0][1]:.3f}"),
        y_range=(0.0, 1.0) if unit else None,
        percent=unit,
    )
    return card


def _summary(cards: list[DomainCard], alerts: list[Any], alpha: float | None) -> str:
    if alpha is None:
        return "This run was not monitored: curves are shown as they are, without a test of whether a drop is more than noise."
    fell = [c.name for c in cards if c.status == "fell"]
    back = [c.name for c in cards if c.status == "recovered"]
    if not alerts:
        return f"No domain fell significantly; the chance of any false alarm was held at {alpha:.0%}."
    parts = [f"{', '.join(fell)} fell" if fell else "", f"{', '.join(back)} fell and came back" if back else ""]
    return (
        f"{'; '.join(p for p in parts if p)}. The chance of any false alarm in the whole run was held at {alpha:.0%}."
    )


def _points(drop: float) -> str:
    return f"{100 * drop:.1f} points"


# -------------------------------------------------------------------------------------------------------------- interference


def _interference(record: RunRecord, stages: list[Any], missing: list[tuple[str, str]]) -> list[Matrix | Chart]:
    out: list[Matrix | Chart] = []
    changes = _stage_changes(record)
    if changes is not None:
        out.append(changes)
    found = record.found("monitor", "gradients")
    if not found:
        missing.append(
            (
                "Gradient cosines between domains",
                "DriftMonitor(..., model=model, gradients_every=n), see docs/monitor.md",
            )
        )
        return out
    names: dict[str, None] = {}
    pairs: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for step, gradients in found:
        names.update(dict.fromkeys(gradients["norm"]))
        for a, row in gradients["cosine"].items():
            for b, value in row.items():
                if value is not None:
                    pairs.setdefault((a, b), []).append((step, value))
                    pairs.setdefault((b, a), []).append((step, value))
    order = [n for n in names if n != "batch"]
    batch = {b: points for (a, b), points in pairs.items() if a == "batch"}
    if batch:
        lines = [Line(n, batch[n], order.index(n), marks=len(batch[n]) <= 60) for n in order if n in batch]
        out.append(
            line_chart(
                "This batch's gradient against each domain's own",
                lines,
                y_label="cosine",
                stages=stages,
                level=(0.0, "orthogonal"),
                caption="Above 0 the step also lowers that domain's loss on its stored examples; below 0 it raises it.",
            )
        )
    if len(order) > 1:
        rows = [(a, [_mean(v for _, v in pairs.get((a, b), [])) if a != b else None for b in order]) for a in order]
        for span in record.spans or [Span("run", 0, record.last_step)]:
            cells = [_mean(v for x, v in batch.get(n, []) if span.first <= x <= span.last) for n in order]
            if any(c is not None for c in cells):
                rows.append((f"batch, {span.name}", cells))
        out.append(
            Matrix(
                "Gradient cosines",
                f"Means over {len(found)} measurements; of the batch, per stage. Negative: the two pull against each other.",
                "gradient of",
                order,
                rows,
                1.0,
            )
        )
    return out


def _stage_changes(record: RunRecord) -> Matrix | None:
    """What every stage did to every domain's score; for a single stage, from its first evaluation to its last."""
    rows = []
    for span in record.spans:
        cells: list[float | None] = []
        for name in record.domains:
            scores = record.series("eval", name)
            before = [y for x, y in scores if x < span.first]
            after = [y for x, y in scores if span.first <= x <= span.last]
            cells.append(100 * (after[-1] - before[-1]) if before and after else None)
        rows.append((span.name, cells))
    if not any(c is not None for _, cells in rows for c in cells):
        return None
    strongest = max(abs(c) for _, cells in rows for c in cells if c is not None)
    return Matrix(
        "What each stage did to each domain",
        "Change of the score over the stage, in points. Off the diagonal: transfer if positive, interference if negative.",
        "stage",
        record.domains,
        rows,
        strongest or 1.0,
        "{:+.1f}",
    )


# -------------------------------------------------------------------------------------------------------------------- shares


def _shares(record: RunRecord, stages: list[Any], missing: list[tuple[str, str]]) -> list[Chart]:
    charts = []
    window = max(1, len(record.lines) // 30)

    def curves(get: Callable[[str], Points]) -> list[Line]:
        lines = []
        for i, name in enumerate(record.domains):
            points = get(name)
            if points:
                lines += [Line(name, smooth(points, window), i)]
        return lines

    rewards = curves(lambda name: record.series("rewards", name))
    if rewards:
        charts.append(
            line_chart(
                "Reward",
                rewards,
                y_label="mean reward",
                stages=stages,
                caption=f"Moving average over {window} steps." if window > 1 else "",
            )
        )
    else:
        missing.append(("Rewards per domain", 'metrics with "rewards", see reward_statistics'))
    variance = record.found("reward_variance")
    shares = record.found("batch_share")
    if not (variance and shares):
        missing.append(
            (
                "Shares of reward variance and batch",
                'metrics with "reward_variance" and "batch_share", see reward_statistics',
            )
        )
        return charts
    if any(len(found) > 1 for _, found in shares):
        by_variance = _variance_shares(record)
        for title, source, caption in (
            (
                "Share of the batch",
                {n: record.series("batch_share", n) for n in record.domains},
                "Completions of each domain.",
            ),
            (
                "Share of reward variance",
                by_variance,
                "Within prompts, which is all that group-relative advantages see: who has it decides where the update goes.",
            ),
        ):
            lines = curves(lambda name, source=source: source.get(name, []))  # type: ignore[misc]
            charts.append(line_chart(title, lines, stages=stages, y_range=(0.0, 1.0), percent=True, caption=caption))
    else:
        lines = curves(lambda name: record.series("reward_variance", name))
        charts.append(
            line_chart(
                "Reward variance within prompts",
                lines,
                y_label="variance",
                stages=stages,
                caption="What group-relative advantages learn from; every batch is of one domain here.",
            )
        )
    return charts


def _variance_shares(record: RunRecord) -> dict[str, list[tuple[int, float]]]:
    out: dict[str, list[tuple[int, float]]] = {}
    for line in record.lines:
        variance, share = line.get("reward_variance") or {}, line.get("batch_share") or {}
        weighed = {n: variance[n] * share[n] for n in variance if n in share}
        total = sum(weighed.values())
        for name, value in weighed.items():
            if total > 0:
                out.setdefault(name, []).append((int(line["step"]), value / total))
    return out


# --------------------------------------------------------------------------------------------------------------------- guard


def _guard(record: RunRecord, stages: list[Any], missing: list[tuple[str, str]]) -> list[Matrix | Chart]:
    if record.config is not None and record.config.get("guarded") is False:
        return []
    out: list[Matrix | Chart] = []
    histories = list(dict.fromkeys(n for _, f in record.found("monitor", "guard", "domains") for n in f))
    for key, title, caption in (
        (
            "conflicting",
            "Conflicting share of updates",
            "Share of update energy that undoes what a domain's stage did, since the run began.",
        ),
        (
            "net_displacement",
            "Displacement along protected directions",
            "Net, since the stage began, relative to the recorded stage's own.",
        ),
    ):
        lines = [Line(n, record.series("monitor", "guard", "domains", n, key), i) for i, n in enumerate(histories)]
        if any(n.points for n in lines):
            percent = key == "conflicting"
            out.append(
                line_chart(
                    title,
                    lines,
                    y_label="" if percent else "ratio",
                    stages=stages,
                    percent=percent,
                    caption=caption,
                )
            )
    touched = record.series("monitor", "guard", "touched_share")
    if touched:
        out.append(
            line_chart(
                "Share of update energy that the guard took",
                [Line("touched", touched, 0)],
                stages=stages,
                percent=True,
                caption="Energy of all corrections over energy of all updates, since the run began.",
            )
        )
    reports = {stage: report for stage, report in record.guard_reports.items() if report.get("domains")}
    if not reports:
        if not out:
            missing.append(
                (
                    "Guard activity",
                    "a guard's reports (bases/*.report.json of the trainer, or DriftMonitor(..., guard=guard))",
                )
            )
        return out
    columns = list(dict.fromkeys(n for r in reports.values() for n in r["domains"]))

    def rows(get: Callable[[Mapping[str, Any]], Any]) -> list[tuple[str, list[float | None]]]:
        return [
            (stage, [get(r["domains"][n]) if n in r["domains"] else None for n in columns])
            for stage, r in reports.items()
        ]

    for title, caption, get, full, style in (
        (
            "Displacement at the end of each stage",
            "Along each protected domain's directions, relative to the recorded stage's own displacement.",
            lambda d: d.get("net_displacement"),
            1.0,
            "{:.2f}",
        ),
        (
            "Capture",
            "Share of the recorded stage's squared displacement that its directions hold: what the guard can see of it.",
            lambda d: (d.get("capture") or {}).get("displacement"),
            1.0,
            "{:.2f}",
        ),
    ):
        cells = rows(get)
        if any(c is not None for _, row in cells for c in row):
            out.append(Matrix(title, caption, "after stage", columns, cells, full, style))
    windows = list(reports.values())[-1].get("open_windows") or []
    if windows:
        record.notes.append(f"Open windows at the end, protected by nothing: {', '.join(windows)}.")
    return out


# ---------------------------------------------------------------------------------------------------------------------- cost


def _cost(record: RunRecord) -> tuple[list[tuple[str, float, float, int]], str]:
    seconds: dict[str, float] = {}
    for _, phases in record.found("seconds"):
        for phase, value in phases.items() if isinstance(phases, Mapping) else ():
            if isinstance(value, (int, float)):
                seconds[phase] = seconds.get(phase, 0.0) + value
    total = sum(seconds.values())
    if total <= 0:
        return [], ""
    order = sorted(seconds, key=lambda p: list(PHASES).index(p) if p in PHASES else len(PHASES))
    bars = [(PHASES.get(p, p), seconds[p], seconds[p] / total, i) for i, p in enumerate(order)]

    def share(*names: str) -> float:
        return sum(seconds.get(n, 0.0) for n in names) / total

    text = f"{total:,.0f} s in all; evaluation and monitor {share('eval', 'monitor'):.1%} of it"
    if "guard" in seconds:
        text += f", guard {share('guard', 'probe'):.1%}"
    return bars, text + "."


def _mean(values: Iterable[float]) -> float | None:
    listed = list(values)
    return statistics.fmean(listed) if listed else None
