"""A controller of the mixture: whoever falls below what it was gets more of the batch, slowly and within bounds.

It sees what the monitor sees: every domain's drop below the monitor's baseline ("best": the best that it was in this run; files:
what a single-domain run reached), and that drop's standard error. The law is proportional, with hysteresis and a limited rate:

    excess  = drop - errors * standard error                          in units of the score range
    acting  from excess >= raise_at on, until excess <= release_at
    target  = exp(gain * excess) while acting, else 1;                 at most `limit`
    factor  moves towards the target, by `rise` at most upwards and `fall` downwards, per evaluation; not at all while the
            two differ by less than `hold`, unless the domain was let go

Nothing is integrated, so nothing winds up while a domain recovers; letting go is slower than reaching out, so that a domain
that came back is not dropped at once; and the noise of evaluations moves nothing: this is what keeps it from swinging.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, fields
from typing import Any, Literal

import pydantic
from pydantic import Field

_log = logging.getLogger(__name__)

By = Literal["share", "weight"]


@dataclass(frozen=True)
class Decision:
    """One change of a factor.

    Attributes:
        domain, step: whose, and the evaluation that it rests on.
        before, after: factors.
        drop, error: How far the score lies below the baseline, in units of the score range, and its standard error.
    """

    domain: str
    step: int
    before: float
    after: float
    drop: float
    error: float

    def __str__(self) -> str:
        points = f"{100 * abs(self.drop):.1f} ± {100 * self.error:.1f} points {'below' if self.drop >= 0 else 'above'}"
        return f"{self.domain}, {points} its baseline at step {self.step}: factor {self.before:.2f} -> {self.after:.2f}"


@pydantic.dataclasses.dataclass(eq=False)
class Controller:
    """Factors of the domains' shares of the batch, or of their weights in the loss; see the module's text.

    Args:
        domains: their names.
        by: what the factors multiply: "share" of the prompts, or "weight" of the advantages, where nobody can choose prompts.
        limit: largest factor; the smallest is 1, so that no domain's share falls below 1 / limit of what it was.
        gain: logarithm of the factor per unit of the score range: with 20, five points below ask for a factor of e.
        raise_at, release_at: excess from which a domain is helped, and at which it is let go; in units of the score range.
        rise, fall: largest ratio of successive factors upwards and downwards.
        hold: ratio of target and factor up to which the factor stays as it is.
        errors: standard errors that are taken off a drop: "best" is the best of many evaluations, and chance made some of them.

    Raises:
        pydantic.ValidationError: an argument out of range; the message names it and says what was expected.
    """

    domains: list[str] = Field(min_length=2)
    _: KW_ONLY
    by: By = "share"
    limit: float = Field(default=4.0, gt=1, allow_inf_nan=False)
    gain: float = Field(default=20.0, gt=0)
    raise_at: float = Field(default=0.02, gt=0, lt=1)
    release_at: float = Field(default=0.005, ge=0)
    rise: float = Field(default=1.5, gt=1, allow_inf_nan=False)
    fall: float = Field(default=1.1, gt=1, allow_inf_nan=False)
    hold: float = Field(default=1.4, ge=1, allow_inf_nan=False)
    errors: float = Field(default=2.0, ge=0)

    def __post_init__(self) -> None:
        if len(set(self.domains)) < len(self.domains):
            raise ValueError(f"domains: expected distinct names, found {', '.join(self.domains)}")
        if self.release_at >= self.raise_at:
            raise ValueError(f"expected release_at below raise_at, found {self.release_at} and {self.raise_at}")
        self.factors = dict.fromkeys(self.domains, 1.0)
        self._acting = dict.fromkeys(self.domains, False)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides its numbers, as JSON gives it back."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def weights(self, names: Sequence[str]) -> dict[str, float]:
        """Factors of these domains divided by their mean, so that raising one lowers the others."""
        factors = {name: self.factors.get(name, 1.0) for name in names}
        mean = sum(factors.values()) / len(factors)
        return {name: factor / mean for name, factor in factors.items()}

    def update(self, step: int, found: Mapping[str, Mapping[str, Any]], span: float = 1.0) -> list[Decision]:
        """One evaluation.

        Args:
            found: per domain what the monitor says of it: "drop" and "error". Domains without a drop, which were not compared
                with anything yet, keep their factor.
            span: size of the score range.

        Returns:
            Changes by more than one percent, which are logged, too.
        """
        decisions = []
        for name in self.domains:
            drop, error = (found.get(name, {}).get(key) for key in ("drop", "error"))
            if drop is None or not math.isfinite(drop):
                continue
            drop = drop / span
            error = error / span if error is not None and math.isfinite(error) else 0.0
            before, after = self.factors[name], self._factor(name, drop - self.errors * error)
            self.factors[name] = after
            if abs(math.log(after / before)) > 0.01:
                decisions.append(Decision(name, step, before, after, drop, error))
                _log.info("%s of %s", self.by, decisions[-1])
        return decisions

    def _factor(self, name: str, excess: float) -> float:
        threshold = self.release_at if self._acting[name] else self.raise_at
        self._acting[name] = excess > threshold if self._acting[name] else excess >= threshold
        target = min(self.limit, math.exp(min(self.gain * excess, 700.0))) if self._acting[name] else 1.0
        before = self.factors[name]
        if self._acting[name] and before / self.hold < target < before * self.hold:
            return before
        return min(max(target, before / self.fall), before * self.rise)

    def record(self, decisions: Sequence[Decision]) -> dict[str, Any]:
        """For the metrics: "by", "factor" per domain, "decisions"."""
        return {"by": self.by, "factor": dict(self.factors), "decisions": [asdict(d) for d in decisions]}

    def state_dict(self) -> dict[str, Any]:
        return {"settings": self.settings, "factors": dict(self.factors), "acting": dict(self._acting)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from :meth:`state_dict`.

        Raises:
            ValueError: the state belongs to a controller with other settings.
        """
        if state["settings"] != self.settings:
            raise ValueError(
                f"controller state: expected the settings as saved, {state['settings']}, found {self.settings}; build it with "
                "those, or start a new run without its state"
            )
        self.factors, self._acting = dict(state["factors"]), dict(state["acting"])
