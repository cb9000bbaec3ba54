"""Changes of weight matrices between two checkpoints, confined: the part that needs no files.

The projection is that of :class:`~carerl_kernels.guard.input_stack.InputStack` (docs/math.md, "bounded displacement (box)").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..subspace.correspond import Unit
from ..subspace.factored import FactoredBasis
from ..subspace.matrices import MatrixLayout, Side
from ..subspace.portions import Portion
from ..subspace.weights import DTYPES
from .correct import rule_params
from .input_stack import InputStack
from .rules import RuleParams
from .settings import Settings

PASSES = 5
"""Roundings tried in low precision, see :func:`_storable`."""
NOISE = 1e-6
"""A correction this small against its matrix is float32's rounding: none is needed."""


@dataclass
class Matrix:
    """A matrix of two checkpoints, `[m, n]` float32."""

    unit: Unit | None  # of its directions, None where it has none
    across: slice  # rows of a right-sided matrix, or columns of a left-sided one, among those of the unit
    start: Tensor
    end: Tensor
    # `[m, m]` float64 where a matrix of LoRA's stands for a larger one, with |G X|^2 = <X, gain X>
    gain: Tensor | None = None

    @property
    def side(self) -> Side:
        return "right" if self.unit is None else self.unit.side

    def energy(self, rows: Tensor) -> float:
        """Of some change `[m, ...]` of it, or its coefficients."""
        rows = rows.double()
        return float((rows * (rows if self.gain is None else self.gain @ rows)).sum())


@dataclass
class DomainShare:
    """How much of a change lies along a domain's directions, as shares of the energy of the whole change."""

    before: float = 0.0  # before confining
    after: float = 0.0  # and after it
    norm: float = 0.0  # of what was taken out along them


@dataclass
class Confined:
    """What was done to a change."""

    out: str
    seconds: float = 0.0
    norm: float = 0.0
    remained: float = 0.0  # the share of its energy that is left
    domains: dict[str, DomainShare] = field(default_factory=dict)  # they overlap: their shares do not add up
    corrected: list[str] = field(default_factory=list)  # tensors that were changed
    kept: int = 0  # the number of tensors that are bitwise what they were
    uncovered: list[str] = field(default_factory=list)  # matrices that moved without directions
    free: float = 0.0  # share of the change's energy in them and in vectors
    # files that were not copied, because they may hold weights of another format
    left_out: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # sentences

    def shares(self) -> None:
        """From sums of squares, as they are gathered, to shares and norms."""
        whole = self.norm or 1.0
        for share in self.domains.values():
            share.before, share.after, share.norm = share.before / whole, share.after / whole, share.norm**0.5
        self.remained, self.free, self.norm = self.remained / whole, self.free / whole, self.norm**0.5


@dataclass
class Confinement:
    """Confines changes of matrices, and counts what they are made of."""

    bases: Sequence[FactoredBasis]  # those that act
    bound: float  # this and the next two: see :func:`~carerl_kernels.guard.checkpoints.confine`
    room: float
    device: torch.device
    out: Path | str = ""  # what the result is called

    def __post_init__(self) -> None:
        # gathers energies of the changes, along every domain's directions, and of what remains
        self.result = Confined(str(self.out), domains={basis.info.domain: DomainShare() for basis in self.bases})

    def compared(self, portion: Portion, start: Tensor, end: Tensor, whose: str = "END") -> Matrix | None:
        """A matrix of two checkpoints, of finite numbers, counted as part of the change; None where they are the same."""
        for what, values in (("START", start), (whose, end)):
            if values.dtype not in DTYPES.values():
                raise ValueError(
                    f"{what}: expected {portion.key} in float32, bfloat16 or float16, found {values.dtype}; save the model "
                    "unquantised"
                )
        if torch.equal(start, end):
            return None
        start, end = start.to(self.device, torch.float32), end.to(self.device, torch.float32)
        for what, values in (("START", start), (whose, end)):
            if not bool(values.isfinite().all()):
                raise ValueError(
                    f"{what}: expected finite numbers in {portion.key}, found NaN or infinity; take an earlier checkpoint"
                )
        matrix = Matrix(portion.unit, portion.columns if portion.left else portion.rows, start, end)
        energy, result = matrix.energy(end - start), self.result
        result.norm += energy
        if portion.unit is None:
            result.free += energy
            if len(portion.entry.shape) > 1 and portion.key not in result.uncovered[-1:]:
                result.uncovered.append(portion.key)
        return matrix

    def confined(self, matrices: Sequence[Matrix], dtype: torch.dtype | None) -> list[Tensor]:
        """The matrices' ends inside the box around their starts, float32 numbers that this dtype can store: that of the file,
        or float32 where nothing is stored yet. What stands for a larger matrix is held at its start, whatever the bound."""
        new = [matrix.end for matrix in matrices]
        covered = [i for i, matrix in enumerate(matrices) if matrix.unit is not None]
        if covered and self.bases:
            inside = self._confined([matrices[i] for i in covered], dtype or torch.float32)
            for i, values in zip(covered, inside, strict=True):
                new[i] = values
        self.result.remained += sum(matrix.energy(t - matrix.start) for matrix, t in zip(matrices, new, strict=True))
        return new

    def _confined(self, matrices: Sequence[Matrix], dtype: torch.dtype) -> list[Tensor]:
        k, bound = max(basis.info.k for basis in self.bases), 0.0 if matrices[0].gain is not None else self.bound
        ends = [matrix.end for matrix in matrices]
        names = [str(number) for number in range(len(matrices))]
        sides = {name: matrix.side for name, matrix in zip(names, matrices, strict=True)}
        stack = InputStack(
            MatrixLayout.of(zip(names, ends, strict=True), "input", k, None, sides), self.device, self.room
        )
        for basis in self.bases:
            stack.put(_part_of(basis, matrices, k), ends)
        bounds = rule_params(stack, Settings(bound=bound)) if bound else None
        anchor = stack.measure([matrix.start for matrix in matrices])
        new = _storable(stack, matrices, anchor, bounds, dtype)
        # Of differences, not differences of what is measured: rounding of large weights would hide a small displacement.
        before, after = (
            stack.measure([matrix.start - t for matrix, t in zip(matrices, there, strict=True)])
            for there in (ends, new)
        )
        for group in stack.layout.groups:
            for _, name, rows in stack.layout.matrices(group):
                matrix = matrices[int(name)]
                for domain in stack.names:
                    share, columns = self.result.domains[domain], stack.columns(domain)
                    a, b = before[rows, columns], after[rows, columns]
                    share.before += matrix.energy(a)
                    share.after += matrix.energy(b)
                    share.norm += matrix.energy(a - b)
        return new


