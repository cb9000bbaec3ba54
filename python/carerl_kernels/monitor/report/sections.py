"""The parts of the page below the domains: interference, rewards and shares, guard, cost; and the curves they are made of.

Where a run recorded nothing, they write what it would need into `record.missing`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .chart import Chart, Line, Matrix, Points, line_chart, smooth
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


# -------------------------------------------------------------------------------------------------------------- interference


def interference(record: RunRecord) -> list[Matrix | Chart]:
    """What stages did to scores, and which gradients pull against which."""
    out: list[Matrix | Chart] = list(_stage_changes(record))
    found = record.found("monitor", "gradients")
    if not found:
        needed = "DriftMonitor(..., model=model, gradients_every=n), see docs/monitor.md"
        record.missing["Gradient cosines between domains"] = needed
        return out
    names: dict[str, None] = {}
    pairs: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for step, gradients in found:
        names.update(dict.fromkeys(gradients.get("norm", ())))
        for a, row in gradients.get("cosine", {}).items():
            for b, value in row.items():
                pairs.setdefault((a, b), []).append((step, value))
                pairs.setdefault((b, a), []).append((step, value))
    order = [n for n in names if n != "batch"]
    batch = {n: pairs["batch", n] for n in order if ("batch", n) in pairs}
    if not order:
        record.missing["Gradients to compare the batch's with"] = "probe_examples in the domains"
    if batch:
        lines = [Line(n, batch[n], i, marks=len(batch[n]) <= 60) for i, n in enumerate(order) if n in batch]
        title = "This batch's gradient against each domain's own"
        caption = "Above 0 the step also lowers that domain's loss on its stored examples; below 0 it raises it."
        even = (0.0, "orthogonal")
        out.append(line_chart(title, lines, y_label="cosine", stages=record.stages, level=even, caption=caption))
    if len(order) > 1:
        rows = [(a, [_mean(v for _, v in pairs.get((a, b), [])) if a != b else None for b in order]) for a in order]
        for span in record.spans or [Span("run", 0, record.last_step)]:
            cells = [_mean(v for x, v in batch.get(n, []) if span.first <= x <= span.last) for n in order]
            if any(c is not None for c in cells):
                rows.append((f"batch, {span.name}" if len(record.spans) > 1 else "batch", cells))
        caption = (
            f"Means over {len(found)} measurements; of the batch, per stage. Negative: the two pull against each other."
        )
        out.append(Matrix("Gradient cosines", caption, "gradient of", order, rows))
    return out


def _stage_changes(record: RunRecord) -> Iterator[Matrix]:
    """What every stage did to every domain's score; for a single stage, from its first evaluation to its last."""
    rows = []
    points = record.span == 1
    scale = 100 if points else 1
    for span in record.spans:
        cells: list[float | None] = []
        for name in record.domains:
            scores = record.series("eval", name)
            before = [y for x, y in scores if x < span.first]
            after = [y for x, y in scores if span.first <= x <= span.last]
            cells.append(scale * (after[-1] - before[-1]) if before and after else None)
        rows.append((span.name, cells))
    changes = [abs(c) for _, cells in rows for c in cells if c is not None]
    if changes:
        yield Matrix(
            "What each stage did to each domain",
            f"Change of the score over the stage{', in points' if points else ''}. "
            "Off the diagonal: transfer if positive, interference if negative.",
            "stage",
            record.domains,
            rows,
            max(changes) or 1.0,
            "{:+.1f}" if points else "{:+.3g}",
        )


# -------------------------------------------------------------------------------------------------------------------- shares


def reward_shares(record: RunRecord) -> list[Chart]:
    """Rewards per domain, and who has the batch and the reward variance."""
    averaged = f"Moving average over {moving(record)} steps." if moving(record) > 1 else ""
    charts = curves(record, "Reward", "rewards.*", averaged, smoothed=True, y_label="mean reward")
    if not charts:
        record.missing["Rewards per domain"] = 'metrics with "rewards", see reward_statistics'
    shares = record.found("batch_share")
    if not (record.found("reward_variance") and shares):
        needed = 'metrics with "reward_variance" and "batch_share", see reward_statistics'
        record.missing["Shares of reward variance and batch"] = needed
    elif any(len(found) > 1 for _, found in shares):  # mixed batches
        by_variance = _variance_shares(record)  # none where no prompt's rewards ever differed
        own = "Completions of each domain."
        caption = "Within prompts, all that group-relative advantages see: who has it decides where the update goes."
        charts += [
            *curves(record, "Share of the batch", "batch_share.*", own, smoothed=True, **SHARE),
            *curves(record, "Share of reward variance", by_variance, caption, smoothed=True, **SHARE),
        ]
    else:
        title = "Reward variance within prompts"
        caption = "What group-relative advantages learn from; every batch is of one domain here."
        charts += curves(record, title, "reward_variance.*", caption, smoothed=True, y_label="variance")
    return charts


