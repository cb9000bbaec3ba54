"""The cases of every preset."""

from __future__ import annotations

import torch

from .cases import Case

F32, BF16, F16, I8 = torch.float32, torch.bfloat16, torch.float16, torch.int8

PRESETS = ("quick", "full", "llm", "sweep")


def cases(preset: str) -> list[Case]:
    """Cases of ``quick`` or ``full``, all K and N as promised in docs/performance.md."""
    return _quick() if preset == "quick" else _full()


def compiling(preset: str, case: Case) -> bool:
    """Whether torch.compile takes part: it needs seconds per case, so ``quick`` compiles the main op only."""
    return preset == "full" or case.op == "dacsp_"


def _quick() -> list[Case]:
    n = 2_000_000
    out = [Case(op, N=n, grad=t, basis=t) for op in ("dacsp_", "edit_rotate_", "project", "edit_") for t in (F32, BF16)]
    out += [Case(op, N=n, grad=BF16, basis=I8) for op in ("dacsp_", "project", "edit_")]
    out += [Case(op, D=1, N=n) for op in ("gram", "rotate_", "pca_update_")]
    return [*out, Case("dacsp_.list", N=n, tensors=300), *_logits(256)]


def _logits(tokens: int) -> list[Case]:
    """Forward and backward over Qwen's vocabulary; D and k mean nothing here."""
    ops = ("token_logprobs", "token_logprobs_backward")
    return [Case(op, D=1, k=1, B=tokens, N=151_936, grad=BF16, basis=BF16) for op in ops]


def _full() -> list[Case]:
    ops = ("dacsp_", "edit_rotate_", "project", "edit_")
    out = [Case(op, grad=t, basis=t) for op in ops for t in (F32, BF16)]
    out += [Case("dacsp_", grad=F16, basis=F16)]
    out += [Case(op, grad=t, basis=I8) for op in ("dacsp_", "project", "edit_") for t in (BF16, F32)]
    out += [Case(op, D=1, grad=t, basis=t) for op in ("gram", "rotate_", "pca_update_") for t in (F32, BF16)]
    out += [Case("dacsp_", B=4), Case("gram", D=1, B=4), Case("pca_update_", D=1, B=4, N=1_000_000)]
    out += [Case(op, D=2, k=64, N=2_000_000, grad=t, basis=t) for op in ops for t in (F32, BF16)]
    out += [Case("dacsp_", D=2, k=64, N=2_000_000, grad=BF16, basis=I8)]
    out += [Case("pca_update_", D=1, k=68, N=2_000_000)]
    lists = ((F32, F32), (BF16, BF16), (BF16, I8))
    out += [Case(op, grad=g, basis=u, tensors=300) for op in ("dacsp_.list", "project.list") for g, u in lists]
    return [*out, *_logits(2048)]
