"""Why did a domain fall, or never rise? The likeliest causes of a run's metrics, each with its figures and a first remedy.

Every rule looks at one known cause and says how strongly the figures speak for it, from 0 to 1; nothing is named where nothing
is lost. A diagnosis is an ordering of what to try first, not a proof: docs/monitor.md says what would be one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .causes import LOST, RULES, Cause, Loss
from .report.record import RunRecord

DIPPED = 0.05  # of the score range: what came back is looked into from here on


@dataclass(frozen=True)
class Diagnosis:
    """What a run lost, and the likeliest causes.

    Attributes:
        run: the directory.
        lost: who fell or never rose.
        causes: strongest first; empty where nothing is lost.
        notes: what could not be looked into, and what would have to be recorded.
    """

    run: str
    lost: list[Loss] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def diagnose(run: Path | str, limit: int = 3) -> Diagnosis:
    """Reads a run's directory, with the metrics.jsonl of the trainer, or of a `JsonLines` sink as far as its lines go.

    Args:
        limit: causes named at most.

    Raises:
        RunError: no run there, or a damaged file.
    """
    record = RunRecord.read(run)
    if not any(record.series("eval", name) for name in record.domains):
        return Diagnosis(str(run), notes=["No domain was evaluated: give domains eval_examples, and set eval_every."])
    lost = [loss for name in record.domains for loss in _losses(record, name)]
    if not lost:
        return Diagnosis(str(run))
    causes = sorted((c for rule in RULES for c in rule(record, lost)), key=lambda c: -c.strength)
    return Diagnosis(str(run), lost, causes[:limit], list(_notes(record, causes)))


# ------------------------------------------------------------------------------------------------------------ what is lost


def _losses(record: RunRecord, name: str) -> Iterator[Loss]:
    scores, span = record.series("eval", name), record.span or 1.0
    if len(scores) < 2:
        return
    errors = dict(record.series("monitor", "domains", name, "error"))
    best, at = scores[0][1], scores[0][0]
    worst: Loss | None = None
    for step, score in scores:
        if score > best:
            best, at = score, step
        error = errors.get(step, 0.0)
        least = LOST if step == scores[-1][0] else DIPPED
        if best - score >= max(least * span, 2 * error) and (worst is None or best - score > worst.best - worst.score):
            worst = Loss(name, best, at, score, step, scores[-1][1], error=error)
    if worst is not None:
        yield worst
        return
    trained = [step for step, _ in record.series("batch_share", name)]
    gain, room = scores[-1][1] - scores[0][1], scores[0][1] < 0.9 * span
    if len(trained) >= 10 and gain < LOST * span and room:
        yield Loss(name, best, at, scores[-1][1], scores[-1][0], scores[-1][1], stalled=True)


def _notes(record: RunRecord, causes: Sequence[Cause]) -> Iterator[str]:
    if not record.found("monitor", "split"):
        yield "Conflict and curvature were not recorded: DriftMonitor(..., model=model, split_every=1) tells them apart."
    if not causes:
        yield "None of the known causes fits: look at `carerl report`, and compare with a run at half the learning rate."
