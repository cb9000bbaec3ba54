"""Inputs of the op tests: sizes, dtypes, geometries and memory layouts, covered in pairs; and parameter lists.

What the tensors of a case hold is a function of the case. It is drawn once for all tests and backends of a process, and so is
what an oracle says of it (:func:`once`).
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import oracle
import pytest
import torch
from helpers import DTYPES, SCALED, Backend, Held, naming, rng_of, to64
from torch import Tensor

T = TypeVar("T")

LAYOUTS = {"plain": (0, 0), "offset": (1, 0), "strided": (3, 5)}  # elements before the first row, between rows


@dataclass(frozen=True)
class Case:
    """One combination of sizes, dtypes, geometry and memory layout. `batch` 0 stands for a 1-D gradient."""

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


# The last is of several pieces for every backend: of 2^15 elements, and of less.
SIZES = (0, 1, 3, 15, 127, 128, 129, 1003, 33_001)
GEOMETRIES = ("overlap0", "overlap.5", "overlap.99", "overlap1", "zero_rows", "deficient")
FACTORS: dict[str, tuple] = {
    "n": SIZES,
    "batch": (0, 1, 2, 5),
    "dk": ((1, 1), (3, 8), (2, 5), (4, 16)),
    "grad": ("fp32", "bf16", "fp16"),
    "basis": ("fp32", "bf16", "fp16", "int8", "int8b32", "fp8"),
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


def spread(cases: Sequence[Case], values: Sequence[str]) -> list[tuple[Case, str]]:
    """Gives every case one value of a further factor; what pairs of values are then still missing come with a second one."""

    def pairs(case: Case, value: str) -> set:
        return {(f.name, getattr(case, f.name), value) for f in fields(Case)}

    open_pairs = set().union(*(pairs(case, value) for case in cases for value in values))
    chosen = []
    for at, case in enumerate(cases):
        gain = [len(pairs(case, value) & open_pairs) for value in values]
        ties = [value for value, g in zip(values, gain, strict=True) if g == max(gain)]
        chosen.append((case, ties[at % len(ties)]))
        open_pairs -= pairs(*chosen[-1])
    for case, value in itertools.product(cases, values):
        if pairs(case, value) & open_pairs:
            chosen.append((case, value))
            open_pairs -= pairs(case, value)
    return chosen


def over(cases: Sequence[Case | tuple]) -> Callable[[Callable], Callable]:
    """Makes `test(op, case, ...)` one test for every size, which goes through the cases of that size."""
    of_size: dict[int, list[tuple]] = {}
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        of_size.setdefault(values[0].n, []).append(values)

    def decorate(test: Callable) -> Callable:
        def run(op: Backend, n: int) -> None:
            for values in of_size[n]:
                if not _too_long(op, values[0]):
                    with naming(*values):
                        test(op, *values)

        run.__name__, run.__doc__, run.__module__ = test.__name__, test.__doc__, test.__module__
        return pytest.mark.parametrize("n", sorted(of_size))(run)

    return decorate


def _too_long(op: Backend, case: Case) -> bool:
    """Whether the interpreter, some thousand times slower than native kernels, would take seconds for it."""
    return op.name == "triton-interpreted" and case.n > 10_000 and max(case.batch, 1) * case.dk[0] * case.dk[1] > 50


_known: dict[tuple, Any] = {}


def once(key: tuple, compute: Callable[[], T]) -> T:
    """What an oracle says of the inputs that `key` stands for: computed for the first backend, kept for the others."""
    if key not in _known:
        _known[key] = compute()
    return _known[key]


def directions(rng: np.random.Generator, domains: int, slots: int, n: int, geometry: str) -> np.ndarray:
    """Rows `[D, k, N]` of about unit length; slots are independent, domains overlap pairwise as the geometry says."""
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
    """Stores float64 rows in a basis dtype; int8 and fp8 with the oracle's scales."""
    if DTYPES[name] not in SCALED:
        return torch.from_numpy(rows).to(DTYPES[name]).to(device), None
    rounded = rows.astype(np.float32).astype(np.float64)
    codes, scales = oracle.quantize(rounded, block_size(name), SCALED[DTYPES[name]])
    return torch.from_numpy(codes).to(DTYPES[name]).to(device), torch.from_numpy(scales).to(device)


def block_size(name: str) -> int:
    return 32 if name == "int8b32" else 128


