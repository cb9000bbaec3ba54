"""Inputs of a case, and putting them back as they were before every call."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._ops import SEGMENT
from .cost import SCALE_BLOCK, Case

ALIGNED, CONFLICT, THRESHOLD = 1.2, 0.2, 0.0
OUTPUTS = {
    "project": ("coeffs",),
    "gram": ("gram",),
    "edit_": ("grads",),
    "rotate_": ("rows",),
    "edit_rotate_": ("grads", "rows"),
    "dacsp_": ("coeffs", "grads"),
    "pca_update_": ("rows", "singular_values"),
    "input_project": ("coeffs",),
    "input_confine_": ("grads",),
    "input_dacsp_": ("grads",),
}
"""What each op computes, by the names that :class:`Expectation` has for it."""
SCALE = 0.9  # of edit_ and edit_rotate_: not 1, so that a kernel that forgets it is caught


class Inputs:
    """Tensors of a case. Gradients have a planted component along every row: coefficients are far above rounding.

    Rows are random of unit length: orthonormal up to 1/sqrt(N), which costs what exactly orthonormal ones do.
    """

    def __init__(self, case: Case, seed: int = 0):
        self.case = case
        draw = torch.Generator().manual_seed(seed)
        d, k, b, n = case.D, case.k, case.B, case.N
        working = case.grad if case.basis == torch.int8 else case.basis
        sizes = _sizes(case.tensors, n, draw)
        self.offsets, covered = _offsets(sizes, n)
        bases = torch.empty(d, k, n, dtype=working)
        for row in bases.view(-1, n):
            row.normal_(0, n**-0.5, generator=draw)
        bases.mul_(covered) if covered is not None else None
        # [B, N]; of a list form [1, N] before the call, with zeros between the tensors
        self.grads = torch.empty(b, n, dtype=case.grad).normal_(generator=draw)
        plan = torch.where(torch.rand(b, d * k, generator=draw) < 0.5, -0.5, 0.5) * math.sqrt(n)
        for start in range(0, n, 1 << 20):
            rows = bases.view(d * k, n)[:, start : start + (1 << 20)].float()
            self.grads[:, start : start + (1 << 20)] += (plan @ rows).to(case.grad)
        self.grads.mul_(covered) if covered is not None else None
        self.bases, self.scales = bases, None  # [D, k, N]; scales of int8 bases
        if case.basis == torch.int8:
            self.bases, self.scales = torch.ops.carerl.quantize_bases(bases, SCALE_BLOCK)
        # mix [B, K], scale [B], q [k, k+B]: dense, for a kernel may skip rows with a zero mix
        self.mix = 0.1 * math.sqrt(n) * torch.randn(b, d * k, generator=draw)
        self.scale = torch.full((b,), SCALE)
        self.q = torch.randn(k, k + b, generator=draw) / math.sqrt(k + b)
        self.anchor = self.bound = torch.empty(0)  # [B, K] of input_confine_, where the gradients stand for a matrix
        if case.op == "input_confine_":
            self.anchor = self.grads.float() @ bases.view(d * k, n).float().T
            self.anchor += torch.randn(b, d * k, generator=draw)
            self.bound = 0.5 * torch.rand(b, d * k, generator=draw)
        self.singular_values = self.grads[0].norm(dtype=torch.float32).double() * torch.linspace(3, 0.3, k).double()
        self._first = self.singular_values.clone()
        self._raw = self.grads.clone()
        # What the op may overwrite; int8 bases never are.
        self._rows = self.bases[0].clone() if case.op.startswith(("rotate_", "edit_rotate_", "pca_update_")) else None
        self.tensors = [self._raw[0, o : o + s].clone() for o, s in zip(self.offsets, sizes, strict=True)]

    def reset(self) -> None:
        """Everything as before the first call."""
        if not self.tensors:
            self.grads.copy_(self._raw)
        for tensor, offset in zip(self.tensors, self.offsets, strict=True):
            tensor.copy_(self._raw[0, offset : offset + tensor.numel()])
        if self._rows is not None:
            self.bases[0].copy_(self._rows)
        self.singular_values.copy_(self._first)

    def outputs(self, returned: Tensor | None) -> dict[str, Any]:
        """What a call of the op has computed: what it returned, if anything, and the tensors that it changed in place."""
        changed = {"grads": self.tensors or self.grads, "rows": self.bases[0], "singular_values": self.singular_values}
        return {name: changed.get(name, returned) for name in OUTPUTS[self.case.packet]}

    def flat(self, tensors: list[Tensor]) -> Tensor:
        """Tensors of a list form as `[1, N]` with zeros between."""
        out = torch.zeros(1, self.case.N, dtype=self.case.grad)
        for tensor, offset in zip(tensors, self.offsets, strict=True):
            out[0, offset : offset + tensor.numel()] = tensor.view(-1)
        return out


def _sizes(count: int, n: int, draw: torch.Generator) -> list[int]:
    """Odd sizes over three orders of magnitude, as norms, adapters and matrices of a model have, that fit into n."""
    if not count:
        return []
    weights = 10 ** (3 * torch.rand(count, generator=draw, dtype=torch.float64))
    room = n - count * SEGMENT
    return [max(int(room * float(w / weights.sum())) | 1, 1) for w in weights]


def _offsets(sizes: list[int], n: int) -> tuple[list[int], Tensor | None]:
    """Offsets of the tensors, and a mask `[N]` of the elements that they cover."""
    if not sizes:
        return [], None
    covered, offsets, end = torch.zeros(n, dtype=torch.bool), [], 0
    for size in sizes:
        offsets.append(end)
        covered[end : end + size] = True
        end += -(-size // SEGMENT) * SEGMENT
    return offsets, covered
