"""One domain as the monitor sees it: baseline, evidence, alert."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .sequential import DropTest, Numbers

Given = float | Sequence[float | None]


@dataclass(frozen=True)
class Alert:
    """A domain fell.

    Attributes:
        domain, step: which, and the evaluation that showed it.
        drop, error: mean paired difference baseline - present, and its standard error, in units of the score.
        baseline, score: means over the examples compared.
        n: examples compared.
        p: anytime-valid p-value, corrected for the number of domains.
        alpha: bound on the probability of any false alarm in the run.
        span: size of the score range; the text speaks of points, hundredths of the range, only where it is 1.
    """

    domain: str
    step: int
    drop: float
    error: float
    baseline: float
    score: float
    n: int
    p: float
    alpha: float
    span: float = 1.0

    def __str__(self) -> str:
        points = f"{100 * self.drop:.1f} ± {100 * self.error:.1f} points"
        return (
            f"{self.domain} fell by {points if self.span == 1 else f'{self.drop:.3g} ± {self.error:.2g}'} "
            f"({self.baseline:.3f} -> {self.score:.3f}, {self.n} examples) at step {self.step}; "
            f"p = {self.p:.2g}, chance of any false alarm in this run at most {self.alpha:.0%}"
        )


class WatchedDomain:
    """Scores of one domain over a run, compared with its baseline.

    Args:
        test: gathers the evidence.
        domains: how many are tested: evidence of one has to be that much stronger.
        score_range: smallest and largest possible score.
        given: a known score, or the scores of another model on the same examples; None: earlier evaluations of this run.
        best: every earlier evaluation is a baseline, not the first alone.

    Attributes:
        latest: scores `[n]` of the last evaluation, NaN where not judged; None before the first.
        alerted: since the last rebase.
    """

    def __init__(
        self,
        name: str,
        test: DropTest,
        domains: int,
        score_range: tuple[float, float],
        given: Given | None,
        best: bool,
    ) -> None:
        self.name, self.test, self.domains, self.score_range, self.best = name, test, domains, score_range, best
        self.given = None if given is None else self.checked([given] if is_number(given) else given, "baseline")
        self.given_number = is_number(given)
        self.baselines: list[Numbers] = []
        self.latest: Numbers | None = None
        self.p = 1.0
        self.alerted = False

    @property
    def baseline_kind(self) -> str:
        """What the domain is compared with, in words."""
        if self.given is not None:
            return f"the known score {self.given[0]:g}" if self.given_number else "given scores"
        return "best" if self.best else "start"

    def pairs(self, values: Any) -> tuple[Numbers, list[Numbers]]:
        """Present scores `[n]`, and those to compare with, each `[n]`; none on a first evaluation. Changes nothing.

        Args:
            values: scores, or with fresh examples (scores, baseline's scores).

        Raises:
            ValueError: out of range, of another length than the baseline, without one that fresh examples need, or with two.
        """
        fresh, pair = self.test.examples == "fresh", None
        if fresh and isinstance(values, tuple) and len(values) == 2 and all(np.ndim(v) for v in values):
            values, pair = values
            if self.given is not None:
                raise ValueError(
                    f"scores of {self.name!r}: expected scores alone, to be compared with the known score "
                    f"{self.given[0]:g}, found a pair (scores, baseline's scores); give one of the two baselines"
                )
        present = self.checked(values, "scores")
        if pair is not None:
            against = [self.checked(pair, "baseline")]
        elif self.given is not None:
            against = [np.full(len(present), self.given[0]) if self.given_number else self.given]
        elif fresh:
            raise ValueError(
                f"scores of {self.name!r}: with fresh examples expected a pair (scores, baseline's scores on the same "
                f"examples), found scores alone; give them, or a known score as baseline={{{self.name!r}: ...}}"
            )
        else:
            against = self.baselines
        for other in against:
            if len(other) != len(present):
                raise ValueError(
                    f"scores of {self.name!r}: expected {len(other)}, one per example of the baseline in the same order, "
                    f"found {len(present)}; evaluate the same examples every time"
                )
        return present, against

    def checked(self, values: Any, what: str) -> Numbers:
        """The values as an array, None as NaN; ValueError: a value out of range, or none that is judged."""
        low, high = self.score_range
        scores = np.array(values, dtype=np.float64)  # None becomes NaN
        judged = scores[~np.isnan(scores)]
        wrong = judged[(judged < low - 1e-6) | (judged > high + 1e-6)]
        if scores.ndim != 1 or not judged.size or wrong.size:
            found = f"{wrong[0]:g}" if wrong.size else f"no judged example in an array of shape {scores.shape}"
            raise ValueError(
                f"{what} of {self.name!r}: expected a number from {low:g} to {high:g} (score_range) per example, found {found}"
            )
        return scores.clip(low, high)

    def add(self, present: Numbers, against: list[Numbers], tested: bool) -> dict[str, Any]:
        """One evaluation, as `pairs` gave it: what is recorded of it.

        Returns:
            "score" and "n" over what was judged; where there is something to compare with also "baseline", "drop" (to the best
            baseline, over examples judged in both), "error", "p"; "n" is then the number of pairs.
        """
        found: dict[str, Any] = {"score": float(np.nanmean(present)), "n": int((~np.isnan(present)).sum())}
        if against and tested:
            found |= self._compare(present, np.stack(against))
        self.latest = present
        own = self.given is None and self.test.examples == "fixed"
        if own and (self.best or not self.baselines):
            self.baselines.append(present)
        return found

    def _compare(self, present: Numbers, against: Numbers) -> dict[str, Any]:
        differences = against - present  # [R, n]
        scaled = differences / (self.score_range[1] - self.score_range[0])
        evidence = self.test.update(scaled if self.best else scaled[0])
        self.p = min(self.p, math.exp(min(0.0, math.log(self.domains) - evidence)))
        judged = ~np.isnan(differences)
        drops = np.where(judged, differences, 0.0).sum(1) / np.maximum(judged.sum(1), 1)
        worst = int(drops.argmax())
        d, n = differences[worst][judged[worst]], int(judged[worst].sum())
        return {
            "baseline": float(against[worst][judged[worst]].mean()) if n else math.nan,
            "drop": float(drops[worst]),
            "error": float(d.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan,
            "n": n,
            "p": self.p,
        }

    def rebase(self) -> None:
        """Compares with the latest evaluation from now on; a given or best baseline stays."""
        if self.best or self.given is not None or self.latest is None:
            return
        self.baselines = [self.latest]
        self.test.restart()
        self.p, self.alerted = 1.0, False

    def state_dict(self) -> dict[str, Any]:
        return {
            "test": self.test.state_dict(),
            "baselines": [as_json(b) for b in self.baselines],
            "latest": None if self.latest is None else as_json(self.latest),
            "p": self.p,
            "alerted": self.alerted,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.test.load_state_dict(state["test"])
        self.baselines = [np.array(b, dtype=np.float64) for b in state["baselines"]]
        self.latest = None if state["latest"] is None else np.array(state["latest"], dtype=np.float64)
        self.p, self.alerted = state["p"], state["alerted"]


def as_json(values: Numbers) -> list[float | None]:
    """As JSON can hold them."""
    return [None if math.isnan(v) else v for v in values.tolist()]


def read_baseline(source: Any, domains: Sequence[str]) -> dict[str, Given]:
    """What was given as a baseline, per domain: scores, or those in a file or files written by `DriftMonitor.save_scores`, of
    which those of other domains are left out.

    Raises:
        ValueError: a file that is none, or unknown domains.
    """
    if not isinstance(source, Mapping):
        merged: dict[str, Given] = {}
        for path in [source] if isinstance(source, (str, Path)) else source:
            try:
                merged |= json.loads(Path(path).read_text())["scores"]
            except (OSError, ValueError, KeyError, TypeError) as e:
                raise ValueError(
                    f"baseline: expected 'start', 'best', scores per domain, or a file written by save_scores, "
                    f"found {str(path)!r}: {e}"
                ) from e
        source = {name: scores for name, scores in merged.items() if name in domains}
    unknown = [name for name in source if name not in domains]
    if unknown:
        raise ValueError(f"baseline: expected domains out of {', '.join(domains)}, found {', '.join(unknown)}")
    return dict(source)


def is_number(value: Any) -> bool:
    """A known score, not the scores of examples."""
    return isinstance(value, numbers.Real)


def judge(
    watched: Mapping[str, WatchedDomain],
    scores: Mapping[str, Any],
    step: int,
    tested: bool,
    alpha: float,
    drop: float,
    span: float,
) -> tuple[dict[str, Any], list[Alert]]:
    """Takes in an evaluation: what is known of every domain now, and alerts of those that have fallen for the first time.

    Args:
        scores: As the monitor's `evaluate` gives them.
        tested: Whether this evaluation counts as evidence.
        alpha, drop, span: See the monitor; the last is the size of the range of scores.

    Raises:
        ValueError: Scores of an unknown domain, of another length, or out of range.
    """
    unknown = [name for name in scores if name not in watched]
    if unknown:
        raise ValueError(f"scores: expected domains out of {', '.join(watched)}, found {', '.join(unknown)}")
    pairs = {name: watched[name].pairs(values) for name, values in scores.items()}  # all before any is counted
    out: dict[str, Any] = {}
    alerts = []
    for name, (present, against) in pairs.items():
        found = out[name] = watched[name].add(present, against, tested)
        if "p" not in found:
            continue
        found["fallen"] = found["p"] <= alpha and found["drop"] >= drop
        if found["fallen"] and not watched[name].alerted:
            watched[name].alerted = True
            told = {key: found[key] for key in ("drop", "error", "baseline", "n", "p")}
            alerts.append(Alert(name, step, score=found["baseline"] - found["drop"], alpha=alpha, span=span, **told))
    return out, alerts
