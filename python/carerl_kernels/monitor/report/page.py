"""From a run's record to one self-contained HTML page: what happened to each domain, who pulled where, what it cost."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..._files import write_bytes_atomically
from .chart import Chart, Line, Matrix, line_chart
from .pooled import balance, conflict_and_curvature, step_budget
from .record import RunRecord
from .sections import guard_activity, interference, reward_shares, run_cost


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
    """Everything that the template shows, besides what it reads in the record."""

    record: RunRecord
    name: str
    summary: str
    facts: list[tuple[str, str]]
    cards: list[DomainCard]
    monitored: bool
    interference: list[Matrix | Chart]
    shares: list[Chart]
    balance: list[Chart]
    decisions: list[Mapping[str, Any]]
    guard: list[Matrix | Chart]
    cost: list[tuple[str, float, float, int]]  # name, seconds, share, colour
    cost_text: str


def write_report(run: Path | str, target: Path | str | None = None) -> tuple[Path, Page]:
    """Writes the report of a run's directory, into report.html there unless a target is given; returns where it is, and
    what it says."""
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
    config = "" if page.record.config is None else json.dumps(page.record.config, indent=2)
    template = environment.get_template("page.html")
    return template.render(
        page=page, record=page.record, config=config, is_matrix=lambda item: isinstance(item, Matrix)
    )


def build_page(record: RunRecord) -> Page:
    """Everything that can be said of a run; what cannot is listed in `record.missing` with what would have recorded it."""
    missing = record.missing
    tests = record.series("monitor", "alpha")
    cards = [_card(record, name) for name in record.domains]
    if not any(card.chart for card in cards):
        missing["Scores per domain"] = "give domains held-out examples (eval_examples), or evaluate=... to the monitor"
    if not tests:
        missing["A test of drift"] = "train with monitor=DriftMonitor(domains)"
    pulls = [*conflict_and_curvature(record), *interference(record)]
    shares = [*step_budget(record), *reward_shares(record)]
    balanced, decisions = balance(record)
    guard = guard_activity(record)
    cost, cost_text = run_cost(record)
    if not cost:
        missing["Cost"] = 'lines with "seconds" per phase, which the trainer and JsonLines write'
    facts = [("steps", f"{record.last_step:,}"), ("domains", str(len(record.domains)))]
    if record.spans:
        facts.append(("stages" if len(record.spans) > 1 else "stage", " → ".join(s.name for s in record.spans)))
    if record.config and isinstance(record.config.get("parameters"), int):
        facts.append(("parameters", f"{record.config['parameters']:,}"))
    if record.config:
        facts.append(("guard", "yes" if record.config.get("guarded") else "none"))
    return Page(
        record,
        name="/".join(record.path.resolve().parts[-2:]),  # runs are often told apart by the folder above
        summary=_summary(cards, bool(record.alerts), tests[0][1] if tests else None),
        facts=facts,
        cards=cards,
        monitored=bool(tests),
        interference=pulls,
        shares=shares,
        balance=balanced,
        decisions=decisions,
        guard=guard,
        cost=cost,
        cost_text=cost_text,
    )


# ------------------------------------------------------------------------------------------------------------------- domains


def _verdict(record: RunRecord, name: str) -> tuple[str, str]:
    """Status and what it rests on.

    A domain has recovered where it is, at the end, within the alerts' `drop` of the baseline of *every* alert: after a
    rebase the monitor compares with what is left of it, which says nothing about coming back.
    """
    found = record.found("monitor", "domains", name)
    tested = [f for _, f in found if f.keys() >= {"p", "drop", "score", "fallen"}]
    own = [a for a in record.alerts if a["domain"] == name]
    drops, alphas = record.series("monitor", "drop"), record.series("monitor", "alpha")
    drop, alpha = drops[-1][1] if drops else 0.0, alphas[-1][1] if alphas else 0.0
    if own:
        end = tested[-1]["score"] if tested else -math.inf
        below = [a for a in own if a["baseline"] - end >= drop and a["baseline"] > end]
        a = (below or own)[-1]
        if below or tested[-1]["fallen"]:
            return "fell", f"{record.difference(a['drop'])} below its baseline at step {a['step']}, {_p(a['p'])}"
        side = f"{record.difference(abs(a['baseline'] - end))} {'below' if end < a['baseline'] else 'above'}"
        return "recovered", f"fell at step {a['step']}; {side} that baseline at the end"
    if not tested:
        return "untested", "not monitored"
    last = tested[-1]
    if last["p"] > alpha:
        return "holds", f"no significant drop, {_p(last['p'])}"
    if last["drop"] > 0:
        told = f"{record.difference(last['drop'])}, less than the {record.difference(drop)} that alerts are for"
        return "slipped", f"a significant drop, {_p(last['p'])}, of {told}"
    return (
        "holds",
        f"not below its baseline at the end; significantly so before, {_p(last['p'])}, but never enough for an alert",
    )


def _card(record: RunRecord, name: str) -> DomainCard:
    scores = record.series("eval", name)
    card = DomainCard(name, *_verdict(record, name))
    if not scores:
        card.verdict = "never evaluated"
        return card
    card.score, card.start = scores[-1][1], scores[0][1]
    card.best = max(scores, key=lambda p: p[1])
    errors = dict(record.series("monitor", "domains", name, "error"))
    band = [(x, y - 2 * errors[x], y + 2 * errors[x]) for x, y in scores if x in errors]
    card.percent = unit = record.span == 1 and all(0 <= y <= 1 for _, y in scores)
    card.chart = line_chart(
        name,
        [Line(name, scores, 0, marks=len(scores) <= 80, band=band)],
        y_label="" if unit else "score",
        stages=record.stages,
        own=[s.name for s in record.spans if name in s.name.split("+") or s.name.rpartition("-")[0] == name],
        alerts=[
            (a["step"], f"{name} fell by {record.difference(a['drop'])}, p = {a['p']:.2g}")
            for a in record.alerts
            if a["domain"] == name
        ],
        level=(scores[0][1], f"start: {scores[0][1]:.3f}"),
        y_range=(0.0, 1.0) if unit else None,
        percent=unit,
    )
    return card


def _summary(cards: list[DomainCard], alerts: bool, alpha: float | None) -> str:
    if alpha is None:
        return "This run was not monitored: curves are shown as they are, without a test of whether a drop is more than noise."
    fell = [c.name for c in cards if c.status == "fell"]
    back = [c.name for c in cards if c.status == "recovered"]
    slipped = [c.name for c in cards if c.status == "slipped"]
    less = f"{', '.join(slipped)} slipped, by less than alerts are for" if slipped else ""
    if not alerts:
        what = f"No alert; {less}" if less else "No domain fell significantly"
        return f"{what}; the chance of any false alarm was held at {alpha:.0%}."
    parts = [f"{', '.join(fell)} fell" if fell else "", f"{', '.join(back)} fell and came back" if back else "", less]
    return (
        f"{'; '.join(p for p in parts if p)}. The chance of any false alarm in the whole run was held at {alpha:.0%}."
    )


def _p(p: float) -> str:
    return f"p\u00a0=\u00a0{p:.2g}"
