"""What the ops compete with on a GPU: the libraries' products in a few lines of PyTorch, and the compiled textbook.

Their results are not compared: products of 16-bit operands round on the way where ours do not. Quantised bases have no product
in a library, so that only the compiled version competes there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cases import ALIGNED, CONFLICT, Inputs
from .logits import LogitsCase, log_softmax_gather, textbook
from .textbook import weights
from .variants import textbook_call

Ways = dict[str, Callable[[], Any]]
CHUNK = 65536  # columns of each product of a batch of them: sums over more lose digits in fp32
COMPILED = ("project", "edit_", "dacsp_", "input_confine_", "token_logprobs")  # seconds each to compile


def ways(x: Inputs | LogitsCase) -> Ways:
    """Competitors of a case by name; empty where none is known."""
    if isinstance(x, LogitsCase):
        return _logits(x)
    op = x.case.op
    found: Ways = {}
    if op.startswith("input_") or (not x.tensors and x.scales is None and x.grads.dtype == x.bases.dtype):
        found |= _products(x)
    if op in COMPILED and not x.tensors:
        torch._dynamo.reset()
        found["torch.compile"] = textbook_call(x, compiled=True)
    return found


def _logits(x: LogitsCase) -> Ways:
    if x.case.op != "token_logprobs":
        return {}
    compiled = torch.compile(textbook, dynamic=False)
    return {
        "log_softmax": lambda: log_softmax_gather(x.logits, x.ids),
        "torch.compile": lambda: compiled(x.logits, x.ids),
    }


def _products(x: Inputs) -> Ways:
    rows, grads = x.bases.flatten(0, 1).to(x.grads.dtype), x.grads
    mix, q = x.mix.to(grads.dtype), x.q.to(grads.dtype)

    def literal(c: Tensor) -> Tensor:
        return (weights(c, ALIGNED, CONFLICT) - 1) * c

    def confine() -> Tensor:
        d = x.anchor - grads @ rows.T
        return grads.addmm_((d - torch.clamp(d, -x.bound, x.bound)).to(grads.dtype), rows)

    def gram() -> Tensor:
        stack = torch.cat([rows, grads])
        return stack @ stack.T

    own = rows[: x.case.k]  # of the first domain
    found: dict[str, Ways] = {
        "project": {"mm": lambda: grads @ rows.T, "bmm": lambda: _chunked(grads, rows)},
        "edit_": {"mm": lambda: grads.addmm_(mix, rows)},
        "dacsp_": {"mm": lambda: grads.addmm_(literal(grads @ rows.T), rows)},
        "gram": {"mm": gram},
        "rotate_": {"mm": lambda: own.copy_(q @ torch.cat([own, grads]))},
        "edit_rotate_": {
            "mm": lambda: (q @ torch.cat([own, grads]), grads.addmm_(mix, rows)),
        },
        "input_project": {"mm": lambda: grads @ rows.T},
        "input_confine_": {"mm": confine},
        "input_dacsp_": {"mm": lambda: grads.addmm_(literal(grads @ rows.T), rows)},
    }
    if x.case.B == 1:
        found["project"]["mv"] = lambda: rows @ grads[0]
        found["dacsp_"]["mv"] = lambda: grads[0].addmv_(rows.T, literal(rows @ grads[0]))
    return found.get(x.case.op, {})


def _chunked(grads: Tensor, rows: Tensor) -> Tensor:
    """Coefficients as many products of a few columns each, summed in fp64: as exact as ours, and the libraries' fastest."""
    whole = rows.shape[1] // CHUNK * CHUNK
    left = rows[:, :whole].unflatten(1, (-1, CHUNK)).transpose(0, 1)
    right = grads[:, :whole].unflatten(1, (-1, CHUNK)).permute(1, 2, 0)
    parts = torch.bmm(left, right) if rows.dtype == torch.float32 else torch.bmm(left, right, out_dtype=torch.float32)
    rest = rows[:, whole:].float() @ grads[:, whole:].float().T
    return (parts.sum(0, dtype=torch.float64) + rest).T
