"""The demonstration's summary: numbers, a table, an honest sentence about them, a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..grpo.plots import new_figure
from .cells import Record
from .costs import memory
from .grid import Cell
from .grpo import guard_share, scores_of

if TYPE_CHECKING:
    from rich.console import Console

# What each guard is compared with: of several settings of one idea the one that did best here, a choice in its favour.
GUARDS = ("guarded", "probed", "instant")
BASELINES = {
    "the best plain learning rate": ("naive", "lower_lr", "lowest_lr"),
    "the best replay": ("replay", "replay_low"),
    "rehearsal": ("rehearse",),
}
Lines = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Variant:
    """One way to train, over all seeds.

    Attributes:
        cell: Of its first seed.
        records: Per seed; scores are exact here, and seconds are those of training and evaluation.
        curves: Per seed the step and the accuracies of every evaluation.
    """

    cell: Cell
    records: list[Record]
    curves: list[list[tuple[int, list[float]]]]

    @classmethod
    def of(cls, runs: Sequence[tuple[Cell, Record, Lines]]) -> Variant:
        """Of a cell per seed, its record and its metrics, which are exact where records are rounded."""
        domains = runs[0][1].domains
        records = [
            replace(
                record,
                scores=scores_of(lines, domains),
                seconds=sum(sum(line["seconds"].values()) for line in lines),
                guard_share=guard_share(lines),
            )
            for _, record, lines in runs
        ]
        curves = [[(x["step"], [x["eval"][d] for d in domains]) for x in lines if "eval" in x] for *_, lines in runs]
        return cls(runs[0][0], records, curves)

    @property
    def name(self) -> str:
        return self.cell.method_name

    @property
    def domains(self) -> list[str]:
        """In the order they were learned."""
        return self.records[0].domains

    def of_seeds(self, measure: str) -> list[float]:
        """A measure of `Record`, per seed."""
        return [getattr(record, measure) for record in self.records]

    def accuracy(self, when: str) -> dict[str, list[float]]:
        """Per domain and seed: "final", "after_own_stage", or at the "start", before everything."""
        stage = {"start": 0, "final": -1}
        return {d: [r.scores[stage.get(when, r.own(d))][i] for r in self.records] for i, d in enumerate(self.domains)}

    @property
    def guard_time_share(self) -> float:
        """Share of the seconds spent in the guard, probes included."""
        return fmean(record.guard_share or 0.0 for record in self.records)

    @property
    def touched_share(self) -> float | None:
        """Energy of the guard's corrections over energy of all raw updates it saw; None without guard."""
        touched = [record.touched for record in self.records if record.touched is not None]
        return fmean(touched) if touched else None

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""

        def values(found: Sequence[float]) -> dict[str, Any]:
            return {"mean": fmean(found), "values": list(found)}

        return {
            **{
                part: {domain: values(found) for domain, found in self.accuracy(part).items()}
                for part in ("final", "after_own_stage", "start")
            },
            "average": values(self.of_seeds("average")),
            "forgetting": values(self.of_seeds("forgetting")),
            "new_domain": values(self.of_seeds("new")),
            "guard_time_share": self.guard_time_share,
            "touched_share": self.touched_share,
            "seconds": values(self.of_seeds("seconds")),
        }


@dataclass(frozen=True)
class Summary:
    """All variants.

    Attributes:
        seeds: How many.
        seconds: Wall-clock seconds of everything.
        variants: In the order of the grid.
    """

    seeds: int
    seconds: float
    variants: Sequence[Variant]

    def as_dict(self) -> dict[str, Any]:
        """JSON form, as `run_demo` documents it."""
        return {
            "domains": self.variants[0].domains,
            "seeds": self.seeds,
            "seconds": self.seconds,
            "variants": {v.name: v.as_dict() for v in self.variants},
        }

    def verdicts(self) -> list[str]:
        """One sentence per guard: seed by seed against the best plain learning rate, the best replay and rehearsal."""
        sentences, named = [], {v.name: v for v in self.variants}
        for guard in (named[n] for n in GUARDS if n in named):
            parts = []
            for label, names in BASELINES.items():
                present = [named[n] for n in names if n in named]
                if present:
                    parts.append(_compare(guard, max(present, key=lambda v: fmean(v.of_seeds("average"))), label))
            if parts:
                sentences.append(f"{guard.name} {'; '.join(parts)}.")
        return sentences


