"""Timing of one case: every competitor once per round, in turn, so that drift of the machine falls on all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .cost import Case
from .probe import Bandwidth, cache_bytes, peak_extra_memory
from .variants import OURS, Variant

ROUNDS = (5, 41)  # at least, at most
SLOW = 2.0
"""Seconds a call: a competitor that takes longer is timed once, and without its memory."""


class ImpossibleResult(RuntimeError):
    """A case was faster than its bytes can come from memory: the count, the clock or the result must be wrong."""


class Resettable(Protocol):
    case: Case

    def reset(self) -> None: ...


class Checks(Protocol):
    def check(self, variant: str, outputs: Mapping[str, Any], exact: bool) -> dict[str, float]: ...


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, median, high = np.percentile(values, (25, 50, 75))
        return cls(float(median), float(low), float(high))

    @property
    def relative(self) -> float:
        """Interquartile range over median."""
        return (self.high - self.low) / self.median if self.median else 0.0


@dataclass(frozen=True)
class VariantResult:
    """What one competitor did."""

    seconds: Spread  # per call
    gbps: float  # GB/s of the bytes counted for the op: what a competitor moves beyond them shows as a lower figure
    percent: Spread  # of the streaming-read bandwidth, against the probe of the same round
    ratio: Spread  # its time over ours in the same round; above 1 means that ours was faster
    peak_extra_bytes: int | None  # growth of the resident set during one call; None: not known here, or a call is slow
    rounds: int  # in which it took part
    errors: dict[str, float]  # largest relative error of each output over all calls
    note: str  # for example which way of writing it was the fastest


@dataclass(frozen=True)
class CaseResult:
    """A case with all competitors."""

    case: Case
    bandwidth: Spread  # GB/s, streaming reads measured once per round
    rounds: int
    variants: dict[str, VariantResult]
    missing: dict[str, str]  # competitors that could not run, and why


def measure(
    x: Resettable,
    found: Mapping[str, Variant],
    missing: Mapping[str, str],
    expectation: Checks,
    bandwidth: Bandwidth,
    seconds: float,
) -> CaseResult:
    """Times all competitors of a case for about `seconds`; every call starts from the same inputs and is checked.

    The time is shared evenly: a slow competitor takes part in fewer rounds, at least three of them (a very slow one in one),
    which are spread over the whole.

    Raises:
        WrongResult: a competitor computed something else.
        ImpossibleResult: see :func:`check_possible`.
    """
    case = x.case
    times: dict[str, list[tuple[int, float]]] = {name: [] for name in found}  # round and seconds
    errors: dict[str, dict[str, float]] = {name: {} for name in found}

    def once(name: str, call: Callable[[], dict[str, Any]]) -> float:
        variant = found[name]
        x.reset()
        variant.reset()
        bandwidth.evict()
        started = time.perf_counter()
        outputs = call()
        elapsed = time.perf_counter() - started
        for output, error in (variant.expectation or expectation).check(name, outputs, variant.exact).items():
            errors[name][output] = max(error, errors[name].get(output, 0.0))
        return elapsed

    peaks, wanted = {}, {}
    for name, variant in found.items():
        rough = once(name, variant.call)
        slow = rough > SLOW and name != OURS
        x.reset()
        variant.reset()
        peaks[name] = None if slow else peak_extra_memory(variant.call)
        fewest = ROUNDS[0] if name == OURS else 1 if slow else 3
        wanted[name] = min(max(int(seconds / len(found) / rough), fewest), ROUNDS[1])
    rounds = wanted[OURS]
    probes: list[float] = []
    for number in range(rounds):
        probes.append(bandwidth.measure())
        for name, variant in found.items():
            share = min(wanted[name], rounds)
            if (number + 1) * share // rounds > number * share // rounds:
                times[name].append((number, once(name, variant.call)))

    results = {}
    for name, variant in found.items():
        counted = case.bytes if variant.expectation is None else variant.expectation.x.case.bytes
        results[name] = VariantResult(
            seconds=Spread.of([t for _, t in times[name]]),
            gbps=Spread.of([counted / t / 1e9 for _, t in times[name]]).median,
            percent=Spread.of([100 * counted / t / 1e9 / probes[number] for number, t in times[name]]),
            ratio=Spread.of([t / times[OURS][number][1] for number, t in times[name]]),  # ours is in every round
            peak_extra_bytes=peaks[name],
            rounds=len(times[name]),
            errors=errors[name],
            note=variant.note,
        )
    result = CaseResult(case, Spread.of(probes), rounds, results, dict(missing))
    check_possible(result, max(probes))
    return result


def check_possible(result: CaseResult, fastest_probe: float, cache: int | None = None) -> None:
    """Compares our time with the least that the case's bytes need from memory.

    A last-level cache may keep what an earlier pass of the same call has read, so that many bytes need not come from
    memory again; nothing else is in cache, because every timed call starts cold.

    Args:
        result: of :func:`measure`. fastest_probe: GB/s, the best streaming read of its rounds. cache: bytes; None asks.

    Raises:
        ImpossibleResult: more than 100 % of the bandwidth plus the spread of the measurement; names the case.
    """
    case, own = result.case, result.variants[OURS]
    held = min(case.rereads, cache_bytes() if cache is None else cache)
    rate = (case.bytes - held) / own.seconds.median / 1e9
    spread = own.seconds.relative + result.bandwidth.relative
    if rate > fastest_probe * (1 + spread):
        raise ImpossibleResult(
            f"{case.name}: at least {rate:.1f} GB/s from memory where streaming reads reach {fastest_probe:.1f} "
            f"({100 * rate / fastest_probe:.0f} %, spread {100 * spread:.0f} %): bytes, clock or probe must be wrong"
        )
