"""`carerl report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._command import plain_errors


def report(
    run: Annotated[Path, typer.Argument(help="Directory of a run: metrics.jsonl and what stands beside it.")],
    out: Annotated[Path | None, typer.Option(help="HTML file; report.html in the directory by default.")] = None,
) -> None:
    """One self-contained HTML page of a run: domains, alerts, interference, guard, cost."""
    with plain_errors("report", "train"):
        from .monitor.report import write_report

        path, page = write_report(run, out)
    typer.echo(page.summary)
    for card in page.cards:
        score = "" if card.score is None else f"{card.score:.3f}"
        typer.echo(f"  {card.name:<16} {score:<6} {card.status}: {card.verdict}")
    if page.cost_text:
        typer.echo(page.cost_text)
    for what, remedy in page.record.missing.items():
        typer.echo(f"Not recorded: {what}. Needs: {remedy}.")
    typer.echo(f"Report: {path}")
