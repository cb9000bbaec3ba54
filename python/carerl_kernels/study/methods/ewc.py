"""Elastic weight consolidation (Kirkpatrick et al., PNAS 2017, arXiv:1612.00796).

When a domain's stage ends, the diagonal of the Fisher information is estimated there from the domain's stored answers, which
nothing needs afterwards (the empirical Fisher: squared gradients of the log-probability of each right answer, averaged). From
then on the loss has the term `strength / 2 * sum F (theta - theta_end)^2`, one for every domain that ended; its gradient is
added after clipping.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from ...train.recipe import RecipeError
from ..acting import Acting, Actor, Trainee
from . import Extra


class Consolidation(Actor):
    """Weights and Fisher information of every domain whose stage has ended."""

    def __init__(self, trainee: Trainee, strength: float, examples: int) -> None:
        self.trainee, self.strength, self.examples = trainee, strength, examples
        self.kept: list[tuple[list[Tensor], list[Tensor]]] = []

    def turn(self, ended: str) -> None:
        weights = list(self.trainee.trained.values())
        fisher, seen = [torch.zeros_like(p) for p in weights], 0
        for nats in self.trainee.nats(ended, self.examples):
            gradients = torch.autograd.grad(nats(), weights, allow_unused=True)  # those in p.grad are the coming step's
            for total, g in zip(fisher, gradients, strict=True):
                if g is not None:
                    total.addcmul_(g, g)
            seen += 1
        torch._foreach_div_(fisher, float(seen))
        self.kept.append(([p.detach().clone() for p in weights], fisher))

    @torch.no_grad()
    def before(self, optimizer: Optimizer) -> None:
        for anchors, fisher in self.kept:
            for p, anchor, f in zip(self.trainee.trained.values(), anchors, fisher, strict=True):
                if p.grad is not None:
                    p.grad.addcmul_(f, p - anchor, value=self.strength)


class Method(Acting):
    """Args:
    strength: Of the penalty.
    examples: Stored answers of a domain behind its Fisher information; a domain of the trainer has `probes` of them.
    """

    strength: float = Field(gt=0)
    examples: int = Field(default=32, ge=1)

    def check(self, recipe: Any, source: str) -> None:
        super().check(recipe, source)
        few = [name for name, d in getattr(recipe, "domains", {}).items() if d.probes < self.examples]
        if few:
            raise RecipeError(
                f"{source}: expected {self.examples} stored answers in every domain to go with add: ewc, found fewer in "
                f"{', '.join(few)}; raise their probes, or lower examples"
            )

    def actor(self, trainee: Trainee) -> Actor:
        return Consolidation(trainee, self.strength, self.examples)

    def extra(self, recipe: Any) -> Extra:
        earlier = len(recipe.stages) - 1
        return Extra(both=earlier * self.examples, stores=f"{2 * earlier} models")
