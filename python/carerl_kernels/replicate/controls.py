"""Controls: guards that know nothing, to see what knowing something buys."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..guard import CapabilityGuard
from ..guard.validate import random_basis
from ..subspace import StoredBasis


class RandomGuard(CapabilityGuard):
    """A guard whose recorded directions are replaced by random ones, as many and of the same tensors.

    Args:
        seed: Of the directions, which differ from domain to domain.

    Raises:
        ValueError: A rule that compares with the recorded displacement, which random directions do not have.
    """

    def __init__(self, model: Any, *, seed: int = 0, **options: Any) -> None:
        if options.get("rule") != "remove":
            raise ValueError(f"random directions: expected rule 'remove', found {options.get('rule')!r}")
        self._seed = seed
        super().__init__(model, **options)

    def add(self, basis: StoredBasis | Path | str) -> None:
        """Takes random directions in place of a recorded domain's."""
        basis = basis if isinstance(basis, StoredBasis) else StoredBasis.load(basis, self.layout)
        fresh: Any = random_basis(self.layout, 1000 * self._seed + len(self.history))
        super().add(replace(fresh, info=basis.info))
