"""Gradients as the ops take them: of every guarded parameter one dense, contiguous tensor that lives here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..subspace.shards import local


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
