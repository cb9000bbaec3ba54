"""DriftMonitor: does one domain fall while others are trained? Works in any loop, with or without a guard."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from torch import nn

from .._files import write_bytes_atomically
from .gradients import GradientKeeper
from .guarded import guard_figures
from .sequential import DropTest, Examples
from .sinks import Sink

Scores = Sequence[float | None]
Numbers = NDArray[np.float64]
Baseline = float | Scores
_log = logging.getLogger(__name__)


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

    def __str__(self) -> str:
        return (
            f"{self.domain} fell by {100 * self.drop:.1f} ± {100 * self.error:.1f} points "
            f"({self.baseline:.3f} -> {self.score:.3f}, {self.n} examples) at step {self.step}; "
            f"p = {self.p:.2g}, chance of any false alarm in this run at most {self.alpha:.0%}"
        )


class DriftMonitor:
    """Held-out evaluation per domain, an alert when one falls, and figures of who pulls where.

    Call :meth:`step` once per training step. A domain is alerted once it is at least ``drop`` below its baseline *and* a
    sequential test on paired scores says that this is no accident; see :mod:`carerl_kernels.monitor.sequential`.

    Args:
        domains: their names.
        evaluate: gives the scores of held-out examples per domain, always in the same order; None for an example that could not
            be judged. None: scores are handed to :meth:`step` (the reference trainer hands over its own evaluations).
        every: steps between calls of ``evaluate``; the first call of :meth:`step` evaluates, too.
        baseline: what domains are compared with. "start": their own first evaluation (since :meth:`rebase`). "best": every
            earlier evaluation of the run, at the price of some power: for mixed runs, in which domains rise before they fall.
            Else, per domain, a known score or the scores of a single-domain model on the same examples; or files of these
            (:meth:`save_scores`). Domains that are not given are compared with their start.
        test_from: evaluations at earlier steps are recorded, not tested: a baseline of another run has to be reached first.
        examples: "fixed": the same held-out examples at every evaluation. "fresh": others each time, which adds up evidence over
            evaluations; ``evaluate`` then gives (scores, baseline's scores on the same examples) per domain, unless the baseline
            is a known score.
        drop: alerts are for drops of at least this (0.03: three points of an accuracy).
        alpha: probability of any false alarm, over all domains and the whole run, at most.
        tolerance: true drops up to this count as none.
        planned: evaluations expected in the run. More are fine; far fewer or more cost power.
        score_range: smallest and largest possible score.
        model: needed for :meth:`gradients`: a module, or pairs of name and parameter.
        gradients_every: steps between comparisons of gradients, see :meth:`gradients_due`; 0: never.
        guard: its report is recorded at every evaluation.
        sinks: get every step's line. Give them to one process only.
        on_alert: called with every alert, after the sinks.

    Attributes:
        alerts: all so far.
        seconds: spent per part: evaluate, gradients, test, guard, sinks.

    Raises:
        ValueError: an argument out of range, named with what was expected.
    """

    def __init__(
        self,
        domains: Sequence[str],
        evaluate: Callable[[], Mapping[str, Any]] | None = None,
        *,
        every: int = 50,
        baseline: str | Path | Sequence[str | Path] | Mapping[str, Baseline] = "start",
        test_from: int = 0,
        examples: Examples = "fixed",
        drop: float = 0.03,
        alpha: float = 0.05,
        tolerance: float = 0.0,
        planned: int = 100,
        score_range: tuple[float, float] = (0.0, 1.0),
        model: nn.Module | Iterable[tuple[str, nn.Parameter]] | None = None,
        gradients_every: int = 0,
        guard: Any = None,
        sinks: Sequence[Sink] = (),
        on_alert: Callable[[Alert], None] | None = None,
    ) -> None:
        self.domains = tuple(domains)
        if not self.domains or len(set(self.domains)) != len(self.domains) or isinstance(domains, str):
            raise ValueError(f"domains: expected one or more distinct names, found {domains!r}")
        if examples not in get_args(Examples):
            raise ValueError(f"examples: expected 'fixed' or 'fresh', found {examples!r}")
        low, high = score_range
        span = high - low
        for name, ok, found in (
            ("every", every >= 1, every),
            ("gradients_every", gradients_every >= 0, gradients_every),
            ("planned", planned >= 1, planned),
            ("score_range", span > 0 and math.isfinite(span), score_range),
            ("alpha", 0 < alpha < 1, alpha),
            ("drop", 0 <= drop < span, drop),
            ("tolerance", 0 <= tolerance < span, tolerance),
        ):
            if not ok:
                raise ValueError(f"{name}: out of range, found {found!r}")
        if gradients_every and model is None:
            raise ValueError("gradients_every needs model=, whose gradients are compared")
        if examples == "fresh" and baseline == "best":
            raise ValueError("baseline 'best' compares evaluations on the same examples: expected examples='fixed'")
        self.evaluate, self.every, self.test_from = evaluate, every, test_from
        self.examples, self.drop, self.alpha = examples, drop, alpha
        self.score_range, self.gradients_every, self.guard = (float(low), float(high)), gradients_every, guard
        self.sinks, self.on_alert = tuple(sinks), on_alert
        self.alerts: list[Alert] = []
        self.seconds: dict[str, float] = {}
        self._best = baseline == "best"
        self._given = {} if baseline in ("start", "best") else self._read_baseline(baseline)
        self._tests = {d: DropTest(examples, planned, tolerance / span) for d in self.domains}
        # Scores that present ones are compared with, per domain: one list, or with "best" one per earlier evaluation.
        self._baselines: dict[str, list[Numbers]] = {d: [] for d in self.domains}
        self._latest: dict[str, Numbers] = {}
        self._p = dict.fromkeys(self.domains, 1.0)
        self._alerted: set[str] = set()
        self._step: int | None = None
        self._keeper = None if model is None else GradientKeeper(model)
        self._started: float | None = None
        self._wall_before = 0.0
        self._spent_before, self._last_end = 0.0, time.perf_counter()

    # ------------------------------------------------------------------------------------------------------------ the loop

    def step(self, step: int, metrics: Mapping[str, Any] | None = None, *, scores: Any = None) -> dict[str, Any]:
        """Call once per training step, after it; and once before training, for the baseline of the start.

        Args:
            step: number of the step, larger at every call.
            metrics: of the step, for the sinks; see :func:`carerl_kernels.monitor.reward_statistics`.
            scores: of an evaluation that was made anyway, as ``evaluate`` gives them.

        Returns:
            What is new, as JSON can hold it: "domains" after an evaluation (per domain "score", "baseline", "drop", "error", "n",
            "p", "fallen") and "alpha", "gradients", "guard", "alerts"; empty on most steps.

        Raises:
            ValueError: the step was seen already; scores of unknown domains, of another length, or out of range.
        """
        if self._step is not None and step <= self._step:
            raise ValueError(f"expected a step after {self._step}, found {step}; steps count over the whole run")
        self._started = self._started or time.perf_counter()
        if scores is None and self.evaluate is not None and (self._step is None or step % self.every == 0):
            with self._timed("evaluate"):
                scores = self.evaluate()
        record: dict[str, Any] = {}
        alerts: list[Alert] = []
        if scores:
            with self._timed("test"):
                record["domains"], alerts = self._judge(step, scores)
            record["alpha"] = self.alpha
        if self._keeper is not None and self._keeper.kept:
            with self._timed("gradients"):
                record["gradients"] = self._keeper.compare()
        if self.guard is not None and record:
            with self._timed("guard"):
                record["guard"] = guard_figures(self.guard.report())
        if alerts:
            record["alerts"] = [asdict(a) for a in alerts]
            self.alerts += alerts
        self._step = step
        with self._timed("sinks"):
            self._tell(step, metrics or {}, record, alerts)
        return record

    def rebase(self, domains: Sequence[str] | None = None) -> None:
        """From now on, compare with the latest evaluation: at the end of a stage, what it made of its domains.

        Domains with a given baseline keep it; with "best" nothing changes. When to call it must not depend on the scores, or the
        bound on false alarms is lost.

        Raises:
            ValueError: an unknown domain.
        """
        for name in self.domains if domains is None else domains:
            if name not in self.domains:
                raise ValueError(f"rebase: expected a domain out of {', '.join(self.domains)}, found {name!r}")
            if self._best or name in self._given or name not in self._latest:
                continue
            self._baselines[name] = [self._latest[name]]
            self._tests[name].restart()
            self._p[name] = 1.0
            self._alerted.discard(name)

    def save_scores(self, path: Path | str) -> None:
        """Writes the latest scores of every domain: the baseline of another run on the same examples.

        Raises:
            RuntimeError: nothing was evaluated yet.
        """
        if not self._latest:
            raise RuntimeError("expected an evaluation to save the scores of, found none yet")
        document = {"step": self._step, "scores": {n: _plain(v) for n, v in self._latest.items()}}
        write_bytes_atomically(path, (json.dumps(document) + "\n").encode())

    def close(self) -> None:
        """Closes the sinks."""
        for sink in self.sinks:
            sink.close()

    # ----------------------------------------------------------------------------------------------------------- gradients

    def gradients_due(self) -> bool:
        """Whether gradients shall be shown before the next optimizer step."""
        if not self.gradients_every or (self._keeper is not None and self._keeper.kept):
            return False
        return ((self._step or 0) + 1) % self.gradients_every == 0

    @contextmanager
    def gradients(self, name: str, *, training: bool = True) -> Iterator[None]:
        """Around the backward pass of one domain's loss: its gradient is kept until :meth:`step`, which compares all of them.

        Costs a copy of the gradient per name until then, and one read of each.

        Args:
            name: a domain's, or another's under which the cosines shall appear.
            training: False: the gradient is only looked at, and what ``p.grad`` held is put back.

        Raises:
            ValueError: the monitor was built without a model.
            RuntimeError: no gradient arrived.
        """
        started = time.perf_counter()
        with self._gradient_keeper().around(name, training):
            entered = time.perf_counter()
            yield
            left = time.perf_counter()
        self._spend("gradients", entered - started + time.perf_counter() - left)
        if not training:
            self._spend("gradients", left - entered)

    def keep_gradients(self, name: str) -> None:
        """Keeps a copy of what is in ``p.grad`` now."""
        with self._timed("gradients"):
            self._gradient_keeper().keep(name)

    def _gradient_keeper(self) -> GradientKeeper:
        if self._keeper is None:
            raise ValueError(
                "expected a monitor built with model=, found one without: it cannot know where gradients are"
            )
        return self._keeper

    # ---------------------------------------------------------------------------------------------------------------- cost

    def cost(self) -> dict[str, Any]:
        """Seconds per part, wall-clock seconds since the first step, and the share of monitoring in them."""
        wall = self._wall_before + (0.0 if self._started is None else time.perf_counter() - self._started)
        total = sum(self.seconds.values())
        return {"seconds": dict(self.seconds), "wall": wall, "share": min(1.0, total / wall) if wall > 0 else 0.0}

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._spend(part, time.perf_counter() - started)

    def _spend(self, part: str, seconds: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    # --------------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on exactly: baselines, evidence, alerts, costs. Plain Python values."""
        return {
            "domains": list(self.domains),
            "step": self._step,
            "baselines": {name: [_plain(v) for v in each] for name, each in self._baselines.items()},
            "latest": {name: _plain(v) for name, v in self._latest.items()},
            "tests": {name: test.state_dict() for name, test in self._tests.items()},
            "p": dict(self._p),
            "alerted": sorted(self._alerted),
            "alerts": [asdict(a) for a in self.alerts],
            "seconds": dict(self.seconds),
            "wall": self.cost()["wall"],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from :meth:`state_dict`; sinks forget what was logged after it.

        Raises:
            ValueError: the state belongs to a monitor of other domains.
        """
        if tuple(state["domains"]) != self.domains:
            raise ValueError(
                f"monitor state: expected the domains {', '.join(state['domains'])} as saved, found {', '.join(self.domains)}"
            )
        self._step = state["step"]
        self._baselines = {n: [np.array(v, dtype=np.float64) for v in each] for n, each in state["baselines"].items()}
        self._latest = {n: np.array(v, dtype=np.float64) for n, v in state["latest"].items()}
        for name, test in state["tests"].items():
            self._tests[name].load_state_dict(test)
        self._p, self._alerted = dict(state["p"]), set(state["alerted"])
        self.alerts = [Alert(**a) for a in state["alerts"]]
        self.seconds, self._wall_before = dict(state["seconds"]), state["wall"]
        for sink in self.sinks:
            sink.resume(-1 if self._step is None else self._step)

    # ----------------------------------------------------------------------------------------------------------- internals

    def _judge(self, step: int, scores: Mapping[str, Any]) -> tuple[dict[str, Any], list[Alert]]:
        unknown = [name for name in scores if name not in self.domains]
        if unknown:
            raise ValueError(f"scores: expected domains out of {', '.join(self.domains)}, found {', '.join(unknown)}")
        checked = {
            name: self._pairs(name, values) for name, values in scores.items()
        }  # all of them before any is counted
        out: dict[str, Any] = {}
        alerts = []
        for name, (present, against) in checked.items():
            self._latest[name] = present
            out[name] = {"score": float(np.nanmean(present)), "n": int((~np.isnan(present)).sum())}
            if against and step >= self.test_from:
                out[name] |= self._compare(name, present, against)
                fallen = out[name]["fallen"]
                if fallen and name not in self._alerted:
                    self._alerted.add(name)
                    found = {key: out[name][key] for key in ("drop", "error", "baseline", "n", "p")}
                    alerts.append(Alert(name, step, score=out[name]["compared"], alpha=self.alpha, **found))
                del out[name]["compared"]
            if self._best or not (self._baselines[name] or name in self._given or self.examples == "fresh"):
                self._baselines[name].append(present)
        return out, alerts

    def _pairs(self, name: str, values: Any) -> tuple[Numbers, list[Numbers]]:
        """Present scores (NaN: not judged), and those to compare with, each as long; none on a first evaluation."""
        baseline = None
        if self.examples == "fresh" and isinstance(values, tuple) and len(values) == 2:
            values, baseline = values
        present = self._checked(name, values)
        if baseline is not None:
            against = [self._checked(f"baseline of {name}", baseline)]
        elif name in self._given:
            given = self._given[name]
            against = [np.full(len(present), given) if isinstance(given, (int, float)) else self._checked(name, given)]
        elif self.examples == "fresh":
            raise ValueError(
                f"scores of {name!r}: with fresh examples expected a pair (scores, baseline's scores on the same examples), "
                f"found scores alone; give them, or a known score as baseline={{{name!r}: ...}}"
            )
        else:
            against = self._baselines[name]
        for other in against:
            if len(other) != len(present):
                raise ValueError(
                    f"scores of {name!r}: expected {len(other)}, one per example of the baseline in the same order, "
                    f"found {len(present)}; evaluate the same examples every time"
                )
        return present, against

    def _checked(self, name: str, values: Any) -> Numbers:
        low, high = self.score_range
        numbers = np.array(values, dtype=np.float64)  # None becomes NaN
        judged = numbers[~np.isnan(numbers)]
        wrong = judged[(judged < low - 1e-6) | (judged > high + 1e-6)]
        if numbers.ndim != 1 or not judged.size or wrong.size:
            found = f"{wrong[0]:g}" if wrong.size else f"no judged example in an array of shape {numbers.shape}"
            raise ValueError(
                f"scores of {name!r}: expected a number from {low:g} to {high:g} (score_range) per example, found {found}"
            )
        return numbers.clip(low, high)

    def _compare(self, name: str, present: Numbers, against: list[Numbers]) -> dict[str, Any]:
        low, high = self.score_range
        differences = [other - present for other in against]
        differences = [d[~np.isnan(d)] for d in differences]
        scaled = [d / (high - low) for d in differences]
        evidence = self._tests[name].update(scaled if self._best else scaled[0])
        self._p[name] = min(self._p[name], math.exp(min(0.0, math.log(len(self.domains)) - evidence)))
        worst = max(
            range(len(against)), key=lambda i: float(differences[i].mean()) if differences[i].size else -math.inf
        )
        d = differences[worst]
        n, pairs = d.size, ~np.isnan(against[worst] - present)
        drop = float(d.mean()) if n else 0.0
        return {
            "baseline": float(against[worst][pairs].mean()) if n else math.nan,
            "compared": float(present[pairs].mean()) if n else math.nan,
            "drop": drop,
            "error": float(d.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan,
            "n": n,
            "p": self._p[name],
            "fallen": self._p[name] <= self.alpha and drop >= self.drop,
        }

    def _tell(self, step: int, metrics: Mapping[str, Any], record: dict[str, Any], alerts: list[Alert]) -> None:
        for alert in alerts:
            _log.warning("%s", alert)
        if self.sinks:
            line = dict(metrics)
            if record:
                line["monitor"] = record
            if "domains" in record and "eval" not in line:
                line["eval"] = {name: found["score"] for name, found in record["domains"].items()}
            if "seconds" not in line:
                line["seconds"] = self._since_last_line()
            for sink in self.sinks:
                sink.log(step, line)
                for alert in alerts:
                    sink.alert(alert)
        if self.on_alert is not None:
            for alert in alerts:
                self.on_alert(alert)

    def _since_last_line(self) -> dict[str, float]:
        """Wall-clock seconds since the last line: the monitor's own, and everything else."""
        now, spent = time.perf_counter(), sum(self.seconds.values())
        wall, own = now - self._last_end, spent - self._spent_before
        self._last_end, self._spent_before = now, spent
        return {"other": max(0.0, wall - own), "monitor": own}

    def _read_baseline(self, source: Any) -> dict[str, Baseline]:
        if not isinstance(source, Mapping):
            merged: dict[str, Baseline] = {}
            for path in [source] if isinstance(source, (str, Path)) else source:
                try:
                    merged |= json.loads(Path(path).read_text())["scores"]
                except (OSError, ValueError, KeyError, TypeError) as e:
                    raise ValueError(
                        f"baseline: expected 'start', 'best', scores per domain, or a file written by save_scores, "
                        f"found {str(path)!r}: {e}"
                    ) from e
            source = {name: scores for name, scores in merged.items() if name in self.domains}
        unknown = [name for name in source if name not in self.domains]
        if unknown:
            raise ValueError(f"baseline: expected domains out of {', '.join(self.domains)}, found {', '.join(unknown)}")
        for name, value in source.items():
            self._checked(f"baseline of {name}", [value] if isinstance(value, (int, float)) else value)
        return dict(source)


def _plain(values: Numbers) -> list[float | None]:
    return [None if math.isnan(v) else v for v in values.tolist()]
