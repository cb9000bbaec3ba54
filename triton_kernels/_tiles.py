"""What the kernels share on the device: chunks, tiles of bases and gradients as fp32, and storing rotated rows.

Full tiles and the tail of a chunk are told apart at compile time (TAIL): a full tile has no mask along its columns, so
that its loads and stores are 16 bytes wide whatever the length of a tensor is. They also need rows that begin at
multiples of 16 bytes (N a multiple of 16, as padded bases are); otherwise the same code is compiled with narrow loads.
"""

import triton
import triton.language as tl


@triton.jit
def chunk_of(chunk, grads, table, n, length, LIST: tl.constexpr, ALIGNED: tl.constexpr):
    """Address of a chunk's first gradient element, its column in the bases, its elements, its group."""
    if LIST:
        entry = table + tl.cast(chunk, tl.int64) * 4
        pointer = tl.load(entry).to(grads.dtype)
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
        column = tl.multiple_of(tl.load(entry + 1), 16)
        count = tl.load(entry + 2).to(tl.int32)
        group = tl.load(entry + 3)
    else:
        column = tl.cast(chunk, tl.int64) * length
        pointer = grads + column
        count = tl.minimum(tl.cast(length, tl.int64), n - column).to(tl.int32)
        group = tl.cast(0, tl.int64)
    return pointer, column, count, group


@triton.jit
def load_gradients(pointer, b, inside, stride, start, count, WIDTH: tl.constexpr, TAIL: tl.constexpr):
    """Gradients `[BT, WIDTH]` in fp32, zero outside."""
    i = start + tl.arange(0, WIDTH)
    mask = inside[:, None]
    if TAIL:
        mask = mask & (i < count)[None, :]
    return tl.load(pointer + b.to(tl.int64)[:, None] * stride + i[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_rows(
    bases, scales, row, inside, n, blocks, shift, column, start, count,
    CODES: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Rows of the bases `[R, WIDTH]` in fp32, dequantised, zero outside. CODES: 0 floats, 1 int8, 2 fp8 bits."""
    if CODES == 0:
        i = start + tl.arange(0, WIDTH)
        mask = inside[:, None]
        if TAIL:
            mask = mask & (i < count)[None, :]
        pointers = bases + row.to(tl.int64)[:, None] * n + column + i[None, :]
        value = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    else:
        # Runs of 32: one scale serves a whole run, since blocks are multiples of 32 and columns of tiles are too.
        SIZE: tl.constexpr = row.shape[0]
        run = start + 32 * tl.arange(0, WIDTH // 32)
        i = run[:, None] + tl.arange(0, 32)[None, :]
        mask, covered = inside[:, None, None], inside[:, None]
        if TAIL:
            mask = mask & (i < count)[None, :, :]
            covered = covered & (run < count)[None, :]
        pointers = bases + row.to(tl.int64)[:, None, None] * n + column + i[None, :, :]
        block = row.to(tl.int64)[:, None] * blocks + ((column + run) >> shift)[None, :]
        scale = tl.load(scales + block, mask=covered, other=0.0)
        code = tl.load(pointers, mask=mask, other=0)
        if CODES == 2:
            decoded = decode_fp8(code)
        else:
            decoded = code.to(tl.float32)
        value = tl.reshape(decoded * scale[:, :, None], [SIZE, WIDTH])
    return value


@triton.jit
def decode_fp8(code):
    """float8_e4m3fn from its bits, on any device: exponent and mantissa moved to their place in fp32, rebiased by 2^120."""
    bits = code.to(tl.uint32)
    magnitude = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where(bits >= 0x80, -magnitude, magnitude)


@triton.jit
def encode_fp8(x):
    """The bits of the nearest float8_e4m3fn, ties to even, for |x| <= 448."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1) >> 20) - 960  # 20 bits fewer, exponents 120 lower
    size = magnitude.to(tl.float32, bitcast=True)
    subnormal = (size * 512.0 + 12582912.0).to(tl.uint32, bitcast=True) & 0xF  # adding 1.5 * 2^23 rounds
    code = tl.where(size < 0.015625, subnormal, normal)  # 2^-6
    return (code | (bits >> 31 << 7)).to(tl.uint8)


@triton.jit
def finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def mix32(x):
    """The finaliser of MurmurHash3 on uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def round_randomly(value, row, position, key, DROPPED: tl.constexpr):
    """fp32 `[R, WIDTH]` to what a 16-bit dtype can store, stochastically: the bits of `reference._random_bits`.

    DROPPED: mantissa bits that the storage dtype lacks, 16 (bf16) or 13 (fp16). Below its normal range fp16 has fewer:
    lifted into the first normal binade, the dropped bits line up again.
    """
    low, high = (position & 0xFFFFFFFF).to(tl.uint32), (position >> 32).to(tl.uint32)
    word = (low * 0x9E3779B1 + high * 0xC2B2AE3D)[None, :] + (row.to(tl.uint32) * 0x85EBCA77 + key)[:, None]
    noise = mix32(word) >> (32 - DROPPED)
    bits = value.to(tl.uint32, bitcast=True)
    sign = bits & 0x80000000
    size = (bits ^ sign).to(tl.float32, bitcast=True)
    if DROPPED == 13:
        lift = tl.where(size < 0.00006103515625, 0.00006103515625, 0.0)  # 2^-14
        kept = ((size + lift).to(tl.uint32, bitcast=True) + noise) >> 13 << 13
        size = kept.to(tl.float32, bitcast=True) - lift
    else:
        size = ((bits ^ sign) + noise >> 16 << 16).to(tl.float32, bitcast=True)
    return (size.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def store_rows(
    bases, value, row, inside, n, column, start, count, key, DROPPED: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    """fp32 rows `[R, WIDTH]` to their storage dtype; stochastically where DROPPED is not 0."""
    WIDTH: tl.constexpr = value.shape[1]
    i = start + tl.arange(0, WIDTH)
    mask = inside[:, None]
    if TAIL:
        mask = mask & (i < count)[None, :]
    if DROPPED != 0:
        value = round_randomly(value, row + 1, column + i, key, DROPPED)
    pointers = bases + row.to(tl.int64)[:, None] * n + column + i[None, :]
    tl.store(pointers, value.to(bases.dtype.element_ty), mask=mask)
