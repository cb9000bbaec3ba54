"""Every op in plain PyTorch: the default backend on any device, and what the fast kernels are compared with.

Works through the N dimension in chunks, so that no N-sized temporary exists; coefficients are summed in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _ops
from .linalg import dacsp_core, pca_core
from .reference_matrices import (
    block_edit_,
    block_project,
    input_confine_,
    input_dacsp_,
    input_project,
    packed_times,
)
from .reference_policy import group_advantages, token_logprobs, token_logprobs_backward

CHUNK = 1 << 16  # elements of a row handled at once; K * CHUNK floats are the largest temporary


class _Rows:
    """The rows of a basis stack, dequantised a chunk at a time."""

    def __init__(self, bases: Tensor, scales: Tensor | None):
        self.rows = bases.flatten(0, -2)  # flatten, not reshape(-1, N): N may be 0
        self.scales = None if scales is None else scales.flatten(0, -2)
        self.block = 0 if scales is None else _ops.block_of("reference", bases.shape[-1], scales.shape[-1])

    def read(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        chunk = self.rows[:, start:stop].to(dtype)
        if self.scales is None:
            return chunk
        blocks = torch.arange(start, stop, device=chunk.device) // self.block
        return chunk * self.scales[:, blocks].to(dtype)


def _segments(grads: Tensor | Sequence[Tensor], offsets: Sequence[int]) -> list[tuple[Tensor, int]]:
    """(gradient rows [B, n], offset in the bases) of a batch (one segment) or of a list (one each, B = 1)."""
    if isinstance(grads, Tensor):
        return [(grads if grads.dim() == 2 else grads.unsqueeze(0), 0)]
    return [(grad.view(1, -1), offset) for grad, offset in zip(grads, offsets, strict=True)]


def _chunks(grad: Tensor, offset: int) -> Iterator[tuple[Tensor, int, int]]:
    """(gradient chunk [B, m], start, stop) with start and stop counted in the rows of the bases."""
    for start in range(0, grad.shape[-1], CHUNK):
        stop = min(start + CHUNK, grad.shape[-1])
        yield grad[:, start:stop], offset + start, offset + stop


def _gather(parts: list[Tensor], per_tensor: bool) -> Tensor:
    return torch.stack(parts) if per_tensor else torch.stack(parts).sum(0)


def _coefficients(grads, offsets, bases, scales, per_tensor) -> Tensor:
    """c [B, K] (batch), [K] (list) or [T, K] (per tensor), float64."""
    rows = _Rows(bases, scales)
    parts = []
    for grad, offset in _segments(grads, offsets):
        total = torch.zeros(grad.shape[0], rows.rows.shape[0], dtype=torch.float64, device=grad.device)
        for chunk, start, stop in _chunks(grad, offset):
            total += chunk.double() @ rows.read(start, stop, torch.float64).mT
        parts.append(total)
    if isinstance(grads, Tensor):
        return parts[0]
    return _gather([part[0] for part in parts], per_tensor)


# An op over one gradient or a batch is that over a list, without offsets.


def project(grads, bases, scales=None, out_dtype=torch.float32):
    return project_list(grads, bases, (), scales, out_dtype)


def project_list(grads, bases, offsets, scales=None, out_dtype=torch.float32, per_tensor=False):
    _ops.check_project(grads, bases, scales, out_dtype, offsets)
    coeffs = _coefficients(grads, offsets, bases, scales, per_tensor)
    lead = grads.shape[:-1] if isinstance(grads, Tensor) else coeffs.shape[:-1]
    return coeffs.to(out_dtype).view(lead + bases.shape[:2])


def gram(bases, grads, scales=None):
    return gram_list(bases, grads, (), scales)


def gram_list(bases, grads, offsets, scales=None, per_tensor=False):
    _ops.check_gram(bases, grads, scales, offsets)
    rows = _Rows(bases, scales)
    parts = []
    for grad, offset in _segments(grads, offsets):
        size = rows.rows.shape[0] + grad.shape[0]
        total = torch.zeros(size, size, dtype=torch.float64, device=grad.device)
        for chunk, start, stop in _chunks(grad, offset):
            stack = torch.cat([rows.read(start, stop, torch.float64), chunk.double()])
            total += stack @ stack.mT
        parts.append(total)
    return parts[0] if isinstance(grads, Tensor) else _gather(parts, per_tensor)


def _edit_chunk(chunk: Tensor, basis: Tensor, mix: Tensor, scale: Tensor) -> Tensor:
    """scale * (g + mix U) in fp32. A row with x = 0 keeps its bits, one with a non-finite x or scale is left alone."""
    finite = (mix.isfinite().all(1) & scale.isfinite()).unsqueeze(1)
    moved = finite & (mix != 0).any(1, keepdim=True)
    value = chunk.float()
    value = torch.where(moved, torch.addmm(value, torch.where(finite, mix, 0.0), basis), value)
    return torch.where(finite, value * scale.unsqueeze(1), chunk.float())


def _edit(grads, offsets, bases, mix, scale, scales) -> None:
    rows = _Rows(bases, scales)
    for t, (grad, offset) in enumerate(_segments(grads, offsets)):
        # A batch is one segment with B rows of mix; a list has one row in all or one per tensor.
        at = slice(None) if isinstance(grads, Tensor) or mix.shape[0] == 1 else slice(t, t + 1)
        for chunk, start, stop in _chunks(grad, offset):
            chunk.copy_(_edit_chunk(chunk, rows.read(start, stop, torch.float32), mix[at], scale[at]))


def edit_(grads, bases, mix, scale, scales=None):
    edit_list(grads, bases, (), mix, scale, scales)


def edit_list(grads, bases, offsets, mix, scale, scales=None, per_tensor=False):
    _ops.check_edit("edit_", grads, bases, mix, scale, scales, offsets, per_tensor)
    _edit(grads, offsets, bases, mix, scale, scales)


def _mix32(x: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 on 32-bit words held in int64."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _random_bits(rows: int, start: int, stop: int, seed: int, device: torch.device) -> Tensor:
    """32 random bits for every (row, position), a pure function of seed, row and position: same on every backend and split."""
    position = torch.arange(start, stop, device=device, dtype=torch.int64)
    row = torch.arange(1, rows + 1, device=device, dtype=torch.int64).unsqueeze(1)
    key = _mix32(torch.tensor(seed & 0xFFFFFFFF, device=device)) + ((seed >> 32) & 0xFFFFFFFF)
    word = (position & 0xFFFFFFFF) * 0x9E3779B1 + (position >> 32) * 0xC2B2AE3D + row * 0x85EBCA77 + key
    return _mix32(word & 0xFFFFFFFF)


def _store(value: Tensor, dtype: torch.dtype, start: int, seed: int) -> Tensor:
    """fp32 rows to their storage dtype: to nearest, or stochastically (unbiased) when a seed is given."""
    if dtype == torch.float32 or seed == 0:
        return value.to(dtype)
    dropped = 16 if dtype == torch.bfloat16 else 13  # mantissa bits that the storage dtype lacks
    noise = _random_bits(value.shape[0], start, start + value.shape[1], seed, value.device) >> (32 - dropped)
    size = value.abs()
    # Below its normal range fp16 has fewer mantissa bits: lifted into the first normal binade, the dropped bits line up again.
    lift = torch.where(size < 2.0**-14, 2.0**-14, 0.0) if dtype == torch.float16 else torch.zeros_like(size)
    bits = ((size + lift).view(torch.int32) + noise.to(torch.int32)) & -(1 << dropped)
    return torch.copysign(bits.view(torch.float32) - lift, value).to(dtype)


def _rotate_chunk(basis: Tensor, chunk: Tensor, q: Tensor, start: int, seed: int) -> None:
    rows = torch.zeros(basis.shape, dtype=torch.float32, device=basis.device)
    torch.mm(q, torch.cat([basis.float(), chunk.float()]), out=rows[: q.shape[0]])
    finite = q.isfinite().all()
    basis.copy_(torch.where(finite, _store(rows, basis.dtype, start, seed), basis))


def rotate_(bases, grads, q, seed=0):
    rotate_list(bases, grads, (), q, seed=seed)


def rotate_list(bases, grads, offsets, q, per_tensor=False, seed=0):
    _ops.check_rotate(bases, grads, q, offsets, per_tensor)
    for t, (grad, offset) in enumerate(_segments(grads, offsets)):
        core = q[t] if q.dim() == 3 else q
        for chunk, start, stop in _chunks(grad, offset):
            _rotate_chunk(bases[:, start:stop], chunk, core, start, seed)


def edit_rotate_(grads, bases, mix, scale, domain, q, seed=0):
    edit_rotate_list(grads, bases, (), mix, scale, domain, q, seed=seed)


def edit_rotate_list(grads, bases, offsets, mix, scale, domain, q, per_tensor=False, seed=0):
    _ops.check_edit_rotate(grads, bases, mix, scale, domain, q, offsets, per_tensor)
    rows = _Rows(bases, None)
    for t, (grad, offset) in enumerate(_segments(grads, offsets)):
        at = slice(None) if isinstance(grads, Tensor) or mix.shape[0] == 1 else slice(t, t + 1)
        core = q[t] if q.dim() == 3 else q
        for chunk, start, stop in _chunks(grad, offset):
            edited = _edit_chunk(chunk, rows.read(start, stop, torch.float32), mix[at], scale[at])
            _rotate_chunk(bases[domain, :, start:stop], chunk, core, start, seed)  # sees the raw gradient
            chunk.copy_(edited)


def dacsp_(grads, bases, aligned, conflict, threshold, root=None, scales=None):
    return dacsp_list(grads, bases, (), aligned, conflict, threshold, root, scales)


def dacsp_list(grads, bases, offsets, aligned, conflict, threshold, root=None, scales=None, per_tensor=False):
    _ops.check_dacsp(grads, bases, aligned, conflict, threshold, root, scales, offsets, per_tensor)
    coeffs = _coefficients(grads, offsets, bases, scales, per_tensor)
    classes, mix = dacsp_core(coeffs, aligned, conflict, threshold, root)
    mix32 = torch.atleast_2d(mix.float())
    _edit(grads, offsets, bases, mix32, mix32.new_ones(mix32.shape[0]), scales)
    lead = grads.shape[:-1] if isinstance(grads, Tensor) else coeffs.shape[:-1]
    shape = tuple(lead) + tuple(bases.shape[:2])
    return coeffs.float().view(shape), classes.view(shape)


def pca_update_(bases, singular_values, grads, decay=1.0, seed=0):
    """Composite on every backend: the two passes go through `gram` and `rotate_` of whichever backend serves them."""
    _ops.check_pca_update(bases, singular_values, grads, decay)
    q, values, discarded = pca_core(torch.ops.carerl.gram(bases, grads), singular_values, decay)
    torch.ops.carerl.rotate_(bases, grads, q.float(), seed)
    singular_values.copy_(values)
    return discarded


def pca_update_list(bases, singular_values, grads, offsets, decay=1.0, per_tensor=False, seed=0):
    _ops.check_pca_update(bases, singular_values, grads, decay, offsets, per_tensor)
    measured = torch.ops.carerl.gram.list(bases, grads, offsets, None, per_tensor)
    q, values, discarded = pca_core(measured, singular_values, decay)
    torch.ops.carerl.rotate_.list(bases, grads, offsets, q.float(), per_tensor, seed)
    singular_values.copy_(values)
    return discarded


def quantize_bases(bases, block=128, dtype=torch.int8):
    """`scale = max|u| / 127` (float8_e4m3fn: 448) over each block of each row, codes rounded to nearest even."""
    _ops.check_quantize(bases, block, dtype)
    n, largest = bases.shape[-1], _ops.SCALED_DTYPES[dtype]
    codes = torch.empty(bases.shape, dtype=dtype, device=bases.device)
    scales = torch.zeros(*bases.shape[:-1], -(-n // block), dtype=torch.float32, device=bases.device)
    step = max(CHUNK // block, 1) * block
    for start in range(0, n, step):
        chunk = bases[..., start : start + step].float()
        padded = torch.nn.functional.pad(chunk, (0, -chunk.shape[-1] % block)).unflatten(-1, (-1, block))
        scale = padded.abs().amax(-1) / largest
        scales[..., start // block : start // block + scale.shape[-1]] = scale
        ratio = torch.where(scale.unsqueeze(-1) > 0, padded / scale.unsqueeze(-1), 0.0)
        ratio = ratio.clamp(-largest, largest)  # a subnormal scale is so coarse that the ratio may exceed the largest
        code = (ratio.round() if dtype == torch.int8 else ratio.nan_to_num(0.0)).to(dtype)
        codes[..., start : start + step] = code.flatten(-2)[..., : chunk.shape[-1]]
    return codes, scales


def all_finite(tensors):
    # The largest magnitude of finite numbers does not overflow, as a sum of squares would.
    _ops.check_all_finite(tensors)
    parts = [tensor for tensor in tensors if tensor.numel()]
    if not parts:
        return torch.ones((), dtype=torch.bool, device=tensors[0].device)
    norms = torch._foreach_norm(parts, float("inf"))
    return torch.stack([norm.to(torch.float64) for norm in norms]).isfinite().all()


KERNELS: dict[str, Callable[..., Any]] = {
    "project": project,
    "project.list": project_list,
    "gram": gram,
    "gram.list": gram_list,
    "edit_": edit_,
    "edit_.list": edit_list,
    "rotate_": rotate_,
    "rotate_.list": rotate_list,
    "edit_rotate_": edit_rotate_,
    "edit_rotate_.list": edit_rotate_list,
    "dacsp_": dacsp_,
    "dacsp_.tensor": dacsp_,
    "dacsp_.list": dacsp_list,
    "dacsp_.list_tensor": dacsp_list,
    "pca_update_": pca_update_,
    "pca_update_.list": pca_update_list,
    "quantize_bases": quantize_bases,
    "block_project": block_project,
    "block_edit_": block_edit_,
    "input_project": input_project,
    "input_confine_": input_confine_,
    "input_dacsp_": input_dacsp_,
    "input_dacsp_.tensor": input_dacsp_,
    "packed_times": packed_times,
    "all_finite": all_finite,
    "token_logprobs": token_logprobs,
    "token_logprobs_backward": token_logprobs_backward,
    "group_advantages": group_advantages,
}


def register() -> None:
    for name, kernel in KERNELS.items():
        _ops._LIB.impl(name, kernel, "CompositeExplicitAutograd")
