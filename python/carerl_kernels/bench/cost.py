"""What is measured, an op at a shape, with the bytes and floating-point operations of one call: the one place where benchmark and
documentation take them from.

Each pass over an N-sized operand counts once, however often a kernel returns to a piece of it in cache, and nothing of
size K x K counts. A write counts as its own bytes: what a processor reads of a line before overwriting it, and what a
baseline moves beyond this (casts, temporaries), is part of its time and not of the count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .._errors import one_of

SCALE_BLOCK = 128  # elements of an int8 basis that share one fp32 scale

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


@dataclass(frozen=True)
class Case:
    """One op at one shape."""

    op: str  # name in the schema, with `.list` for the multi-tensor form
    D: int = 3  # domains; `rotate_` and `pca_update_` work on one
    k: int = 8  # rows per domain
    B: int = 1  # gradients
    N: int = 8_000_000  # elements of each, the padding between tensors of a list included
    grad: torch.dtype = torch.float32
    basis: torch.dtype = torch.float32
    tensors: int = 0  # number of tensors of a list form, 0 for a single tensor

    @property
    def packet(self) -> str:
        """The op without its overload."""
        return self.op.split(".")[0]

    @property
    def K(self) -> int:
        """Rows of all domains."""
        return self.D * self.k

    @property
    def passes(self) -> list[int]:
        """Bytes of every pass, reads and writes."""
        beside = _PER_COEFFICIENT.get(self.op, 0) * self.B * self.K
        return [
            self._bytes_of(basis_read, grad_read) + self._bytes_of(basis_written, grad_written) + beside
            for basis_read, grad_read, grad_written, basis_written in _PASSES[self.packet]
        ]

    @property
    def bytes(self) -> int:
        """Bytes that one call has to move between memory and processor."""
        return sum(self.passes)

    @property
    def rereads(self) -> int:
        """Of these, bytes of operands that an earlier pass of the call has read already: a cache may still hold some."""
        return sum(self._bytes_of(basis, grads) for basis, grads, _, _ in _PASSES[self.packet][1:])

    def _bytes_of(self, rows: str, grads: str) -> int:
        """Bytes of so many rows of a basis, the scales of int8 included, and of so many gradients."""
        count = {"0": 0, "B": self.B, "K": self.K, "k": self.k}
        row = self.N * self.basis.itemsize + (4 * -(-self.N // SCALE_BLOCK) if self.basis == torch.int8 else 0)
        return count[rows] * row + count[grads] * self.N * self.grad.itemsize

    @property
    def flops(self) -> int:
        """Multiplications and additions of one call; symmetric halves once, K x K cores not at all."""
        b, k, rows, n = self.B, self.k, self.K, self.N
        project, edit = 2 * b * rows * n, 2 * b * rows * n + b * n
        rotate = 2 * k * (k + b) * n
        return {
            "project": project,
            "gram": (rows + b) * (rows + b + 1) * n,
            "edit_": edit,
            "rotate_": rotate,
            "edit_rotate_": edit + rotate,
            "dacsp_": project + edit,
            "pca_update_": (k + b) * (k + b + 1) * n + rotate,
            "input_project": project,
            "input_confine_": project + edit,
            "input_dacsp_": project + edit,
            "token_logprobs": 6 * b * n,
            "token_logprobs_backward": 7 * b * n,
        }[self.packet]

    @property
    def dtypes(self) -> str:
        """For example `bf16` or, where bases differ, `bf16/int8` (gradients / bases)."""
        return short(self.grad) if self.grad == self.basis else f"{short(self.grad)}/{short(self.basis)}"

    @property
    def name(self) -> str:
        if self.op.startswith("token_logprobs"):
            return f"{self.op} {short(self.grad)} T={self.B} V={self.N}"
        lists = f" T={self.tensors}" if self.tensors else ""
        return f"{self.op} {self.dtypes} D={self.D} k={self.k} B={self.B} N={self.N:.3g}{lists}".replace("e+0", "e")


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8"}[dtype]


# --------------------------------------------------------------------------------------------------------- presets

F32, BF16, F16, I8 = torch.float32, torch.bfloat16, torch.float16, torch.int8

PRESETS = ("quick", "full", "llm", "sweep")


def cases(preset: str) -> list[Case]:
    """Cases of `quick` or `full`, all K and N as promised in docs/performance.md."""
    return _quick() if preset == "quick" else _full()


def chosen_of(available: Sequence[Case], ops: Sequence[str]) -> list[Case]:
    """Cases of the wanted ops, all by default; an op without overload stands for its list form too. ValueError: one has
    none."""
    known = sorted({case.op for case in available} | {case.packet for case in available})
    for op in ops:
        one_of("op", op, known)
    return [case for case in available if not ops or case.op in ops or case.packet in ops]


def compiling(preset: str, case: Case) -> bool:
    """Whether torch.compile takes part: it needs seconds per case, so not in every case."""
    if preset == "quick":
        return case.op == "dacsp_"
    return case.op == "token_logprobs" or (case.op in ("dacsp_", "edit_rotate_") and (case.D, case.B) == (3, 1))


def _quick() -> list[Case]:
    n = 2_000_000
    out = [Case(op, N=n, grad=t, basis=t) for op in ("dacsp_", "edit_rotate_", "project", "edit_") for t in (F32, BF16)]
    out += [Case(op, N=n, grad=BF16, basis=I8) for op in ("dacsp_", "project", "edit_")]
    out += [Case(op, D=1, N=n) for op in ("gram", "rotate_", "pca_update_")]
    one = [("input_project", BF16), ("input_confine_", F32), ("input_confine_", BF16), ("input_dacsp_", BF16)]
    out += one_sided(one, [(1536, 576)])
    return [*out, Case("dacsp_.list", N=n, tensors=300), *_logits(256)]


def one_sided(ops: list[tuple[str, torch.dtype]], shapes: list[tuple[int, int]]) -> list[Case]:
    """Matrices [B, N] with 96 directions of their inputs in fp32: three domains of 32."""
    return [Case(op, D=1, k=96, B=m, N=n, grad=t) for op, t in ops for m, n in shapes]


def _logits(tokens: int) -> list[Case]:
    """Forward and backward over Qwen's vocabulary; D and k mean nothing here."""
    ops = ("token_logprobs", "token_logprobs_backward")
    return [Case(op, D=1, k=1, B=tokens, N=151_936, grad=BF16, basis=BF16) for op in ops]


