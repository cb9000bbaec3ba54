"""Has a domain fallen? A test that may be looked at after every evaluation, for as long as the run lasts.

Betting (Waudby-Smith and Ramdas 2024, arXiv:2010.09686): against "the expected drop is at most m" one bets a fraction b on every
difference d in [-1, 1] between baseline and present score of one example. The capital prod_i (1 + b (d_i - m)) does not grow in
expectation while the claim holds, so by Markov's inequality it rarely becomes large; averaged over several b it is one number per
evaluation, an e-value e_s with E[e_s] <= 1, whatever the distribution of scores.

How evaluations add up depends on the examples:

fixed   The same examples every time, so evaluations depend on each other in unknown ways. M_t = sum_s w_s e_s with weights fixed
        beforehand and sum w_s <= 1 has E[M_inf] <= 1 under ANY dependence, and never falls: P(M ever >= D / alpha) <= alpha / D.
        Several baselines at once (every earlier evaluation) are further terms of the sum, with weights v_r, sum v_r <= 1.
fresh   New examples every time. Capital is carried on, and begun anew with weight w_s at every evaluation, because nobody knows
        when a drop begins: R_t = (R_{t-1} + w_t) L_t for each b. A nonnegative supermartingale: the same bound, by Ville.

With D domains each is tested at alpha / D: the probability of any false alarm in the whole run is at most alpha.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Examples = Literal["fixed", "fresh"]
Numbers = NDArray[np.float64]

# Fractions b of the capital put on each example: drops of a few points on noisy scores want about drop / variance, quiet
# (exact) scores as much as there is. Below 1, because a difference can be -1.
BETS: Numbers = np.geomspace(0.02, 0.95, 14)


def look_weight(look: int, planned: int) -> float:
    """Weight of evaluation `look` (from 1): nine tenths spread evenly over the planned ones, the rest over all that follow.

    The sum over all looks is at most 1.
    """
    return 0.9 / planned if look <= planned else 0.1 * planned / (look * (look - 1))


def log_capital(differences: Numbers, tolerance: float = 0.0) -> Numbers:
    """Log capital `[bets, ...]` after betting that the mean of the differences `[..., n]` in [-1, 1] exceeds the tolerance;
    NaN is no bet."""
    # in [-1, 1], mean at most 0 while the claim holds
    gains = np.nan_to_num((differences - tolerance) / (1 + tolerance))
    gains = np.concatenate([gains, np.zeros((*gains.shape[:-1], -gains.shape[-1] % 16))], axis=-1)
    gains = gains.reshape(*gains.shape[:-1], 16, -1)
    bets = BETS.reshape(-1, *[1] * (gains.ndim - 1))
    product = np.ones(1)
    for i in range(16):  # one logarithm for sixteen factors: .05^16 is far from underflow
        product = product * (1.0 + bets * gains[..., i, :])
    return np.asarray(np.log(product).sum(-1))


@dataclass
class DropTest:
    """Evidence that one domain fell, over the evaluations of a run.

    Args:
        examples: "fixed" or "fresh", see the module's text.
        planned: evaluations expected in the run; there may be more, with less power left for them.
        tolerance: expected drops up to this are not held against the domain.

    Attributes:
        looks: evaluations so far, over all restarts.
        log_evidence: natural logarithm of M, or of R averaged over bets; -inf before the first evaluation.
    """

    examples: Examples = "fixed"
    planned: int = 100
    tolerance: float = 0.0
    looks: int = 0
    _logs: Numbers = field(default_factory=lambda: np.full(len(BETS), -np.inf))

    def update(self, differences: Numbers) -> float:
        """Takes one evaluation; returns the log evidence.

        Args:
            differences: baseline - present `[n]` in [-1, 1], NaN where one is missing; or `[R, n]`, for several baselines in
                the order of their appearance.

        Raises:
            ValueError: several baselines for fresh examples: they cannot have been scored on them.
        """
        self.looks += 1
        weight = math.log(look_weight(self.looks, self.planned))
        capital = log_capital(differences, self.tolerance)  # [bets] or [bets, R]
        if self.examples == "fresh":
            if capital.ndim > 1:
                raise ValueError(f"fresh examples: expected one baseline, found an array {differences.shape}")
            self._logs = np.logaddexp(self._logs, weight) + capital
        elif capital.ndim == 1:
            self._logs = np.logaddexp(self._logs, weight + capital)
        else:
            shares = np.log([look_weight(r, self.planned) for r in range(1, capital.shape[1] + 1)])
            self._logs = np.logaddexp(self._logs, np.logaddexp.reduce(weight + shares + capital, axis=1))
        return self.log_evidence

    @property
    def log_evidence(self) -> float:
        return float(np.logaddexp.reduce(self._logs)) - math.log(len(BETS))

    def restart(self) -> None:
        """Forgets the evidence, as after a new baseline. What was spent of the weights stays spent, so the bound holds over
        all restarts together, provided that they do not depend on the evaluations (the end of a stage does not)."""
        self._logs = np.full(len(BETS), -np.inf)

    def state_dict(self) -> dict[str, Any]:
        return {"looks": self.looks, "logs": [None if v == -np.inf else v for v in self._logs.tolist()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.looks = state["looks"]
        self._logs = np.array([-np.inf if v is None else v for v in state["logs"]])


def smallest_drop(n: int, deviation: float, *, alpha: float = 0.05, domains: int = 1, planned: int = 100) -> float:
    """About the smallest drop that one evaluation of n fixed examples can establish.

    The capital grows by about n drop^2 / (2 deviation^2) nats (deviation: standard deviation of the paired differences) and has
    to reach log(D / alpha) - log(weight of a look).
    """
    need = math.log(domains / alpha) - math.log(look_weight(1, planned)) + 1.0  # about a nat for not knowing the bet
    return deviation * math.sqrt(2 * need / n)
