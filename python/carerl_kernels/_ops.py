"""The operators of `torch.ops.carerl`: schema, argument checks and fake kernel of each, side by side.

This is the one place where an op is declared. Kernels live elsewhere and register against these schemas:
`reference.py` (any device), the native CPU and CUDA libraries (`csrc/ops`) and Triton.

Conventions
    B gradients, N elements, D domains, k rows ("slots") per domain, K = D*k rows altogether, T tensors of a list.
    Rows are directions in the *gradient convention*: `u . g > 0` means that the step `-lr*g` repeats prior learning.
    An empty slot is a row of exact zeros.
    Every N-sized op has an overload `.list` that takes the tensors of a parameter list (B = 1) and, for each, the offset
    of its first element within the rows of the bases, so that nobody has to flatten. Offsets are multiples of 128 and
    segments do not overlap; only the covered segments are read or written. With `per_tensor=True` the coefficients are kept
    apart per tensor (leading dimension T), otherwise they are summed over the list.
    int8 and float8_e4m3fn bases carry fp32 `scales [D, k, ceil(N/block)]`; `block` is a power of two of at least 32.
    Their codes are finite: what a code NaN of float8_e4m3fn reads as is not defined.
    Nothing is written where a coefficient is not finite: a row of `mix`/`scale` with a NaN or an infinity leaves its
    gradient untouched, a `q` with one leaves its bases untouched.

All argument errors are `RuntimeError` and name the op, what was expected and what was found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "carerl"
SEGMENT = 128
"""Elements; the granularity of list offsets: one cache line of int8 and a whole number of vectors everywhere."""
GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALED_DTYPES = {torch.int8: 127, torch.float8_e4m3fn: 448}
"""Storage with a scale per block, and the code that the largest magnitude of a block gets."""
BASIS_DTYPES = (*GRAD_DTYPES, *SCALED_DTYPES)

_LIB = torch.library.Library(NAMESPACE, "DEF")

SCHEMAS: dict[str, str] = {
    "project": "(Tensor grads, Tensor bases, Tensor? scales=None, ScalarType out_dtype=float) -> Tensor",
    "project.list": "(Tensor[] grads, Tensor bases, int[] offsets, Tensor? scales=None, ScalarType out_dtype=float,"
    " bool per_tensor=False) -> Tensor",
    "gram": "(Tensor bases, Tensor grads, Tensor? scales=None) -> Tensor",
    "gram.list": "(Tensor bases, Tensor[] grads, int[] offsets, Tensor? scales=None, bool per_tensor=False) -> Tensor",
    "edit_": "(Tensor(a!) grads, Tensor bases, Tensor mix, Tensor scale, Tensor? scales=None) -> ()",
    "edit_.list": "(Tensor(a!)[] grads, Tensor bases, int[] offsets, Tensor mix, Tensor scale, Tensor? scales=None,"
    " bool per_tensor=False) -> ()",
    "rotate_": "(Tensor(a!) bases, Tensor grads, Tensor q, int seed=0) -> ()",
    "rotate_.list": "(Tensor(a!) bases, Tensor[] grads, int[] offsets, Tensor q, bool per_tensor=False, int seed=0) -> ()",
    "edit_rotate_": "(Tensor(a!) grads, Tensor(b!) bases, Tensor mix, Tensor scale, int domain, Tensor q, int seed=0) -> ()",
    "edit_rotate_.list": "(Tensor(a!)[] grads, Tensor(b!) bases, int[] offsets, Tensor mix, Tensor scale, int domain, Tensor q,"
    " bool per_tensor=False, int seed=0) -> ()",
    "dacsp_": "(Tensor(a!) grads, Tensor bases, float aligned, float conflict, float threshold, Tensor? root=None,"
    " Tensor? scales=None) -> (Tensor, Tensor)",
    "dacsp_.tensor": "(Tensor(a!) grads, Tensor bases, Tensor aligned, Tensor conflict, Tensor threshold, Tensor? root=None,"
    " Tensor? scales=None) -> (Tensor, Tensor)",
    "dacsp_.list": "(Tensor(a!)[] grads, Tensor bases, int[] offsets, float aligned, float conflict, float threshold,"
    " Tensor? root=None, Tensor? scales=None, bool per_tensor=False) -> (Tensor, Tensor)",
    "dacsp_.list_tensor": "(Tensor(a!)[] grads, Tensor bases, int[] offsets, Tensor aligned, Tensor conflict, Tensor threshold,"
    " Tensor? root=None, Tensor? scales=None, bool per_tensor=False) -> (Tensor, Tensor)",
    "pca_update_": "(Tensor(a!) bases, Tensor(b!) singular_values, Tensor grads, float decay=1.0, int seed=0) -> Tensor",
    "pca_update_.list": "(Tensor(a!) bases, Tensor(b!) singular_values, Tensor[] grads, int[] offsets, float decay=1.0,"
    " bool per_tensor=False, int seed=0) -> Tensor",
    "quantize_bases": "(Tensor bases, int block=128, ScalarType dtype=int8) -> (Tensor, Tensor)",
    "block_project": "(Tensor[] matrices, Tensor left, Tensor right, int domains=1) -> Tensor",
    "block_edit_": "(Tensor(a!)[] matrices, Tensor left, Tensor mix, Tensor right) -> ()",
    "input_project": "(Tensor[] matrices, Tensor directions, bool left=False) -> Tensor",
    "input_confine_": "(Tensor(a!)[] matrices, Tensor directions, Tensor anchor, Tensor? lower=None, Tensor? upper=None,"
    " bool left=False) -> Tensor",
    "input_dacsp_": "(Tensor(a!)[] matrices, Tensor directions, float aligned, float conflict, float threshold,"
    " bool left=False) -> Tensor",
    "input_dacsp_.tensor": "(Tensor(a!)[] matrices, Tensor directions, Tensor aligned, Tensor conflict, Tensor threshold,"
    " bool left=False) -> Tensor",
    "packed_times": "(Tensor packed, Tensor x) -> Tensor",
    "all_finite": "(Tensor[] tensors) -> Tensor",
    "token_logprobs": "(Tensor logits, Tensor ids, float temperature=1.0) -> (Tensor, Tensor)",
    "token_logprobs_backward": "(Tensor grad_logp, Tensor grad_entropy, Tensor logits, Tensor ids, Tensor logp,"
    " Tensor entropy, float temperature=1.0) -> Tensor",
    "group_advantages": '(Tensor rewards, Tensor group_ids, Tensor? domain_ids=None, str mode="group", float eps=1e-06)'
    " -> Tensor",
}

OP_NAMES: tuple[str, ...] = tuple(dict.fromkeys(name.split(".")[0] for name in SCHEMAS))

COMPOSITE: dict[str, tuple[str, ...]] = {"pca_update_": ("gram", "rotate_"), "group_advantages": ()}
"""Ops without an N-sized pass of their own, and the ops that make theirs: torch does the rest on any device."""

CPU_ONLY: tuple[str, ...] = ("block_project", "block_edit_", "packed_times", "all_finite")
"""Ops with kernels for the CPU alone, where torch's thin products and reductions run at a third of what the machine can do. On
GPUs the reference calls torch's, and those are good."""

