"""Does a basis still say something about the model? Fresh gradients of its domain against a random subspace of equal rank."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..subspace.kinds import KINDS
from ..subspace.random_basis import as_random, random_basis
from ..subspace.shards import local
from ..subspace.store import StoredBasis
from .build import architecture_of, new_stack, sides_of, trainable
from .gradients import gradients, set_aside
from .stack import Stack, noise_floor

# two-sided 95 % points of Student's t for 2, 3, ... degrees of freedom; beyond the last the normal's
_T95 = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16, 2.145, 2.131, 2.12)


@dataclass(frozen=True)
class Validation:
    """How much of fresh gradients a basis explains.

    Attributes:
        gradients: how many were drawn.
        explained: Mean share of their energy inside the basis.
        low, high: The 95 % interval (Student's t over gradients).
        random: Mean share inside random directions of equal number.
        random_high: Upper end of its interval.
        verdict: "functional" (the whole interval lies above the noise floor, thrice what random directions explain or half of
            what those leave), "chance" (it reaches down to what random directions explain) or "weak" (between).
    """

    domain: str
    kind: str
    k: int
    gradients: int
    explained: float
    low: float
    high: float
    random: float
    random_high: float
    verdict: str


def validate(basis: StoredBasis, model: nn.Module, losses: Iterable[Callable[[], Tensor]], seed: int = 0) -> Validation:
    """Draws fresh gradients of a domain and compares the energy that its basis explains with a random subspace's.

    A basis that looks like another (names, shapes, cosines) is no proof that it matters for this model: explained energy of
    fresh gradients is.

    Args:
        model: its trainable parameters are those of the basis. Gradients it holds are put back.
        losses: each gives the domain's loss on fresh data; at least three.

    Raises:
        BasisError: the basis belongs to another model.
        ValueError: fewer than three gradients, or one that is not finite or zero.
    """
    named = trainable(model)
    info = basis.info
    layout = KINDS[info.kind].layout(named, info.kind, info.k, None, sides_of(model, named))
    basis.check_model(layout, architecture_of(model))
    parameters = [p for _, p in named]
    device = local(parameters[0]).device
    stacks = []
    with torch.no_grad():
        for one in (basis, as_random(basis, random_basis(layout, seed))):
            stack: Stack[Any, Any] = new_stack(layout, torch.float32, device)
            stack.put(one, [local(p) for p in parameters])
            stacks.append(stack)
    shares: list[list[float]] = [[], []]
    for loss in losses:
        with set_aside(parameters):
            loss().backward()
            with torch.no_grad():
                grads = gradients(parameters, layout.names)
                for stack, out in zip(stacks, shares, strict=True):
                    share, total = stack.explained(grads)
                    if not (total.isfinite() and total > 0):
                        raise ValueError(
                            f"validate: expected a finite gradient other than zero, found |g|^2 = {float(total)}"
                        )
                    out.append(float(share))
    if len(shares[0]) < 3:
        raise ValueError(f"validate: expected at least 3 losses for an interval, found {len(shares[0])}")
    (mean, low, high), (chance, _, chance_high) = _interval(shares[0]), _interval(shares[1])
    verdict = "weak" if low > chance_high else "chance"
    if low > max(chance_high, noise_floor(chance)):
        verdict = "functional"
    return Validation(info.domain, info.kind, info.k, len(shares[0]), mean, low, high, chance, chance_high, verdict)


def _interval(values: list[float]) -> tuple[float, float, float]:
    n, mean, spread = len(values), statistics.fmean(values), statistics.stdev(values)
    t = _T95[n - 3] if n - 3 < len(_T95) else 1.96 + 2.4 / (n - 1)
    half = t * spread / math.sqrt(n)
    return mean, max(0.0, mean - half), min(1.0, mean + half)
