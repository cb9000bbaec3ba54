"""The literal rule while a stage is recorded: both passes over the rows serve the edit and the streaming PCA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..linalg import dacsp_core
from ..subspace.recorder import StageRecorder
from .rules import RuleParams
from .stack import RowStack


class LiteralRecording:
    """Rows that act and rows that are being recorded in one tensor, so that `gram` and `edit_rotate_` serve both.

    The first pass measures all of them and the gradient, the second edits the gradient along the ones and rotates the others,
    where a correction and a recording by themselves take four.

    Args:
        stack: The stack of float32 rows, at least one domain.
        recorder: The recorder of the stage; from now on its rows live here.
    """

    def __init__(self, stack: RowStack, recorder: StageRecorder):
        self.stack, self.recorder = stack, recorder
        D, k, N = stack.bases.shape
        width = recorder.pca.rows.shape[0]
        self._bases = torch.zeros(D + 1, max(k, width), N, dtype=torch.float32, device=stack.device)
        self._bases[:D, :k] = stack.bases
        self._bases[D, :width] = recorder.pca.rows
        recorder.pca.rows = self._bases[D, :width]
        rows = torch.arange((D + 1) * self._bases.shape[1], device=stack.device).view(D + 1, -1)
        self._acting, self._recorded = rows[:D, :k].flatten(), rows[D, :width]
        self._made_of = stack.bases

    @classmethod
    def of(cls, stack: RowStack, recorder: StageRecorder, before: LiteralRecording | None) -> LiteralRecording:
        """The one for this stack and recorder: that of the step before, where nothing has changed."""
        same = before is not None and before.recorder is recorder and before._made_of is stack.bases
        return before if same and before is not None else cls(stack, recorder)

    def step(self, grads: Sequence[Tensor], own: str | None, params: RuleParams) -> tuple[Tensor, Tensor]:
        """Records a gradient and edits it in place.

        Returns:
            Coefficients of the rows that act, and what was taken out along them: `[T, K]` float64.
        """
        stack, pca = self.stack, self.recorder.pca
        measured = stack.layout.gram(self._bases, grads)  # [T, R + 1, R + 1]
        finite = measured.isfinite().all()
        c = torch.where(stack.active(own) & finite, measured[:, self._acting, -1], 0.0)
        _, x = dacsp_core(c, params.aligned, params.conflict, 0.0, stack.root(own))
        mix = torch.zeros(stack.layout.T, measured.shape[-1] - 1, dtype=x.dtype, device=x.device)
        mix[:, self._acting] = x
        mine = torch.cat([self._recorded, self._recorded.new_tensor([measured.shape[-1] - 1])])
        q = pca.decide(measured[:, mine.unsqueeze(1), mine])
        stack.layout.edit_rotate_(grads, self._bases, mix, len(stack), q)
        self.recorder.steps += 1
        return c, -x
