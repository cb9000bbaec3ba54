"""Counts of what the guard saw and did, kept as device scalars so that counting never synchronises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .stack import Stack


def energies(c: Tensor) -> Tensor:
    """`[2, T, K]` of coefficients c: energy aligned, and conflicting."""
    energy = c.square()
    return torch.stack([torch.where(c > 0, energy, 0.0), torch.where(c < 0, energy, 0.0)])


def squared_distance(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """`|a - b|^2` over all tensors, 0-d float64."""
    steps = ((a.double() - b.double()).square().sum() for a, b in zip(before, after, strict=True))
    return torch.stack(list(steps)).sum()


def squared_norm(stack: Stack[Any, Any], tensors: Sequence[Tensor]) -> Tensor:
    """`|t|^2` over all tensors and processes, 0-d float64."""
    squares = torch.stack([t.norm(dtype=torch.float32).double().square() for t in tensors])
    return stack.layout.shards.sum_(squares.sum())


class Statistics:
    """Energies of raw updates along each domain's rows, and of the corrections."""

    def __init__(self) -> None:
        self.steps = 0  # optimizer steps taken
        self.dropped = 0  # for a non-finite gradient
        self._energies: dict[str, Tensor] = {}  # domain -> [aligned, conflicting, total while it was history]
        self._touched: Tensor | None = None  # [energy of corrections, total energy]

    def count(self, stack: Stack[Any, Any], sums: Tensor, touched: Tensor, total: Tensor | None) -> None:
        """Adds an update: sums of :func:`energies` `[2, K]`, the energy of its correction, and its squared norm if known."""
        known = sums.new_full((), torch.nan) if total is None else total.to(sums.dtype)
        for name in stack.names:
            add = torch.cat([sums[:, stack.columns(name)].sum(1), known.unsqueeze(0)])
            self._energies[name] = self._energies[name] + add if name in self._energies else add
        add = torch.stack([touched.to(known), known])
        self._touched = add if self._touched is None else self._touched + add

    def shares(self, name: str) -> dict[str, float | None] | None:
        """Shares of raw update energy: of the whole update where it was tracked, else of the part along the domain's rows."""
        if name not in self._energies:
            return None
        aligned, conflicting, total = (float(v) for v in self._energies[name])
        if aligned == conflicting == total == 0:
            return None
        inside, unknown = aligned + conflicting, math.isnan(total)
        whole = max(inside if unknown else total, 1e-300)
        orthogonal = None if unknown else max(0.0, 1 - inside / whole)
        return {"aligned": aligned / whole, "conflicting": conflicting / whole, "orthogonal": orthogonal}

    @property
    def touched_share(self) -> float | None:
        """Energy of all corrections over energy of all raw updates; None unless tracked."""
        if self._touched is None:
            return None
        touched, total = (float(v) for v in self._touched)
        return touched / total if total > 0 else None  # NaN > 0 is False: not tracked

    def state_dict(self, names: Sequence[str], device: torch.device) -> dict[str, Any]:
        """For a checkpoint, with the same entries whether anything was counted yet or not."""

        def numbers(found: Tensor | None, size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=device) if found is None else found.clone()

        return {
            "steps": self.steps,
            "dropped": self.dropped,
            "energies": {name: numbers(self._energies.get(name), 3) for name in names},
            "touched": numbers(self._touched, 2),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.dropped = state["steps"], state["dropped"]
        self._energies, self._touched = dict(state["energies"]), state["touched"]
