"""What a guard is asked for: every option of :class:`CapabilityGuard`, with its checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

import torch

from .._errors import at_least, one_of
from .._ops import BASIS_DTYPES
from ..subspace.kinds import KINDS
from ..subspace.layout import Kind
from .rules import RULES, Rule

Weight = float | Mapping[str, float]
Bound = float | tuple[float, float] | Mapping[str, float | tuple[float, float]]


def pair(name: str, value: Any) -> tuple[float, float]:
    """A checked weight or bound, as (against, along)."""
    lower, upper = value if isinstance(value, tuple | list) and name == "bound" else (value, value)
    for number in (lower, upper):
        if not isinstance(number, int | float) or not 0 <= number < float("inf"):
            raise ValueError(f"{name}: expected a finite number of at least 0, found {value!r}")
    return float(lower), float(upper)


def for_domain(what: str, value: Any, name: str) -> Any:
    """One domain's number, where numbers may differ by domain."""
    if not isinstance(value, Mapping):
        return value
    if name not in value:
        raise ValueError(f"{what}: expected a number for domain {name!r}, found one only for {', '.join(value)}")
    return value[name]


class GuardOptions(TypedDict, total=False):
    """Keyword arguments of :class:`CapabilityGuard`; their defaults are those of :class:`Settings`.

    Attributes:
        basis: "input" (one-sided, r per weight matrix, of what is fed into it) or "block" (two-sided, r x r per weight matrix,
            from a stage's parameter change), whose memory is small enough for full fine-tuning; "per_matrix" (k directions for
            every weight matrix) or "flat" (k over all parameters), both from gradients. None is "input", or "per_matrix" where k
            or a basis_dtype asks for rows or the model is pairs. docs/evidence.md compares them.
        k: Directions per domain of row bases, 64 by default.
        r: Rank of "block", 16 by default, and of "input", 32.
        every: rules "bounded" and "remove": steps of one domain between corrections. Weights may be outside of their box by what
            the steps since then did; a stage's end, :meth:`detach` and :meth:`confine_` put them back.
        bound: a number for both sides, (against, along), or one of these per domain.
        aligned, conflict: weights of components along (at least 0, 1 passes) and against (0 removes) prior learning, for the
            rules that decide on signs; a number, or one per domain.
        apply_to: "update" corrects the parameters, whatever the optimizer made of the gradient; "grad" edits `p.grad` before
            the step (Adam largely normalises such an edit away).
        max_grad_norm: grad mode: clips the edited gradient (clip before the step as usual in update mode).
        probe_every: Steps between probes, with rule "probed".
        probe_adaptive: Whether `probe_every` is where the interval starts only, and it then follows how
            much successive probes agree. Signs that agree no more than a coin's fall back to "bounded".
        basis_dtype: storage of row directions: float32, bfloat16, float16, or block-scaled int8 or float8_e4m3fn.
        record_every: record every n-th gradient of a stage.
        track_energy: measure the share of updates that is aligned, conflicting, orthogonal and touched. In update mode this
            keeps one copy of the parameters.
        domains: all domain names, so that a misspelt one is an error; None accepts any.
        energy: basis "input": keep the fewest directions with this share of the inputs' energy, at most r.
        room: basis "input": in a matrix as many directions of all domains together as this share of its inputs, at most; those
            with the smallest shares of their domain's inputs give way.
    """

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
    """Options of a guard, checked; see :class:`GuardOptions` for what they mean."""

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
            one_of("basis kind", self.basis, KINDS)
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
        one_of("basis_dtype", self.basis_dtype, BASIS_DTYPES)
        for name in ("aligned", "conflict", "bound"):
            value = getattr(self, name)
            for one in value.values() if isinstance(value, Mapping) else (value,):
                pair(name, one)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Settings:
        """From keyword arguments; a TypeError names those there are."""
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
        """Weights and bounds of one domain, which has to be among those named where numbers differ by domain."""
        lower, upper = pair("bound", for_domain("bound", self.bound, domain))
        aligned, conflict = (for_domain(name, getattr(self, name), domain) for name in ("aligned", "conflict"))
        return {"aligned": float(aligned), "conflict": float(conflict), "lower": lower, "upper": upper}

    def deciding(self) -> dict[str, Any]:
        """What decides how steps are corrected, for comparison with a saved state."""
        names = ["rule", "apply_to", "aligned", "conflict", "bound", "max_grad_norm", "probe_every", "probe_adaptive"]
        names += ["every"] if self.confines else []
        kept = {name: getattr(self, name) for name in names}
        return {name: dict(v) if isinstance(v, Mapping) else v for name, v in kept.items()}
