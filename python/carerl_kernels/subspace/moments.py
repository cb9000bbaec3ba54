"""Second moments of what is fed into weight matrices, summed over batches and processes, and the bases they make."""

from __future__ import annotations

import functools
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..thin import full_precision, times, times_transposed
from .factored import FactoredBasis
from .fingerprint import hash_parameters
from .matrices import Group, MatrixLayout, Side, some, unlabel
from .recorder import StageStart
from .store import BasisInfo

EXACT = 1024
"""Input vectors of up to so many elements have their second moments `[n, n]` kept whole, longer ones a sketch."""
NARROW = 256
"""Up to so many elements the products themselves are taken in float64, which costs next to nothing."""
CHUNK = 4096
"""Input vectors per float32 product; the products add up in float64."""
WAITING = 4
"""Input tensors that wait for other weights that are fed by them, too (queries, keys and values; gates): one product for all."""
FLOOR = 1e-7
"""Squared singular values below this share of the first are rounding of float32 products: no directions."""

Use = tuple[str, Side]
"""A matrix by its label, and the side its inputs come from."""


@dataclass
class Sum:
    """Sum of `x x^T` over input vectors: whole, or its product with a fixed random matrix and its trace.

    Both are linear in the sum: batches and processes add up, in any order.
    """

    values: Tensor  # `[n, n]`, or Y = (sum of x x^T) Omega `[n, s]`; float64
    trace: Tensor  # the trace of the sum, 0-d float64

    @classmethod
    def zeros(cls, n: int, width: int, device: torch.device) -> Sum:
        columns = n if exact(n, width) else width
        values = torch.zeros(n, columns, dtype=torch.float64, device=device)
        return cls(values, values.new_zeros(()))

    def add(self, rows: Tensor) -> None:
        """Takes in `[T, n]`."""
        n, columns = self.values.shape
        wide = rows.dtype == torch.float64 or n <= NARROW
        for part in rows.split(CHUNK):
            part = part.to(torch.float64 if wide else torch.float32)
            with full_precision(part.device):
                product = part.mT @ (part if n == columns else part @ omega(n, columns, part.device).to(part.dtype))
            self.values += product
            squares = product.diagonal() if n == columns else torch.linalg.vector_norm(part, dim=1).double().square()
            self.trace += squares.sum()

    def leading(self, r: int) -> tuple[Tensor, Tensor]:
        """Eigenvectors `[n, r']` and eigenvalues `[r']` of the sum, at most r of them, descending; float64."""
        n, columns = self.values.shape
        if n == columns:
            squares, vectors = torch.linalg.eigh((self.values + self.values.mT) / 2)
            return vectors.flip(1)[:, :r], squares.flip(0)[:r].clamp_min(0.0)
        # Nystroem with a shift against rounding (Tropp, Yurtsever, Udell, Cevher 2017, algorithm 3)
        test = omega(n, columns, self.values.device).double()
        shift = 1e-7 * torch.linalg.matrix_norm(self.values)
        shifted = self.values + shift * test
        core = test.mT @ shifted
        squares, turn = torch.linalg.eigh((core + core.mT) / 2)
        held = squares > 1e-12 * squares[-1:].clamp_min(1e-300)
        half = turn * torch.where(held, squares.clamp_min(1e-300).rsqrt(), 0.0)
        vectors, values, _ = torch.linalg.svd(shifted @ half, full_matrices=False)
        return vectors[:, :r], (values.square() - shift).clamp_min(0.0)[:r]


def exact(n: int, width: int) -> bool:
    """Whether sums of vectors of n elements are kept whole: a sketch of this width has to be much smaller to pay."""
    return n <= max(EXACT, 2 * width)


def sketch_width(r: int) -> int:
    """Columns of a sketch from which r directions are taken."""
    return 2 * r + 16


