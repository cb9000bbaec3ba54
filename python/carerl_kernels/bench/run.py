"""Runs a preset: measures, prints, writes JSON and the roofline picture, and fails at the end if anything was wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from .._errors import one_of
from .._files import write_json
from .cases import Inputs
from .cost import PRESETS, Case, cases, chosen_of, compiling, short
from .expect import Expectation, WrongResult
from .llm import guard_overhead, settings_named
from .logits import LogitsCase
from .measure import CaseResult, ImpossibleResult, measure
from .overhead import call_overhead, sweep, sweep_cases
from .probe import PROBE_BYTES, Bandwidth, environment
from .show import Printer, roofline
from .variants import variants

SECONDS = {"quick": 0.7, "full": 3.0}  # of timed rounds per case, at least five rounds


class BenchError(RuntimeError):
    """At least one result of the run was wrong or impossible; all others were written all the same."""


def run_bench(
    preset: str = "quick",
    json_path: Path | str | None = None,
    png_path: Path | str | None = None,
    *,
    ops: Sequence[str] = (),
    own_cases: Sequence[Case] | None = None,
    seconds: float | None = None,
    probe_bytes: int = PROBE_BYTES,
    printer: Printer | None = None,
) -> dict[str, Any]:
    """Measures one preset and prints a table.

    Args:
        preset: "quick" (under a minute on a quiet machine), "full", "sweep" (time against N and K) or "llm" (the
            guard on a training step of SmolLM2-135M).
        png_path: file for the roofline picture (quick and full).
        ops: only these ops (of "llm": settings whose names contain one of these); all by default.
        seconds: of timed rounds per case, instead of the preset's.

    Returns:
        what the JSON file holds: `environment`, and `cases` or what the preset measures instead.

    Raises:
        ValueError: an unknown preset or op.
        BenchError: wrong or impossible results, named; raised after everything else was measured and written.
    """
    one_of("preset", preset, PRESETS)
    if preset == "sweep" and len(ops) > 1:
        raise ValueError(f"op: expected one for the sweep, found {', '.join(ops)}")
    settings = []
    if preset == "llm":
        settings = settings_named(ops)
    chosen = [] if preset == "llm" else chosen_of(own_cases or cases(preset), ops)
    printer = printer or Printer()
    bandwidth = Bandwidth(probe_bytes)
    best = max(bandwidth.measure() for _ in range(5))
    report: dict[str, Any] = {"preset": preset, "environment": environment(best, bandwidth.source)}
    printer.environment(report["environment"])
    failures: list[str] = []
    with torch.no_grad():
        if preset == "sweep":
            report["sweep"] = sweep(sweep_cases(ops[0] if ops else "dacsp_"), bandwidth, say=printer.line)
        elif preset == "llm":
            report["llm"] = guard_overhead(printer, settings)
        else:
            results = _measure_all(preset, chosen, bandwidth, seconds or SECONDS[preset], printer, failures)
            report["cases"] = results
            if preset == "full" and not ops and own_cases is None:
                _extras(report, bandwidth, printer, failures)
            if png_path is not None:
                roofline(results, report["environment"], png_path)
    report["failures"] = failures
    if json_path is not None:
        write_json(json_path, report, plain)
    if failures:
        raise BenchError("\n".join(failures))
    return report


def _measure_all(
    preset: str, chosen: list[Case], bandwidth: Bandwidth, seconds: float, printer: Printer, failures: list[str]
) -> list[CaseResult]:
    results = []
    for case in chosen:
        printer.progress(case.name)
        try:
            result = _measure_one(case, compiling(preset, case), bandwidth, seconds)
        except (WrongResult, ImpossibleResult) as error:
            failures.append(str(error))
            printer.line(f"[red]{error}")
            continue
        results.append(result)
        printer.case(result)
    printer.table(results)
    return results


def _measure_one(case: Case, compiled: bool, bandwidth: Bandwidth, seconds: float) -> CaseResult:
    if case.op.startswith("token_logprobs"):
        logits = LogitsCase(case)
        return measure(logits, *logits.variants(compiled), logits, bandwidth, seconds)
    x = Inputs(case)
    expectation = Expectation(x)
    return measure(x, *variants(x, expectation, compiled), expectation, bandwidth, seconds)


def _extras(report: dict[str, Any], bandwidth: Bandwidth, printer: Printer, failures: list[str]) -> None:
    """Call overhead, and PCA against scikit-learn where it is installed."""
    report["call_overhead_us"] = call_overhead()
    printer.overhead(report["call_overhead_us"])
    try:
        from .sklearn_pca import SharedStream

        stream = SharedStream(Case("pca_update_", D=1, k=8, B=4, N=1_000_000))
    except ImportError:
        printer.line("scikit-learn is not installed: no comparison with IncrementalPCA")
        return
    try:
        result = measure(stream, stream.variants(), {}, stream, bandwidth, 4 * SECONDS["full"])
    except (WrongResult, ImpossibleResult) as error:
        failures.append(str(error))
        return
    report["sklearn"] = {"case": result, "captured_energy": stream.captured()}
    printer.case(result)
    printer.line(f"captured energy of the stream: {report['sklearn']['captured_energy']}")


def plain(value: Any) -> Any:
    """What JSON does not know of results."""
    if isinstance(value, torch.dtype):
        return short(value)
    of_case = {"name": value.name, "bytes": value.bytes, "flops": value.flops} if isinstance(value, Case) else {}
    return {field.name: getattr(value, field.name) for field in fields(value)} | of_case
