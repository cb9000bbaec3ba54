"""An L1 penalty on movement from the stage's start, as CPO's (arXiv:2607.04364), by soft-thresholding.

After every optimizer step, each weight's distance from where it was as the stage began shrinks by `strength * lr`, and is zero
where it was less than that: the proximal step of `strength * |theta - theta_start|_1`, decoupled from Adam's moments as AdamW's
decay is. Adam moves a weight by about lr a step, so a strength of 1 lets hardly anything move. This is a reading of what is
said of the paper, whose text was not at hand: it is said to choose coordinates, where here all of them are penalised alike.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from ..acting import Acting, Actor, Trainee
from . import Extra


class Shrinkage(Actor):
    """Weights at the stage's start."""

    def __init__(self, trainee: Trainee, strength: float) -> None:
        self.trainee, self.strength = trainee, strength
        self.start: list[Tensor] = []

    def turn(self, ended: str) -> None:
        self.start = [p.detach().clone() for p in self.trainee.trained.values()]

    @torch.no_grad()
    def after(self, optimizer: Optimizer) -> None:
        by = self.strength * optimizer.param_groups[0]["lr"]
        for p, start in zip(self.trainee.trained.values(), self.start, strict=True):
            p.copy_(start + torch.nn.functional.softshrink(p - start, by))


class Method(Acting):
    """Args:
    strength: Of the penalty, in learning rates a step.
    """

    strength: float = Field(gt=0)

    def actor(self, trainee: Trainee) -> Actor:
        return Shrinkage(trainee, self.strength)

    def extra(self, recipe: Any) -> Extra:
        return Extra(stores="1 model")
