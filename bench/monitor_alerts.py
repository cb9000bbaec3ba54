"""`python bench/monitor_alerts.py`: how often the monitor is wrong, and how late it is right.

A simulated run has three domains and 40 evaluations after that of the start. Every example has a success probability, drawn from
a U-shaped Beta distribution with mean .6; before every evaluation 3 % of the examples draw theirs anew, as models change without
becoming worse. In the runs with a drop, the first domain's probabilities are scaled so that its expected score is lower by the
drop from the tenth evaluation on.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import typer
from carerl_kernels.monitor import DriftMonitor
from carerl_kernels.monitor.sequential import Examples, Numbers

DOMAINS = ("first", "second", "third")
LOOKS, BEGIN, CHURN = 40, 10, 0.03
ALPHA_BETA = (0.75, 0.5)  # mean .6, most examples easy or hard
SAMPLES = {"exact": 0, "1 sample": 1, "4 samples": 4}


@dataclass(frozen=True)
class Case:
    """What is simulated.

    Attributes:
        examples, baseline: as the monitor's arguments; n: examples per domain; scores: a key of SAMPLES.
    """

    examples: Examples
    baseline: str
    scores: str
    n: int


@dataclass
class Outcome:
    """Attributes: false: runs with any false alarm; delays: evaluations from the drop to its alert, per run that had one."""

    runs: int = 0
    false: int = 0
    delays: list[int] | None = None


def simulate(
    case: Case, drop: float, runs: int, *, seed: int = 0, alert_drop: float = 0.02, alpha: float = 0.05
) -> Outcome:
    """Runs of which the first domain falls by `drop` (0: none)."""
    outcome = Outcome(delays=[])
    for run in range(runs):
        rng = np.random.default_rng([seed, run])
        monitor = DriftMonitor(
            DOMAINS,
            examples=case.examples,
            baseline=case.baseline,
            drop=alert_drop,
            alpha=alpha,
            planned=LOOKS,
        )
        skills = {name: rng.beta(*ALPHA_BETA, case.n) for name in DOMAINS}
        outcome.runs += 1
        for look in range(LOOKS + 1):
            scores = {}
            for name in DOMAINS:
                lost = drop if name == DOMAINS[0] and look >= BEGIN else 0.0
                scores[name] = _scores(case, rng, skills[name], lost)
            found = monitor.step(look, scores=scores).get("alerts", [])
            if any(a["domain"] != DOMAINS[0] or drop == 0 or look < BEGIN for a in found):
                outcome.false += 1
                break
            if found:
                assert outcome.delays is not None
                outcome.delays.append(look - BEGIN + 1)
                break
    return outcome


def _scores(case: Case, rng: np.random.Generator, skill: Numbers, drop: float) -> Numbers | tuple[Numbers, Numbers]:
    """Scores of one evaluation; `skill` changes in place. With fresh examples a pair: present, and the start's."""
    start = rng.beta(*ALPHA_BETA, case.n) if case.examples == "fresh" else skill
    present = start.copy() if case.examples == "fresh" else skill
    moved = rng.random(case.n) < CHURN
    present[moved] = rng.beta(*ALPHA_BETA, int(moved.sum()))
    mean = ALPHA_BETA[0] / sum(ALPHA_BETA)
    seen = _judged(case, rng, present * (1 - drop / mean))
    return (seen, _judged(case, rng, start)) if case.examples == "fresh" else seen


def _judged(case: Case, rng: np.random.Generator, skill: Numbers) -> Numbers:
    samples = SAMPLES[case.scores]
    return rng.binomial(samples, skill) / samples if samples else skill.copy()


def table(cases: list[Case], drops: list[float], runs: int, power_runs: int) -> str:
    """Markdown: false alarms over `runs`, and per drop the share detected within the run and the median delay."""
    heads = [
        "examples",
        "baseline",
        "scores",
        "n",
        f"false alarms in {runs}",
        *(f"{100 * d:.0f} points" for d in drops),
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for case in cases:
        cells = [case.examples, case.baseline, case.scores, str(case.n), str(simulate(case, 0.0, runs).false)]
        for drop in drops:
            outcome = simulate(case, drop, power_runs, seed=1)
            delays = sorted(outcome.delays or [])
            share = len(delays) / outcome.runs
            cells.append(f"{share:.0%}, {delays[len(delays) // 2]}" if delays else "0%")
        lines.append("| " + " | ".join(cells) + " |")
        typer.echo(lines[-1], err=True)
    return "\n".join(lines)


def main(
    runs: Annotated[int, typer.Option(min=1, help="Simulated runs without drift.")] = 200,
    power_runs: Annotated[int, typer.Option(min=1, help="Simulated runs per drop.")] = 50,
    n: Annotated[list[int] | None, typer.Option(help="Examples per domain; may be repeated.")] = None,
    only: Annotated[str | None, typer.Option(help="Only these rows: fixed-start, fixed-best or fresh-start.")] = None,
) -> None:
    """Prints the table of docs/monitor.md; about half an hour on one core."""
    logging.getLogger("carerl_kernels.monitor").setLevel(logging.ERROR)  # alerts are counted here, not told
    kinds = {
        "fixed-start": ("exact", "1 sample", "4 samples"),
        "fixed-best": ("exact", "1 sample"),
        "fresh-start": ("1 sample", "4 samples"),
    }
    if only is not None and only not in kinds:
        raise typer.BadParameter(f"--only: expected {', '.join(kinds)}, found {only!r}")
    cases = [
        Case(kind.split("-")[0], kind.split("-")[1], scores, size)  # type: ignore[arg-type]
        for kind in ([only] if only else kinds)
        for scores in kinds[kind]
        for size in n or [128, 512, 2048]
    ]
    typer.echo(table(cases, [0.02, 0.03, 0.05, 0.1], runs, power_runs))
    typer.echo("\nPer drop: share of runs in which it was alerted, and the median number of evaluations until then.")


if __name__ == "__main__":
    typer.run(main)
