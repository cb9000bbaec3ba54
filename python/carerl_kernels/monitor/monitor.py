"""DriftMonitor: does one domain fall while others are trained? Works in any loop, with or without a guard."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from torch import nn

from .._files import write_json
from .._json import plain
from ..guard.report import guard_figures
from .budget import StepBudget
from .clock import MonitorClock
from .controller import Controller
from .domain import Alert, Given, WatchedDomain, as_json, is_number, judge, read_baseline
from .gradients import GradientKeeper
from .sequential import DropTest, Examples
from .sinks import Sink
from .split import Losses
from .windows import Windows

_log = logging.getLogger(__name__)


class DriftMonitor:
    """Held-out evaluation per domain, an alert when one falls, and figures of who pulls where.

    Call :meth:`step` once per training step. A domain is alerted once it is at least `drop` below its baseline *and* a
    sequential test on paired scores says that this is no accident; see :mod:`carerl_kernels.monitor.sequential`.

    Args:
        domains: their names.
        evaluate: gives the scores of held-out examples per domain, always in the same order; None for an example that could not
            be judged. None: scores are handed to :meth:`step` (the reference trainer hands over its own evaluations).
        every: steps between calls of `evaluate`; the first call of :meth:`step` evaluates, too.
        baseline: what domains are compared with. "start": their own first evaluation (since :meth:`rebase`). "best": every
            earlier evaluation of the run, at the price of some power: for mixed runs, in which domains rise before they fall.
            Else, per domain, a known score or the scores of a single-domain model on the same examples; or files of these
            (:meth:`save_scores`). Domains that are not given are compared with their start.
        test_from: evaluations at earlier steps are recorded, not tested: a baseline of another run has to be reached first.
        examples: "fixed": the same held-out examples at every evaluation. "fresh": others each time, which adds up evidence over
            evaluations; `evaluate` then gives (scores, baseline's scores on the same examples) per domain, unless the baseline
            is a known score. Scores given beforehand belong to other examples and are refused.
        drop: alerts are for drops of at least this (0.03: three points of an accuracy).
        alpha: probability of any false alarm, over all domains and the whole run, at most.
        tolerance: true drops up to this count as none.
        planned: evaluations expected in the run. More are fine; far fewer or more cost power.
        score_range: smallest and largest possible score.
        model: needed for :meth:`gradients`: a module, or pairs of name and parameter.
        gradients_every: steps between comparisons of gradients, see :meth:`gradients_due`; 0: never.
        split_every: evaluations between splits of what happened to the losses into conflict and curvature
            (:mod:`carerl_kernels.monitor.split`); 0: never.
        losses: gives every domain's loss on held-out examples for them, the same ones every time; the reference trainer has
            its own.
        snapshots: folder where the weights are kept meanwhile, as safetensors; None: in memory.
        controller: raises the share or weight of domains that fall below their baseline; its state is part of this one's.
        guard: its report is recorded at every evaluation.
        sinks: get every step's line. Give them to one process only.
        on_alert: called with every alert, after the sinks.

    Attributes:
        alerts: all so far.

    Raises:
        ValueError: an argument out of range, named with what was expected.
    """

    def __init__(
        self,
        domains: Sequence[str],
        evaluate: Callable[[], Mapping[str, Any]] | None = None,
        *,
        every: int = 50,
        baseline: str | Path | Sequence[str | Path] | Mapping[str, Given] = "start",
        test_from: int = 0,
        examples: Examples = "fixed",
        drop: float = 0.03,
        alpha: float = 0.05,
        tolerance: float = 0.0,
        planned: int = 100,
        score_range: tuple[float, float] = (0.0, 1.0),
        model: nn.Module | Iterable[tuple[str, nn.Parameter]] | None = None,
        gradients_every: int = 0,
        split_every: int = 0,
        losses: Losses | None = None,
        snapshots: Path | str | None = None,
        controller: Controller | None = None,
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
            ("split_every", split_every >= 0, split_every),
            ("planned", planned >= 1, planned),
            ("score_range", span > 0 and math.isfinite(span), score_range),
            ("alpha", 0 < alpha < 1, alpha),
            ("drop", 0 <= drop < span, drop),
            ("tolerance", 0 <= tolerance < span, tolerance),
        ):
            if not ok:
                raise ValueError(f"{name}: out of range, found {found!r}")
        for option, interval in (("gradients_every", gradients_every), ("split_every", split_every)):
            if interval and model is None:
                raise ValueError(f"{option} needs model=, whose gradients are compared and whose weights are split")
        strangers = [] if controller is None else [name for name in controller.domains if name not in self.domains]
        if strangers:
            raise ValueError(f"controller: expected domains out of {', '.join(domains)}, found {', '.join(strangers)}")
        if examples == "fresh" and baseline == "best":
            raise ValueError("baseline 'best' compares evaluations on the same examples: expected examples='fixed'")
        self.evaluate, self.every, self.test_from = evaluate, every, test_from
        self.drop, self.alpha, self.span = drop, alpha, float(span)
        self.gradients_every, self.guard = gradients_every, guard
        self.losses, self.controller = losses, controller
        self.sinks, self.on_alert = tuple(sinks), on_alert
        self.alerts: list[Alert] = []
        self._clock = MonitorClock()
        given = {} if baseline in ("start", "best") else read_baseline(baseline, self.domains)
        if examples == "fresh":
            for name, value in given.items():
                if not is_number(value):
                    raise ValueError(
                        f"baseline of {name!r}: with fresh examples expected a known score (a number), found the scores of "
                        "other examples, which cannot be paired; let evaluate return (scores, baseline's scores on the same "
                        "examples), or use examples='fixed'"
                    )
        self._watched = {
            name: WatchedDomain(
                name,
                DropTest(examples, planned, tolerance / span),
                len(self.domains),
                (float(low), float(high)),
                given.get(name),
                baseline == "best",
            )
            for name in self.domains
        }
        self._settings = {  # what evidence means, as JSON gives it back: a state cannot go on under others
            "examples": examples,
            "planned": planned,
            "tolerance": tolerance,
            "alpha": alpha,
            "score_range": [float(low), float(high)],
            "baseline": {name: w.baseline_kind for name, w in self._watched.items()},
        }
        self._told_unseen = False
        self._step: int | None = None
        self._begun = False  # sinks know whether this run is new or goes on
        model = model if model is None or isinstance(model, nn.Module) else list(model)
        self._keeper = None if model is None else GradientKeeper(model)
        self._budget = None if model is None else StepBudget(model)
        folder = None if snapshots is None else Path(snapshots)
        self.windows = None if model is None or not split_every else Windows(model, split_every, folder)

    # ------------------------------------------------------------------------------------------------------------ the loop

    def step(
        self,
        step: int,
        metrics: Mapping[str, Any] | None = None,
        *,
        scores: Any = None,
        losses: Losses | None = None,
        acting: str | None = None,
    ) -> dict[str, Any]:
        """Call once per training step, after it; and once before training, for the baseline of the start.

        Args:
            step: number of the step, larger at every call.
            metrics: The metrics of the step, for the sinks; see :func:`carerl_kernels.monitor.reward_statistics`.
            scores: The scores of an evaluation that was made anyway, as `evaluate` gives them.
            losses: Takes the place of the constructor's `losses` for this call.
            acting: domain or stage whose step this was.

        Returns:
            What is new, as JSON can hold it: "domains" after an evaluation (per domain "score", "baseline", "drop", "error", "n",
            "p", "fallen") and "alpha", "drop", "span" (size of the score range); "gradients", "budget" (shares of the step),
            "split" (see :meth:`Windows.look`), "balance" (of the controller), "guard", "alerts"; empty on most steps.

        Raises:
            ValueError: the step was seen already; scores of unknown domains, of another length, or out of range.
            FileExistsError: on a first step without a loaded state, a sink's file holds another run.
        """
        if self._step is not None and step <= self._step:
            raise ValueError(f"expected a step after {self._step}, found {step}; steps count over the whole run")
        if not self._begun:
            for sink in self.sinks:
                sink.begin()
            self._begun = True
        self._clock.start()
        if scores is None and self.evaluate is not None and (self._step is None or step % self.every == 0):
            with self._clock.timed("evaluate"):
                scores = self.evaluate()
        record: dict[str, Any] = {}
        alerts: list[Alert] = []
        if scores:
            with self._clock.timed("test"):
                tested = step >= self.test_from
                record["domains"], alerts = judge(self._watched, scores, step, tested, self.alpha, self.drop, self.span)
            record |= {"alpha": self.alpha, "drop": self.drop, "span": self.span}
        if self._keeper is not None and self._keeper.kept:
            with self._clock.timed("gradients"):
                record["gradients"] = self._keeper.compare()
        if self._budget is not None and self._budget.kept:
            with self._clock.timed("gradients"):
                record["budget"] = self._budget.measure()
        if self.windows is not None:
            self.windows.acts(acting)
            if scores:
                with self._clock.timed("split"):
                    record |= self._split(step, losses or self.losses, record.get("budget", {}))
        if self._budget is not None:
            self._budget.directions = {}
        if self.controller is not None and scores:
            decisions = self.controller.update(step, record["domains"], self.span)
            record["balance"] = self.controller.record(decisions)
        if self.guard is not None and record:
            with self._clock.timed("guard"):
                record["guard"] = guard_figures(self.guard.report())
        if alerts:
            record["alerts"] = [asdict(a) for a in alerts]
            self.alerts += alerts
        self._step = step
        with self._clock.timed("sinks"):
            self._tell(step, metrics or {}, record, alerts)
        return record

    def rebase(self, domains: Sequence[str] | None = None) -> None:
        """From now on, compare with the latest evaluation: at the end of a stage, what it made of its domains.

        Domains with a given baseline keep it; with "best" nothing changes. When to call it must not depend on the scores, or the
        bound on false alarms is lost.

        Raises:
            ValueError: an unknown domain.
        """
        names = self.domains if domains is None else domains
        for name in names:
            if name not in self.domains:
                raise ValueError(f"rebase: expected a domain out of {', '.join(self.domains)}, found {name!r}")
        for name in names:
            self._watched[name].rebase()

    def save_scores(self, path: Path | str) -> None:
        """Writes the latest scores of every domain: the baseline of another run on the same examples.

        Raises:
            RuntimeError: nothing was evaluated yet.
        """
        scores = {name: as_json(w.latest) for name, w in self._watched.items() if w.latest is not None}
        if not scores:
            raise RuntimeError("expected an evaluation to save the scores of, found none yet")
        write_json(path, {"step": self._step, "scores": scores}, indent=None)

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
            training: False: the gradient is only looked at, and what `p.grad` held is put back. Else `p.grad` holds the sum,
                bitwise as without the monitor if the block holds one backward pass.

        Raises:
            ValueError: the monitor was built without a model.
            RuntimeError: no gradient arrived.
        """
        started = time.perf_counter()
        with self._gradient_keeper().around(name, training):
            entered = time.perf_counter()
            yield
            inside = time.perf_counter() - entered if training else 0.0  # that pass is the run's own
        self._clock.spend("gradients", time.perf_counter() - started - inside)

    def domains_due(self, evaluation: bool = False) -> bool:
        """Whether the gradients of a mixed batch's domains shall be shown before the next optimizer step.

        Args:
            evaluation: whether the domains are evaluated after that step.
        """
        if self._budget is None or self._budget.kept:
            return False
        return self.gradients_due() or (evaluation and self.windows is not None and self.windows.due)

    @contextmanager
    def domain(self, name: str, optimizer: Any = None) -> Iterator[None]:
        """Around the backward pass of one domain's part of the batch, which only looks: what `p.grad` held is put back.

        :meth:`step` says what share of the step each domain has, of the gradients and, for Adam's kind, of the normalised step.

        Args:
            optimizer: The one whose step follows.

        Raises:
            ValueError: the monitor was built without a model.
            RuntimeError: no gradient arrived.
        """
        self._gradient_keeper()
        assert self._budget is not None
        with self._clock.timed("gradients"), self._budget.around_part(name, optimizer):
            yield

    def keep_gradients(self, name: str) -> None:
        """Keeps a copy of what is in `p.grad` now."""
        with self._clock.timed("gradients"):
            self._gradient_keeper().keep(name)

    def _gradient_keeper(self) -> GradientKeeper:
        if self._keeper is None:
            raise ValueError(
                "expected a monitor built with model=, found one without: it cannot know where gradients are"
            )
        return self._keeper

    def cost(self) -> dict[str, Any]:
        """Seconds per part (evaluate, gradients, test, split, guard, sinks), wall-clock seconds since the first step, and the
        share of monitoring in them."""
        return self._clock.cost()

    # --------------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on exactly: baselines, evidence, alerts, costs. Plain Python values."""
        return {
            "domains": list(self.domains),
            "settings": dict(self._settings),
            "step": self._step,
            "watched": {name: w.state_dict() for name, w in self._watched.items()},
            "alerts": [asdict(a) for a in self.alerts],
            "split": None if self.windows is None else self.windows.state_dict(),
            "controller": None if self.controller is None else self.controller.state_dict(),
            **self._clock.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from :meth:`state_dict`; sinks forget what was logged after it.

        Raises:
            ValueError: the state belongs to a monitor of other domains, or of other settings of the test: evidence gathered
                under both would keep the promise of neither.
        """
        if tuple(state["domains"]) != self.domains:
            raise ValueError(
                f"monitor state: expected the domains {', '.join(state['domains'])} as saved, found {', '.join(self.domains)}"
            )
        for key, saved in state.get("settings", {}).items():
            if self._settings[key] != saved:
                raise ValueError(
                    f"monitor state: expected {key} {_told(saved)} as saved, found {_told(self._settings[key])}; "
                    f"build the monitor with the {key} of the saved run, or start a new run without its state"
                )
        for part, own in (("split", self.windows), ("controller", self.controller)):
            if own is not None and state.get(part) is not None:
                own.load_state_dict(state[part])
        self._step = state["step"]
        for name, watched in self._watched.items():
            watched.load_state_dict(state["watched"][name])
        self.alerts = [Alert(**a) for a in state["alerts"]]
        self._clock.load_state_dict(state)
        self.resume_sinks(-1 if self._step is None else self._step)

    def resume_sinks(self, step: int) -> None:
        """Goes on in the sinks' record of a run, which forget what was logged after the step; for runs whose state is lost."""
        for sink in self.sinks:
            sink.resume(step)
        self._begun = True

    # ----------------------------------------------------------------------------------------------------------- internals

    def _split(self, step: int, losses: Losses | None, budget: Mapping[str, Any]) -> dict[str, Any]:
        assert self.windows is not None and self._budget is not None
        if losses is None:
            raise ValueError("split_every needs losses=, every domain's loss on held-out examples, found None")
        shares = budget.get("step", budget.get("gradient"))
        found = self.windows.look(step, losses, self._budget.directions, shares)
        unseen = [name for name in self.domains if name not in self.windows.at_start]
        if unseen and not self._told_unseen:
            self._told_unseen = True
            _log.warning(
                "split_every: no loss is known of %s, whose conflict and curvature stay unseen; give held-out examples with "
                "answers, or losses=",
                ", ".join(unseen),
            )
        return {} if found is None else {"split": found}

    def _tell(self, step: int, metrics: Mapping[str, Any], record: dict[str, Any], alerts: list[Alert]) -> None:
        for alert in alerts:
            _log.warning("%s", alert)
        if self.sinks:
            line = plain(metrics)
            if record:
                line["monitor"] = plain(record)
            if "domains" in record and "eval" not in line:
                line["eval"] = {name: found["score"] for name, found in record["domains"].items()}
            if "seconds" not in line:
                line["seconds"] = self._clock.since_last_line()
            for sink in self.sinks:
                sink.log(step, line)
                for alert in alerts:
                    sink.alert(alert)
        if self.on_alert is not None:
            for alert in alerts:
                self.on_alert(alert)


def _told(setting: Any) -> str:
    if isinstance(setting, Mapping):
        return ", ".join(f"{name}: {value}" for name, value in setting.items())
    return repr(setting)
