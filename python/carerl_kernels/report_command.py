"""`carerl report` and `carerl diagnose`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._command import Json, plain_errors, show_json

Run = Annotated[Path, typer.Argument(help="Directory of a run: metrics.jsonl and what stands beside it.")]


def report(
    run: Run,
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


def diagnose(
    run: Run,
    as_json: Json = False,
    limit: Annotated[int, typer.Option(min=1, help="Causes named at most.")] = 3,
) -> None:
    """Why a domain fell or never rose: the likeliest causes of a run, their figures, and what to try first."""
    with plain_errors("diagnose", "train"):
        from .monitor.diagnose import diagnose as read

        found = read(run, limit)
    if as_json:
        return show_json(found)
    if not found.lost and not found.notes:
        typer.echo("Nothing is lost: no domain fell below its best or stayed where it was.")
    for loss in found.lost:
        if loss.stalled:
            typer.echo(f"{loss.domain} never rose: {loss.score:.3f} at step {loss.step}")
        else:
            way = f"{loss.best:.3f} at step {loss.at}, {loss.score:.3f} at step {loss.step}; {loss.end:.3f} at the end"
            typer.echo(f"{loss.domain} fell: {way}")
    for number, cause in enumerate(found.causes, start=1):
        typer.echo(f"{number}. {cause.name} ({', '.join(cause.domains)}; strength {cause.strength:.2f})")
        for figure in cause.evidence:
            typer.echo(f"     {figure.text}")
        typer.echo(f"   first: {cause.remedy}")
    for note in found.notes:
        typer.echo(note)