KERNEL_OVERLOADS: tuple[str, ...] = tuple(name for name in SCHEMAS if name.split(".")[0] not in (*COMPOSITE, *CPU_ONLY))
"""The overloads that the CUDA library has kernels for."""

for _name, _schema in SCHEMAS.items():
    _LIB.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"{NAMESPACE}::{name}", lib=_LIB)


def _fake_of_batch(name: str, at: int = 2) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A list's fake serves one gradient or a batch, too: `at` is where the offsets stand that these do not have."""

    def register(of_list: Callable[..., Any]) -> Callable[..., Any]:
        _fake(name)(lambda *args, **kwargs: of_list(*args[:at], (), *args[at:], **kwargs))
        return of_list

    return register


# ---------------------------------------------------------------------------------------------------------- checks


def _require(condition: bool, op: str, expected: str, found: object, remedy: str = "") -> None:
    torch._check(
        condition, lambda: f"carerl::{op}: expected {expected}, found {found}" + (f"; {remedy}" if remedy else "")
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_rows(op: str, name: str, rows: Tensor, dims: tuple[int, ...], dtypes: Sequence[torch.dtype]) -> None:
    """Rank, dtype and layout of an N-sized argument: the last dimension is dense, rows may be strided."""
    _require(rows.dim() in dims, op, f"{name} with {' or '.join(map(str, dims))} dimensions", tuple(rows.shape))
    _require(
        rows.dtype in dtypes,
        op,
        f"{name} of dtype {', '.join(map(_short, dtypes))}",
        _short(rows.dtype),
    )
    _require(
        rows.shape[-1] <= 1 or rows.stride(-1) == 1,
        op,
        f"{name} contiguous in its last dimension",
        f"strides {tuple(rows.stride())}",
        "call .contiguous() first",
    )


def _check_bases(op: str, bases: Tensor, scales: Tensor | None, dims: tuple[int, ...] = (3,)) -> int:
    """Checks a basis stack and its int8 scales; returns its number of rows K."""
    _check_rows(op, "bases", bases, dims, BASIS_DTYPES)
    _require(
        bases.is_contiguous(), op, "contiguous bases", f"strides {tuple(bases.stride())}", "call .contiguous() first"
    )
    n = bases.shape[-1]
    if bases.dtype in SCALED_DTYPES:
        _require(
            scales is not None,
            op,
            f"scales with {_short(bases.dtype)} bases",
            "None",
            "pass both results of quantize_bases",
        )
        assert scales is not None
        _require(
            scales.dtype == torch.float32 and scales.is_contiguous() and scales.shape[:-1] == bases.shape[:-1],
            op,
            f"contiguous float32 scales [{', '.join(map(str, bases.shape[:-1]))}, ceil(N/block)]",
            f"{scales.dtype} {tuple(scales.shape)}",
        )
        _check_device(op, "scales", scales, bases)
        block_of(op, n, scales.shape[-1])
    else:
        _require(scales is None, op, f"no scales with {bases.dtype} bases", "a tensor")
    return math.prod(bases.shape[:-1])


def block_of(op: str, n: int, blocks: int) -> int:
    """Elements per scale of scaled bases with N elements and this many scales a row; unique because a block is 32 * 2**i."""
    block = 32
    while -(-n // block) > max(blocks, 1):
        block *= 2
    _require(-(-n // block) == blocks, op, "ceil(N/block) scales a row with block a power of two >= 32", blocks)
    return block


def _check_listed(
    op: str,
    name: str,
    t: int,
    tensor: Tensor,
    expected: str,
    dtypes: Sequence[torch.dtype],
    like: Tensor,
    like_name: str,
) -> None:
    """Tensor t of a list: its dtype, that it is dense, and where it is."""
    _require(tensor.dtype in dtypes, op, expected, f"{_short(tensor.dtype)} at index {t}")
    found = f"strides {tuple(tensor.stride())} at index {t}"
    _require(tensor.is_contiguous(), op, f"contiguous {name}", found, "call .contiguous() first")
    _check_device(op, f"{name}[{t}]", tensor, like, like_name)


def _of_one_dtype(tensors: Sequence[Tensor]) -> tuple[torch.dtype, ...]:
    """What the dtypes of a list may be: the first's, if it is one of gradients."""
    return tuple(dtype for dtype in GRAD_DTYPES if dtype == tensors[0].dtype)


def _check_device(op: str, name: str, tensor: Tensor, like: Tensor, like_name: str = "bases") -> None:
    _require(tensor.device == like.device, op, f"{name} on {like.device} like {like_name}", tensor.device)


def _check_small(
    op: str,
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    like: Tensor,
    dtypes: Sequence[torch.dtype],
    like_name: str = "bases",
) -> None:
    _require(
        tensor.dtype in dtypes and tuple(tensor.shape) == shape,
        op,
        f"{name} [{', '.join(map(str, shape))}] of dtype {' or '.join(map(_short, dtypes))}",
        f"{_short(tensor.dtype)} {list(tensor.shape)}",
    )
    _require(tensor.is_contiguous(), op, f"contiguous {name}", f"strides {tuple(tensor.stride())}")
    _check_device(op, name, tensor, like, like_name)


def _check_grads(op: str, grads: Tensor | Sequence[Tensor], bases: Tensor, offsets: Sequence[int] = ()) -> int:
    """One gradient [N], a batch [B, N], or a list with its offsets; returns B, which is 1 of a list."""
    if not isinstance(grads, Tensor):
        _check_list(op, grads, offsets, bases)
        return 1
    _check_rows(op, "grads", grads, (1, 2), GRAD_DTYPES)
    _require(grads.shape[-1] == bases.shape[-1], op, f"grads with N = {bases.shape[-1]} like bases", tuple(grads.shape))
    _check_device(op, "grads", grads, bases)
    return grads.shape[0] if grads.dim() == 2 else 1


def _check_written(op: str, grads: Tensor | Sequence[Tensor]) -> None:
    """Rows that share memory (an expanded gradient, overlapping windows) would be edited more than once."""
    if not isinstance(grads, Tensor):
        return
    apart = grads.dim() == 1 or grads.shape[0] <= 1 or grads.stride(0) >= grads.shape[-1]
    _require(
        apart, op, "grads whose rows do not overlap", f"strides {tuple(grads.stride())}", "call .contiguous() first"
    )


def _check_list(op: str, grads: Sequence[Tensor], offsets: Sequence[int], bases: Tensor) -> None:
    """A list of dense tensors of one dtype and the ascending offsets of their segments."""
    _require(len(grads) > 0, op, "at least one tensor in grads", "an empty list")
    _require(len(grads) == len(offsets), op, f"{len(grads)} offsets, one per tensor", len(offsets))
    expected, dtypes, end = "grads of one dtype out of float32, bfloat16, float16", _of_one_dtype(grads), 0
    for t, (grad, offset) in enumerate(zip(grads, offsets, strict=True)):
        _check_listed(op, "grads", t, grad, expected, dtypes, bases, "bases")
        _require(
            offset % SEGMENT == 0 and offset >= end,
            op,
            f"ascending offsets that are multiples of {SEGMENT} without overlap",
            f"{offset} at index {t} where the segment before it ends at {end}",
        )
        end = offset + grad.numel()
    _require(end <= bases.shape[-1], op, f"segments within N = {bases.shape[-1]}", f"one that ends at {end}")


def _groups(grads: Tensor | Sequence[Tensor], per_tensor: bool) -> tuple[int, ...]:
    """Leading shape of what is kept apart per tensor: (T,), or () for sums over a list and for batches."""
    return (len(grads),) if per_tensor and not isinstance(grads, Tensor) else ()


def _lead(grads: Tensor | Sequence[Tensor], per_tensor: bool) -> tuple[int, ...]:
    """Leading shape of coefficients: (B,) of a batch, (T,) per tensor, else ()."""
    return tuple(grads.shape[:-1]) if isinstance(grads, Tensor) else _groups(grads, per_tensor)


_F32 = (torch.float32,)
_CORE = (torch.float32, torch.float64)


# ------------------------------------------------------------------------------------------------- checks and fakes


# Of ops over gradients one check and one fake serve both overloads: `grads` is a tensor, without offsets, or a list with them.


def check_project(grads, bases, scales, out_dtype, offsets=()) -> None:
    _check_bases("project", bases, scales)
    _check_grads("project", grads, bases, offsets)
    _require(out_dtype in _CORE, "project", "out_dtype float32 or float64", out_dtype)


@_fake("project.list")
@_fake_of_batch("project")
def _project_fake(grads, bases, offsets, scales=None, out_dtype=torch.float32, per_tensor=False):
    check_project(grads, bases, scales, out_dtype, offsets)
    return bases.new_empty(_lead(grads, per_tensor) + tuple(bases.shape[:2]), dtype=out_dtype)


def check_gram(bases, grads, scales, offsets=()) -> tuple[int, int]:
    rows = _check_bases("gram", bases, scales, (2, 3))
    return rows, _check_grads("gram", grads, bases, offsets)


@_fake("gram.list")
@_fake_of_batch("gram")
def _gram_fake(bases, grads, offsets, scales=None, per_tensor=False):
    rows, batch = check_gram(bases, grads, scales, offsets)
    return bases.new_empty((*_groups(grads, per_tensor), rows + batch, rows + batch), dtype=torch.float64)


def check_edit(op, grads, bases, mix, scale, scales, offsets=(), per_tensor=False) -> int:
    """Returns B, as :func:`_check_grads` does."""
    rows = _check_bases(op, bases, scales)
    batch = _check_grads(op, grads, bases, offsets)
    _check_written(op, grads)
    (groups,) = _groups(grads, per_tensor) or (batch,)
    _check_small(op, "mix", mix, (groups, rows), bases, _F32)
    _check_small(op, "scale", scale, (groups,), bases, _F32)
    return batch


@_fake("edit_.list")
@_fake_of_batch("edit_")
def _edit_fake(grads, bases, offsets, mix, scale, scales=None, per_tensor=False):
    check_edit("edit_", grads, bases, mix, scale, scales, offsets, per_tensor)


def _check_rotatable(op: str, bases: Tensor, dims: tuple[int, ...]) -> None:
    _require(
        bases.dtype not in SCALED_DTYPES,
        op,
        "bases of dtype float32, bfloat16, float16",
        _short(bases.dtype),
        "quantised bases are never rotated: stream into a float basis and call quantize_bases when the stage ends",
    )
    _check_bases(op, bases, None, dims)


def _check_q(op: str, q: Tensor, bases: Tensor, batch: int, groups: tuple[int, ...]) -> None:
    k = bases.shape[-2]
    ok = q.dim() == len(groups) + 2 and tuple(q.shape[:-2]) == groups and q.shape[-1] == k + batch and q.shape[-2] <= k
    shape = ", ".join(map(str, (*groups, f"<= {k}", k + batch)))
    _require(ok and q.dtype == torch.float32, op, f"float32 q [{shape}]", f"{q.dtype} {list(q.shape)}")
    _require(q.is_contiguous(), op, "contiguous q", f"strides {tuple(q.stride())}")
    _check_device(op, "q", q, bases)


def check_rotate(bases, grads, q, offsets=(), per_tensor=False) -> None:
    _check_rotatable("rotate_", bases, (2,))
    batch = _check_grads("rotate_", grads, bases, offsets)
    _check_q("rotate_", q, bases, batch, _groups(grads, per_tensor))


@_fake("rotate_.list")
@_fake_of_batch("rotate_")
def _rotate_fake(bases, grads, offsets, q, per_tensor=False, seed=0):
    check_rotate(bases, grads, q, offsets, per_tensor)


def check_edit_rotate(grads, bases, mix, scale, domain, q, offsets=(), per_tensor=False) -> None:
    op = "edit_rotate_"
    _check_rotatable(op, bases, (3,))
    batch = check_edit(op, grads, bases, mix, scale, None, offsets, per_tensor)
    _require(0 <= domain < bases.shape[0], op, f"domain in 0..{bases.shape[0] - 1}", domain)
    _check_q(op, q, bases, batch, _groups(grads, per_tensor))


@_fake("edit_rotate_.list")
@_fake_of_batch("edit_rotate_")
def _edit_rotate_fake(grads, bases, offsets, mix, scale, domain, q, per_tensor=False, seed=0):
    check_edit_rotate(grads, bases, mix, scale, domain, q, offsets, per_tensor)


def _check_weights(op: str, weights: Sequence[Tensor | float], rows: int, like: Tensor, like_name: str) -> None:
    """Aligned, conflict and threshold of the sign rule: a number each, or one per row."""
    for name, weight in zip(("aligned", "conflict", "threshold"), weights, strict=True):
        if isinstance(weight, Tensor):
            _check_small(op, name, weight, (rows,), like, _F32, like_name)
        else:
            _require(math.isfinite(weight), op, f"finite {name}", weight)
            _require(name != "threshold" or weight >= 0, op, "threshold of at least 0", weight)


def check_dacsp(grads, bases, aligned, conflict, threshold, root, scales, offsets=(), per_tensor=False) -> None:
    rows = _check_bases("dacsp_", bases, scales)
    _check_grads("dacsp_", grads, bases, offsets)
    _check_written("dacsp_", grads)
    _check_weights("dacsp_", (aligned, conflict, threshold), rows, bases, "bases")
    if root is not None:
        _check_small("dacsp_", "root", root, (*_groups(grads, per_tensor), rows, rows), bases, _CORE)


@_fake("dacsp_.list")
@_fake("dacsp_.list_tensor")
@_fake_of_batch("dacsp_")
@_fake_of_batch("dacsp_.tensor")
def _dacsp_fake(grads, bases, offsets, aligned, conflict, threshold, root=None, scales=None, per_tensor=False):
    check_dacsp(grads, bases, aligned, conflict, threshold, root, scales, offsets, per_tensor)
    shape = _lead(grads, per_tensor) + tuple(bases.shape[:2])
    return bases.new_empty(shape, dtype=torch.float32), bases.new_empty(shape, dtype=torch.int8)


def check_pca_update(bases, singular_values, grads, decay, offsets=(), per_tensor=False) -> None:
    op = "pca_update_"
    _check_rotatable(op, bases, (2,))
    shape = (*_groups(grads, per_tensor), bases.shape[0])
    _check_small(op, "singular_values", singular_values, shape, bases, _CORE)
    _require(0.0 <= decay <= 1.0, op, "decay in 0..1", decay)
    _check_grads(op, grads, bases, offsets)


@_fake("pca_update_.list")
@_fake_of_batch("pca_update_", at=3)
def _pca_update_fake(bases, singular_values, grads, offsets, decay=1.0, per_tensor=False, seed=0):
    check_pca_update(bases, singular_values, grads, decay, offsets, per_tensor)
    return bases.new_empty(_groups(grads, per_tensor), dtype=torch.float64)


def check_quantize(bases: Tensor, block: int, dtype: torch.dtype) -> None:
    _check_rows("quantize_bases", "bases", bases, (3,), GRAD_DTYPES)
    _require(bases.is_contiguous(), "quantize_bases", "contiguous bases", f"strides {tuple(bases.stride())}")
    _require(block >= 32 and block & (block - 1) == 0, "quantize_bases", "block a power of two of at least 32", block)
    _require(
        dtype in SCALED_DTYPES, "quantize_bases", f"dtype {' or '.join(map(_short, SCALED_DTYPES))}", _short(dtype)
    )


@_fake("quantize_bases")
def _quantize_fake(bases, block=128, dtype=torch.int8):
    check_quantize(bases, block, dtype)
    shape = (*bases.shape[:2], -(-bases.shape[-1] // block))
    return bases.new_empty(bases.shape, dtype=dtype), bases.new_empty(shape, dtype=torch.float32)


# -------------------------------------------------------------------------------------------------- weight matrices


def _check_alike(op: str, matrices: Sequence[Tensor], like: Tensor, like_name: str) -> tuple[int, int]:
    """A list of dense matrices of one shape and dtype, on the device of `like`; returns the shape."""
    _require(len(matrices) > 0, op, "at least one tensor in matrices", "an empty list")
    first = matrices[0]
    _require(first.dim() == 2, op, "matrices with 2 dimensions", tuple(first.shape))
    expected, dtypes = "matrices of one dtype out of float32, bfloat16, float16", _of_one_dtype(matrices)
    for t, matrix in enumerate(matrices):
        _check_listed(op, "matrices", t, matrix, expected, dtypes, like, like_name)
        alike = f"matrices {list(first.shape)} like the first"
        _require(matrix.shape == first.shape, op, alike, f"{list(matrix.shape)} at index {t}")
    return first.shape[0], first.shape[1]


def check_matrices(op: str, matrices: Sequence[Tensor], left: Tensor, right: Tensor) -> None:
    """Matrices of one shape with left factors [G, m, q] and right ones [G, n, q]."""
    m, n = _check_alike(op, matrices, left, "left")
    q = left.shape[2] if left.dim() == 3 else 0
    for name, factors, size in (("left", left, m), ("right", right, n)):
        _check_small(op, name, factors, (len(matrices), size, q), left, _F32, "left")


def check_block_project(matrices: Sequence[Tensor], left: Tensor, right: Tensor, domains: int) -> int:
    """Returns the rank r."""
    check_matrices("block_project", matrices, left, right)
    q = left.shape[2]
    expected = f"domains that divide the {q} columns of left"
    _require(domains >= 1 and q % max(domains, 1) == 0, "block_project", expected, domains)
    return q // domains


@_fake("block_project")
def _block_project_fake(matrices, left, right, domains=1):
    r = check_block_project(matrices, left, right, domains)
    return left.new_empty((left.shape[0], domains, r, r), dtype=torch.float64)


def check_block_edit(matrices: Sequence[Tensor], left: Tensor, mix: Tensor, right: Tensor) -> None:
    check_matrices("block_edit_", matrices, left, right)
    q = left.shape[2]
    domains = mix.shape[1] if mix.dim() == 4 else 1
    fits = domains >= 1 and q % max(domains, 1) == 0
    _require(fits, "block_edit_", f"mix [G, D, r, r] with D r = {q} like left", list(mix.shape))
    r = q // domains
    _check_small("block_edit_", "mix", mix, (left.shape[0], domains, r, r), left, _F32, "left")


@_fake("block_edit_")
def _block_edit_fake(matrices, left, mix, right):
    check_block_edit(matrices, left, mix, right)


DIRECTION_DTYPES = (torch.float32, torch.bfloat16)


def check_input(op: str, matrices: Sequence[Tensor], directions: Tensor, left: bool) -> tuple[int, int, int]:
    """Matrices with directions of their inputs `[G, K, n]` (left: `[G, K, m]`); returns the shape `[G, outputs, K]`."""
    m, n = _check_alike(op, matrices, directions, "directions")
    rows = directions.shape[1] if directions.dim() == 3 else 0
    shape = (len(matrices), rows, m if left else n)
    _check_small(op, "directions", directions, shape, directions, DIRECTION_DTYPES, "directions")
    return len(matrices), n if left else m, rows


@_fake("input_project")
def _input_project_fake(matrices, directions, left=False):
    return directions.new_empty(check_input("input_project", matrices, directions, left), dtype=torch.float32)


def check_input_confine(matrices, directions, anchor, lower, upper, left) -> None:
    op = "input_confine_"
    shape = check_input(op, matrices, directions, left)
    for name, tensor in (("anchor", anchor), ("lower", lower), ("upper", upper)):
        if tensor is not None:
            _check_small(op, name, tensor, shape, directions, _F32, "directions")


@_fake("input_confine_")
def _input_confine_fake(matrices, directions, anchor, lower=None, upper=None, left=False):
    check_input_confine(matrices, directions, anchor, lower, upper, left)
    return directions.new_empty((len(matrices),), dtype=torch.float64)


def check_input_dacsp(matrices, directions, aligned, conflict, threshold, left) -> None:
    op = "input_dacsp_"
    _, _, rows = check_input(op, matrices, directions, left)
    _check_weights(op, (aligned, conflict, threshold), rows, directions, "directions")


@_fake("input_dacsp_")
@_fake("input_dacsp_.tensor")
def _input_dacsp_fake(matrices, directions, aligned, conflict, threshold, left=False):
    check_input_dacsp(matrices, directions, aligned, conflict, threshold, left)
    return directions.new_empty((len(matrices),), dtype=torch.float64)


def check_packed_times(packed: Tensor, x: Tensor) -> None:
    op = "packed_times"
    fits = x.dim() == 3 and x.dtype == torch.float64 and x.is_contiguous()
    _require(fits, op, "contiguous float64 x [B, G, A]", f"{_short(x.dtype)} {list(x.shape)}")
    _, matrices, size = x.shape
    _check_small(op, "packed", packed, (matrices, size * (size + 1) // 2), x, _F32, "x")


@_fake("packed_times")
def _packed_times_fake(packed, x):
    check_packed_times(packed, x)
    return torch.empty_like(x)


def check_all_finite(tensors: Sequence[Tensor]) -> None:
    op = "all_finite"
    dtypes = (*GRAD_DTYPES, torch.float64)
    expected = f"tensors of dtype {', '.join(map(_short, dtypes))}"
    _require(len(tensors) > 0, op, "at least one tensor", "an empty list")
    for t, tensor in enumerate(tensors):
        _check_listed(op, "tensors", t, tensor, expected, dtypes, tensors[0], "the first")


@_fake("all_finite")
def _all_finite_fake(tensors):
    check_all_finite(tensors)
    return tensors[0].new_empty((), dtype=torch.bool)


# --------------------------------------------------------------------------------------------------- token_logprobs


MASK_LATER = "give padding any valid id and mask it later"


def check_token_logprobs(op: str, logits: Tensor, ids: Tensor, temperature: float) -> None:
    _check_rows(op, "logits", logits, (2,), GRAD_DTYPES)
    rows = logits.shape[0]
    _check_small(op, "ids", ids, (rows,), logits, (torch.int64,), "logits")
    _require(0 < temperature < math.inf, op, "a positive temperature", temperature)


@_fake("token_logprobs")
def _token_logprobs_fake(logits, ids, temperature=1.0):
    check_token_logprobs("token_logprobs", logits, ids, temperature)
    return logits.new_empty(ids.shape, dtype=torch.float32), logits.new_empty(ids.shape, dtype=torch.float32)


def check_token_logprobs_backward(grad_logp, grad_entropy, logits, ids, logp, entropy, temperature) -> None:
    op = "token_logprobs_backward"
    check_token_logprobs(op, logits, ids, temperature)
    named = {"grad_logp": grad_logp, "grad_entropy": grad_entropy, "logp": logp, "entropy": entropy}
    for name, vector in named.items():
        _check_small(op, name, vector, (logits.shape[0],), logits, _F32, "logits")


@_fake("token_logprobs_backward")
def _token_logprobs_backward_fake(grad_logp, grad_entropy, logits, ids, logp, entropy, temperature=1.0):
    check_token_logprobs_backward(grad_logp, grad_entropy, logits, ids, logp, entropy, temperature)
    return logits.new_empty(logits.shape)


def _save_for_backward(ctx, inputs, output):
    logits, ids, ctx.temperature = inputs
    ctx.save_for_backward(logits, ids, *output)


def _differentiate(ctx, grad_logp, grad_entropy):
    logits, ids, logp, entropy = ctx.saved_tensors
    grads = [torch.zeros_like(logp) if g is None else g.contiguous() for g in (grad_logp, grad_entropy)]
    out = torch.ops.carerl.token_logprobs_backward(*grads, logits, ids, logp, entropy, ctx.temperature)
    return out, None, None


torch.library.register_autograd(
    f"{NAMESPACE}::token_logprobs", _differentiate, setup_context=_save_for_backward, lib=_LIB
)


# ------------------------------------------------------------------------------------------------- group_advantages

ADVANTAGE_MODES = ("group", "domain", "none")


def check_group_advantages(
    rewards: Tensor, group_ids: Tensor, domain_ids: Tensor | None, mode: str, eps: float
) -> None:
    op = "group_advantages"
    _require(
        rewards.dim() == 1 and rewards.is_floating_point(),
        op,
        "floating-point rewards [B]",
        f"{_short(rewards.dtype)} {list(rewards.shape)}",
    )
    for name, ids in {"group_ids": group_ids, "domain_ids": domain_ids}.items():
        if ids is not None:
            _check_small(op, name, ids, (rewards.shape[0],), rewards, (torch.int64, torch.int32), "rewards")
    _require(mode in ADVANTAGE_MODES, op, f"mode {', '.join(ADVANTAGE_MODES)}", mode)
    _require(0 <= eps < math.inf, op, "eps of at least 0", eps)


@_fake("group_advantages")
def _group_advantages_fake(rewards, group_ids, domain_ids=None, mode="group", eps=1e-6):
    check_group_advantages(rewards, group_ids, domain_ids, mode, eps)
    return rewards.new_empty(rewards.shape, dtype=torch.float32)
