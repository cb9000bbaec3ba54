"""What the op tests share: the backends under test, inputs of every shape and geometry, guarded buffers, error bounds."""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import oracle
import torch
from torch import Tensor

from carerl_kernels import _ops, reference

# --------------------------------------------------------------------------------------------------------- backends


@dataclass(frozen=True)
class Backend:
    """A set of kernels under test: ``backend("project.list", ...)`` calls the overload of that name."""

    name: str
    device: str
    kernel: Callable[[str], Callable]
    missing: Callable[[], str | None]  # why it cannot run here, None when it can

    def __call__(self, overload: str, *args, **kwargs):
        return self.kernel(overload)(*args, **kwargs)


def dispatched(overload: str) -> torch._ops.OpOverload:
    """``torch.ops.carerl.<op>.<overload>``: whatever kernel the dispatcher picks for the device of the arguments."""
    name, _, variant = overload.partition(".")
    return getattr(getattr(torch.ops.carerl, name), variant or "default")


def _no_kernel_for(key: str) -> str | None:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return None if has("carerl::project", key) else f"no {key} kernel of carerl::project is registered"


def _no_cuda() -> str | None:
    return _no_kernel_for("CUDA") if torch.cuda.is_available() else "no CUDA device"


BACKENDS = [
    Backend("reference", "cpu", reference.KERNELS.__getitem__, lambda: None),
    Backend("cpu", "cpu", dispatched, lambda: _no_kernel_for("CPU")),
    Backend("cuda", "cuda", dispatched, _no_cuda),
    # Triton (on a GPU, or interpreted on CPU tensors) and the emulated CUDA kernels join here: a name, the device of their
    # tensors, a lookup from overload to callable, and the reason for being skipped.
]
GPU_BACKENDS = {"cuda", "triton"}


# ----------------------------------------------------------------------------------------------------------- numbers

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
    "int8b32": torch.int8,  # blocks of 32 instead of 128
}
FP32_UNIT = 2.0**-24
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a spacing, relative
FLOOR = {
    torch.float32: 2.0**-149,
    torch.bfloat16: 2.0**-133,
    torch.float16: 2.0**-25,
}  # the same below the normal range

DOT_UNIT = 1e-6
"""Bound on a blocked dot product relative to sum |u_i g_i|. Lanes are fp32 and totals fp64, so a kernel that sums m products in
a lane has an error of m * 2^-24 at worst and sqrt(m) * 2^-24 typically: 1e-6 allows 16 at worst, 280 typically."""


def rng_of(*labels: object) -> np.random.Generator:
    """Inputs are a function of the test's labels; CARERL_TEST_SEED draws fresh ones."""
    return np.random.default_rng([zlib.crc32(repr(labels).encode()), int(os.environ.get("CARERL_TEST_SEED", "0"))])


