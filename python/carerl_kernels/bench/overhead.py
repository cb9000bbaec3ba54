"""What a call costs when there is next to nothing to do, and how time grows with bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.benchmark import Timer

from .cases import Inputs
from .cost import Case
from .expect import Expectation
from .measure import Spread, measure
from .probe import Bandwidth
from .variants import OURS, Variant, ours

SMALL = 64  # elements


def call_overhead(rounds: int = 15, calls: int = 1000) -> dict[str, Spread]:
    """Microseconds per call on 64 elements (D = 1, k = 4), in turn with two aten ops of the same kind."""
    x = Inputs(Case("dacsp_", D=1, k=4, N=SMALL))
    y = Inputs(Case("dacsp_.list", D=1, k=4, N=SMALL * 8, tensors=2))
    ops = torch.ops.carerl
    x.mix.zero_()  # and scale 1: a thousand edits in a row must not overflow
    x.scale.fill_(1.0)
    one, rows = torch.ones(SMALL), x.bases[0]
    out = torch.empty(1, 4)
    competitors: dict[str, Callable[[], Any]] = {
        "aten add_": lambda: one.add_(1.0),
        "aten addmm_": lambda: x.grads.addmm_(x.mix, rows),
        "aten mm": lambda: torch.mm(x.grads, rows.T, out=out),
        "project": lambda: ops.project(x.grads, x.bases),
        "edit_": lambda: ops.edit_(x.grads, x.bases, x.mix, x.scale),
        "dacsp_": lambda: ops.dacsp_(x.grads, x.bases, 1.0, 1.0, 0.0),
        "dacsp_.list of 2": lambda: ops.dacsp_.list(y.tensors, y.bases, y.offsets, 1.0, 1.0, 0.0),
        "gram": lambda: ops.gram(x.bases, x.grads),
    }
    threads = torch.get_num_threads()
    timers = {name: Timer("call()", globals={"call": call}, num_threads=threads) for name, call in competitors.items()}
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer.timeit(calls).mean * 1e6)
    return {name: Spread.of(values) for name, values in times.items()}


@dataclass(frozen=True)
class Line:
    """Least squares fit of `seconds = fixed + per_byte * bytes`, in relative errors."""

    fixed: float
    per_byte: float
    r_squared: float

    @classmethod
    def fit(cls, counted: Sequence[int], seconds: Sequence[float]) -> Line:
        """Fits in relative terms, so that small sizes count as much as large ones.

        `r_squared` is that of the plain residuals in seconds.
        """
        b, t = np.asarray(counted, float), np.asarray(seconds, float)
        per_byte, fixed = np.polyfit(b, t, 1, w=1 / t)
        left = float(((t - fixed - per_byte * b) ** 2).sum())
        return cls(float(fixed), float(per_byte), 1 - left / float(((t - t.mean()) ** 2).sum()))

    def __str__(self) -> str:
        rate = 1 / self.per_byte / 1e9 if self.per_byte > 0 else float("inf")
        return f"time = {self.fixed * 1e6:.0f} us + bytes / {rate:.1f} GB/s, R^2 = {self.r_squared:.4f}"


def sweep_cases(op: str = "dacsp_", largest: int = 8_000_000) -> dict[str, list[Case]]:
    """Growing N at K = 24, and growing K at a quarter of the largest N (fp32)."""
    steps = [largest >> shift for shift in range(6, -1, -1)]
    return {
        "N": [Case(op, N=n) for n in steps],
        "K": [Case(op, D=1, k=k, N=largest // 4) for k in (4, 8, 16, 32, 64, 128)],
    }


def sweep(
    axes: dict[str, list[Case]],
    bandwidth: Bandwidth,
    seconds: float = 0.5,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Times our op alone along every axis, for about so many seconds a case: per axis the `points`, and the fitted `line`."""
    out: dict[str, Any] = {}
    for axis, cases in axes.items():
        points: list[dict[str, Any]] = []
        for case in cases:
            x = Inputs(case)
            alone = {OURS: Variant(ours(x), exact=True)}
            own = measure(x, alone, {}, Expectation(x), bandwidth, seconds).variants[OURS]
            points.append({"N": case.N, "K": case.K, "bytes": case.bytes, "seconds": own.seconds})
            say(f"{case.name}: {own.seconds.median * 1e3:.3g} ms, {own.gbps:.1f} GB/s")
        line = Line.fit([p["bytes"] for p in points], [p["seconds"].median for p in points])
        say(f"over {axis}: {line}")
        out[axis] = {"points": points, "line": line}
    return out
