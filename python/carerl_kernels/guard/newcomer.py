"""A domain that appears in the middle of a run: recorded on the fly, it acts once its directions are above the noise floor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..subspace.recorder import Recorder
from ..subspace.store import StoredBasis
from .stack import Stack, noise_floor

LEAST = 8
"""Fresh gradients that have to be explained before a basis may act."""


class Newcomer:
    """Records a domain, and asks of every fresh gradient how much the directions found so far explain *before* seeing it.

    In-sample capture says nothing while there are fewer gradients than directions; this is out of sample. The mean less two
    standard errors has to lie above the noise floor.

    Args:
        recorder: The recorder of the domain.
        stack: empty, to hold the directions found so far.
        check_every: own steps between looks at the directions.
    """

    def __init__(self, recorder: Recorder, stack: Stack[Any, Any], check_every: int):
        self.recorder, self.stack, self.check_every = recorder, stack, check_every
        self.steps = 0
        self.acting = False
        self._shares: list[Tensor] = []

    def look(self, grads: Sequence[Tensor], parameters: Sequence[Tensor]) -> StoredBasis | None:
        """Takes in one gradient of the domain; gives a basis when it may act from now on, or has been renewed since."""
        if len(self.stack):
            self._shares.append(self._share(grads))
        self.recorder.update(grads)
        self.steps += 1
        if self.steps % self.check_every:
            return None
        basis = self.recorder.finish(parameters)
        self.acting = self.acting or self.above_floor()
        self._shares = self._shares[-LEAST * 4 :]
        self.stack.put(basis, parameters)
        return basis if self.acting else None

    def _share(self, grads: Sequence[Tensor]) -> Tensor:
        inside = self.stack.frame(None).root(self.stack.project(grads)).square()
        total = torch.stack([g.double().square().sum() for g in grads]).sum()
        return self.stack.column_sums(inside).sum() / self.stack.layout.shards.sum_(total).clamp_min(1e-300)

    def explained(self) -> tuple[float, float] | None:
        """Mean share of fresh gradients' energy explained and its standard error; None before `LEAST` of them."""
        if len(self._shares) < LEAST:
            return None
        shares = torch.stack(self._shares)
        return float(shares.mean()), float(shares.std() / len(shares) ** 0.5)

    def above_floor(self) -> bool:
        """Whether the directions explain more than noise does."""
        known = self.explained()
        return known is not None and known[0] - 2 * known[1] > noise_floor(self.stack.chance(self.recorder.domain))

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        known = self.explained()
        return {"steps": self.steps, "acting": self.acting, "explained": None if known is None else known[0]}
