"""What a mixture did: who damaged whom and how, who had the step budget, what balanced it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ...grpo.balance import DOMINATES
from .chart import Chart, Matrix
from .record import RunRecord
from .sections import SHARE, curves


@dataclass(frozen=True)
class Damage:
    """What the windows of one acting domain or stage did to one domain's loss, on average.

    Attributes:
        odd, even: conflict and curvature, means per window in nats per token; above 0 the loss rose.
        windows, last: how many there were, and the step at which the last one ended.
    """

    acting: str
    domain: str
    odd: float
    even: float
    windows: int
    last: int

    @property
    def total(self) -> float:
        """All that happened to the loss."""
        return self.odd + self.even


def damages(record: RunRecord, *, parts: bool = False, after: int = 0, until: int | None = None) -> list[Damage]:
    """Of every acting stage and domain with a loss, in order of appearance.

    Args:
        parts: Whether the changes are those of a mixed batch's domains, each along its own direction, instead of all that
            happened.
        after, until: only windows that ended after the one and not after the other of these steps.
    """
    until = record.last_step if until is None else until
    changes: dict[tuple[str, str], list[tuple[float, float, int]]] = {}
    for step, split in record.found("monitor", "split"):
        windows = split.get("by", {}) if parts else {split.get("acting") or "run": split}
        for acting, window in windows.items() if after < step <= until else ():
            odd, even = (window.get(part, {}) for part in ("odd", "even"))
            for name in odd:
                if name in even:
                    changes.setdefault((acting, name), []).append((odd[name], even[name], step))
    out = []
    for (acting, name), rows in changes.items():
        odds, evens, steps = zip(*rows, strict=True)
        out.append(Damage(acting, name, fmean(odds), fmean(evens), len(rows), steps[-1]))
    return out


def conflict_and_curvature(record: RunRecord) -> list[Matrix | Chart]:
    """Who is damaged by whom, and how."""
    out: list[Matrix | Chart] = []
    for parts, whose in ((False, "stage"), (True, "domain of a mixed batch")):
        found = damages(record, parts=parts)
        if not found:
            continue
        rows = list(dict.fromkeys(d.acting for d in found))
        columns = list(dict.fromkeys(d.domain for d in found))
        cells = {(d.acting, d.domain): d for d in found}
        windows = max(d.windows for d in found)
        full = max(max(abs(d.odd), abs(d.even)) for d in found) or 1.0
        note = " Along each domain's normalised gradient, as long as its share of the window's steps." if parts else ""
        for title, part, caption in (
            ("Conflict", "odd", "First order: the steps' direction raises (above 0) or lowers that domain's loss."),
            ("Curvature", "even", "Second order: what steps this long cost that domain in any direction; grows with the "
             "square of the learning rate, and cosines do not show it."),
        ):  # fmt: skip
            values = [(a, [getattr(cells[a, d], part) if (a, d) in cells else None for d in columns]) for a in rows]
            out.append(
                Matrix(
                    f"{title} between domains" if parts else f"{title}: what the steps did to the losses",
                    f"Means over {windows} windows between evaluations, nats a token of held-out answers. {caption}{note}",
                    f"steps of ({whose})",
                    columns,
                    values,
                    full,
                    bad_above=True,
                )
            )
    if not out:
        record.missing["Conflict and curvature"] = "DriftMonitor(..., model=model, split_every=1), see docs/monitor.md"
    return out


def step_budget(record: RunRecord) -> list[Chart]:
    """Who had the optimizer's steps of mixed batches."""
    advantages = "Squared advantages, weights included: whose noise and signal fill the step that Adam normalises."
    gradients, own = "monitor.budget.gradient.*", "Of each domain's part of the batch."
    steps, divided = "monitor.budget.step.*", "The same, each parameter divided by the root of its second moment."
    loudest = "Largest share of the step budget times the number of domains: 1 is even."
    warned = (DOMINATES, f"warned of from {DOMINATES} on")
    return [
        *curves(record, "Share of the step budget", "step_share.*", advantages, smoothed=True, **SHARE),
        *curves(record, "Share of the squared gradient", gradients, own, **SHARE),
        *curves(record, "Share of Adam's step", steps, divided, **SHARE),
        *curves(record, "Domination", "domination", loudest, ["domination"], smoothed=True, level=warned),
    ]


def balance(record: RunRecord) -> tuple[list[Chart], list[Mapping[str, Any]]]:
    """What weighed the domains or moved their shares, and the controller's decisions."""
    multiplied = "What each domain's advantages were multiplied by."
    redrawn = "Per step, because all completions earned the same."
    agreed = "Share of a domain's prompts from which nothing is learned."
    factor, by = "monitor.balance.factor.*", "What the share or weight was multiplied by."
    charts = [
        *curves(record, "Factor of the controller", factor, by),
        *curves(record, "Weight in the loss", "weight.*", multiplied),
        *curves(record, "Prompts drawn anew", "redrawn.*", redrawn, smoothed=True),
        *curves(record, "Prompts that agree", "agreed.*", agreed, smoothed=True, percent=True),
    ]
    return charts, [one for _, decisions in record.found("monitor", "balance", "decisions") for one in decisions]
