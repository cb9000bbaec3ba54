"""The ops timed on a GPU: CUDA events, L2 flushed before every call, results checked as on the CPU, bandwidth measured.

`make gpu-check` runs this after the tests; `carerl bench --gpu` alone. Nothing here has an opinion on what is fast: it
prints time and bandwidth beside what :mod:`roofline` predicts from the device's data sheet.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import _load
from .cases import Inputs
from .cost import Case, chosen_of
from .expect import Expectation, WrongResult
from .gpu_others import ways
from .logits import LogitsCase
from .measure import Spread
from .roofline import cases, device_named, predict
from .variants import OURS, line_of, ours

FLUSHED = 1 << 30  # bytes written before every call: many times any L2, and time for the host to queue the call
ROUNDS = 15
LARGEST = 32_000_000  # elements; bases of 24 bf16 rows are 1.5 GB, 30 times an L2 of 50 MB


class NoGpu(RuntimeError):
    """There is no GPU that this torch can use; the message says why."""


def device_or_raise() -> torch.device:
    """The current GPU; NoGpu with the reason where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        why = f"torch {torch.__version__} is a CPU build; install one with CUDA or ROCm"
    else:
        why = "torch sees no device; check the driver and CUDA_VISIBLE_DEVICES"
    raise NoGpu(f"no GPU: {why}")


def describe(device: torch.device) -> dict[str, Any]:
    """What results depend on. No host name, no path."""
    properties = torch.cuda.get_device_properties(device)
    found: dict[str, Any] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": getattr(torch.version, "hip", None),
    }
    with suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    return found


def elapsed(call: Callable[[], Any], before: Callable[[], Any], device: torch.device, rounds: int) -> list[float]:
    """Seconds of every call by CUDA events; `before` runs on the same stream before each, outside the time."""
    pairs = []
    for _ in range(rounds):
        before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def bandwidth(device: torch.device, size: int = FLUSHED) -> dict[str, float]:
    """GB/s of a copy (bytes read and written) and of a sum (bytes read) over `size` bytes."""
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    ways: dict[str, tuple[Callable[[], Any], int]] = {
        "copy_gbps": (lambda: target.copy_(source), 2 * size),
        "read_gbps": (source.sum, size),
    }
    found = {}
    for name, (call, moved) in ways.items():
        call()
        found[name] = moved / statistics.median(elapsed(call, lambda: None, device, ROUNDS)) / 1e9
    return found


def moved_to(x: Inputs | LogitsCase, device: torch.device) -> None:
    """Every tensor of the inputs to the device, the expected values stay."""
    for name, value in vars(x).items():
        if name not in ("expected", "sampled"):
            setattr(x, name, pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), value))


def on_host(outputs: dict[str, Any]) -> dict[str, Any]:
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.cpu(), outputs)


def measure_case(
    case: Case,
    device: torch.device,
    name: str,
    rates: Mapping[str, float],
    rounds: int = ROUNDS,
    competing: bool = True,
) -> dict[str, Any]:
    """Times and checks one case.

    Args:
        name: of the device, as torch has it. rates: of :func:`bandwidth`. competing: whether others are timed beside ours.

    Returns:
        plain values: `case`, `op`, `bytes`, `flops`, `predicted_ms` (from the measured copy bandwidth),
        `data_sheet_ms` (from that of the data sheet, None for an unknown device), `errors` (relative, of every
        output), `wrong` (a message, or None); and where nothing is wrong `ms` (low, median, high quartile), `gbps`,
        `percent_of_copy` and `others` (median ms of each competitor, or why there is none).
    """
    x: Inputs | LogitsCase
    if case.op.startswith("token_logprobs"):
        x = LogitsCase(case)
        checks: Any = x
        moved_to(x, device)
        call = x.variants(False)[0][OURS].call
    else:
        x = Inputs(case)
        checks = Expectation(x)
        moved_to(x, device)
        call = ours(x)
    flush = torch.empty(FLUSHED, dtype=torch.int8, device=device)

    def before() -> None:
        x.reset()
        flush.zero_()

    result: dict[str, Any] = {"case": case.name, "op": case.op, "bytes": case.bytes, "flops": case.flops}
    result |= predictions(case, name, rates) | {"errors": {}, "wrong": None}
    try:
        for _ in range(2):  # the first one compiles; the second must find everything as before
            before()
            checks.check(OURS, on_host(call()), exact=True)
        seconds = Spread.of(elapsed(call, before, device, rounds))
        before()
        result["errors"] = checks.check(OURS, on_host(call()), exact=True)
    except WrongResult as error:
        return result | {"wrong": str(error)}
    gbps = case.bytes / seconds.median / 1e9
    milliseconds = [1e3 * seconds.low, 1e3 * seconds.median, 1e3 * seconds.high]
    result |= {"ms": milliseconds, "gbps": gbps, "percent_of_copy": 100 * gbps / rates["copy_gbps"]}
    return result | {"others": others(x, before, device, rounds) if competing else {}}