def _full() -> list[Case]:
    main, parts, half = ("dacsp_", "edit_rotate_"), ("project", "edit_"), 4_000_000
    out = [Case(op, grad=t, basis=t) for op in main for t in (F32, BF16)]
    out += [Case("dacsp_", grad=t, basis=u) for t, u in ((F16, F16), (BF16, I8), (F32, I8))]
    out += [Case(op, N=half, grad=t, basis=t) for op in parts for t in (F32, BF16)]
    out += [Case(op, N=half, grad=BF16, basis=I8) for op in parts]
    out += [Case("pca_update_", D=1, grad=t, basis=t) for t in (F32, BF16)]
    out += [Case(op, D=1, N=half, grad=t, basis=t) for op in ("gram", "rotate_") for t in (F32, BF16)]
    out += [Case("dacsp_", B=4), Case("gram", D=1, B=4, N=half), Case("pca_update_", D=1, B=4, N=1_000_000)]
    out += [Case(op, D=2, k=64, N=2_000_000, grad=t, basis=t) for op in main for t in (F32, BF16)]
    out += [Case("dacsp_", D=2, k=64, N=2_000_000, grad=BF16, basis=I8)]
    out += [Case("pca_update_", D=1, k=68, N=2_000_000)]
    lists = ((F32, F32), (BF16, BF16), (BF16, I8))
    out += [Case("dacsp_.list", grad=g, basis=u, tensors=300) for g, u in lists] + [Case("project.list", tensors=300)]
    smollm2 = [(576, 576), (1536, 576), (576, 1536), (192, 576)]
    out += one_sided([(op, t) for op in ("input_project", "input_confine_") for t in (F32, BF16)], smollm2)
    out += one_sided([("input_dacsp_", F32), ("input_dacsp_", BF16)], smollm2[:1])
    return [*out, *_logits(2048)]