def dense_rows(bases: Tensor, scales: Tensor | None, name: str) -> np.ndarray:
    """The rows `[K, N]` in float64 that stored bases stand for."""
    dense = scales is None
    rows = to64(bases) if dense else oracle.dequantize(to64(bases), scales.cpu().numpy(), block_size(name))
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


@functools.cache
def _drawn(case: Case) -> tuple[Tensor, Tensor, Tensor | None, np.ndarray, np.ndarray, np.random.Generator]:
    """Gradients, bases and scales of a case, what they stand for in float64, and the generator as it was left."""
    rng = rng_of(str(case))
    bases, scales = store_bases(directions(rng, *case.dk, case.n, case.geometry), case.basis)
    rows = dense_rows(bases, scales, case.basis)
    grads = gradients(rng, rows, case.batch, DTYPES[case.grad])
    g = np.atleast_2d(to64(grads))
    g.flags.writeable = rows.flags.writeable = False
    return grads, bases, scales, g, rows, rng


def build(case: Case, device: str = "cpu") -> Inputs:
    grads, bases, scales, g, rows, rng = _drawn(case)
    lead, gap = LAYOUTS[case.layout]
    held = Held(grads.to(device), lead, gap), Held(bases.to(device), lead)
    return Inputs(*held, None if scales is None else scales.to(device), g, rows, copy.deepcopy(rng))


def draw_mix(inputs: Inputs, batch: int, device: str) -> tuple[Tensor, Tensor]:
    """Edit coefficients `[B, K]` and scale `[B]` in fp32."""
    mix = torch.from_numpy(inputs.rng.standard_normal((batch, len(inputs.rows)))).float().to(device)
    scale = torch.from_numpy(inputs.rng.uniform(0.25, 2.0, batch)).float().to(device)
    return mix, scale


# ------------------------------------------------------------------------------------------------------------- lists

SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (3, 43), (128,), (7,), (2, 0, 3), (19, 53), (1,), (130, 259))
"""A parameter list with scalars, empty tensors, whole segments and one tensor of several pieces for every backend."""


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
        """(gradient [1, n], rows [K, n]) of each coefficient group, without gaps: one per tensor, or everything at once."""
        parts = [(self.g[t : t + 1, mask], self.rows[:, mask]) for t, mask in enumerate(self.masks)]
        return parts if per_tensor else [tuple(np.concatenate(side, 1) for side in zip(*parts, strict=True))]


@functools.cache
def _drawn_list(grad: str, basis: str) -> tuple:
    """Gradients in one tensor, offsets, bases, scales, masks, rows, and the generator as it was left."""
    rng = rng_of("list", grad, basis)
    offsets, end = [], 128
    for t, shape in enumerate(SHAPES):
        offsets.append(end)
        end = -(-(end + int(np.prod(shape))) // 128) * 128 + (256 if t % 3 == 1 else 0)
    n = end + 100
    masks = np.zeros((len(SHAPES), n), dtype=bool)
    for t, (shape, offset) in enumerate(zip(SHAPES, offsets, strict=True)):
        masks[t, offset : offset + int(np.prod(shape))] = True
    covered = masks.any(0)
    bases, scales = store_bases(directions(rng, 2, 5, n, "overlap.5"), basis)
    gaps = torch.from_numpy(~covered)
    if scales is None:
        bases[..., gaps] = torch.nan
    else:
        bases.view(torch.int8)[..., gaps] = 77  # a large code of either type
    rows = np.where(covered, dense_rows(bases, scales, basis), 0.0)
    flat = gradients(rng, rows, 0, DTYPES[grad])
    g = np.where(masks, to64(flat), 0.0)
    g.flags.writeable = rows.flags.writeable = False
    return flat, offsets, bases, scales, g, masks, rows, rng


def build_list(grad: str, basis: str, device: str = "cpu") -> ListInputs:
    """Segments with gaps before, between and after; the gaps of float bases hold NaN, which no result may show."""
    flat, offsets, bases, scales, g, masks, rows, rng = _drawn_list(grad, basis)
    grads = [
        Held(flat[offset : offset + int(np.prod(shape))].reshape(shape).to(device), lead=1)
        for shape, offset in zip(SHAPES, offsets, strict=True)
    ]
    scales = None if scales is None else scales.to(device)
    return ListInputs(grads, offsets, Held(bases.to(device), lead=1), scales, g, masks, rows, copy.deepcopy(rng))
