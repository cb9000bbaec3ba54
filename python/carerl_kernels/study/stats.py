"""Paired comparisons over seeds: mean, 95 % interval and p value of Student's t, Holm's correction, Pareto fronts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

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

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

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
    n = len(values)
    if n == 0:
        raise ValueError("expected one value or more, found none")
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, math.inf, 1.0, 1)
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    p = (1.0 if mean == 0 else 0.0) if error == 0 else t_two_sided(mean / error, n - 1)
    return Estimate(mean, t_quantile(LEVEL, n - 1) * error, p, n)


def t_two_sided(t: float, df: int) -> float:
    """P(|T| > |t|) of Student's distribution with df >= 1 degrees of freedom.

    With T = sqrt(df) tan(phi) the density of phi is proportional to cos(phi)^(df-1), smooth and on a finite interval.
    """
    edge = math.atan(abs(t) / math.sqrt(df))
    return _integral(edge, math.pi / 2, df) / _integral(0.0, math.pi / 2, df)


def _integral(low: float, high: float, df: int) -> float:
    """Simpson's rule with 2000 intervals."""
    phi = np.linspace(low, high, 2001)
    f = np.cos(phi) ** (df - 1)
    return float((high - low) / 6000 * (f[0] + f[-1] + 4 * f[1:-1:2].sum() + 2 * f[2:-1:2].sum()))


@cache
def t_quantile(level: float, df: int) -> float:
    """t with P(|T| <= t) = level, by bisection."""
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - t_two_sided(middle, df) < level else (low, middle)
    return high


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