def to64(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


def bits(tensor: Tensor) -> Tensor:
    """The storage of a tensor as integers: comparisons that tell -0.0 from 0.0 and can compare NaN."""
    return tensor.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def assert_within(actual: Tensor | np.ndarray, expected: np.ndarray, bound: np.ndarray | float, what: str = "") -> None:
    """Elementwise ``|actual - expected| <= bound``, with the worst element in the message."""
    found = to64(actual) if isinstance(actual, Tensor) else actual
    assert found.shape == expected.shape, f"{what} shape {found.shape}, expected {expected.shape}"
    error = np.abs(found - expected)
    excess = error - bound
    if excess.size and not (excess <= 0).all():  # written so that NaN fails
        worst = np.unravel_index(np.nanargmax(np.where(np.isnan(excess), np.inf, excess)), excess.shape)
        limit = np.broadcast_to(bound, excess.shape)[worst]
        raise AssertionError(
            f"{what}{list(map(int, worst))}: {found[worst]!r}, expected {expected[worst]!r} within {limit:.3g}"
        )


def dot_bound(g: np.ndarray, rows: np.ndarray, out: torch.dtype = torch.float32) -> np.ndarray:
    """Bound on c ``[B, K]``: the lanes' error plus one rounding to the output."""
    unit = FP32_UNIT if out == torch.float32 else 0.0
    return DOT_UNIT * (np.abs(g) @ np.abs(rows).T) + unit * np.abs(g @ rows.T)


def edit_bound(g: np.ndarray, rows: np.ndarray, mix: np.ndarray, scale: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Bound on g' ``[B, N]``: K + 1 fp32 terms in any order, one rounding each for dequantisation, scale and storage."""
    size = np.abs(scale)[:, None] * (np.abs(g) + np.abs(mix) @ np.abs(rows))
    exact = scale[:, None] * (g + mix @ rows)
    return (len(rows) + 3) * FP32_UNIT * size + UNIT[dtype] * np.abs(exact) + FLOOR[dtype]


def rotate_bound(
    rows: np.ndarray, g: np.ndarray, q: np.ndarray, dtype: torch.dtype, stochastic: bool = False
) -> np.ndarray:
    """Bound on U' ``[k, N]``: k + B fp32 terms and one rounding (of up to a whole spacing when stochastic)."""
    stack = np.vstack([rows, g])
    size, exact = np.zeros_like(rows), np.zeros_like(rows)
    size[: len(q)], exact[: len(q)] = np.abs(q) @ np.abs(stack), np.abs(q @ stack)
    storage = (2 if stochastic else 1) * (UNIT[dtype] * exact + FLOOR[dtype])
    return (len(stack) + 1) * FP32_UNIT * size + storage


# ----------------------------------------------------------------------------------------------------------- buffers


class Held:
    """A tensor inside a larger buffer of sentinels (NaN, or -77 in int8): stray reads poison results, stray writes show.

    Args:
        values: the contents, copied.
        lead: sentinels before the first element; 1 makes every vector load unaligned.
        gap: sentinels between the rows of a 2-D tensor.
    """

    def __init__(self, values: Tensor, lead: int = 0, gap: int = 0):
        sentinel = -77 if values.dtype == torch.int8 else torch.nan
        strides = list(torch.empty(values.shape, device="meta").stride())
        if values.dim() == 2 and gap:
            strides[0] = values.shape[1] + gap
        size = values.numel() + gap * (values.shape[0] if values.dim() == 2 else 0) + lead + 67
        self.buffer = torch.full((size,), sentinel, dtype=values.dtype, device=values.device)
        self.view = self.buffer.as_strided(values.shape, strides, lead)
        self.view.copy_(values)
        self.before = self.buffer.clone()
        self.outside = torch.ones(size, dtype=torch.bool, device=values.device)
        self.outside.as_strided(values.shape, strides, lead).fill_(False)

    def unchanged(self) -> bool:
        return same_bits(self.buffer, self.before)

    def intact(self) -> bool:
        """Whether everything around the tensor still has its bits."""
        return same_bits(self.buffer[self.outside], self.before[self.outside])


LAYOUTS = {"plain": (0, 0), "offset": (1, 0), "strided": (3, 5)}

# ------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One combination of sizes, dtypes, geometry and memory layout. ``batch`` 0 stands for a 1-D gradient."""

    n: int
    batch: int
    dk: tuple[int, int]
    grad: str
    basis: str
    geometry: str
    layout: str

    def __str__(self) -> str:
        batch = f"B{self.batch}" if self.batch else "1d"
        return f"N{self.n}-{batch}-D{self.dk[0]}k{self.dk[1]}-{self.grad}x{self.basis}-{self.geometry}-{self.layout}"


SIZES = (0, 1, 3, 15, 127, 128, 129, 1003, 70001)
GEOMETRIES = ("overlap0", "overlap.5", "overlap.99", "overlap1", "zero_rows", "deficient")
FACTORS: dict[str, tuple] = {
    "n": SIZES,
    "batch": (0, 1, 2, 5),
    "dk": ((1, 1), (3, 8), (2, 5), (4, 16)),
    "grad": ("fp32", "bf16", "fp16"),
    "basis": ("fp32", "bf16", "fp16", "int8", "int8b32"),
    "geometry": GEOMETRIES,
    "layout": tuple(LAYOUTS),
}


def covering(**changes: Sequence) -> list[Case]:
    """A small set of cases in which every pair of values of any two factors occurs together (greedy pairwise cover)."""
    factors = {f.name: tuple(changes.get(f.name, FACTORS[f.name])) for f in fields(Case)}
    names = list(factors)

    def pairs(chosen: dict) -> Iterable:
        return (
            ((a, chosen[a]), (b, chosen[b])) for a, b in itertools.combinations(names, 2) if a in chosen and b in chosen
        )

    open_pairs = dict.fromkeys(
        ((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in factors[a] for y in factors[b]
    )
    cases = []
    while open_pairs:
        chosen = dict(next(iter(open_pairs)))
        for name in names:
            if name not in chosen:
                gain = [sum(p in open_pairs for p in pairs({**chosen, name: value})) for value in factors[name]]
                best = max(gain)  # ties go to a value that rotates with the cases, to spread what need not be covered
                ties = [i for i, g in enumerate(gain) if g == best]
                chosen[name] = factors[name][ties[len(cases) % len(ties)]]
        for pair in pairs(chosen):
            open_pairs.pop(pair, None)
        cases.append(Case(**chosen))
    return cases


def directions(rng: np.random.Generator, domains: int, slots: int, n: int, geometry: str) -> np.ndarray:
    """Rows ``[D, k, N]`` of about unit length; slots are independent, domains overlap pairwise as the geometry says."""
    own = rng.standard_normal((domains, slots, n)) / max(n, 1) ** 0.5
    flat = own.reshape(domains * slots, n)
    if geometry.startswith("overlap"):
        overlap = float(geometry.removeprefix("overlap"))
        shared = rng.standard_normal((slots, n)) / max(n, 1) ** 0.5
        return overlap**0.5 * shared + (1 - overlap) ** 0.5 * own
    if geometry == "zero_rows":
        flat[::2] = 0.0
        return own
    rank = max(domains * slots // 2, 1)
    mixing = rng.standard_normal((domains * slots, rank)) / rank**0.5
    return (mixing @ flat[:rank]).reshape(own.shape)


def store_bases(rows: np.ndarray, name: str, device: str = "cpu") -> tuple[Tensor, Tensor | None]:
    """Stores float64 rows in a basis dtype; int8 with the oracle's scales."""
    if DTYPES[name] != torch.int8:
        return torch.from_numpy(rows).to(DTYPES[name]).to(device), None
    codes, scales = oracle.quantize(rows.astype(np.float32).astype(np.float64), block_size(name))
    return torch.from_numpy(codes).to(device), torch.from_numpy(scales).to(device)


def block_size(name: str) -> int:
    return 32 if name == "int8b32" else 128


def dense_rows(bases: Tensor, scales: Tensor | None, name: str) -> np.ndarray:
    """The rows ``[K, N]`` in float64 that stored bases stand for."""
    if scales is None:
        rows = to64(bases)
    else:
        rows = oracle.dequantize(bases.cpu().numpy(), scales.cpu().numpy(), block_size(name))
    return rows.reshape(int(np.prod(rows.shape[:-1])), rows.shape[-1])


def gradients(
    rng: np.random.Generator, rows: np.ndarray, batch: int, dtype: torch.dtype, device: str = "cpu"
) -> Tensor:
    """Noise plus a pull along every row: coefficients of either sign, none near zero by construction of the signs."""
    n = rows.shape[-1]
    pull = rng.choice([-1.0, 1.0], (max(batch, 1), len(rows))) * rng.uniform(0.5, 2.0, (max(batch, 1), len(rows)))
    g = rng.standard_normal((max(batch, 1), n)) + pull @ rows * n**0.5
    return torch.from_numpy(g if batch else g[0]).to(dtype).to(device)


def integers(rng: np.random.Generator, *shape: int, limit: int = 15, device: str = "cpu") -> Tensor:
    """Small whole numbers in fp32: sums of their products are exact in any order, so different orders agree bitwise."""
    return torch.from_numpy(rng.integers(-limit, limit, shape, endpoint=True)).float().to(device)


@dataclass
class Inputs:
    """The tensors of a case, guarded, and their exact float64 values."""

    grads: Held
    bases: Held
    scales: Tensor | None
    g: np.ndarray  # [max(B, 1), N]
    rows: np.ndarray  # [K, N]
    rng: np.random.Generator


def build(case: Case, device: str = "cpu") -> Inputs:
    rng = rng_of(str(case))
    bases, scales = store_bases(directions(rng, *case.dk, case.n, case.geometry), case.basis, device)
    rows = dense_rows(bases, scales, case.basis)
    grads = gradients(rng, rows, case.batch, DTYPES[case.grad], device)
    lead, gap = LAYOUTS[case.layout]
    return Inputs(Held(grads, lead, gap), Held(bases, lead), scales, np.atleast_2d(to64(grads)), rows, rng)


def draw_mix(inputs: Inputs, batch: int, device: str) -> tuple[Tensor, Tensor]:
    """Edit coefficients ``[B, K]`` and scale ``[B]`` in fp32."""
    mix = torch.from_numpy(inputs.rng.standard_normal((batch, len(inputs.rows)))).float().to(device)
    scale = torch.from_numpy(inputs.rng.uniform(0.25, 2.0, batch)).float().to(device)
    return mix, scale


# ------------------------------------------------------------------------------------------------------------- lists

SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (3, 43), (128,), (7,), (2, 0, 3), (19, 53), (1,), (260, 259))
"""A parameter list with scalars, empty tensors, whole segments and one tensor that spans a reference chunk's edge."""


@dataclass
class ListInputs:
    """A parameter list, its offsets, and the same thing as a dense batch: one zero-padded row per tensor."""

    grads: list[Held]
    offsets: list[int]
    bases: Held
    scales: Tensor | None
    g: np.ndarray  # [T, N]
    masks: np.ndarray  # [T, N]: the elements of N that tensor t covers
    rows: np.ndarray  # [K, N], zero in the gaps
    rng: np.random.Generator

    @property
    def views(self) -> list[Tensor]:
        return [held.view for held in self.grads]

    def groups(self, per_tensor: bool) -> list[tuple[np.ndarray, np.ndarray]]:
        """(gradient [1, N], rows [K, N]) of each coefficient group: one per tensor, or everything at once."""
        if per_tensor:
            return [(self.g[t : t + 1], self.rows * self.masks[t]) for t in range(len(self.g))]
        return [(self.g.sum(0, keepdims=True), self.rows)]


def build_list(
    grad: str, basis: str, device: str = "cpu", dk=(2, 5), geometry="overlap.5", lead: int = 1
) -> ListInputs:
    """Segments with gaps before, between and after; the gaps of float bases hold NaN, which no result may show."""
    rng = rng_of("list", grad, basis, geometry)
    offsets, end = [], 128
    for t, shape in enumerate(SHAPES):
        offsets.append(end)
        end = -(-(end + int(np.prod(shape))) // 128) * 128 + (256 if t % 3 == 1 else 0)
    n = end + 100
    masks = np.zeros((len(SHAPES), n), dtype=bool)
    for t, (shape, offset) in enumerate(zip(SHAPES, offsets, strict=True)):
        masks[t, offset : offset + int(np.prod(shape))] = True
    covered = masks.any(0)
    bases, scales = store_bases(directions(rng, *dk, n, geometry), basis, device)
    bases[..., torch.from_numpy(~covered).to(device)] = 77 if scales is not None else torch.nan
    rows = np.where(covered, dense_rows(bases, scales, basis), 0.0)
    flat = gradients(rng, rows, 0, DTYPES[grad], device)
    grads = [
        Held(flat[offset : offset + int(np.prod(shape))].reshape(shape), lead)
        for shape, offset in zip(SHAPES, offsets, strict=True)
    ]
    return ListInputs(grads, offsets, Held(bases, lead), scales, np.where(masks, to64(flat), 0.0), masks, rows, rng)
