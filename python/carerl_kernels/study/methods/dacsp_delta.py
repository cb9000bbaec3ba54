"""Direction-aware projection, read as rank-1 directions of what earlier stages changed: a reading of CARE-RL (arXiv:2606.00609).

Of every weight matrix but embeddings and the output layer, the change of each stage that has ended is decomposed (SVD); its
directions are the pairs `u_i v_i^T`, as many as hold 95 % of the change's energy, at most 64 (of a large model's change many
more would be needed). Those of all earlier stages are orthogonalised together by a QR decomposition with pivoting, which drops
what others span and keeps every direction's sign. The optimizer's update is split along them: what repeats an earlier change
counts 1.2 times, what goes against one .2 times, the rest as it is. The paper's abstract leaves open what its directions are;
`instant` reads them as principal directions of gradients instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from ...train.recipe import RecipeError
from ..acting import Acting, Actor, Trainee
from . import Extra

SPANNED = 1e-2
"""A direction is dropped where less than this of its length is left of it outside of the others' span."""


@dataclass
class Directions:
    """K directions `left[k] right[k]^T` of length 1, and their orthonormalised span.

    Attributes:
        left, right: `[K, m]` and `[K, n]`.
        frame: `[rank, K]` float64, row j the j-th orthonormal direction as a combination of the K.
    """

    left: Tensor
    right: Tensor
    frame: Tensor

    @classmethod
    def of(cls, left: Tensor, right: Tensor) -> Directions:
        """Orthonormalised: the QR decomposition with pivoting of the K matrices as columns, from their inner products."""
        u, v = left.double(), right.double()
        return cls(left, right, torch.from_numpy(pivoted_frame(((u @ u.T) * (v @ v.T)).numpy())))

    def edit(self, update: Tensor, aligned: float, conflict: float) -> Tensor:
        """What is added to an update `[m, n]` of the weights."""
        along = torch.einsum("kn,kn->k", self.left @ update, self.right).double()
        c = self.frame @ along
        x = self.frame.T @ (torch.where(c > 0, aligned - 1, conflict - 1) * c)
        return (self.left * x.to(self.left.dtype)[:, None]).T @ self.right


def pivoted_frame(gram: np.ndarray) -> np.ndarray:
    """`[rank, K]` T with T gram T^T = 1: the inverse of R in the QR decomposition with column pivoting of unit columns.

    Args:
        gram: `[K, K]` float64 inner products of the columns; its Cholesky factor with pivoting is R.
    """
    rest, rows = np.diag(gram).copy(), np.zeros((0, len(gram)))
    frame = np.zeros((0, len(gram)))
    while len(frame) < len(gram) and rest.max() > SPANNED**2:
        chosen = int(rest.argmax())
        own = np.eye(len(gram))[chosen] - rows[:, chosen] @ frame  # the column without what is spanned already
        own /= np.sqrt(own @ gram @ own)
        frame, rows = np.vstack([frame, own]), np.vstack([rows, own @ gram])
        rest = np.maximum(rest - rows[-1] ** 2, 0.0)
        rest[chosen] = 0.0
    return frame


class Projection(Actor):
    """Directions of the stages that have ended, by parameter."""

    def __init__(self, trainee: Trainee, method: Method, random: bool) -> None:
        self.method, self.random = method, random
        apart = {id(p) for m in trainee.model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        output = getattr(trainee.model, "get_output_embeddings", lambda: None)()
        apart |= {id(p) for p in output.parameters()} if output is not None else set()
        self.weights = {n: p for n, p in trainee.trained.items() if p.dim() == 2 and id(p) not in apart}
        self.start = self._copy()
        self.directions: dict[str, Directions] = {}
        self.generator = torch.Generator().manual_seed(trainee.seed)
        self.taken = self.whole = 0.0

    def _copy(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.weights.items()}

    @torch.no_grad()
    def turn(self, ended: str) -> None:
        for name, p in self.weights.items():
            left, right = self._pairs(p - self.start[name])
            known = self.directions.get(name)
            if known is not None:
                left, right = torch.cat([known.left, left]), torch.cat([known.right, right])
            if len(left):
                self.directions[name] = Directions.of(left, right)
        self.start = self._copy()

    def _pairs(self, change: Tensor) -> tuple[Tensor, Tensor]:
        """Those of a stage's change, or as many random ones."""
        u, s, vt = torch.linalg.svd(change, full_matrices=False)
        held = s.double().square().cumsum(0)
        enough = int((held < self.method.energy * held[-1]).sum()) + 1 if held[-1] > 0 else 0
        n = min(enough, self.method.most)
        if self.random:
            u, vt = (
                torch.linalg.qr(torch.randn(size, n, generator=self.generator))[0].to(change) for size in change.shape
            )
            return u.T.contiguous(), vt.T.contiguous()
        return u[:, :n].T.contiguous(), vt[:n].contiguous()

    def before(self, optimizer: Optimizer) -> None:
        self.old = self._copy()

    @torch.no_grad()
    def after(self, optimizer: Optimizer) -> None:
        for name, directions in self.directions.items():
            update = self.weights[name] - self.old[name]
            edit = directions.edit(update, self.method.aligned, self.method.conflict)
            self.weights[name].add_(edit)
            self.taken += float(edit.double().square().sum())
            self.whole += float(update.double().square().sum())

    def figures(self) -> dict[str, Any]:
        return {"touched": self.taken / self.whole} if self.whole else {}


class Method(Acting):
    """Args:
    random: Random pairs in place of the changes' own, as many in every matrix: the control.
    aligned, conflict: Weights of what repeats an earlier change, and of what goes against one.
    energy: Share of a change's energy that its directions hold.
    most: Directions of a stage in a matrix, at most.
    """

    random: bool = False
    aligned: float = Field(default=1.2, ge=0)
    conflict: float = Field(default=0.2, ge=0)
    energy: float = Field(default=0.95, gt=0, le=1)
    most: int = Field(default=64, ge=1)

    def check(self, recipe: Any, source: str) -> None:
        super().check(recipe, source)
        if "text" in recipe.stages[:1]:
            raise RecipeError(
                f"{source}: expected stages that are trained before the last to go with add: dacsp_delta, which learns its "
                "directions from their changes; found text, which the model comes with"
            )
        if getattr(recipe, "lora", None) or getattr(getattr(recipe, "model", None), "lora", None):
            raise RecipeError(
                f"{source}: expected whole weights to go with add: dacsp_delta, found lora, whose factors are no weights"
            )

    def actor(self, trainee: Trainee) -> Actor:
        return Projection(trainee, self, self.random)

    def extra(self, recipe: Any) -> Extra:
        return Extra(stores=f"2 models and at most {self.most * (len(recipe.stages) - 1)} pairs a matrix")
