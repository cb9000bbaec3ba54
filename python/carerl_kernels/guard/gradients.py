"""Gradients as the ops take them: of every guarded parameter one dense, contiguous tensor that lives here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..subspace.shards import Shards, local

CHUNK = 1 << 20  # elements per gradient of the buffer that inner products are taken in


def gradient_of(p: Tensor, grad: Tensor | None) -> Tensor:
    """The local part of a parameter's gradient; zeros where there is none."""
    return torch.zeros_like(local(p)) if grad is None else local(grad)


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The local part of every `p.grad` as it is; one that is missing counts as zero."""
    return [gradient_of(p, p.grad) for p in parameters]


def gradients(parameters: Sequence[nn.Parameter], names: Sequence[str]) -> list[Tensor]:
    """The local part of every gradient; one that is missing counts as zero, a sparse one is refused (ValueError).

    A gradient that is not contiguous becomes so, in place of the one that was there: what edits it edits `p.grad`.
    """
    for name, p in zip(names, parameters, strict=True):
        if p.grad is None:
            continue
        if p.grad.layout != torch.strided:
            raise ValueError(
                f"gradient of {name!r}: expected a dense tensor, found {p.grad.layout}; make the embedding with sparse=False, or "
                "guard updates (apply_to='update') with basis='input'"
            )
        if not local(p.grad).is_contiguous():
            p.grad = p.grad.contiguous()
    return local_gradients(parameters)


def finite_parts(parameters: Iterable[nn.Parameter]) -> Iterator[Tensor]:
    """Of every gradient that is there, the numbers to look at."""
    for p in parameters:
        if p.grad is not None:
            grad = local(p.grad)
            yield (grad.coalesce().values() if grad.layout != torch.strided else grad).contiguous()


@contextmanager
def set_aside(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, gradients start from nothing; those gathered before are put back."""
    kept = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in zip(parameters, kept, strict=True):
            p.grad = grad


@torch.no_grad()
def gradient_gram(gradients: Sequence[Sequence[Tensor]], shards: Shards | None = None, chunk: int = CHUNK) -> Tensor:
    """All inner products of D gradients.

    Pieces of all gradients are copied side by side into a buffer `[D, chunk]` (many small tensors, or part of a large one), and
    `torch.ops.carerl.gram` reads it: nothing of size N is allocated, sums are float64.

    Args:
        gradients: D times one tensor per parameter (of sharded parameters the local parts), of equal sizes.
        shards: Of sharded parameters; sums over their processes.
        chunk: elements per gradient in the buffer: 4 D chunk bytes.

    Returns:
        `[D, D]` float64, on the CPU.

    Raises:
        ValueError: no gradients, or of different sizes.
    """
    D = len(gradients)
    sizes = [[t.numel() for t in tensors] for tensors in gradients]
    if D == 0 or any(s != sizes[0] for s in sizes):
        raise ValueError(f"expected gradients over the same parameters, found {[len(s) for s in sizes]} tensors")
    device = gradients[0][0].device if sizes[0] else torch.device("cpu")
    length = max(1, min(chunk, sum(sizes[0])))
    buffer = torch.zeros(D, length, device=device)  # [D, chunk] float32
    total = torch.zeros(D, D, dtype=torch.float64, device=device)
    filled = 0
    for tensors in zip(*gradients, strict=True):
        flat = [t.reshape(-1) for t in tensors]
        start, n = 0, flat[0].numel()
        while start < n:
            take = min(n - start, length - filled)
            for row, piece in zip(buffer, flat, strict=True):
                row[filled : filled + take].copy_(piece[start : start + take])
            start, filled = start + take, filled + take
            if filled == length:
                total += _gram(buffer)
                filled = 0
    if filled:
        buffer[:, filled:] = 0
        total += _gram(buffer)
    if shards is not None:
        shards.sum_(total)
    return total.cpu()


def _gram(rows: Tensor) -> Tensor:
    """`rows @ rows.T` in float64 by the op, which wants at least one row on either side."""
    if rows.shape[0] == 1:
        return torch.ops.carerl.gram(rows, rows)[:1, :1]
    return torch.ops.carerl.gram(rows[:-1], rows[-1:])
