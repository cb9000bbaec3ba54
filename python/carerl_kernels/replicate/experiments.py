"""Guards that only the study knows: a control that knows nothing, and ideas that were tried."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ._early import CapabilityGuard
from ..guard.validate import as_random, random_basis
from ..subspace import StoredBasis
from ..subspace.factored import FactoredBasis
from ..subspace.matrices import FactoredKind

Experiment = Literal["random", "elastic", "spectral", "aged", "confident", "curved"]
RULES: Mapping[Experiment, str] = {
    "random": "remove",
    "elastic": "integrated",
    "spectral": "bounded",
    "aged": "bounded",
    "confident": "probed",
    "curved": "probed",
}
"""The rule that each of them changes."""
STRONG: tuple[Experiment, ...] = ("elastic", "spectral", "aged", "curved")
"""Those with a strength."""


class ExperimentalGuard(CapabilityGuard):
    """A guard with one thing changed.

    Args:
        model: As for `CapabilityGuard`.
        experiment: "random": recorded directions are replaced by random ones, as many in every tensor. "elastic": a share
            ``1 / (1 + strength * e)`` of displacement passes, e the row's energy in the recorded stage relative to the mean
            over its tensor. "spectral": rule "bounded" with bounds divided by ``e^(strength / 2)``, tighter where the
            stage's gradients were larger. "aged": rule "bounded" with bounds of a domain times ``strength^n``, n domains
            recorded after it. "confident": rule "probed", where as much of a conflicting component goes as successive probes
            agree on its sign. "curved": rule "probed", where ``1 / (1 + strength * f)`` of it passes, f the mean square of
            the row's probes relative to the mean over its tensor (Fisher information on a few answers).
        strength: Of those in `STRONG`.
        seed: Of random directions, which differ from domain to domain.
        options: As for `CapabilityGuard`.

    Raises:
        ValueError: A rule other than the one that the experiment changes, or a basis that it cannot do anything with.
    """

    def __init__(
        self, model: Any, *, experiment: Experiment, strength: float = 1.0, seed: int = 0, **options: Any
    ) -> None:
        if options.get("rule") != RULES[experiment]:
            raise ValueError(f"{experiment}: expected rule {RULES[experiment]!r}, found {options.get('rule')!r}")
        if experiment in ("elastic", "spectral") and options.get("basis") == "block":
            raise ValueError(f"{experiment}: expected a basis with an energy per row, found 'block'")
        if experiment == "curved" and options.get("basis") in get_args(FactoredKind):
            raise ValueError(f"curved: expected a basis of rows, found {options['basis']!r}")
        self._experiment, self._strength, self._seed = experiment, strength, seed
        self._agreed: dict[str, tuple[Tensor, Tensor]] = {}
        super().__init__(model, **options)

    def add(self, basis: StoredBasis | Path | str) -> None:
        """Takes a recorded domain, or random directions in its place."""
        basis = basis if isinstance(basis, StoredBasis) else StoredBasis.load(basis, self.layout)
        if self._experiment == "random":
            basis = as_random(basis, random_basis(self.layout, 1000 * self._seed + len(self.history)))
        super().add(basis)

    def rebase(self) -> None:
        """Forgets what probes agreed on, too."""
        self._agreed.clear()
        super().rebase()

    def _resize(self) -> None:
        super()._resize()
        if self._experiment == "random" or not self.history:
            return
        if self._experiment in ("confident", "curved"):
            self._trust()
            return
        if self._experiment == "aged":
            later = torch.arange(len(self.history) - 1, -1, -1, dtype=torch.float64, device=self.device)
            smaller = (self._strength**later).repeat_interleave(self.layout.width)
            self._params = replace(self._params, lower=self._params.lower * smaller, upper=self._params.upper * smaller)
            return
        energy = torch.cat([relative_energy(self.basis(name), self.layout) for name in self.history], dim=1)
        energy = energy.to(self.device)
        if self._experiment == "elastic":
            passing = 1 / (1 + self._strength * energy)
            self._params = replace(self._params, aligned=passing, conflict=passing)
        else:
            tighter = energy.clamp_min(1e-6) ** (-self._strength / 2)
            self._params = replace(self._params, lower=self._params.lower * tighter, upper=self._params.upper * tighter)

    def _settle_probes(self) -> None:
        for name in self._probes.pending() if self._experiment in ("confident", "curved") else ():
            fresh = self._probes.total(name)
            mean, square = self._agreed.get(name, (fresh, fresh.square()))
            self._agreed[name] = (mean + fresh) / 2, (square + fresh.square()) / 2
        super()._settle_probes()
        if self._agreed:
            self._trust()

    def _trust(self) -> None:
        """What passes of conflicting components: nothing where all probes agreed, all where they cancel; or by their squares."""
        passing = torch.zeros(self.layout.T, self._stack.rows, dtype=torch.float64, device=self.device)
        for name, (mean, square) in self._agreed.items():
            passing[:, self._stack.columns(name)] = (
                1 - mean.abs() / square.sqrt().clamp_min(1e-300)
                if self._experiment == "confident"
                else 1 / (1 + self._strength * _relative(square.sqrt()))
            )
        self._params = replace(self._params, conflict=passing)


def relative_energy(basis: Any, layout: Any) -> Tensor:
    """``[T, width]`` float64: squared singular values over their mean in the tensor; zero where there is no direction."""
    if not isinstance(basis, FactoredBasis):
        return _relative(basis.singular_values.double())
    out = torch.zeros(layout.T, layout.width, dtype=torch.float64)
    for group in layout.groups:
        for _, name, rows in layout.matrices(group):
            out[rows] = _relative(basis.values[name].double().cpu())
    return out


def _relative(values: Tensor) -> Tensor:
    squares = values.square()
    number = (squares > 0).sum(-1, keepdim=True).clamp_min(1)
    return squares / (squares.sum(-1, keepdim=True) / number).clamp_min(1e-300)
