"""Paired comparisons over seeds: mean, 95 % interval and p value of Student's t, Holm's correction, Pareto fronts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: Of the values.
        half: Half of the 95 % interval; infinite for a single value.
        p: Two-sided, of the mean being zero; 1 for a single value.
        n: Values.
    """

    mean: float
    half: float
    p: float
    n: int

    def holds(self, value: float) -> bool:
        """Whether one more seed's value lies where 95 % of such values would: an interval for a value, not for the mean."""
        if self.n < 2:
            return False
        return abs(value - self.mean) <= self.half * math.sqrt(self.n + 1)


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval of values that are independent and about normal.

    Raises:
        ValueError: No values.
    """
    from scipy.stats import t

    n = len(values)
    if n == 0:
        raise ValueError("expected one value or more, found none")
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, math.inf, 1.0, 1)
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    p = (1.0 if mean == 0 else 0.0) if error == 0 else 2 * float(t.sf(abs(mean) / error, n - 1))
    return Estimate(mean, float(t.ppf((1 + LEVEL) / 2, n - 1)) * error, p, n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction of a family of p values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    out, worst = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - rank) * p_values[i]))
        out[i] = worst
    return out


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of points that no other is at least as good as in both coordinates and better in one."""
    return [
        i
        for i, (x, y) in enumerate(points)
        if not any(a >= x and b >= y and (a > x or b > y) for j, (a, b) in enumerate(points) if j != i)
    ]
