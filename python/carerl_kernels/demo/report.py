"""The demonstration's summary: numbers, a table, an honest sentence about them, a picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..grpo.plots import new_figure
from .variants import RunResult, Scale, Variant

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class VariantSummary:
    """One variant over all seeds; every list has one value per seed, in order.

    Attributes:
        name: Of the variant.
        start, after_own_stage, final: Accuracy per domain before everything, after its own stage, at the end.
        average: Mean over domains of the final accuracy.
        forgetting: Mean over all but the last domain of after_own_stage - final.
        new_domain: Mean over all but the first domain of after_own_stage: stages in which there is something to forget.
        guard_time_share: Mean over seeds of the share of wall-clock time spent in the guard.
        touched_share: Mean share of update energy that the guard took; None without guard.
        seconds: Wall-clock seconds per run.
    """

    name: str
    start: dict[str, list[float]]
    after_own_stage: dict[str, list[float]]
    final: dict[str, list[float]]
    average: list[float]
    forgetting: list[float]
    new_domain: list[float]
    guard_time_share: float
    touched_share: float | None
    seconds: list[float]

    @classmethod
    def of(cls, name: str, runs: Sequence[RunResult], domains: Sequence[str]) -> VariantSummary:
        """Collect the runs of one variant."""
        own = {d: [r.after_own_stage[d] for r in runs] for d in domains}
        final = {d: [r.final[d] for r in runs] for d in domains}
        count = range(len(runs))
        touched = [r.touched_share for r in runs if r.touched_share is not None]
        return cls(
            name=name,
            start={d: [r.curve[0][1][d] for r in runs] for d in domains},
            after_own_stage=own,
            final=final,
            average=[statistics.fmean(final[d][i] for d in domains) for i in count],
            forgetting=[statistics.fmean(own[d][i] - final[d][i] for d in domains[:-1]) for i in count],
            new_domain=[statistics.fmean(own[d][i] for d in domains[1:]) for i in count],
            guard_time_share=statistics.fmean(r.guard_time_share for r in runs),
            touched_share=statistics.fmean(touched) if touched else None,
            seconds=[r.seconds for r in runs],
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "final": {d: _values(v) for d, v in self.final.items()},
            "after_own_stage": {d: _values(v) for d, v in self.after_own_stage.items()},
            "start": {d: _values(v) for d, v in self.start.items()},
            "average": _values(self.average),
            "forgetting": _values(self.forgetting),
            "new_domain": _values(self.new_domain),
            "guard_time_share": self.guard_time_share,
            "touched_share": self.touched_share,
            "seconds": _values(self.seconds),
        }


@dataclass(frozen=True)
class Summary:
    """All variants.

    Attributes:
        domains: In the order they were learned.
        seeds: How many.
        seconds: Wall-clock seconds of everything.
        variants: By name.
    """

    domains: tuple[str, ...]
    seeds: int
    seconds: float
    variants: dict[str, VariantSummary]

    @classmethod
    def of(
        cls,
        results: Sequence[RunResult],
        variants: Sequence[Variant],
        domains: Sequence[str],
        seeds: int,
        seconds: float,
    ) -> Summary:
        """Group results by variant, seeds in order."""
        groups = {v.name: sorted((r for r in results if r.variant == v.name), key=lambda r: r.seed) for v in variants}
        by_name = {name: VariantSummary.of(name, runs, domains) for name, runs in groups.items()}
        return cls(tuple(domains), seeds, seconds, by_name)

    def as_dict(self) -> dict[str, Any]:
        """JSON form, as `run_demo` documents it."""
        return {
            "domains": list(self.domains),
            "seeds": self.seeds,
            "seconds": self.seconds,
            "variants": {name: v.as_dict() for name, v in self.variants.items()},
        }

    def verdicts(self) -> list[str]:
        """One sentence per guard: seed by seed against the best plain learning rate, the best replay and rehearsal."""
        sentences = []
        for guard in (self.variants[n] for n in ("guarded", "probed", "instant") if n in self.variants):
            parts = []
            for label, names in BASELINES.items():
                present = [self.variants[n] for n in names if n in self.variants]
                if present:
                    best = max(present, key=lambda v: statistics.fmean(v.average))
                    parts.append(_compare(guard, best, label))
            if parts:
                sentences.append(f"{guard.name} {'; '.join(parts)}.")
        return sentences


# What each guard is compared with: of several settings of one idea the one that did best here, a choice in its favour.
BASELINES = {
    "the best plain learning rate": ("naive", "lower_lr", "lowest_lr"),
    "the best replay": ("replay", "replay_low"),
    "rehearsal": ("rehearse",),
}


def _compare(guard: VariantSummary, other: VariantSummary, label: str) -> str:
    gaps = [g - o for g, o in zip(guard.average, other.average, strict=True)]
    wins = sum(gap > 0 for gap in gaps)
    learning = statistics.fmean(guard.new_domain) - statistics.fmean(other.new_domain)
    return (
        f"against {other.name} ({label}): average {statistics.fmean(gaps):+.3f}, "
        f"better on {wins} of {len(gaps)} seeds, new domains {learning:+.3f}"
    )


def _values(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": statistics.fmean(values), "values": list(values)}


def _cell(values: Sequence[float]) -> str:
    """Mean, and half the range over seeds where there are several: ".62±.03"."""
    mean = _short(statistics.fmean(values))
    return mean if len(values) < 2 else f"{mean}±{_short((max(values) - min(values)) / 2)}"


def _short(value: float) -> str:
    """Two digits (the third is noise) without the leading zero: the table fits in 80 columns."""
    text = f"{value:.2f}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def print_summary(console: Console, summary: Summary, variants: Sequence[Variant], scale: Scale) -> None:
    """The table, what its columns mean, and the comparison whoever it favours."""
    from rich import box
    from rich.table import Table

    names = " -> ".join(summary.domains)
    title = f"{names}, {scale.steps} GRPO steps each, {summary.seeds} seed{'s' if summary.seeds > 1 else ''}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column("variant", style="bold", no_wrap=True)
    for column in (*summary.domains, "average", "forget", "new", "touched", "guard"):
        table.add_column(column, justify="right", no_wrap=True)
    columns: list[Callable[[VariantSummary], list[float]]] = [
        *((lambda v, d=d: v.final[d]) for d in summary.domains),
        lambda v: v.average,
        lambda v: v.forgetting,
        lambda v: v.new_domain,
    ]
    for row in summary.variants.values():
        touched = "" if row.touched_share is None else f"{row.touched_share:.1%}"
        share = f"{row.guard_time_share:.0%}" if row.guard_time_share else ""
        table.add_row(row.name, *(_cell(column(row)) for column in columns), touched, share)
    console.print()
    console.print(table)
    first = next(iter(summary.variants.values()))
    start = ", ".join(f"{d} {statistics.fmean(v):.2f}" for d, v in first.start.items())
    earlier, later = ", ".join(summary.domains[:-1]), ", ".join(summary.domains[1:])
    console.print(
        "Accuracy: exact probability of the right answer at temperature 1 on held-out examples "
        f"(before training: {start}).\n"
        "Domain columns and average: at the end. "
        f"Forget: drop since a domain's own stage, mean over all but the last ({earlier}).\n"
        f"New: accuracy right after a domain's own stage, mean over all but the first ({later}). "
        "±: half the range over seeds.\n"
        "Touched: energy of the guard's corrections over energy of all updates it saw. "
        "Guard: its share of wall-clock time, recording and probes included.\n",
        style="dim",
    )
    for variant in variants:
        memory = "" if variant.memory == "none" else f" [dim](keeps {variant.memory})[/]"
        console.print(f"  [bold]{variant.name:<10}[/] {variant.text}{memory}")
    for sentence in summary.verdicts():
        console.print(sentence)
    console.print(f"{summary.seconds:.0f} s in all.")


def plot_curves(
    path: Path, results: Sequence[RunResult], variants: Sequence[Variant], domains: Sequence[str], steps: int
) -> None:
    """Accuracy of each domain over time: a panel per domain, a line per variant (mean; band: range over seeds)."""
    figure = new_figure(figsize=(4.2 * len(domains), 3.9), layout="constrained")
    panels = figure.subplots(1, len(domains), sharey=True, squeeze=False)[0]
    for panel, domain in zip(panels, domains, strict=True):
        for i, variant in enumerate(variants):
            runs = [r for r in results if r.variant == variant.name]
            x = [step for step, _ in runs[0].curve]
            values = [[scores[domain] for _, scores in r.curve] for r in runs]
            mean = [statistics.fmean(column) for column in zip(*values, strict=True)]
            style = "-" if variant.guard is not None else "--"
            panel.plot(x, mean, style, color=f"C{i}", linewidth=1.6, label=variant.name)
            if len(runs) > 1:
                low, high = ([f(column) for column in zip(*values, strict=True)] for f in (min, max))
                panel.fill_between(x, low, high, color=f"C{i}", alpha=0.08, linewidth=0)
        for j, name in enumerate(domains):
            panel.axvspan(j * steps, (j + 1) * steps, color="0.5", alpha=0.10 if name == domain else 0.0, linewidth=0)
            panel.text((j + 0.5) * steps, 0.02, f"learns {name}", ha="center", fontsize=7, color="0.35")
        panel.set(title=domain, xlabel="GRPO step", ylim=(0, 1), xlim=(0, steps * len(domains)))
    panels[0].set_ylabel("probability of the right answer")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(variants), frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
