"""The control that knows nothing: recorded directions are replaced by random ones, as many in every tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...guard import CapabilityGuard
from ...subspace import StoredBasis
from ...subspace.random_basis import as_random, random_basis
from ...train.recipe import RecipeError
from . import Addition


class RandomGuard(CapabilityGuard):
    """Takes random directions in place of a recorded domain's.

    Args:
        model: As for `CapabilityGuard`.
        seed: Of the directions, which differ from domain to domain.
        options: As for `CapabilityGuard`.
    """

    def __init__(self, model: Any, *, seed: int = 0, **options: Any) -> None:
        self._seed = seed
        super().__init__(model, **options)

    def add(self, basis: StoredBasis | Path | str, *, rebase: bool = True) -> None:
        """Adds as many random directions."""
        basis = basis if isinstance(basis, StoredBasis) else StoredBasis.load(basis, self.layout)
        fresh = random_basis(self.layout, 1000 * self._seed + len(self.history))
        super().add(as_random(basis, fresh), rebase=rebase)


class Method(Addition):
    """A guard with random directions."""

    def check(self, recipe: Any, source: str) -> None:
        if recipe.guard is None:
            raise RecipeError(f"{source}: expected a guard to go with add: random, found none")

    def guard_class(self) -> type[CapabilityGuard]:
        return RandomGuard

    def guard_defaults(self, seed: int) -> dict[str, Any]:
        return {"seed": seed}