def _compare(guard: Variant, other: Variant, label: str) -> str:
    gaps = [g - o for g, o in zip(guard.of_seeds("average"), other.of_seeds("average"), strict=True)]
    wins = sum(gap > 0 for gap in gaps)
    return (
        f"against {other.name} ({label}): average {fmean(gaps):+.3f}, better on {wins} of {len(gaps)} seeds, "
        f"new domains {fmean(guard.of_seeds('new')) - fmean(other.of_seeds('new')):+.3f}"
    )


def _cell(values: Sequence[float]) -> str:
    """Mean, and half the range over seeds where there are several: ".62±.03"."""
    mean = _short(fmean(values))
    return mean if len(values) < 2 else f"{mean}±{_short((max(values) - min(values)) / 2)}"


def _short(value: float) -> str:
    """Two digits (the third is noise) without the leading zero: the table fits in 80 columns."""
    text = f"{value:.2f}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def print_summary(console: Console, summary: Summary) -> None:
    """The table, what its columns mean, and the comparison whoever it favours."""
    from rich import box
    from rich.table import Table

    first = summary.variants[0]
    domains, steps = first.domains, first.cell.recipe.stages[0].steps
    title = f"{' -> '.join(domains)}, {steps} GRPO steps each, {summary.seeds} seed{'s' if summary.seeds > 1 else ''}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column("variant", style="bold", no_wrap=True)
    for column in (*domains, "average", "forget", "new", "touched", "guard"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in summary.variants:
        touched = "" if row.touched_share is None else f"{row.touched_share:.1%}"
        share = f"{row.guard_time_share:.0%}" if row.guard_time_share else ""
        columns = [*row.accuracy("final").values(), *map(row.of_seeds, ("average", "forgetting", "new"))]
        table.add_row(row.name, *map(_cell, columns), touched, share)
    console.print()
    console.print(table)
    start = ", ".join(f"{d} {fmean(v):.2f}" for d, v in first.accuracy("start").items())
    console.print(
        "Accuracy: exact probability of the right answer at temperature 1 on held-out examples "
        f"(before training: {start}).\n"
        "Domain columns and average: at the end. "
        f"Forget: drop since a domain's own stage, mean over all but the last ({', '.join(domains[:-1])}).\n"
        f"New: accuracy right after a domain's own stage, mean over all but the first ({', '.join(domains[1:])}). "
        "±: half the range over seeds.\n"
        "Touched: energy of the guard's corrections over energy of all updates it saw. "
        "Guard: its share of wall-clock time, recording and probes included.\n",
        style="dim",
    )
    for row in summary.variants:
        keeps = "" if memory(row.cell) == "none" else f" [dim](keeps {memory(row.cell)})[/]"
        console.print(f"  [bold]{row.name:<10}[/] {row.cell.method.text}{keeps}")
    for sentence in summary.verdicts():
        console.print(sentence)
    console.print(f"{summary.seconds:.0f} s in all.")


def plot_curves(path: Path, variants: Sequence[Variant]) -> None:
    """Accuracy of each domain over time: a panel per domain, a line per variant (mean; band: range over seeds)."""
    stages = variants[0].cell.recipe.stages
    ends = [sum(stage.steps for stage in stages[:i]) for i in range(len(stages) + 1)]
    figure = new_figure(figsize=(4.2 * len(stages), 3.9), layout="constrained")
    panels = figure.subplots(1, len(stages), sharey=True, squeeze=False)[0]
    for d, (panel, own) in enumerate(zip(panels, stages, strict=True)):
        for i, variant in enumerate(variants):
            x = [step for step, _ in variant.curves[0]]
            columns = list(zip(*([scores[d] for _, scores in curve] for curve in variant.curves), strict=True))
            style = "-" if variant.cell.recipe.guard is not None else "--"
            panel.plot(x, list(map(fmean, columns)), style, color=f"C{i}", linewidth=1.6, label=variant.name)
            if len(variant.curves) > 1:
                panel.fill_between(
                    x, list(map(min, columns)), list(map(max, columns)), color=f"C{i}", alpha=0.08, linewidth=0
                )
        for (begin, end), stage in zip(pairwise(ends), stages, strict=True):
            panel.axvspan(begin, end, color="0.5", alpha=0.10 if stage is own else 0.0, linewidth=0)
            panel.text((begin + end) / 2, 0.02, f"learns {stage.name}", ha="center", fontsize=7, color="0.35")
        panel.set(title=own.name, xlabel="GRPO step", ylim=(0, 1), xlim=(0, ends[-1]))
    panels[0].set_ylabel("probability of the right answer")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(variants), frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
