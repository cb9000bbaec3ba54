"""How far a judge can be trusted: agreement with a known order, with itself, and with the places swapped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .scorer import Score


def rank_agreement(values: Sequence[float], truth: Sequence[float]) -> float:
    """Kendall's tau-b between two rankings of the same things, in [-1, 1]; 0 when one of them has no order at all."""
    if len(values) != len(truth):
        raise ValueError(f"rank_agreement: expected equally many numbers, found {len(values)} and {len(truth)}")
    orders = [np.sign(np.subtract.outer(v, v)) for v in (values, truth)]  # [n, n]: of every pair, which one is larger
    scale = math.sqrt(math.prod(np.count_nonzero(order) for order in orders))
    return float((orders[0] * orders[1]).sum()) / scale if scale else 0.0


@dataclass(frozen=True)
class JudgeNoise:
    """What a second verdict on the same responses says about the first.

    Attributes:
        n: Responses judged twice.
        bias: Mean of second minus first: the effect of the criteria's order (the second one reverses it).
        noise: Standard deviation of one verdict around the response's own mean.
        share: Of the variance of the first verdicts that is noise, in [0, 1]; None with fewer than three or no variance.
    """

    n: int
    bias: float
    noise: float
    share: float | None


def judge_noise(scores: Sequence[Score]) -> JudgeNoise | None:
    """From the re-judged share of scores; None when there is none."""
    pairs = [(s.value, s.again) for s in scores if s.value is not None and s.again is not None]
    if not pairs:
        return None
    first, again = np.array(pairs).T
    n, gaps = len(pairs), again - first
    noise, variance = (float(values.var()) * n / max(1, n - 1) for values in (gaps, first))
    noise /= 2  # variance of one verdict
    share = min(1.0, noise / variance) if n >= 3 and variance > 0 else None
    return JudgeNoise(n, float(gaps.mean()), math.sqrt(noise), share)
