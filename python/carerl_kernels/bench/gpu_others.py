"""What the ops compete with on a GPU: the libraries' products in a few lines of PyTorch, and the compiled textbook.

Their results are not compared: products of 16-bit operands round on the way where ours do not. Quantised bases have no product
in a library, so that only the compiled version competes there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .cases import Inputs
from .logits import LogitsCase, log_softmax_gather, textbook
from .sharp import Way, apart, computed, edited, gram_mm, halves, rotate_mm, ruled, sign_rule
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
    if op.startswith("input_"):
        found |= _input_products(x)
    elif not x.tensors and x.grads.dtype == x.bases.dtype:
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
    coeffs, edits = halves(x, {})
    found: dict[str, Mapping[str, Way]] = {
        "project": {**coeffs, "bmm": _chunked},
        "edit_": {name: partial(edited, edit) for name, edit in edits.items()},
        "dacsp_": {name: partial(ruled, coeffs[name], edit) for name, edit in edits.items()},
        "gram": {"mm": gram_mm},
        "rotate_": {"mm": rotate_mm},
        "edit_rotate_": {name: partial(apart, edit) for name, edit in edits.items()},
    }
    return {name: computed(x, way) for name, way in found.get(x.case.op, {}).items()}


def _input_products(x: Inputs) -> Ways:
    """With directions in the dtype of the matrix, so that the library's fastest product serves."""
    rows, grads = x.bases[0].to(x.grads.dtype), x.grads

    def confine() -> Tensor:
        d = x.anchor - grads @ rows.T
        return grads.addmm_((d - torch.clamp(d, -x.bound, x.bound)).to(grads.dtype), rows)

    found: Ways = {
        "input_project": lambda: grads @ rows.T,
        "input_confine_": confine,
        "input_dacsp_": lambda: grads.addmm_(sign_rule(grads @ rows.T), rows),
    }
    return {"mm": lambda: x.outputs(found[x.case.op]())}


def _chunked(x: Inputs) -> Tensor:
    """Coefficients as many products of a few columns each, summed in fp64: as exact as ours, and the libraries' fastest."""
    grads, rows = x.grads, x.bases.flatten(0, 1)
    whole = rows.shape[1] // CHUNK * CHUNK
    left = rows[:, :whole].unflatten(1, (-1, CHUNK)).transpose(0, 1)
    right = grads[:, :whole].unflatten(1, (-1, CHUNK)).permute(1, 2, 0)
    parts = torch.bmm(left, right) if rows.dtype == torch.float32 else torch.bmm(left, right, out_dtype=torch.float32)
    rest = rows[:, whole:].float() @ grads[:, whole:].float().T
    return (parts.sum(0, dtype=torch.float64) + rest).T
