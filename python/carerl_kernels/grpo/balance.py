"""Who gets how much of a mixed batch: shares of the step budget, and weights that even them out."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .config import GRPOConfig, Stage
from .parallel import Ranks
from .progress import Monitor
from .rollout import Batch

_log = logging.getLogger(__name__)

DOMINATES = 1.5
"""Domination (see :func:`domination_of`) from which one domain is called loud."""
LOUD_OVER = 10
"""Steps whose mean domination is looked at: that of one step is mostly chance."""
MEMORY = 0.9  # of the running means: about the last ten steps


def step_shares(domains: Sequence[str], advantages: Tensor) -> dict[str, float]:
    """Every domain's share of the batch's squared advantages (weights included); all 0 where no advantage differs from 0.

    A completion enters the policy gradient as A_i * grad log p_i, so with scores of similar size this is its share of
    the squared gradient, and of Adam's step, which divides them all by the same numbers. NaN, for what was not judged,
    is nothing.
    """
    energy = energies(domains, advantages)
    total = sum(energy.values())
    return {name: value / total if total > 0 else 0.0 for name, value in energy.items()}


def energies(domains: Sequence[str], advantages: Tensor) -> dict[str, float]:
    """Sum of squared advantages [B] per domain, in order of appearance."""
    squares = advantages.detach().double().nan_to_num(0.0).square().tolist()
    out: dict[str, float] = {}
    for name, square in zip(domains, squares, strict=True):
        out[name] = out.get(name, 0.0) + square
    return out


def domination_of(shares: Mapping[str, float]) -> float:
    """Largest share of the step budget times the number of domains: 1 is even, the number of domains is one alone.

    Shares of the batch that were asked for count like everything else: a domain with six prompts of eight has most of every
    step, and whether that was meant changes nothing for the others.
    """
    return max(shares.values(), default=0.0) * len(shares)


class EqualNorms:
    """Weights under which every domain's gradient has the same norm, from running means of its square.

    The squared norm of a domain's gradient is what the caller measured where gradients of single domains are known (behind an
    editor), else its sum of squared advantages stands for it: exact up to the size of the scores grad log p.

    Args:
        limit: Weights stay between 1 / limit and limit.
    """

    def __init__(self, limit: float = 10.0) -> None:
        self.limit = limit
        self._mean: dict[str, float] = {}
        self._seen: dict[str, int] = {}

    def see(self, squares: Mapping[str, float]) -> None:
        """Takes in the squared norms of one step, without the weights that were applied in it; what is not finite is left out."""
        for name, square in squares.items():
            if math.isfinite(square):
                self._mean[name] = MEMORY * self._mean.get(name, 0.0) + (1 - MEMORY) * square
                self._seen[name] = self._seen.get(name, 0) + 1

    def weights(self, names: Sequence[str]) -> dict[str, float]:
        """A weight per domain; 1 for all as long as one of them was never seen. Without limits they keep the sum of squares."""
        if any(name not in self._seen for name in names):
            return dict.fromkeys(names, 1.0)
        squares = {name: self._mean[name] / (1 - MEMORY ** self._seen[name]) for name in names}
        mean = sum(squares.values()) / len(squares)
        if mean <= 0:
            return dict.fromkeys(names, 1.0)
        out = {}
        for name, square in squares.items():
            weight = math.sqrt(mean / square) if square > 0 else self.limit
            out[name] = min(self.limit, max(1 / self.limit, weight))
        return out

    def state_dict(self) -> dict[str, Any]:
        """Plain Python values."""
        return {"mean": dict(self._mean), "seen": dict(self._seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._mean, self._seen = dict(state["mean"]), dict(state["seen"])


def weighted(advantages: Tensor, domains: Sequence[str], weights: Mapping[str, float]) -> Tensor:
    """Advantages [B], each times the weight of its domain; those of a domain without one as they are."""
    factors = [weights.get(name, 1.0) for name in domains]
    return advantages * advantages.new_tensor(factors)


def loud(recent: Sequence[Mapping[str, float]], setting: str = "advantages='domain'") -> str | None:
    """What to tell of the shares of the last steps, if one domain had most of them: a sentence with the remedies.

    Args:
        recent: Shares per domain of the step budget, of a step each; only the last `LOUD_OVER` count, and fewer say nothing.
        setting: What divides rewards by their spread, as the trainer spells it.
    """
    recent = recent[-LOUD_OVER:]
    if len(recent) < LOUD_OVER or sum(map(domination_of, recent)) / len(recent) < DOMINATES:
        return None
    shares: dict[str, float] = {}
    for step in recent:
        for name, share in step.items():
            shares[name] = shares.get(name, 0.0) + share / len(recent)
    loudest = max(shares, key=lambda name: shares[name])
    mean = sum(map(domination_of, recent)) / len(recent)
    return (
        f"{loudest} has {shares[loudest]:.0%} of the step budget (squared advantages, mean of {len(recent)} steps) among "
        f"{len(shares)} domains, domination {mean:.2f}; the others may erode: {setting} or balance='gradient', equal "
        "shares, or half the learning rate"
    )


class Mixture:
    """What the configuration's `balance` makes of the mixed batches of a run, and what is told of them.

    Args:
        monitor: The monitor whose controller acts, or None.
        norms_known: Whether gradients of single domains are told to `see`: an editor combines them.

    Raises:
        ValueError: A balance by a controller that no monitor has, or that no evaluation feeds.
    """

    def __init__(self, config: GRPOConfig, monitor: Monitor | None, ranks: Ranks, *, norms_known: bool) -> None:
        self.config, self.ranks, self.norms_known = config, ranks, norms_known
        self.norms = EqualNorms(config.balance_limit) if config.balance == "gradient" else None
        self.controller: Any = None
        self._weights: dict[str, float] = {}
        self._warned: str | None = None  # stage
        if config.balance == "controller":
            self.controller = getattr(monitor, "controller", None)
            if self.controller is None:
                raise ValueError(
                    "balance='controller': expected monitor=DriftMonitor(..., baseline='best', controller=Controller(domains)), "
                    "whose evaluations it acts on, found no monitor with a controller"
                )

    @property
    def settings(self) -> dict[str, Any] | None:
        """Of the controller, for the run's record."""
        return None if self.controller is None else dict(self.controller.settings)

    def shares(self, stage: Stage) -> tuple[float, ...] | None:
        """Of the prompts of a mixed stage, as the controller has changed them."""
        if self.controller is None or self.controller.by != "share" or not stage.mixed:
            return stage.shares
        factors = [self.controller.factors.get(name, 1.0) for name in stage.domains]
        if len(set(factors)) == 1:
            return stage.shares
        return tuple(s * f for s, f in zip(stage.shares or [1.0] * len(factors), factors, strict=True))

    def weigh(self, batch: Batch) -> None:
        """Weighs the advantages of a mixed batch."""
        names, weights = list(dict.fromkeys(batch.whole.domains)), dict[str, float]()
        if batch.mixed and self.norms is not None:
            if not self.norms_known:
                self.norms.see(energies(batch.whole.domains, batch.whole.advantages))
            weights = self.norms.weights(names)
        elif batch.mixed and self.controller is not None and self.controller.by == "weight":
            weights = self.controller.weights(names)
        if weights:
            batch.advantages = weighted(batch.advantages, batch.domains, weights)
            batch.whole.advantages = weighted(batch.whole.advantages, batch.whole.domains, weights)
        self._weights = weights

    def see(self, gradients: Mapping[str, Sequence[Tensor]]) -> None:
        """Takes in the gradients of the domains of a minibatch, as far as they are here."""
        if self.norms is None or len(gradients) < 2:
            return
        squares = [float(sum(g.double().square().sum() for g in parts)) for parts in gradients.values()]
        total = zip(gradients, self.ranks.sum(squares), strict=True)
        self.norms.see({name: square / self._weights.get(name, 1.0) ** 2 for name, square in total})

    def metrics(self, batch: Batch) -> dict[str, Any]:
        """Of a mixed batch: "step_share" and "domination"; where they were changed, "weight" and "redrawn" per domain."""
        if not batch.mixed:
            return {}
        shares = step_shares(batch.whole.domains, batch.whole.advantages)
        out: dict[str, Any] = {"step_share": shares, "domination": domination_of(shares)}
        if self._weights:
            out["weight"] = dict(self._weights)
        if self.config.balance == "shares":
            out["redrawn"] = dict(batch.redrawn)
        return out

    def warn_if_loud(self, stage: str, history: Sequence[Mapping[str, Any]]) -> None:
        """Says in the log, once per stage, that one domain has most of the step budget by the latest lines of metrics."""
        if self._warned != stage and self.ranks.first:
            recent = [
                line["step_share"] for line in history[-LOUD_OVER:] if line["stage"] == stage and "step_share" in line
            ]
            told = loud(recent)
            if told is not None:
                self._warned = stage
                _log.warning("stage %s: %s", stage, told)

    def state_dict(self) -> dict[str, Any]:
        """Plain Python values; the controller's state is the monitor's."""
        return {"norms": None if self.norms is None else self.norms.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.norms is not None:
            self.norms.load_state_dict(state["norms"])
