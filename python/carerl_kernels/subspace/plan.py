"""What a kind of basis costs a model before anything is allocated: memory per process, bytes and operations per step, traffic.

The model is described by shapes alone (meta device), so a 7B configuration takes seconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from .._errors import at_least
from .._ops import SCALED_DTYPES
from ..thin import WORKSPACE
from .layout import Kind, Layout
from .matrices import MatrixLayout
from .moments import exact, sketch_width
from .sites import guess_sides

OVERSAMPLED_ROWS = 4  # what StreamingPCA stores beyond k while recording
STATE = 5  # float64 per coefficient of row and block bases: q_prev, q_start, the rule's, and where q and correction go


@dataclass(frozen=True)
class Plan:
    """Bytes are per process; counts are per optimizer step."""

    kind: Kind  # this and the next four: what was planned
    k: int  # or the rank of factored kinds
    domains: int
    world_size: int
    dtype: str
    parameters: int
    covered: int  # the number of parameters under directions
    directions: int  # bytes of all domains' directions
    cores: int  # bytes of overlaps, and of the frames of every set of domains that acts (all, and all but one)
    state: int  # bytes of the rule's memory, the baselines and, of input bases, what was recorded
    recording: int  # bytes more while a stage is recorded
    disk: int  # bytes of one domain's file (float32)
    start: int  # bytes of a process's temporary copy of the parameters in a stage
    read: int  # bytes of parameters and directions moved by one acting step
    flops: int  # multiplications and additions of an acting step
    communicated: int  # numbers summed over processes by one acting step
    recorded: int  # numbers summed over processes by recording one gradient
    seconds: float  # the duration of an acting step, memory traffic and arithmetic one after the other

    @property
    def total(self) -> int:
        """Bytes per process while acting and recording."""
        return self.directions + self.cores + self.state + self.recording

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total}


def plan(
    model: nn.Module,
    kind: Kind,
    k: int,
    domains: int = 3,
    world_size: int = 1,
    dtype: torch.dtype = torch.float32,
    parameter_bytes: int = 4,
    bandwidth: float = 2.0e12,
    flops: float = 30e12,
) -> Plan:
    """Plans a guard over the trainable parameters of a model, which may be on the meta device.

    Args:
        model: its shapes count.
        kind, k: see :class:`~carerl_kernels.CapabilityGuard`; k is the rank of "block" and "input".
        domains: The number of domains with history, besides none or one that is being recorded.
        world_size: processes that share the parameters (FSDP2).
        dtype: storage of row bases.
        parameter_bytes: per element of the parameters that the optimizer updates.
        bandwidth: Bytes per second of a process's memory, as attained.
        flops: Float32 operations per second of matrix products, as attained.

    Raises:
        ValueError: a number out of range, or a kind the model has no use for.
    """
    at_least("domains", domains, 1)
    at_least("world size", world_size, 1)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    N = sum(p.numel() for _, p in named)
    common: dict[str, Any] = {
        "kind": kind,
        "k": k,
        "domains": domains,
        "world_size": world_size,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": N,
        "start": -(-N // world_size) * parameter_bytes,
    }
    if kind in get_args(Kind)[:2]:
        parts: dict[str, Any] = _rows(named, kind, k, domains, world_size, dtype, parameter_bytes)
    else:
        sides = guess_sides(model, named)
        if world_size > 1:  # FSDP2 spreads stacks of matrices over processes: they are not covered
            named = [(name, p) for name, p in named if name not in sides or p.dim() < 3]
        layout = MatrixLayout.of(_floats(named), kind, k, None, sides)  # type: ignore[arg-type]
        parts = (_block if kind == "block" else _input)(layout, domains, world_size, parameter_bytes)
    seconds = parts["read"] / bandwidth + parts["flops"] / flops
    return Plan(**common, **parts, seconds=seconds)


def _floats(named: Sequence[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """The same shapes in float32, wherever the model came from."""
    return [(name, torch.empty(p.shape, device="meta")) for name, p in named]


def _rows(
    named: Sequence[tuple[str, Tensor]], kind: Any, k: int, D: int, world: int, dtype: torch.dtype, parameter_bytes: int
) -> dict[str, int]:
    layout = Layout.of(_floats(named), kind, k)
    N, K = -(-layout.size // world), D * k
    direction = K * N * dtype.itemsize + (K * -(-N // 128) * 4 if dtype in SCALED_DTYPES else 0)
    frames = D * ((D - 1) * k) ** 2 + K**2
    W = k + OVERSAMPLED_ROWS + 1
    return {
        "covered": layout.parameters,
        "directions": direction,
        "cores": layout.T * 8 * (K**2 + frames),
        "state": layout.T * K * 8 * STATE,
        "recording": (k + OVERSAMPLED_ROWS) * N * 4,
        "disk": k * layout.size * 4,
        "read": 2 * direction + 3 * N * parameter_bytes,
        "flops": 4 * K * N,
        "communicated": (layout.T * K + 1) if world > 1 else 0,
        "recorded": layout.T * W**2 if world > 1 else 0,
    }


def _block(layout: MatrixLayout, D: int, world: int, parameter_bytes: int) -> dict[str, int]:
    r, T = layout.k, layout.T
    count = lambda size: sum(len(g.indices) * size(g) for g in layout.groups)  # noqa: E731
    m, n = count(lambda g: -(-g.whole // world)), count(lambda g: g.n)
    N = count(lambda g: -(-g.whole // world) * g.n)
    K = D * r * r

    def frame(active: int) -> int:
        """Float64 numbers per matrix: none, the closed form of two, or a dense root."""
        return {0: 0, 1: 0, 2: 6 * r * r}.get(active, (active * r * r) ** 2)

    return {
        "covered": layout.covered,
        "directions": 4 * D * r * (m + n),
        "cores": 8 * T * (2 * (D * r) ** 2 + frame(D) + D * frame(D - 1)),
        "state": T * K * 8 * (STATE + 2),  # orientation and displacement, too
        "recording": 2 * WORKSPACE,
        "disk": 4 * r * count(lambda g: g.whole + g.n) + 8 * T * (r * r + r),
        "read": 3 * N * parameter_bytes,
        "flops": 4 * N * D * r,
        "communicated": (T * K + 1) if world > 1 else 0,
        "recorded": 0,
    }


def _input(layout: MatrixLayout, D: int, world: int, parameter_bytes: int) -> dict[str, int]:
    r = layout.k
    K = D * r
    factors = rows = N = sums = left_rows = whole = outputs = matrices = 0
    for g in layout.groups:
        count, m, right = len(g.indices), -(-g.whole // world), g.side == "right"
        fed, told = (g.n, g.whole) if right else (g.whole, g.n)  # elements of an input, and outputs
        factors += count * (g.n if right else m)
        whole += count * fed
        outputs += count * told
        rows += count * (m if right else g.n)
        left_rows += 0 if right else count * g.n
        N += count * m * g.n
        sums += count * fed * (fed if exact(fed, sketch_width(r)) else sketch_width(r))
        matrices += count
    return {
        "covered": layout.covered,
        "directions": 2 * 4 * K * factors,  # as they are, and orthonormal as those act together that act now
        "cores": (8 + 4) * matrices * K**2,  # overlaps, and the root of those that act
        "state": 2 * 4 * rows * K
        + 4 * K * factors,  # anchors and displacements; directions as recorded, for later room
        "recording": 8 * sums,  # at most: matrices that are fed the same share theirs
        "disk": 4 * r * whole + 8 * outputs * r,
        "read": 3 * N * parameter_bytes,
        "flops": 4 * N * K,
        "communicated": (left_rows * K + 1) if world > 1 else 0,
        "recorded": 0,  # the sums, once, at the stage's end
    }


def model_of(config: Path | str) -> nn.Module:
    """A causal language model on the meta device, from a transformers config: a JSON file, or a folder with a config.json."""
    path = Path(config)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"model config {path}: expected a config.json or a folder with one, found nothing there"
        )
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        raw = json.loads(path.read_text())
        settings = AutoConfig.for_model(**raw)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"model config {path}: expected a transformers config with a known model_type ({error})"
        ) from error
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(settings)
