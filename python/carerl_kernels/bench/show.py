"""How results look: lines and a table in the terminal, and the roofline picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ..grpo.plots import new_figure
from .measure import CaseResult, Spread
from .variants import NOT_RUN, OURS

if TYPE_CHECKING:
    from .llm import GuardResult

OTHERS = ("textbook", "sharp", "compiled")


class Printer:
    """Prints to a rich console."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console()
        if not self.console.is_terminal:
            self.console.width = 180  # a file has no edge to wrap at

    def line(self, text: str) -> None:
        self.console.print(text, highlight=False)

    def progress(self, name: str) -> None:
        if self.console.is_terminal:
            self.line(f"[dim]{name} ...")

    def environment(self, found: Mapping[str, Any]) -> None:
        self.line(
            f"{found['cpu']}, {found['isa']}, {found['threads']} threads, torch {found['versions']['torch']}; streaming "
            f"read {found['bandwidth_gbps']:.1f} GB/s ({found['bandwidth_source']}); ops served by "
            + ", ".join(sorted(set(found["serves"].values())))
        )
        if (found["load_average"] or 0) > 0.5:
            self.line(
                f"[yellow]load average {found['load_average']:.1f}: others use this machine, expect wide quartiles"
            )

    def case(self, result: CaseResult) -> None:
        """One line while the run goes on."""
        own = result.variants[OURS]
        parts = [f"{name} {ratio(v.ratio)}" for name, v in result.variants.items() if name != OURS]
        self.line(
            f"{result.case.name}: {milliseconds(own.seconds)}, {own.gbps:.1f} GB/s, {percent(own.percent)}; "
            + ", ".join(parts)
        )
        for name, reason in result.missing.items():
            if reason != NOT_RUN:
                self.line(f"  [yellow]{name}: {reason}")

    def table(self, results: Sequence[CaseResult]) -> None:
        """All cases at the end."""
        headings = ("case", "time, ms", "GB/s", "% of read", *OTHERS, "extra memory")
        table = _table("median \\[quartiles]; ratios are their time over ours, in the same rounds", headings)
        for result in results:
            own = result.variants[OURS]
            cells = [result.case.name, milliseconds(own.seconds, ""), f"{own.gbps:.1f}", percent(own.percent, "")]
            for other in OTHERS:
                found = result.variants.get(other)
                cells.append("" if found is None else ratio(found.ratio) + (f" ({found.note})" if found.note else ""))
            table.add_row(*cells, size(own.peak_extra_bytes))
        self.console.print(table)

    def guard(self, results: Sequence[GuardResult]) -> None:
        headings = ("setting", "N", "bases", "step, s", "guard, ms", "share of step", "peak without", "with")
        table = _table("guard on a training step; median \\[quartiles] over steps", headings)
        for r in results:
            cells = [
                r.setting,
                f"{r.N:.4g}",
                size(r.bases_bytes),
                f"{r.plain_seconds.median:.2f} \\[{r.plain_seconds.low:.2f}, {r.plain_seconds.high:.2f}]",
                f"{r.guard_seconds.median * 1e3:.0f}",
                percent(r.share, " %", 2),
                size(r.peak_without),
                size(r.peak_with),
            ]
            table.add_row(*cells)
        self.console.print(table)

    def overhead(self, found: Mapping[str, Spread]) -> None:
        table = _table("one call on 64 elements, microseconds, median \\[quartiles]", ("op", "us"))
        for name, spread in found.items():
            table.add_row(name, f"{spread.median:.1f} [{spread.low:.1f}, {spread.high:.1f}]".replace("[", "\\["))
        self.console.print(table)


def _table(title: str, headings: Sequence[str]) -> Table:
    """Names on the left, numbers on the right."""
    table = Table(title=title)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    return table


def milliseconds(spread: Spread, unit: str = " ms") -> str:
    return f"{spread.median * 1e3:.3g} \\[{spread.low * 1e3:.3g}, {spread.high * 1e3:.3g}]{unit}"


def percent(spread: Spread, unit: str = " %", digits: int = 0) -> str:
    return f"{spread.median:.{digits}f} \\[{spread.low:.{digits}f}, {spread.high:.{digits}f}]{unit}"


def ratio(spread: Spread) -> str:
    return f"{spread.median:.2f}x \\[{spread.low:.2f}, {spread.high:.2f}]"


def size(count: int | None) -> str:
    if count is None:
        return "not available"
    return f"{count / 2**20:.1f} MiB" if count >= 1 << 20 else f"{count / 2**10:.0f} KiB"


def roofline(results: Sequence[CaseResult], environment: Mapping[str, Any], path: Path | str) -> None:
    """Arithmetic intensity (operations per counted byte) against GFLOP/s, with the line that streaming reads allow.

    Every competitor is charged with the operations and bytes of the op, so all of a case lie above each other and the
    vertical distance is the ratio of times.
    """
    figure = new_figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    colours = {OURS: "tab:blue", "sharp": "tab:orange", "compiled": "tab:green", "textbook": "tab:red"}
    intensities = [result.case.flops / result.case.bytes for result in results] or [1.0]
    ends = [min(intensities) / 1.5, max(intensities) * 1.5]
    axes.plot(ends, [environment["bandwidth_gbps"] * end for end in ends], "k-", lw=1, label="streaming read")
    for mark, (name, colour) in zip("o^sv", colours.items(), strict=True):
        shown = [(r.case, r.variants[name]) for r in results if name in r.variants]
        if shown:
            x = [case.flops / case.bytes for case, _ in shown]
            y = [case.flops / variant.seconds.median / 1e9 for case, variant in shown]
            axes.scatter(x, y, marker=mark, color=colour, s=28, alpha=0.8, label=name, zorder=3 if name == OURS else 2)
    labelled: set[tuple[str, str]] = set()
    for result in results:
        key = (result.case.op, result.case.dtypes)
        if key not in labelled:
            labelled.add(key)
            at = (result.case.flops / result.case.bytes, result.case.flops / result.variants[OURS].seconds.median / 1e9)
            axes.annotate(" ".join(key), at, fontsize=6, xytext=(4, 3), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte moved", ylabel="GFLOP/s")
    axes.set_title(f"{environment['cpu']}, {environment['threads']} threads")
    axes.legend(loc="upper left", fontsize=8)
    axes.grid(alpha=0.3, which="both", lw=0.4)
    figure.savefig(path, dpi=150)
