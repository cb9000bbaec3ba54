"""A guard that only the study knows: the control that knows nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..guard import CapabilityGuard
from ..subspace import StoredBasis
from ..subspace.random_basis import as_random, random_basis


class RandomGuard(CapabilityGuard):
    """Recorded directions are replaced by random ones, as many in every tensor.

    Args:
        model: As for `CapabilityGuard`.
        seed: Of the directions, which differ from domain to domain.
        options: As for `CapabilityGuard`.
    """

    def __init__(self, model: Any, *, seed: int = 0, **options: Any) -> None:
        self._seed = seed
        super().__init__(model, **options)

    def add(self, basis: StoredBasis | Path | str, *, rebase: bool = True) -> None:
        """Takes random directions in place of a recorded domain's."""
        basis = basis if isinstance(basis, StoredBasis) else StoredBasis.load(basis, self.layout)
        fresh = random_basis(self.layout, 1000 * self._seed + len(self.history))
        super().add(as_random(basis, fresh), rebase=rebase)