def others(
    x: Inputs | LogitsCase, before: Callable[[], Any], device: torch.device, rounds: int
) -> dict[str, float | str]:
    """Median milliseconds of each competitor, or the error that it ended with."""
    found: dict[str, float | str] = {}
    for name, call in ways(x).items():
        try:
            for _ in range(2):
                before()
                call()
            found[name] = 1e3 * statistics.median(elapsed(call, before, device, rounds))
        except Exception as error:  # a library without the product, a compiler without its tools: not ours to judge
            found[name] = line_of(error)
    return found


def predictions(case: Case, name: str, rates: Mapping[str, float]) -> dict[str, float | None]:
    """Milliseconds that a case should take, at the measured bandwidth and at that of the data sheet."""
    try:
        device = device_named(name)
    except ValueError:  # no fp32 rate to go by either: bytes alone
        return {"predicted_ms": case.bytes / rates["copy_gbps"] / 1e6, "data_sheet_ms": None}
    measured = predict(case, device, rates["copy_gbps"] * 1e9)
    return {"predicted_ms": 1e3 * measured.seconds, "data_sheet_ms": 1e3 * predict(case, device).seconds}


def gpu_cases(largest: int = LARGEST) -> list[Case]:
    """Those of the prediction, cut to what a host can prepare and check, and a list of 300 tensors."""
    cut = [
        replace(case, B=512) if case.op.startswith("token_logprobs") else replace(case, N=min(case.N, largest))
        for case in cases()
    ]
    lists = [replace(case, op="dacsp_.list", tensors=300) for case in cut if case.op == "dacsp_"]
    return cut + lists


def run_gpu(ops: Sequence[str] = (), say: Callable[[str], None] = print, competing: bool = True) -> dict[str, Any]:
    """Measures all cases on the current GPU.

    Args:
        ops: only these; all by default.
        say: takes one line per case. competing: see :func:`measure_case`.

    Raises:
        ValueError: an op that no case has.
        NoGpu: there is none.
    """
    chosen = chosen_of(gpu_cases(), ops)
    device = device_or_raise()
    rates = bandwidth(device)
    found = describe(device)
    say(f"{found['name']}: copy {rates['copy_gbps']:.0f} GB/s, read {rates['read_gbps']:.0f} GB/s")
    results = []
    with torch.no_grad():
        for case in chosen:
            results.append(measure_case(case, device, found["name"], rates, competing=competing))
            say(line(results[-1]))
    serves = {result["op"]: serving(result["op"]) for result in results}
    return {"device": found, "bandwidth": rates, "serves": serves, "results": results}


def serving(op: str) -> str:
    """The backend whose kernel the dispatcher takes for GPU tensors."""
    return next((name for name in ("cuda", "triton") if op in _load.BACKENDS[name].ops), "reference")


def line(result: Mapping[str, Any]) -> str:
    """One result for people."""
    if result["wrong"]:
        return f"{result['case']}: WRONG: {result['wrong']}"
    low, median, high = result["ms"]
    rivals = "".join(
        f", {name} {took:.3g} ms" if isinstance(took, float) else f", {name}: {took}"
        for name, took in result.get("others", {}).items()
    )
    return (
        f"{result['case']}: {median:.3g} [{low:.3g}, {high:.3g}] ms, {result['gbps']:.0f} GB/s, "
        f"{result['percent_of_copy']:.0f} % of copy, predicted {result['predicted_ms']:.3g} ms{rivals}"
    )
