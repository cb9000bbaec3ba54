"""The cases of every preset."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .._errors import one_of
from .cost import Case

F32, BF16, F16, I8 = torch.float32, torch.bfloat16, torch.float16, torch.int8

PRESETS = ("quick", "full", "llm", "sweep")


def cases(preset: str) -> list[Case]:
    """Cases of `quick` or `full`, all K and N as promised in docs/performance.md."""
    return _quick() if preset == "quick" else _full()


def chosen_of(available: Sequence[Case], ops: Sequence[str]) -> list[Case]:
    """Cases of the wanted ops, all by default; an op without overload stands for its list form too.

    Raises:
        ValueError: an op that no case has.
    """
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
