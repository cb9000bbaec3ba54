"""Bytes and floating-point operations of every op: the one place where benchmark and documentation take them from.

Each pass over an N-sized operand counts once, however often a kernel returns to a piece of it in cache, and nothing of
size K x K counts. A write counts as its own bytes: what a processor reads of a line before overwriting it, and what a
baseline moves beyond this (casts, temporaries), is part of its time and not of the count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SCALE_BLOCK = 128  # elements of an int8 basis that share one fp32 scale


@dataclass(frozen=True)
class Shape:
    """What a cost depends on.

    Attributes:
        D, k: domains and rows per domain, K = D*k together. `rotate_` and `pca_update_` work on one domain.
        B: gradients. N: elements of each.
        grad, basis: dtypes of gradients and bases.
    """

    D: int
    k: int
    B: int
    N: int
    grad: torch.dtype = torch.float32
    basis: torch.dtype = torch.float32

    @property
    def K(self) -> int:
        return self.D * self.k


# One sweep over memory: rows of bases read, gradients read, gradients written, rows of bases written. In B, K and k.
_PASSES: dict[str, tuple[tuple[str, str, str, str], ...]] = {
    "project": (("K", "B", "0", "0"),),
    "gram": (("K", "B", "0", "0"),),
    "edit_": (("K", "B", "B", "0"),),
    "rotate_": (("k", "B", "0", "k"),),
    "edit_rotate_": (("K", "B", "B", "k"),),
    "dacsp_": (("K", "B", "0", "0"), ("K", "B", "B", "0")),
    "pca_update_": (("k", "B", "0", "0"), ("k", "B", "0", "k")),
    # A matrix [B, N] in the place of gradients, K directions of its inputs.
    "input_project": (("K", "B", "0", "0"),),
    "input_confine_": (("K", "B", "B", "0"),),
    "input_dacsp_": (("K", "B", "B", "0"),),
    # Logits [T, V] in the place of gradients: B = T tokens, N = V. One exponential counts as one operation.
    "token_logprobs": (("0", "B", "0", "0"),),
    "token_logprobs_backward": (("0", "B", "B", "0"),),
}

OPS = tuple(_PASSES)

_PER_COEFFICIENT = {"input_project": 4, "input_confine_": 12}
"""Bytes beside each of the B K coefficients of a matrix, where these are a sizeable part: what is written, or an anchor and two
bounds."""


def basis_row_bytes(shape: Shape) -> int:
    """Bytes of one stored row of a basis, the scales of int8 included."""
    row = shape.N * shape.basis.itemsize
    return row + 4 * -(-shape.N // SCALE_BLOCK) if shape.basis == torch.int8 else row


def passes_of(op: str, shape: Shape) -> list[int]:
    """Bytes of every pass of `op` (schema name, with or without overload), reads and writes."""
    count = {"0": 0, "B": shape.B, "K": shape.K, "k": shape.k}
    row, grad = basis_row_bytes(shape), shape.N * shape.grad.itemsize
    beside = _PER_COEFFICIENT.get(op, 0) * shape.B * shape.K
    return [
        (count[basis_read] + count[basis_written]) * row + (count[grad_read] + count[grad_written]) * grad + beside
        for basis_read, grad_read, grad_written, basis_written in _PASSES[op.split(".")[0]]
    ]


def bytes_of(op: str, shape: Shape) -> int:
    """Bytes that one call has to move between memory and processor."""
    return sum(passes_of(op, shape))


def rereads_of(op: str, shape: Shape) -> int:
    """Of these, bytes of operands that an earlier pass of the call has read already: a cache may still hold some."""
    passes = _PASSES[op.split(".")[0]]
    count = {"0": 0, "B": shape.B, "K": shape.K, "k": shape.k}
    row, grad = basis_row_bytes(shape), shape.N * shape.grad.itemsize
    return sum(count[basis] * row + count[grads] * grad for basis, grads, _, _ in passes[1:])


def flops_of(op: str, shape: Shape) -> int:
    """Multiplications and additions of one call; symmetric halves once, K x K cores not at all."""
    b, k, rows, n = shape.B, shape.k, shape.K, shape.N
    project, edit = 2 * b * rows * n, 2 * b * rows * n + b * n
    rotate = 2 * k * (k + b) * n
    if op.startswith("pca_update_"):
        return (k + b) * (k + b + 1) * n + rotate
    return {
        "project": project,
        "gram": (rows + b) * (rows + b + 1) * n,
        "edit_": edit,
        "rotate_": rotate,
        "edit_rotate_": edit + rotate,
        "dacsp_": project + edit,
        "input_project": project,
        "input_confine_": project + edit,
        "input_dacsp_": project + edit,
        "token_logprobs": 6 * b * n,
        "token_logprobs_backward": 7 * b * n,
    }[op.split(".")[0]]


def markdown_table() -> str:
    """Bytes and operations per element as formulas, for docs/performance.md."""
    return "\n".join(
        [
            "| op | bytes per element | operations per element |",
            "|---|---|---|",
            "| `project` | K u + B g | 2 B K |",
            "| `gram` | K u + B g | (K + B)(K + B + 1) |",
            "| `edit_` | K u + 2 B g | 2 B K + B |",
            "| `rotate_` | 2 k u + B g | 2 k (k + B) |",
            "| `edit_rotate_` | K u + k u + 2 B g | 2 B K + B + 2 k (k + B) |",
            "| `dacsp_` | 2 K u + 3 B g | 4 B K + B |",
            "| `pca_update_` | 3 k u + 2 B g | (k + B)(k + B + 1) + 2 k (k + B) |",
            "| `input_project` | K u + B g + 4 B K / N | 2 B K |",
            "| `input_confine_` | K u + 2 B g + 12 B K / N | 4 B K + B |",
            "| `input_dacsp_` | K u + 2 B g | 4 B K + B |",
            "| `token_logprobs` | B g | 6 B |",
            "| `token_logprobs_backward` | 2 B g | 7 B |",
        ]
    )