def _variance_shares(record: RunRecord) -> dict[str, list[tuple[int, float]]]:
    """Each domain's share of the squared distances of a batch's rewards to their prompts' means."""
    out: dict[str, list[tuple[int, float]]] = {}
    shares = dict(record.found("batch_share"))
    for step, variance in record.found("reward_variance"):
        share = shares.get(step, {})
        weighed = {n: v * share[n] for n, v in variance.items() if n in share}
        total = sum(weighed.values())
        for name, value in weighed.items():
            if total > 0:
                out.setdefault(name, []).append((step, value / total))
    return out


# --------------------------------------------------------------------------------------------------------------------- guard


def guard_activity(record: RunRecord) -> list[Matrix | Chart]:
    """What the guard saw and did over the run, and its reports at the ends of stages."""
    if record.config is not None and record.config.get("guarded") is False:
        return []
    histories = list(dict.fromkeys(n for _, f in record.found("monitor", "guard", "domains") for n in f))
    conflicting, net = (f"monitor.guard.domains.*.{figure}" for figure in ("conflicting", "net_displacement"))
    undone = "Share of update energy that undoes what a domain's stage did, since the run began."
    moved = "Net, since the stage began, relative to the recorded stage's own."
    touched = "monitor.guard.touched_share"
    taken = "Energy of all corrections over energy of all updates, since the run began."
    out: list[Matrix | Chart] = [
        *curves(record, "Conflicting share of updates", conflicting, undone, histories, percent=True),
        *curves(record, "Displacement along protected directions", net, moved, histories, y_label="ratio"),
        *curves(record, "Share of update energy that the guard took", touched, taken, ["touched"], percent=True),
    ]
    reports = {stage: report for stage, report in record.guard_reports.items() if report.get("domains")}
    if not reports:
        if not out:
            needed = "a guard's reports (bases/*.report.json of the trainer, or DriftMonitor(..., guard=guard))"
            record.missing["Guard activity"] = needed
        return out
    columns = list(dict.fromkeys(n for r in reports.values() for n in r["domains"]))
    ends = [(stage, [report["domains"].get(n, {}) for n in columns]) for stage, report in reports.items()]
    displaced = [(stage, [d.get("net_displacement") for d in found]) for stage, found in ends]
    captured = [(stage, [d.get("capture", {}).get("displacement") for d in found]) for stage, found in ends]
    last, kinds = list(reports.values())[-1], ["aligned", "conflicting", "orthogonal"]
    energies = [(n, [d.get("energy", {}).get(kind) for kind in kinds]) for n, d in last["domains"].items()]
    along = "Along each protected domain's directions, relative to the recorded stage's own displacement."
    held = "Share of the recorded stage's squared displacement that its directions hold: what the guard can see of it."
    classes = "Of all updates that the guard saw: along and against what each domain's stage did, and neither."
    out += [
        matrix
        for matrix in (
            Matrix("Displacement at the end of each stage", along, "after stage", columns, displaced, style="{:.2f}"),
            Matrix("Capture", held, "after stage", columns, captured, style="{:.2f}"),
            Matrix("Update energy by class", classes, "domain", kinds, energies, style="{:.1%}"),
        )
        if any(c is not None for _, cells in matrix.rows for c in cells)
    ]
    windows = last.get("open_windows")
    if windows:
        record.notes.append(f"Open windows at the end, protected by nothing: {', '.join(windows)}.")
    return out


# ---------------------------------------------------------------------------------------------------------------------- cost


def run_cost(record: RunRecord) -> tuple[list[tuple[str, float, float, int]], str]:
    """Per phase its name, seconds, share and number; and a sentence."""
    seconds: dict[str, float] = {}
    for _, phases in record.found("seconds"):
        for phase, value in phases.items():
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
