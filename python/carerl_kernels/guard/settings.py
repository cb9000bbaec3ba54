"""What a guard is asked for: every option of :class:`CapabilityGuard`, with its checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

import torch

from .._ops import BASIS_DTYPES
from ..subspace.kinds import KINDS
from ..subspace.layout import Kind
from .checks import at_least, for_domain, one_of, pair
from .rules import RULES, Rule

Weight = float | Mapping[str, float]
Bound = float | tuple[float, float] | Mapping[str, float | tuple[float, float]]


class GuardOptions(TypedDict, total=False):
    """Keyword arguments of :class:`CapabilityGuard`, see :class:`Settings`."""

    rule: Rule
    basis: Kind | None
    k: int | None
    r: int | None
    every: int
    apply_to: str
    aligned: Weight
    conflict: Weight
    bound: Bound
    max_grad_norm: float | None
    probe_every: int
    probe_adaptive: bool
    basis_dtype: torch.dtype
    record_every: int
    track_energy: bool
    domains: Sequence[str] | None
    energy: float
    room: float


@dataclass(frozen=True)
class Settings:
    """Options of a guard; see :class:`CapabilityGuard` for what they mean.

    Raises:
        ValueError: an option out of range, named with what was expected.
    """

    rule: Rule = "bounded"
    basis: Kind | None = None
    k: int | None = None
    r: int | None = None
    every: int = 8
    apply_to: str = "update"
    aligned: Weight = 1.0
    conflict: Weight = 0.0
    bound: Bound = 0.1
    max_grad_norm: float | None = None
    probe_every: int = 20
    probe_adaptive: bool = False
    basis_dtype: torch.dtype = torch.float32
    record_every: int = 1
    track_energy: bool = False
    domains: Sequence[str] | None = None
    energy: float = 0.9
    room: float = 0.5

    def __post_init__(self) -> None:
        one_of("rule", self.rule, RULES)
        one_of("apply_to", self.apply_to, ("update", "grad"))
        if self.basis is not None:
            one_of("basis kind", self.basis, tuple(KINDS))
        if self.rule == "bounded" and self.apply_to == "grad":
            raise ValueError(
                "rule 'bounded' compares with displacements of parameters: expected apply_to='update', found 'grad'; "
                "for gradients choose another rule, such as 'remove'"
            )
        if self.max_grad_norm is not None and self.apply_to == "update":
            raise ValueError(
                "max_grad_norm belongs to apply_to='grad'; in update mode clip before optimizer.step() as usual"
            )
        if self.max_grad_norm is not None and not 0 < self.max_grad_norm < float("inf"):
            raise ValueError(f"max_grad_norm: expected a positive number, found {self.max_grad_norm}")
        for name in ("energy", "room"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected 0 < {name} <= 1, found {getattr(self, name)}")
        for name in ("every", "probe_every", "record_every"):
            at_least(name, getattr(self, name), 1)
        if self.basis_dtype not in BASIS_DTYPES:
            raise ValueError(
                f"basis_dtype: expected one of {', '.join(map(str, BASIS_DTYPES))}, found {self.basis_dtype}"
            )
        for name in ("aligned", "conflict", "bound"):
            value = getattr(self, name)
            for one in value.values() if isinstance(value, Mapping) else (value,):
                pair(name, one)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Settings:
        """From keyword arguments.

        Raises:
            TypeError: an option that there is not, named with those there are.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise TypeError(f"CapabilityGuard: expected options among {', '.join(known)}, found {name!r}")
        return cls(**options)

    @property
    def confines(self) -> bool:
        """Whether steps are corrected by the box, every so often, instead of one by one."""
        return self.apply_to == "update" and self.rule in ("bounded", "remove")

    def numbers_of(self, domain: str) -> dict[str, float]:
        """Weights and bounds of one domain.

        Raises:
            ValueError: numbers differ by domain, and this one has none.
        """
        lower, upper = pair("bound", for_domain("bound", self.bound, domain))
        aligned, conflict = (for_domain(name, getattr(self, name), domain) for name in ("aligned", "conflict"))
        return {"aligned": float(aligned), "conflict": float(conflict), "lower": lower, "upper": upper}

    def deciding(self) -> dict[str, Any]:
        """What decides how steps are corrected, for comparison with a saved state."""
        names = ["rule", "apply_to", "aligned", "conflict", "bound", "max_grad_norm", "probe_every", "probe_adaptive"]
        names += ["every"] if self.confines else []
        kept = {name: getattr(self, name) for name in names}
        return {name: dict(v) if isinstance(v, Mapping) else v for name, v in kept.items()}