@functools.cache
def omega(n: int, width: int, device: torch.device) -> Tensor:
    """The random matrix `[n, width]` of sketches, float32, orthonormal columns: always the same."""
    drawn = torch.randn(n, width, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    return torch.linalg.qr(drawn)[0].float().to(device)


@dataclass
class _Waiting:
    inputs: Tensor  # [..., K]
    keep: Tensor | None  # bool, of its rows
    columns: Tensor | None  # where its elements stand among the n of the matrix; None: they are all of them
    n: int
    uses: Counter[Use] = field(default_factory=Counter)


class Accumulator:
    """Sums up what matrices are fed with while a pass runs.

    Weights that are fed by the same tensors share one sum: sums are kept by the multiset of matrices that met a tensor.
    """

    def __init__(self, width: int):
        self.width = width  # columns of sketches
        self.sums: dict[frozenset[tuple[Use, int]], Sum] = {}
        self.counts: dict[Use, Tensor] = {}  # [n] float64: how often each element alone was the input (embeddings)
        self._waiting: OrderedDict[tuple[Any, ...], _Waiting] = OrderedDict()

    def see(self, use: Use, inputs: Tensor, keep: Tensor | None, n: int, columns: Tensor | None) -> None:
        """Input vectors of a matrix.

        Args:
            inputs: `[..., K]`; must not change before :meth:`settle`.
            keep: bool, shaped as the rows; None: all count.
            n: elements of an input vector of this matrix.
            columns: `[K]` positions of the elements among the n; None: K = n, in order.
        """
        place = None if columns is None else tuple(columns.tolist())
        where = (inputs.untyped_storage()._cdata, inputs.storage_offset(), inputs.shape, inputs.stride())
        key = (*where, n, place, inputs.dtype)
        waiting = self._waiting.get(key)
        if waiting is None:
            if len(self._waiting) >= WAITING:
                self._take(self._waiting.popitem(last=False)[1])
            waiting = self._waiting[key] = _Waiting(inputs, keep, columns, n)
        waiting.uses[use] += 1

    def look_up(self, use: Use, positions: Tensor, n: int) -> None:
        """Inputs that are one element each, as tokens are to an embedding: their positions among the n."""
        if positions.numel():
            counts = torch.bincount(positions.flatten(), minlength=n).double()
            self.counts[use] = self.counts[use] + counts if use in self.counts else counts

    def settle(self) -> None:
        """Takes in the tensors that wait: called before tensors change in place, and at the end."""
        for waiting in self._waiting.values():
            self._take(waiting)
        self._waiting.clear()

    def _take(self, waiting: _Waiting) -> None:
        rows = waiting.inputs.reshape(-1, waiting.inputs.shape[-1])
        if waiting.keep is not None:
            rows = rows[waiting.keep.reshape(-1)]
        if not rows.shape[0]:
            return
        if waiting.columns is not None:
            whole = rows.new_zeros(rows.shape[0], waiting.n)
            whole[:, waiting.columns] = rows
            rows = whole
        key = frozenset(waiting.uses.items())
        if key not in self.sums:
            self.sums[key] = Sum.zeros(waiting.n, self.width, rows.device)
        self.sums[key].add(rows)

    @torch.no_grad()
    def reduce(self, group: Any) -> None:
        """Sums over the processes of a group; a matrix may have been fed in some of them alone."""
        here: dict[str, Any] = {
            "sums": {key: s.values.shape[0] for key, s in self.sums.items()},
            "counts": {use: counts.numel() for use, counts in self.counts.items()},
        }
        found: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(found, here, group=group)
        tensors = [s.values for s in self.sums.values()] + list(self.counts.values())
        device = tensors[0].device if tensors else torch.device("cpu")
        keys = {key: n for part in found for key, n in part["sums"].items()}
        for key in sorted(keys, key=lambda k: sorted(k)):
            sum_ = self.sums.setdefault(key, Sum.zeros(keys[key], self.width, device))
            dist.all_reduce(sum_.values, group=group)
            dist.all_reduce(sum_.trace, group=group)
        sizes = {use: n for part in found for use, n in part["counts"].items()}
        for use in sorted(sizes):
            counts = self.counts.setdefault(use, torch.zeros(sizes[use], dtype=torch.float64, device=device))
            dist.all_reduce(counts, group=group)


class Moments:
    """What a look at batches found: of every matrix the second moments of its inputs."""

    def __init__(self, accumulator: Accumulator, sides: Mapping[str, Side], batches: int):
        self.batches = batches  # shown, over all processes
        self.uncoverable: frozenset[str] = frozenset()  # weights used in no product with an input
        self._guessed = dict(sides)
        self._counts = accumulator.counts
        self._sums: dict[Use, list[tuple[Sum, int]]] = {}
        for uses, sum_ in accumulator.sums.items():
            for use, times_ in uses:
                self._sums.setdefault(use, []).append((sum_, times_))
        self._leading: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def saw(self, label: str, side: Side | None = None) -> bool:
        """Whether inputs of a matrix were seen, from this side or any."""
        sides = ("right", "left") if side is None else (side,)
        return any((label, s) in found for s in sides for found in (self._sums, self._counts))

    @property
    def sides(self) -> dict[str, Side]:
        """The side of every weight as it was seen, by parameter name; of those that were not, as it was guessed.

        A product counts for more than a lookup, so that an embedding that is an output layer, too, counts as that.
        """
        seen: dict[str, Side] = {}
        for uses in (self._counts, self._sums):
            for text, side in sorted(uses, key=lambda use: use[1]):  # of two sides the right one
                seen[unlabel(text)[0]] = side
        return {name: side for name, side in {**self._guessed, **seen}.items() if name not in self.uncoverable}

    def layout(self, layout: MatrixLayout, parameters: Sequence[Tensor]) -> MatrixLayout:
        """The layout with sides as they were seen; itself where it was right. For the first domain: files fix the sides."""
        return layout.with_sides(self.sides, parameters)

    def energy(self, label: str, side: Side) -> float:
        """Summed squares of all inputs of a matrix."""
        if (label, side) in self._sums:
            return float(self._combined(label, side).trace)
        return float(self._counts[label, side].sum()) if (label, side) in self._counts else 0.0

    def _combined(self, label: str, side: Side) -> Sum:
        parts = self._sums[label, side]
        if len(parts) == 1 and parts[0][1] == 1:
            return parts[0][0]
        values = torch.stack([s.values * t for s, t in parts]).sum(0)
        trace = torch.stack([s.trace * t for s, t in parts]).sum()
        return Sum(values, trace)

    def check_finite(self) -> None:
        """Refuses inputs that are not finite.

        Raises:
            ValueError: names the weights.
        """
        bad = {label for (label, _), parts in self._sums.items() for s, _ in parts if not bool(s.trace.isfinite())}
        if bad:
            raise ValueError(
                f"expected finite inputs of every weight, found NaN or infinity in those of {some(sorted(bad))}; look at the "
                "batches, and at the weights before these"
            )

    @torch.no_grad()
    def directions(self, label: str, side: Side, r: int, energy: float) -> tuple[Tensor, Tensor] | None:
        """Leading input directions of a matrix: as few as hold this share of the energy, at most r.

        Returns:
            Orthonormal columns `[n, r']` float32 and singular values of the inputs `[r']` float64; None: nothing was seen.
        """
        total = self.energy(label, side)
        if total <= 0:
            return None
        if (label, side) in self._sums:
            parts = self._sums[label, side]
            key = (r, *((id(s), t) for s, t in parts))
            if key not in self._leading:  # shared by all matrices that were fed the same
                self._leading[key] = self._combined(label, side).leading(r)
            columns, squares = self._leading[key]
        else:
            counts = self._counts[label, side]
            squares, tokens = counts.topk(min(r, counts.numel()))
            columns = torch.zeros(counts.numel(), squares.numel(), dtype=torch.float64, device=squares.device)
            columns[tokens, torch.arange(tokens.numel(), device=squares.device)] = 1.0
        before = squares.cumsum(0) - squares
        keep = int(((before < energy * total) & (squares > FLOOR * squares[:1])).sum())
        return columns[:, :keep].float(), squares[:keep].sqrt()

    @torch.no_grad()
    def basis(
        self,
        layout: MatrixLayout,
        domain: str,
        *,
        energy: float,
        architecture: str,
        parameters: Sequence[Tensor],
        start: StageStart | None = None,
        steps: int | None = None,
    ) -> FactoredBasis:
        """The input basis of a domain.

        Args:
            layout: A layout of kind "input"; its k is the rank.
            energy: keep the fewest directions with this share of the inputs' energy, at most r.
            parameters: local parts, as they are now.
            start: of the stage, to measure how far it moved along the directions; None: moved by 0, no stage was recorded.
            steps: The number of steps of the stage; by default the batches shown.

        Raises:
            ValueError: inputs of a matrix were seen, but not from the side that the layout has.
        """
        self._check_sides(layout)
        left, right, values, moved = {}, {}, {}, {}
        held = total = 0.0
        moved_energy = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
        pad = torch.nn.functional.pad
        for group in layout.groups:
            size = group.n if group.side == "right" else group.whole
            deltas: Iterator[Tensor | None] = repeat(None)
            if start is not None:
                deltas = layout.each(group, lambda i: start.delta(i, parameters[i]))
            for (position, name, _), delta in zip(layout.matrices(group), deltas, strict=False):
                index, device = group.indices[position], parameters[group.indices[position]].device
                found = self.directions(name, group.side, layout.k, energy)
                columns, singular = found if found is not None else (torch.zeros(size, 0), torch.zeros(0).double())
                missing = layout.k - singular.numel()
                columns, values[name] = pad(columns, (0, missing)).to(device), pad(singular, (0, missing)).to(device)
                held += float(values[name].square().sum())
                total += self.energy(name, group.side)
                if group.side == "right":
                    right[name] = columns
                    moved[name] = _along(delta, group, columns)
                    moved_energy += moved[name].square().sum()
                else:
                    own = layout.shards.pieces[index].rows if group.slices[position] is None else slice(None)
                    left[name] = columns[own]
                    moved[name] = _along(delta, group, left[name])
                    layout.shards.sum_(moved[name])
                    if layout.shards.rank == 0:
                        moved_energy += moved[name].square().sum()
        layout.shards.sum_(moved_energy)
        now = hash_parameters(parameters, layout.shards)
        change = 0.0 if start is None else start.energy(parameters)
        info = BasisInfo.of(
            layout,
            domain,
            architecture=architecture,
            start_hash=now if start is None else start.hash,
            end_hash=now,
            steps=self.batches if steps is None else steps,
            gradient_capture=held / total if total > 0 else 0.0,
            displacement_capture=float(moved_energy) / change if start is not None and change > 0 else None,
        )
        return FactoredBasis(info, left, right, values, moved, layout if layout.shards.sharded else None)

    def _check_sides(self, layout: MatrixLayout) -> None:
        wrong = [
            f"{name} ({group.side})"
            for group in layout.groups
            for name in layout.labels(group)
            if not self.saw(name, group.side) and self.saw(name)
        ]
        if wrong:
            raise ValueError(
                f"expected inputs from the side that the layout has, found those of {some(wrong)} from the other; use "
                "moments.layout(layout, parameters), or record the earlier domains again"
            )


def _along(delta: Tensor | None, group: Group, columns: Tensor) -> Tensor:
    """Coefficients of the stage's change of a matrix along columns, a row each per output; zeros without a stage."""
    if delta is None:
        rows = group.m if group.side == "right" else group.n
        return torch.zeros(rows, columns.shape[1], dtype=torch.float64, device=columns.device)
    with full_precision(columns.device):
        return (times if group.side == "right" else times_transposed)([delta], columns.unsqueeze(0))[0].double()
