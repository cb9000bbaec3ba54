"""Dense float64 versions of every op, in numpy, importing nothing from the package: what the kernels are judged by.

Written from the definitions, not for speed: every function materialises what it needs. Arrays are float64 and hold
exactly the values that the tensors store. Rows are directions: `rows [K, N]`, gradients `g [B, N]`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def project(g: Array, rows: Array) -> Array:
    """c = g U^T `[B, K]`."""
    return g @ rows.T


def gram(rows: Array, g: Array) -> Array:
    """H = [U; G] [U; G]^T `[K+B, K+B]`."""
    stack = np.vstack([rows, g])
    return stack @ stack.T


def edit(g: Array, rows: Array, mix: Array, scale: Array) -> Array:
    """g' = scale * (g + x U); a row whose x or scale is not finite stays as it is."""
    out = g.copy()
    for b in range(len(g)):
        if np.isfinite(mix[b]).all() and np.isfinite(scale[b]):
            out[b] = scale[b] * (g[b] + mix[b] @ rows)
    return out


def rotate(rows: Array, g: Array, q: Array) -> Array:
    """U' = Q [U; G], rows that Q lacks become zero; a Q with a non-finite entry leaves U as it is."""
    if not np.isfinite(q).all():
        return rows.copy()
    out = np.zeros_like(rows)
    out[: len(q)] = q @ np.vstack([rows, g])
    return out


def edit_rotate(g: Array, bases: Array, mix: Array, scale: Array, domain: int, q: Array) -> tuple[Array, Array]:
    """Both edits from the raw state: G' from all old rows `[D, k, N]`, U'_domain from the raw gradients."""
    edited = edit(g, np.concatenate(list(bases)), mix, scale)
    rotated = bases.copy()
    rotated[domain] = rotate(bases[domain], g, q)
    return edited, rotated


def psd_power(overlap: Array, power: float, rcond: float = 1e-4) -> Array:
    """S^power by singular values (S is symmetric, positive semidefinite), those below `rcond * max` dropped."""
    if overlap.size == 0:
        return overlap.copy()
    left, values, right = np.linalg.svd(overlap)
    kept = values > rcond * values[0] if values[0] > 0 else np.zeros(len(values), dtype=bool)
    return (left[:, kept] * values[kept] ** power) @ right[kept]


def loewdin_root(overlap: Array, rcond: float = 1e-4) -> Array:
    """R = (S^+)^(1/2)."""
    return psd_power(overlap, -0.5, rcond)


def dacsp(
    g: Array,
    rows: Array,
    aligned: float | Array,
    conflict: float | Array,
    threshold: float | Array,
    root: Array | None = None,
) -> tuple[Array, Array, NDArray[np.int8], Array]:
    """The sign rule. Returns g', c, classes, gains (w - 1), all but the first `[B, K]`.

    aligned: c > threshold; conflicting: c < -threshold; everything else keeps weight 1.
    sum combine x = (w-1) c, symmetric combine x = R diag(w-1) R c.
    """
    c = g @ rows.T
    classes = np.zeros(c.shape, dtype=np.int8)
    gains = np.zeros(c.shape)
    for side, weight, there in ((1, aligned, c > threshold), (-1, conflict, c < -np.asarray(threshold))):
        classes[there] = side
        gains[there] = np.broadcast_to(weight, c.shape)[there] - 1.0
    x = (
        gains * c
        if root is None
        else np.stack([root @ (gain * (root @ ci)) for gain, ci in zip(gains, c, strict=True)])
    )
    return edit(g, rows, x, np.ones(len(g))), c, classes, gains


def input_project(W: Array, V: Array) -> Array:
    """c = W V^T `[G, outputs, K]` of matrices `[G, outputs, inputs]` and directions `[G, K, inputs]`."""
    return W @ V.swapaxes(1, 2)


def input_confine(W: Array, V: Array, anchor: Array, lower: Array | float, upper: Array | float) -> Array:
    """What the coefficients move by, x: the displacement d = anchor - c beyond its box [-lower, upper]."""
    d = anchor - input_project(W, V)
    x = np.where(d > upper, d - upper, np.where(d < -np.asarray(lower), d + lower, 0.0))
    return np.where(np.isfinite(d).all(2, keepdims=True), x, 0.0)


def input_dacsp(
    W: Array, V: Array, aligned: float | Array, conflict: float | Array, threshold: float | Array
) -> tuple[Array, Array]:
    """Coefficients c and what the sign rule moves them by, x."""
    c = input_project(W, V)
    gain = np.where(c > threshold, aligned - 1.0, np.where(c < -np.asarray(threshold), conflict - 1.0, 0.0))
    return c, gain * c


