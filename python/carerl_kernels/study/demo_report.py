"""The demonstration's summary: numbers, a table, an honest sentence about them, a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..grpo.plots import new_figure
from .costs import kept
from .demo import RunResult
from .grid import Cell

if TYPE_CHECKING:
    from rich.console import Console

# What each guard is compared with: of several settings of one idea the one that did best here, a choice in its favour.
GUARDS = ("guarded", "probed", "instant")
BASELINES = {
    "the best plain learning rate": ("naive", "lower_lr", "lowest_lr"),
    "the best replay": ("replay", "replay_low"),
    "rehearsal": ("rehearse",),
}


@dataclass(frozen=True)
class VariantSummary:
    """One variant over all seeds.

    Attributes:
        runs: A run per seed, in order, of domains in the order they were learned.
        name: Of the variant.
    """

    name: str
    runs: Sequence[RunResult]

    @property
    def domains(self) -> list[str]:
        return list(self.runs[0].after_own_stage)

    def of(self, part: str) -> dict[str, list[float]]:
        """Accuracies per domain: "start" (before everything), "after_own_stage", "final" (at the end)."""
        found = [r.curve[0][1] if part == "start" else getattr(r, part) for r in self.runs]
        return {d: [scores[d] for scores in found] for d in self.domains}

    @property
    def average(self) -> list[float]:
        """Mean over domains of the final accuracy."""
        return [statistics.fmean(r.final[d] for d in self.domains) for r in self.runs]

    @property
    def forgetting(self) -> list[float]:
        """Mean over all but the last domain of after_own_stage - final."""
        return [statistics.fmean(r.after_own_stage[d] - r.final[d] for d in self.domains[:-1]) for r in self.runs]

    @property
    def new_domain(self) -> list[float]:
        """Mean over all but the first domain of after_own_stage: stages in which there is something to forget."""
        return [statistics.fmean(r.after_own_stage[d] for d in self.domains[1:]) for r in self.runs]

    @property
    def guard_time_share(self) -> float:
        return statistics.fmean(r.guard_time_share for r in self.runs)

    @property
    def touched_share(self) -> float | None:
        touched = [r.touched_share for r in self.runs if r.touched_share is not None]
        return statistics.fmean(touched) if touched else None

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""

        def values(found: Sequence[float]) -> dict[str, Any]:
            return {"mean": statistics.fmean(found), "values": list(found)}

        return {
            **{p: {d: values(v) for d, v in self.of(p).items()} for p in ("final", "after_own_stage", "start")},
            **{measure: values(getattr(self, measure)) for measure in ("average", "forgetting", "new_domain")},
            "guard_time_share": self.guard_time_share,
            "touched_share": self.touched_share,
            "seconds": values([r.seconds for r in self.runs]),
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
    def of(cls, results: Sequence[RunResult], variants: Sequence[str], seeds: int, seconds: float) -> Summary:
        """Group results by variant, seeds in order."""
        ordered = sorted(results, key=lambda r: r.seed)
        by_name = {name: VariantSummary(name, [r for r in ordered if r.variant == name]) for name in variants}
        return cls(tuple(results[0].after_own_stage), seeds, seconds, by_name)

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
        for guard in (self.variants[n] for n in GUARDS if n in self.variants):
            parts = []
            for label, names in BASELINES.items():
                present = [self.variants[n] for n in names if n in self.variants]
                if present:
                    best = max(present, key=lambda v: statistics.fmean(v.average))
                    parts.append(_compare(guard, best, label))
            if parts:
                sentences.append(f"{guard.name} {'; '.join(parts)}.")
        return sentences


def _compare(guard: VariantSummary, other: VariantSummary, label: str) -> str:
    gaps = [g - o for g, o in zip(guard.average, other.average, strict=True)]
    wins = sum(gap > 0 for gap in gaps)
    learning = statistics.fmean(guard.new_domain) - statistics.fmean(other.new_domain)
    return (
        f"against {other.name} ({label}): average {statistics.fmean(gaps):+.3f}, "
        f"better on {wins} of {len(gaps)} seeds, new domains {learning:+.3f}"
    )


def _cell(values: Sequence[float]) -> str:
    """Mean, and half the range over seeds where there are several: ".62±.03"."""
    mean = _short(statistics.fmean(values))
    return mean if len(values) < 2 else f"{mean}±{_short((max(values) - min(values)) / 2)}"


def _short(value: float) -> str:
    """Two digits (the third is noise) without the leading zero: the table fits in 80 columns."""
    text = f"{value:.2f}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def print_summary(console: Console, summary: Summary, cells: Sequence[Cell]) -> None:
    """The table, what its columns mean, and the comparison whoever it favours; of each variant a cell says what it is."""
    from rich import box
    from rich.table import Table

    names, steps = " -> ".join(summary.domains), cells[0].recipe.stages[0].steps
    title = f"{names}, {steps} GRPO steps each, {summary.seeds} seed{'s' if summary.seeds > 1 else ''}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column("variant", style="bold", no_wrap=True)
    for column in (*summary.domains, "average", "forget", "new", "touched", "guard"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in summary.variants.values():
        touched = "" if row.touched_share is None else f"{row.touched_share:.1%}"
        share = f"{row.guard_time_share:.0%}" if row.guard_time_share else ""
        columns = [*row.of("final").values(), row.average, row.forgetting, row.new_domain]
        table.add_row(row.name, *map(_cell, columns), touched, share)
    console.print()
    console.print(table)
    first = next(iter(summary.variants.values()))
    start = ", ".join(f"{d} {statistics.fmean(v):.2f}" for d, v in first.of("start").items())
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
    for cell in cells:
        memory = "" if kept(cell) == "none" else f" [dim](keeps {kept(cell)})[/]"
        console.print(f"  [bold]{cell.method_name:<10}[/] {cell.method.text}{memory}")
    for sentence in summary.verdicts():
        console.print(sentence)
    console.print(f"{summary.seconds:.0f} s in all.")


def plot_curves(path: Path, results: Sequence[RunResult], cells: Sequence[Cell]) -> None:
    """Accuracy of each domain over time: a panel per domain, a line per variant (mean; band: range over seeds)."""
    stages = cells[0].recipe.stages
    ends = [sum(stage.steps for stage in stages[:i]) for i in range(len(stages) + 1)]
    figure = new_figure(figsize=(4.2 * len(stages), 3.9), layout="constrained")
    panels = figure.subplots(1, len(stages), sharey=True, squeeze=False)[0]
    for panel, domain in zip(panels, (stage.name for stage in stages), strict=True):
        for i, cell in enumerate(cells):
            runs = [r for r in results if r.variant == cell.method_name]
            x = [step for step, _ in runs[0].curve]
            values = [[scores[domain] for _, scores in r.curve] for r in runs]
            mean = [statistics.fmean(column) for column in zip(*values, strict=True)]
            style = "-" if cell.recipe.guard is not None else "--"
            panel.plot(x, mean, style, color=f"C{i}", linewidth=1.6, label=cell.method_name)
            if len(runs) > 1:
                low, high = ([f(column) for column in zip(*values, strict=True)] for f in (min, max))
                panel.fill_between(x, low, high, color=f"C{i}", alpha=0.08, linewidth=0)
        for begin, end, stage in zip(ends, ends[1:], stages, strict=False):
            panel.axvspan(begin, end, color="0.5", alpha=0.10 if stage.name == domain else 0.0, linewidth=0)
            panel.text((begin + end) / 2, 0.02, f"learns {stage.name}", ha="center", fontsize=7, color="0.35")
        panel.set(title=domain, xlabel="GRPO step", ylim=(0, 1), xlim=(0, ends[-1]))
    panels[0].set_ylabel("probability of the right answer")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(cells), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
