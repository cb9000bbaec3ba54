"""What an op should take on a GPU, from its bytes and operations and the data sheet of the device: no measurement here.

An op takes the longer of (bytes / bandwidth) and (operations / rate), neither of which a kernel attains in full: of the
bandwidth that a copy has it gets a share (:data:`STREAMED`), and of the rate of the units that it uses another
(:data:`ISSUED`). Both were judged from the machine code: loads in flight, instructions and shared-memory wavefronts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from ..subspace.layout import Kind
from ..subspace.plan import plan
from .cost import Case

ATTAINABLE = 0.9
"""Share of the data sheet's bandwidth that a plain copy attains (about .90 to .94 on A100 and H100, as published copies
show); `make gpu-check` measures it on the device and compares with that instead."""

STREAMED = {
    "project": 0.98, "edit_": 0.97, "dacsp_": 0.97,  # 64 to 128 bytes in flight a thread, nothing waits for another
    "token_logprobs": 0.95, "token_logprobs_backward": 0.95,  # 32 a thread, eight thread blocks on a multiprocessor
    # 64 in flight a thread, and then all threads of a block wait for the tile and for each other: other blocks read on.
    "gram": 0.85, "rotate_": 0.8, "edit_rotate_": 0.8, "pca_update_": 0.82,
    "input_project": 0.85, "input_confine_": 0.75, "input_dacsp_": 0.75,  # the matrix is read again, in part from L2
}  # fmt: skip
"""Share of a copy's bandwidth that a kernel bound by memory gets."""

ISSUED = {"fp32": 0.75, "fp64": 0.75, "tf32": 0.55}
"""Share of a unit's rate: a rotation issues 64 multiply-adds beside 10 reads of shared memory and 4 of its table; products of
warps (mma.sync) attain less than the data sheet's rate on everything since Hopper."""


@dataclass(frozen=True)
class Device:
    """Figures of a data sheet."""

    name: str
    bandwidth: float  # bytes per second of device memory
    fp32: float  # operations per second on the ordinary cores, an addition and a multiplication counting as two
    fp64: float  # the same in tensor cores, dense
    tf32: float
    source: str  # where the figures stand


DEVICES = {
    "a100": Device("A100 SXM 80 GB", 2.039e12, 19.5e12, 19.5e12, 156e12, "NVIDIA A100 data sheet (2021)"),
    "h100": Device("H100 SXM 80 GB", 3.35e12, 67e12, 67e12, 494e12, "NVIDIA H100 data sheet (2023)"),
    "b200": Device(
        "B200 180 GB",
        8.0e12,
        80e12,
        37e12,
        1100e12,
        "NVIDIA DGX B200 data sheet (2024): 64 TB/s over 8 GPUs; fp32 and tf32 as HGX B200",
    ),
}


@dataclass(frozen=True)
class Prediction:
    """Seconds of one call: of its bytes, of its operations, and the longer of the two."""

    case: Case
    memory: float
    arithmetic: float

    @property
    def seconds(self) -> float:
        return max(self.memory, self.arithmetic)

    @property
    def bound(self) -> str:
        return "memory" if self.memory >= self.arithmetic else "arithmetic"


def predict(case: Case, device: Device, bandwidth: float | None = None) -> Prediction:
    """What a call of `case` should take at a bandwidth (bytes per second of a copy); by default the data sheet's attained
    share."""
    rate = bandwidth if bandwidth is not None else ATTAINABLE * device.bandwidth
    rates = {"fp32": device.fp32, "fp64": device.fp64, "tf32": device.tf32}
    arithmetic = sum(count / (ISSUED[unit] * rates[unit]) for unit, count in operations(case).items())
    return Prediction(case, case.bytes / (rate * STREAMED[case.packet]), arithmetic)


