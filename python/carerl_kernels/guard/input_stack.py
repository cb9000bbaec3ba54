"""Acting directions of input bases: what has room, the box of every weight matrix, and gradients of mixed batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from ..linalg import loewdin_root
from ..subspace.factored import FactoredBasis
from ..subspace.matrices import Group, MatrixLayout
from ..thin import add_product_, full_precision, times, times_transposed
from .factored_stack import FactoredStack
from .frames import Frame, reach
from .rules import RuleParams

CHUNK = {"cpu": 1 << 20, "cuda": 256 << 20}
"""Bytes of coefficients of input bases that are decided on at a time: a CPU keeps them in cache, a GPU wants few launches."""
DEPENDENT = 1e-9
"""Eigenvalues of an overlap below this share of the largest: what directions span beyond the others is rounding."""


class InputStack(FactoredStack):
    """One-sided input bases: coefficients `G V_d`, a row per output; or `G^T U_d`, a row per column.

    All rows of a matrix share one overlap `V_d^T V_e`. Sharded, the rows of right-sided matrices stay with their process:
    nothing is sent. Of the r columns of a domain those that no matrix of a group has take no part in products.

    Args:
        room: directions of all domains together that a matrix has at most, as a share of its inputs. Those with the smallest
            shares of their own domain's inputs become zero, whatever the order in which domains came.
    """

    def __init__(self, layout: MatrixLayout, device: torch.device, room: float = 1.0):
        super().__init__(layout, device)
        self.room = room
        self._recorded: dict[str, FactoredBasis] = {}  # whole: what has no room now may have it later
        self._shares: dict[str, list[Tensor]] = {}  # by domain, [G, r] of each group
        self._room: dict[str, list[Tensor]] = {}  # the same, bool: what acts
        self._kept: list[Tensor] = []  # of each group, the columns that any of its matrices has
        self._acting: list[Tensor] = []  # [G, n or m, columns kept]
        self._boxes: tuple[str | None, dict[int, tuple[Tensor, Tensor, Tensor, Tensor]]] | None = None
        # On a CPU, by group: anchors on the directions of its box; the anchors and the R that they come from, and their version.
        self._held: dict[int, tuple[Tensor, Tensor, Tensor, int]] = {}
        self._spans: list[Tensor] = []  # of each group, orthonormal [G, n or m, kept]: what all directions span
        self._projectors: dict[str | None, list[Tensor]] = {}  # see projectors

    def _sum_(self, coeffs: Tensor) -> None:
        shards = self.layout.shards
        left = [group.rows for group in self.layout.groups if group.side == "left"]
        if shards.sharded and left:
            sizes = [rows.stop - rows.start for rows in left]
            summed = shards.sum_(torch.cat([coeffs[rows] for rows in left]))
            for rows, part in zip(left, summed.split(sizes), strict=True):
                coeffs[rows] = part

    def acting(self, domain: str) -> float:
        shares, room = self._shares[domain], self._room[domain]
        whole = sum(float(part.sum()) for part in shares)
        return sum(float(part[acts].sum()) for part, acts in zip(shares, room, strict=True)) / whole if whole else 1.0

    def present(self, domain: str) -> Tensor:
        rows = torch.ones(self.layout.T, self.layout.width, dtype=torch.bool, device=self.device)
        for number, group in enumerate(self.layout.groups):
            rows[group.rows] = self._present(number)[:, self.columns(domain)].repeat_interleave(group.each, 0)
        return rows

    def chance(self, domain: str) -> float:
        sizes = (group.whole if group.side == "right" else group.n for group in self.layout.groups)
        held = sum(float((part > 0).sum()) * size for part, size in zip(self._shares[domain], sizes, strict=True))
        return min(1.0, held / self.layout.parameters)

    def get(self, domain: str) -> FactoredBasis:
        """All recorded directions, also those that there is no room for."""
        return self._recorded[domain]

    @property
    def chunks(self) -> Sequence[slice]:
        """Whole matrices of about CHUNK bytes of coefficients together, or parts of one matrix."""
        most = max(1, CHUNK.get(self.device.type, CHUNK["cuda"]) // (8 * max(self.rows, 1)))
        cuts = [0]
        for group in self.layout.groups:
            for start in range(group.first, group.rows.stop, max(group.each, 1)):
                end = start + group.each
                if end - cuts[-1] > most and start > cuts[-1]:
                    cuts.append(start)
                while end - cuts[-1] > most:
                    cuts.append(cuts[-1] + most)
                if group.each > most and cuts[-1] < end:
                    cuts.append(end)
        if cuts[-1] < self.layout.T:
            cuts.append(self.layout.T)
        return [slice(a, b) for a, b in pairwise(cuts)]

    def own_sums(self, values: Tensor, rows: slice = slice(None)) -> Tensor:
        shards = self.layout.shards
        if not shards.sharded or shards.rank == 0:
            return super().own_sums(values, rows)
        first, last, _ = rows.indices(self.layout.T)
        sums = torch.zeros_like(values[..., 0, :])
        for group in self.layout.groups:  # rows of left-sided matrices are the same everywhere
            start, stop = max(first, group.rows.start), min(last, group.rows.stop)
            if group.side == "right" and start < stop:
                sums += values[..., start - first : stop - first, :].sum(-2)
        return sums

    def summed(self, sums: Tensor) -> Tensor:
        return self.layout.shards.sum_(sums)

    def all_finite(self, coeffs: Tensor) -> Tensor:
        return self.layout.shards.all(super().all_finite(coeffs))

    def _chunks(self, group: Group) -> Iterator[tuple[slice, slice]]:
        """Positions of matrices that are stacked at a time, and their coefficient rows in the group."""
        for at in group.chunks(self.device):
            yield at, slice(at.start * group.each, at.stop * group.each)

    def put(self, basis: FactoredBasis, parameters: Sequence[Tensor]) -> None:
        self._check_kind(basis)
        domain, before = basis.info.domain, self._room
        part = basis.part_of(self.layout)
        moved = {name: t.to(self.device, torch.float32) for name, t in part.moved.items()}
        self._recorded[domain] = replace(part, moved=moved)
        self._shares[domain] = self._shares_of(self._recorded[domain])
        names = [name for name in self.names if name != domain] + [domain]
        self._room = self._make_room(names)
        same = [
            name != domain and all(map(torch.equal, self._room[name], before[name])) and name == self.names[at]
            for at, name in enumerate(names)
        ]
        for name in names[same.index(False) :]:  # from the first that changes, so that their order stays
            super().put(self._trimmed(name), parameters)
        self._kept, self._acting, self._boxes, self._held = [], [], None, {}
        self._spans, self._projectors = [], {}
        for number, group in enumerate(self.layout.groups):
            factors = self.factors[group.side][number]
            assert factors is not None
            found = self._present(number).any(0)
            self._kept.append(found.nonzero().squeeze(1))
            self._acting.append(factors if bool(found.all()) else factors[:, :, self._kept[-1]].contiguous())

    def _present(self, number: int) -> Tensor:
        """`[G, K]` bool: columns that are not zero."""
        return self._gram(number).diagonal(dim1=1, dim2=2) > 0.5

    def _shares_of(self, basis: FactoredBasis) -> list[Tensor]:
        """Per group `[G, r]`: of what the directions hold of the inputs of each matrix, the share of each."""
        out = []
        for group in self.layout.groups:
            names = self.layout.labels(group)
            factors = basis.left if group.side == "left" else basis.right
            norms = torch.stack([factors[name].to(self.device, torch.float64).square().sum(0) for name in names])
            if group.side == "left":
                self.layout.shards.sum_(norms)
            squares = torch.stack([basis.values[name].to(self.device, torch.float64).square() for name in names])
            squares = torch.where(norms > 0.5, squares, 0.0)
            out.append(squares / squares.sum(1, keepdim=True).clamp_min(1e-300))
        return out

    def _make_room(self, names: Sequence[str]) -> dict[str, list[Tensor]]:
        """Of all domains' directions in a matrix those act that hold the largest shares of their own domain's inputs."""
        room: dict[str, list[Tensor]] = {name: [] for name in names}
        for number, group in enumerate(self.layout.groups):
            shares = torch.cat([self._shares[name][number] for name in names], dim=1)  # [G, K]
            most = max(1, int(self.room * (group.whole if group.side == "left" else group.n) + 1e-9))
            first = shares.argsort(dim=1, descending=True, stable=True)[:, :most]
            acts = torch.zeros_like(shares, dtype=torch.bool).scatter_(1, first, True) & (shares > 0)
            for name, part in zip(names, acts.split(self.layout.k, dim=1), strict=True):
                room[name].append(part)
        return room

    def _trimmed(self, domain: str) -> FactoredBasis:
        """A domain's basis with zeros for what there is no room for."""
        room: dict[str, Tensor] = {}
        basis = self._recorded[domain]
        for group, part in zip(self.layout.groups, self._room[domain], strict=True):
            room.update(zip(self.layout.labels(group), part, strict=True))

        def kept(by_name: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: t if bool(room[name].all()) else t * room[name].to(t.device) for name, t in by_name.items()}

        return replace(
            basis, left=kept(basis.left), right=kept(basis.right), values=kept(basis.values), moved=kept(basis.moved)
        )

    # Gradients. Parts are float32 `[G, rows of each, kept]`, one for each group: coefficients on orthonormal directions Q that
    # span those of all domains. There the projector onto what some of them span is exact, however alike directions are.

    @property
    def spans(self) -> Sequence[Tensor]:
        """Q of each group `[G, n or m, kept]`; columns are zero where directions depend on others."""
        if not self._spans:
            for number, (kept, factors) in enumerate(zip(self._kept, self._acting, strict=True)):
                overlap = self._gram(number)[:, kept][:, :, kept]
                values, vectors = torch.linalg.eigh(overlap)
                keep = values > DEPENDENT * values[:, -1:]
                scale = torch.where(keep, values.clamp_min(1e-300).rsqrt(), 0.0)
                self._spans.append((factors.double() @ (vectors * scale.unsqueeze(1))).float())
        return self._spans

    def projectors(self, own: str | None) -> list[Tensor]:
        """Onto the directions that act on a domain's gradient, as seen in Q: `[G, kept, kept]` of each group."""
        key = own if own in self.names else None
        if key not in self._projectors:
            self._projectors[key] = []
            for number, (kept, Q) in enumerate(zip(self._kept, self.spans, strict=True)):
                acts = self.active(key)[kept].double()
                root = loewdin_root(self._gram(number)[:, kept][:, :, kept] * acts * acts.unsqueeze(1))
                inside = Q.double().mT @ (self._acting[number].double() @ root)
                if self.layout.groups[number].side == "left":
                    self.layout.shards.sum_(inside)
                self._projectors[key].append((inside @ inside.mT).float())
        return self._projectors[key]

    def seen(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See :class:`Stack`; of a matrix whose columns are spread over processes, what is here."""
        parts = self.nothing_seen()
        with full_precision(self.device):
            for group, Q, part in zip(self.layout.groups, self.spans, parts, strict=True):
                product = times_transposed if group.side == "left" else times
                for at, _ in self._chunks(group) if group.m and Q.shape[2] else ():
                    part[at] = product(self.layout.local(group, tensors, at), Q[at])
        return parts

    def nothing_seen(self) -> list[Tensor]:
        """:meth:`seen` of tensors of zeros."""
        sizes = zip(self.layout.groups, self._acting, strict=True)
        return [torch.zeros(f.shape[0], group.each, f.shape[2], device=self.device) for group, f in sizes]

    def along(self, parts: Sequence[Tensor], own: str | None) -> list[Tensor]:
        with full_precision(self.device):
            return [part @ projector for part, projector in zip(parts, self.projectors(own), strict=True)]

    def remove_(self, tensors: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
        shards = self.layout.shards
        with full_precision(self.device):
            for group, Q, part in zip(self.layout.groups, self.spans, parts, strict=True):
                left = group.side == "left"
                if left and shards.sharded:
                    part = shards.sum_(part.clone())
                for at, _ in self._chunks(group) if group.m and Q.shape[2] else ():
                    pair = (Q[at], -part[at]) if left else (-part[at], Q[at])
                    add_product_(self.layout.local(group, tensors, at), *pair)

    # The box. Coefficients are float32 and as the factors give them, without orientation: one number each is remembered.

    def measure(self, parameters: Sequence[Tensor], domain: str | None = None) -> Tensor:
        width = self.rows if domain is None else self.layout.width
        out = torch.zeros(self.layout.T, width, dtype=torch.float32, device=self.device)
        self._fill_(out, parameters, domain)
        return out

    def confine_(
        self,
        parameters: Sequence[Tensor],
        anchor: Tensor,
        bounds: RuleParams | None,
        own: str | None,
        exempt: Set[int] = frozenset(),
        tight: Set[int] = frozenset(),
    ) -> Tensor:
        energy = torch.zeros((), dtype=torch.float64, device=self.device)
        with full_precision(self.device):
            for number, group in enumerate(self.layout.groups):
                columns, directions, root, far = self._box(number, own)
                if not group.m or not columns.numel():
                    continue
                left = group.side == "left"
                most = max(1, CHUNK.get(self.device.type, CHUNK["cuda"]) // (4 * group.each * columns.numel()))
                for at in _runs([index not in exempt for index in group.indices], most):
                    matrices = self.layout.local(group, parameters, at)
                    here = self._anchors(number, group, anchor, columns, root, at)
                    box = self._bounds(group, at, columns, far, bounds, tight)
                    if left and self.layout.shards.sharded:
                        energy += self._confine_spread(matrices, directions[at], here, *box)
                    else:
                        energy += torch.ops.carerl.input_confine_(matrices, directions[at], here, *box, left).sum()
        return energy

    def _anchors(self, number: int, group: Group, anchor: Tensor, columns: Tensor, root: Tensor, at: slice) -> Tensor:
        """Anchors of some matrices on the directions of their box `[c, each, A]`.

        On a CPU they would take a quarter of a correction, so those of the whole group are kept until anchors or box change. A
        GPU makes them in a hundredth of it, and has less memory to spare.
        """
        raw = anchor[group.rows].unflatten(0, (-1, group.each))
        if self.device.type != "cpu" or anchor.is_inference():  # whose changes nobody counts
            return raw[at][..., columns] @ root[at]
        held, *made_of = self._held.get(number, (root, None, None, 0))
        if made_of[0] is not anchor or made_of[1] is not root or made_of[2] != anchor._version:
            held = raw[..., columns] @ root
            self._held[number] = held, anchor, root, anchor._version
        return held[at]

    def _box(self, number: int, own: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What acts in a group on a domain's steps: columns `[A]`, orthonormal directions `[G, A, n or m]`, R `[G, A, A]`,
        all float32, and reach `[G, A]`. Of the last set of acting domains they are kept."""
        key = own if own in self.names else None
        if self._boxes is None or self._boxes[0] != key:
            self._boxes = key, {}
        if number not in self._boxes[1]:
            active = self.active(own)[self._kept[number]]
            columns = self._kept[number][active]
            overlap = self._gram(number)[:, columns][:, :, columns]
            root = loewdin_root(overlap)
            directions = self._acting[number][:, :, active].double() @ root
            far = reach(root, overlap).float()
            self._boxes[1][number] = columns, directions.mT.float().contiguous(), root.float(), far
        return self._boxes[1][number]

    def _bounds(
        self, group: Group, at: slice, columns: Tensor, far: Tensor, bounds: RuleParams | None, tight: Set[int]
    ) -> tuple[Tensor | None, Tensor | None]:
        """How far rows may go below and above their anchors `[c, each, A]`; None: nowhere."""
        domains = [name for name in self.names if self._moved[name]]
        if not domains or bounds is None:
            return None, None
        names, indices = self.layout.labels(group, at), group.indices[at]
        moved = torch.zeros(len(names), group.each, self.rows, device=self.device)
        for domain in domains:
            moved[..., self.columns(domain)] = torch.stack([self._moved[domain][name] for name in names])
        moved = moved[..., columns]
        size = moved.abs() * far[at].unsqueeze(1)
        size[[position for position, index in enumerate(indices) if index in tight]] = 0
        against, along = (t[columns].float() * size for t in (bounds.lower, bounds.upper))
        return torch.where(moved < 0, along, against), torch.where(moved < 0, against, along)

    def _confine_spread(
        self, matrices: Sequence[Tensor], directions: Tensor, anchor: Tensor, lower: Tensor | None, upper: Tensor | None
    ) -> Tensor:
        """Columns of a sharded matrix are spread over processes: nothing can be decided before they are summed."""
        shards = self.layout.shards
        d = anchor - shards.sum_(torch.ops.carerl.input_project(matrices, directions, True))
        x = d if lower is None or upper is None else d - torch.minimum(torch.maximum(d, -lower), upper)
        x = torch.where(x.isfinite().all(-1, keepdim=True), x, 0.0)
        add_product_(matrices, directions.mT, x)
        energy = x.double().square().sum()
        return energy if shards.rank == 0 else torch.zeros_like(energy)

    def _coefficients(
        self, out: Tensor, number: int, group: Group, tensors: Sequence[Tensor], domain: str | None
    ) -> None:
        if domain is None:
            factors, columns = self._acting[number], self._kept[number]
        else:
            factors = next(f for f in self._factors(number, domain) if f is not None)
            columns = torch.arange(self.layout.k, device=self.device)
        product = times_transposed if group.side == "left" else times
        for at, rows in self._chunks(group):
            found = product(self.layout.local(group, tensors, at), factors[at]).flatten(0, 1)
            out[group.rows][rows].index_copy_(1, columns, found.to(out.dtype))

    def _add_(self, number: int, group: Group, tensors: Sequence[Tensor], mix: Tensor) -> None:
        factors = self._acting[number]
        if factors.shape[2] < mix.shape[1]:
            mix = mix[:, self._kept[number]]
        for at, rows in self._chunks(group):
            matrices = self.layout.local(group, tensors, at)
            part = mix[rows].unflatten(0, (-1, group.each))
            add_product_(matrices, *((factors[at], part) if group.side == "left" else (part, factors[at])))

    def _gram_times(self, number: int, x: Tensor, matrices: slice) -> Tensor:
        return x @ self._gram(number)[matrices]

    def _gram(self, number: int) -> Tensor:
        gram = self.grams[self.layout.groups[number].side][number]
        assert gram is not None
        return gram

    def _frame(self, own: str | None) -> Frame:
        overlaps = [
            (group.rows, group.each, self._gram(number))
            for number, group in enumerate(self.layout.groups)
            if group.each
        ]
        return Frame.dense(overlaps, self.active(own), self.layout.T, self.sign)


def _runs(wanted: Sequence[bool], most: int) -> Iterator[slice]:
    """Positions that are wanted, as slices of at most so many."""
    start = 0
    for at in range(len(wanted) + 1):
        if at == len(wanted) or not wanted[at] or at - start == most:
            if at > start:
                yield slice(start, at)
            start = at if at < len(wanted) and wanted[at] else at + 1