def _storable(
    stack: InputStack, matrices: Sequence[Matrix], anchor: Tensor, bounds: RuleParams | None, dtype: torch.dtype
) -> list[Tensor]:
    """Confined ends, rounded to a dtype once.

    A small correction spread over many elements is lost when every one of them is rounded to the nearest number by itself. So
    rounding takes part: what it left outside the box is added to the unrounded matrix, which is rounded again, a few times; of
    every row that rounding is kept which is nearest to the box.
    """
    exact = [matrix.end.clone() for matrix in matrices]
    stack.confine_(exact, anchor, bounds, None)
    best, least = list(exact), [anchor.new_full((), torch.inf)] * len(exact)
    for _ in range(0 if dtype == torch.float32 else PASSES):
        stored = [t.to(dtype).float() for t in exact]
        again = [t.clone() for t in stored]
        stack.confine_(again, anchor, bounds, None)
        for i, matrix in enumerate(matrices):
            outside = again[i] - stored[i]
            off = outside.norm(dim=0 if matrix.side == "left" else 1, keepdim=True)
            best[i] = torch.where(off < least[i], stored[i], best[i])
            least[i] = torch.minimum(off, least[i])
            exact[i] += outside
    return [
        matrix.end if (new - matrix.end).norm() <= NOISE * matrix.end.norm() else new
        for matrix, new in zip(matrices, best, strict=True)
    ]


def _part_of(basis: FactoredBasis, matrices: Sequence[Matrix], k: int) -> FactoredBasis:
    """What a basis has for these matrices, under their numbers and with k columns; nothing where it has no directions."""
    left, right, values, moved = (dict[str, Tensor]() for _ in range(4))
    for number, matrix in enumerate(matrices):
        name, unit, (m, n) = str(number), matrix.unit, matrix.end.shape
        assert unit is not None
        factors = basis.left if unit.label in basis.left else basis.right
        mine, size, across = (left, m, n) if unit.side == "left" else (right, n, m)
        if unit.label not in factors:
            mine[name], values[name], moved[name] = torch.zeros(size, k), torch.zeros(k), torch.zeros(across, k)
            continue
        wider = (0, k - basis.info.k)
        mine[name], values[name] = pad(factors[unit.label], wider), pad(basis.values[unit.label], wider)
        if matrix.gain is None:
            rows = basis.moved[unit.label]
            moved[name] = pad((rows if unit.rows is None else rows[unit.rows])[matrix.across], wider)
        else:
            moved[name] = torch.zeros(across, k)
    names, shapes = tuple(map(str, range(len(matrices)))), tuple(tuple(matrix.end.shape) for matrix in matrices)
    info = replace(basis.info, k=k, names=names, shapes=shapes)
    return FactoredBasis(info, left, right, values, moved)