def batch_pca(data: Array, k: int) -> tuple[Array, Array]:
    """Top k right singular vectors `[k, N]` and all singular values of the (uncentred) data `[T, N]`."""
    _, values, right = np.linalg.svd(data, full_matrices=False)
    return right[:k], values


def pca_step(rows: Array, s: Array, g: Array, decay: float) -> tuple[Array, Array, Array]:
    """One exact incremental SVD step by a dense SVD of [decay diag(s) U; G].

    Returns the kept rows `[k, N]`, the kept singular values `[k]` and the discarded singular values.
    """
    k = len(rows)
    kept, values = batch_pca(np.vstack([decay * s[:, None] * rows, g]), k)
    values = np.concatenate([values, np.zeros(max(0, k - len(values)))])
    kept = np.vstack([kept, np.zeros((k - len(kept), rows.shape[1]))])
    kept[values[:k] <= 1e-12 * values.max(initial=0)] = 0.0  # slots without energy are empty
    return kept, values[:k], values[k:]


def e4m3(values: Array) -> Array:
    """The nearest of float8_e4m3fn, ties to even: 4 significant bits, multiples of 2^-9 below 2^-6."""
    spacing = np.ldexp(1.0, np.maximum(np.frexp(values)[1] - 1, -6) - 3)
    return np.rint(values / spacing) * spacing


def quantize(rows: Array, block: int, largest: int = 127) -> tuple[Array, NDArray[np.float32]]:
    """Codes of `[..., N]` with scale = max|u| / largest in fp32 over each block: int8 (127) or e4m3 (448)."""
    n = rows.shape[-1]
    padded = np.zeros((*rows.shape[:-1], -(-n // block), block))
    padded.reshape(*rows.shape[:-1], -1)[..., :n] = rows
    scales = np.abs(padded).max(-1).astype(np.float32) / np.float32(largest)
    wide = scales.astype(np.float64)[..., None]
    ratio = np.divide(padded, wide, out=np.zeros_like(padded), where=wide > 0)
    codes = np.clip(np.rint(ratio) if largest == 127 else e4m3(ratio), -largest, largest)
    return np.ascontiguousarray(codes.reshape(*rows.shape[:-1], -1)[..., :n]), scales


def dequantize(codes: Array, scales: NDArray[np.float32], block: int) -> Array:
    return codes * np.repeat(scales.astype(np.float64), block, axis=-1)[..., : codes.shape[-1]]


def _murmur_mix(word: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """fmix32 of MurmurHash3 (public domain, A. Appleby)."""
    word = word ^ (word >> np.uint32(16))
    word = word * np.uint32(0x85EBCA6B)
    word = word ^ (word >> np.uint32(13))
    word = word * np.uint32(0xC2B2AE35)
    return word ^ (word >> np.uint32(16))


def random_bits(rows: int, positions: NDArray[np.int64], seed: int) -> NDArray[np.uint32]:
    """The 32 bits that decide the rounding of (row, position): fmix32 of a sum modulo 2^32.

    word = lo(position) * 0x9E3779B1 + hi(position) * 0xC2B2AE3D + (row + 1) * 0x85EBCA77 + fmix32(lo(seed)) + hi(seed)
    """
    with np.errstate(over="ignore"):
        low, high = (positions & 0xFFFFFFFF).astype(np.uint32), (positions >> 32).astype(np.uint32)
        key = _murmur_mix(np.array([seed & 0xFFFFFFFF], dtype=np.uint32)) + np.uint32((seed >> 32) & 0xFFFFFFFF)
        row = np.arange(1, rows + 1, dtype=np.uint32)[:, None] * np.uint32(0x85EBCA77)
        return _murmur_mix(low * np.uint32(0x9E3779B1) + high * np.uint32(0xC2B2AE3D) + row + key)


def round_stochastically(value: Array, bits: NDArray[np.uint32], mantissa: int, min_exponent: int) -> Array:
    """Rounds away from zero when the dropped fraction plus a uniform number in [0, 1) reaches one.

    The uniform number has as many of the leading `bits` as an fp32 mantissa has beyond the storage format's
    `mantissa` (7 for bf16, 10 for fp16). Below `2^min_exponent` the spacing of the format stays constant (subnormal
    numbers), and the fraction is first rounded to the resolution of the uniform number.
    """
    magnitude = np.abs(value)
    _, exponent = np.frexp(magnitude)  # magnitude = f * 2^exponent with f in [.5, 1)
    spacing = np.ldexp(1.0, np.maximum(exponent - 1, min_exponent) - mantissa)
    dropped = 23 - mantissa
    uniform = (bits >> np.uint32(32 - dropped)).astype(np.float64) / 2.0**dropped
    steps = np.rint(magnitude / spacing * 2.0**dropped) / 2.0**dropped
    return np.copysign(np.floor(steps + uniform) * spacing, value)
