"""What an op should take on a GPU, from its bytes and operations and the data sheet of the device: no measurement here.

An op takes at least the longer of (bytes / memory bandwidth) and (operations / rate), and in practice somewhat more: a kernel
that streams reaches some 90 % of the bandwidth of the data sheet, hence :data:`ATTAINABLE`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .cases import Case
from .cost import SCALE_BLOCK, flops_of

ATTAINABLE = 0.9
"""Share of the data sheet's bandwidth that a plain copy attains (about .90 to .94 on A100 and H100, as published copies
show); ``make gpu-check`` measures it on the device and compares with that instead."""


@dataclass(frozen=True)
class Device:
    """Figures of a data sheet.

    Attributes:
        bandwidth: bytes per second of device memory. fp32, fp64: operations per second on the ordinary cores, an addition and
            a multiplication counting as two. source: where the figures stand.
    """

    name: str
    bandwidth: float
    fp32: float
    fp64: float
    source: str


DEVICES = {
    "a100": Device("A100 SXM 80 GB", 2.039e12, 19.5e12, 9.7e12, "NVIDIA A100 data sheet (2021)"),
    "h100": Device("H100 SXM 80 GB", 3.35e12, 67e12, 34e12, "NVIDIA H100 data sheet (2023)"),
    "b200": Device(
        "B200 180 GB", 8.0e12, 80e12, 37e12, "NVIDIA DGX B200 data sheet (2024): 64 TB/s over 8 GPUs; fp32 as HGX B200"
    ),
}


@dataclass(frozen=True)
class Prediction:
    """Seconds of one call: of its bytes at the attainable bandwidth, of its operations, and the longer of the two."""

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
    """The least that a call of ``case`` takes.

    Args:
        bandwidth: bytes per second that a copy was measured to attain; by default the share of the data sheet's.
    """
    rate = bandwidth if bandwidth is not None else ATTAINABLE * device.bandwidth
    doubles = _fp64_operations(case)
    return Prediction(case, case.bytes / rate, (case.flops - doubles) / device.fp32 + doubles / device.fp64)


def _fp64_operations(case: Case) -> int:
    """Gram matrices are summed in fp64, all else in fp32."""
    return flops_of("gram", case.shape) if case.op.split(".")[0] in ("gram", "pca_update_") else 0


def device_named(name: str) -> Device:
    """A device by the short name of :data:`DEVICES`, or the first whose name occurs in what torch calls it.

    Raises:
        ValueError: neither; names those that are known.
    """
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
        Case("token_logprobs", D=0, k=0, B=16384, N=151_936, grad=BF16, basis=BF16),
        Case("token_logprobs_backward", D=0, k=0, B=16384, N=151_936, grad=BF16, basis=BF16),
    ]


def table(name: str) -> str:
    """Markdown: bytes, operations and predicted time of every case."""
    device = device_named(name)
    lines = ["| case | GB | Gop | ms | bound by |", "|---|---|---|---|---|"]
    for case in cases():
        p = predict(case, device)
        figures = f"{case.bytes / 1e9:.1f} | {case.flops / 1e9:.0f} | {p.seconds * 1e3:.1f} | {p.bound}"
        lines.append(f"| `{case.op}` {case.name.removeprefix(case.op).strip()} | {figures} |")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------- a 7B run on eight GPUs

PARAMETERS = 7.6e9  # Qwen2.5-7B
GPUS = 8
TOKENS = 512 * 2048  # of a step: 512 completions of 2048 tokens
UTILISATION = 0.4  # share of the dense bf16 rate that a training step attains
LINEAR = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)  # weights of the linear layers of Qwen2.5-7B
BF16_RATE = {"a100": 312e12, "h100": 989e12, "b200": 2250e12}  # operations per second, dense, same data sheets


@dataclass(frozen=True)
class Overhead:
    """The guard beside a training step on one of :data:`GPUS` GPUs.

    Attributes:
        setting: kind of bases. bases: bytes per GPU. guard, step: seconds; the step is forward and backward passes only.
    """

    setting: str
    bases: float
    guard: float
    step: float


def overhead(name: str, rows: int = 24, rank: int = 16) -> list[Overhead]:
    """The default guard (project the parameters, edit them) on a 7B run sharded by FSDP2, flat and factored bases.

    A step costs 6 operations per parameter and token. Flat bases hold ``rows`` rows: two passes over the local shard, and
    an all-reduce of ``rows`` numbers (20 us). Factored ones (U, V of rank ``rank`` for each weight matrix, D = 3 domains):
    the weights are read twice and written once, the factors are read twice, U^T W V and W + U X V^T cost 2 * 2 * rank
    operations per weight and domain on tensor cores, counted at half their rate.
    """
    device, shard = device_named(name), PARAMETERS / GPUS
    rate = ATTAINABLE * device.bandwidth
    step = 6 * PARAMETERS * TOKENS / (GPUS * UTILISATION * BF16_RATE[name])
    found = []
    for label, size in (("bf16", 2.0), ("int8", 1 + 4 / SCALE_BLOCK), ("fp8", 1 + 4 / SCALE_BLOCK)):
        moved = shard * (2 * rows * size + 3 * 2)
        found.append(Overhead(f"flat, K = {rows}, {label}", shard * rows * size, moved / rate + 20e-6, step))
    factors = 3 * _factor_elements(rank) / GPUS
    moved = LINEAR / GPUS * 3 * 2 + 2 * 2 * factors
    operations = 2 * 3 * 2 * rank * LINEAR / GPUS
    guard = max(moved / rate, operations / (0.5 * BF16_RATE[name])) + 20e-6
    found.append(Overhead(f"factored, r = {rank}, 3 domains", 2 * factors, guard, step))
    return found


def _factor_elements(rank: int) -> float:
    """(m + n) r over the linear layers of Qwen2.5-7B."""
    hidden, kv, inner = 3584, 512, 18944
    return 28 * rank * (2 * (hidden + hidden) + 2 * (hidden + kv) + 3 * (hidden + inner))


def overhead_table(name: str) -> str:
    """Markdown of :func:`overhead`."""
    lines = ["| bases | GB per GPU | guard, ms | step, s | share |", "|---|---|---|---|---|"]
    for o in overhead(name):
        share = 100 * o.guard / o.step
        lines.append(f"| {o.setting} | {o.bases / 1e9:.2f} | {o.guard * 1e3:.1f} | {o.step:.2f} | {share:.2f} % |")
    return "\n".join(lines)


def report(name: str) -> str:
    """What ``carerl bench --predict`` prints and docs/gpu.md holds."""
    device = device_named(name)
    return "\n".join(
        [
            f"{device.name}: {device.bandwidth / 1e12:.2f} TB/s, {device.fp32 / 1e12:g} TFLOP/s fp32, "
            f"{device.fp64 / 1e12:g} fp64 ({device.source})",
            "",
            table(name),
            "",
            overhead_table(name),
        ]
    )