def operations(case: Case) -> dict[str, float]:
    """Operations by unit, those on padding included: Gram matrices are summed in fp64 over eight rows at a time, inputs of
    matrices in tf32 over 32 directions, whose fp32 numbers are two terms each; all else is fp32."""
    op = case.packet
    if op.startswith("input_"):
        product = 2.0 * case.B * -(-case.K // 32) * 32 * case.N
        terms = (1 + (case.grad == torch.float32)) * (1 + (case.basis == torch.float32))
        coefficients, edit = min(terms, 3), 2 + (case.basis == torch.float32)
        return {"tf32": product * (coefficients + (edit if op != "input_project" else 0))}
    if op not in ("gram", "pca_update_"):
        return {"fp32": case.flops}
    eights = -(-(case.K + case.B) // 8)
    squares = {"fp64": eights * (eights + 1) / 2 * 128.0 * case.N}
    return squares if op == "gram" else squares | {"fp32": replace(case, op="rotate_").flops}


def device_named(name: str) -> Device:
    """A device by the short name of :data:`DEVICES`, or the first whose name occurs in what torch calls it; else a
    ValueError."""
    for short, device in DEVICES.items():
        if short in name.lower():
            return device
    raise ValueError(f"device: expected one of {', '.join(DEVICES)}, found {name!r}")


# -------------------------------------------------------------------------------------------------------- the table

BF16, INT8 = torch.bfloat16, torch.int8
N = 1_000_000_000
"""Elements that one of eight GPUs holds of a model of 8e9 parameters."""


def cases() -> list[Case]:
    """Every N-sized op on a shard of 1e9 bf16 elements, streams of k = 64 on a smaller one, and logits of 16k tokens."""
    return [
        Case("project", N=N, grad=BF16, basis=BF16),
        Case("project", N=N, grad=BF16, basis=INT8),
        Case("gram", D=1, k=12, N=N, grad=BF16, basis=BF16),
        Case("edit_", N=N, grad=BF16, basis=BF16),
        Case("edit_", N=N, grad=BF16, basis=INT8),
        Case("rotate_", D=1, k=12, N=N, grad=BF16, basis=BF16),
        Case("edit_rotate_", N=N, grad=BF16, basis=BF16),
        Case("dacsp_", N=N, grad=BF16, basis=BF16),
        Case("dacsp_", N=N, grad=BF16, basis=INT8),
        Case("pca_update_", D=1, k=12, N=N, grad=BF16, basis=BF16),
        Case("gram", D=1, k=68, N=N // 8, grad=BF16, basis=BF16),
        Case("pca_update_", D=1, k=68, N=N // 8, grad=BF16, basis=BF16),
        *(Case(op, D=1, k=96, B=8192, N=8192, grad=BF16) for op in ("input_project", "input_confine_", "input_dacsp_")),
        Case("token_logprobs", D=0, k=0, B=16384, N=151_936, grad=BF16, basis=BF16),
        Case("token_logprobs_backward", D=0, k=0, B=16384, N=151_936, grad=BF16, basis=BF16),
    ]


def table(name: str) -> str:
    """Markdown: bytes, operations and predicted time of every case."""
    device = device_named(name)
    lines = ["| case | GB | Gop | ms | % of bandwidth | bound by |", "|---|---|---|---|---|---|"]
    for case in cases():
        p = predict(case, device)
        share = 100 * case.bytes / p.seconds / device.bandwidth
        figures = f"{case.bytes / 1e9:.2f} | {case.flops / 1e9:.0f} | {p.seconds * 1e3:.2f} | {share:.0f} | {p.bound}"
        lines.append(f"| `{case.op}` {case.name.removeprefix(case.op).strip()} | {figures} |")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------- a 7B run on eight GPUs

GPUS, DOMAINS = 8, 3
TOKENS = 512 * 2048  # of a step: 512 completions of 2048 tokens
UTILISATION = 0.4  # share of the dense bf16 rate that a training step attains
BF16_RATE = {"a100": 312e12, "h100": 989e12, "b200": 2250e12}  # operations per second, dense, same data sheets
SUMMED = 20e-6
"""Seconds of one all-reduce of a few numbers."""
GUARDS: tuple[tuple[str, Kind, int, torch.dtype], ...] = (
    ("input, r = 32 (the default)", "input", 32, torch.float32),
    ("block, r = 16", "block", 16, torch.float32),
    ("flat, k = 8, bf16", "flat", 8, BF16),
    ("flat, k = 8, int8", "flat", 8, INT8),
)


@dataclass(frozen=True)
class Overhead:
    """An acting step of the guard beside a training step, on one of :data:`GPUS` GPUs."""

    setting: str  # what the guard's bases are
    bases: float  # bytes of directions per GPU
    guard: float  # seconds of an acting step
    step: float  # seconds of a training step's forward and backward passes


def overhead(name: str) -> list[Overhead]:
    """Guards on a 7B run sharded by FSDP2, as :func:`carerl_kernels.subspace.plan.plan` counts bytes and operations.

    Parameters are bf16. A step costs 6 operations per parameter and token. Input directions are multiplied in tf32, all else
    in fp32.
    """
    device, model = device_named(name), _qwen2_7b()
    parameters = sum(p.numel() for p in model.parameters())
    step = 6 * parameters * TOKENS / (GPUS * UTILISATION * BF16_RATE[name])
    found = []
    for label, kind, rank, dtype in GUARDS:
        rate = ISSUED["tf32"] * device.tf32 if kind == "input" else ISSUED["fp32"] * device.fp32
        planned = plan(model, kind, rank, DOMAINS, GPUS, dtype, 2, ATTAINABLE * device.bandwidth, rate)
        found.append(Overhead(label, planned.directions, planned.seconds + SUMMED, step))
    return found


def _qwen2_7b() -> nn.Module:
    """The shapes of Qwen2.5-7B, without its biases."""
    hidden, kv, inner, vocabulary = 3584, 512, 18944, 152_064
    with torch.device("meta"):
        linear = [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden)]
        linear += [(hidden, inner), (hidden, inner), (inner, hidden)]
        layers = [nn.Linear(*size, bias=False) for _ in range(28) for size in linear]
        return nn.Sequential(nn.Embedding(vocabulary, hidden), *layers, nn.Linear(hidden, vocabulary, bias=False))


def overhead_table(name: str) -> str:
    """Markdown of :func:`overhead`."""
    lines = ["| bases | GB per GPU | guard, ms | step, s | share |", "|---|---|---|---|---|"]
    for o in overhead(name):
        share = 100 * o.guard / o.step
        lines.append(f"| {o.setting} | {o.bases / 1e9:.2f} | {o.guard * 1e3:.1f} | {o.step:.2f} | {share:.2f} % |")
    return "\n".join(lines)


def report(name: str) -> str:
    """What `carerl bench --predict` prints and docs/gpu.md holds."""
    device = device_named(name)
    head = (
        f"{device.name}: {device.bandwidth / 1e12:.2f} TB/s, {device.fp32 / 1e12:g} TFLOP/s fp32, "
        f"{device.fp64 / 1e12:g} fp64 and {device.tf32 / 1e12:g} tf32 in tensor cores ({device.source})"
    )
    return "\n\n".join([head, table(name), overhead_table(name)])
