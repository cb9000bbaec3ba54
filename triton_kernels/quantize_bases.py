"""Block-scaled codes: scale = max|u| / 127 of each block (fp8: 448), codes to nearest even."""

import torch
import triton
import triton.language as tl

from .. import _ops
from . import _blocks
from ._plan import launch
from ._tiles import encode_fp8

TILE = 4096  # elements of a program at a time


@triton.jit
def quantize_kernel(
    bases, codes, scales, n, blocks, tiles, LARGEST: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of WIDTH * STEPS elements of one row. Blocks too long for a tile are read twice, the second time from L2."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    block = tl.program_id(0) % tiles * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks
    first = block.to(tl.int64) * (WIDTH * STEPS)
    largest = tl.zeros([BLOCKS], tl.float32)
    broken = tl.zeros([BLOCKS], tl.int32)
    for step in range(0, STEPS):
        i = first[:, None] + (step * WIDTH + tl.arange(0, WIDTH))[None, :]
        u = tl.load(bases + row * n + i, mask=inside[:, None] & (i < n), other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(u), axis=1))
        broken = tl.maximum(broken, tl.max((u != u).to(tl.int32), axis=1))  # a maximum overlooks NaN, a scale must not
    scale = tl.div_rn(largest, tl.full([BLOCKS], LARGEST, tl.float32))
    scale = tl.where(broken != 0, float("nan"), scale)
    tl.store(scales + row * blocks + block, scale, mask=inside)
    for step in range(0, STEPS):
        i = first[:, None] + (step * WIDTH + tl.arange(0, WIDTH))[None, :]
        mask = inside[:, None] & (i < n)
        u = tl.load(bases + row * n + i, mask=mask, other=0.0).to(tl.float32)
        wide = tl.broadcast_to(scale[:, None], [BLOCKS, WIDTH])
        ratio = tl.where(wide > 0, tl.div_rn(u, tl.where(wide > 0, wide, 1.0)), 0.0)
        # A subnormal scale is so coarse that the ratio may exceed the largest code.
        ratio = tl.minimum(tl.maximum(ratio, -LARGEST), LARGEST)
        if LARGEST == 127:
            code = ((ratio + 12582912.0) - 12582912.0).to(tl.int8)  # adding 1.5 * 2^23 rounds to nearest even
        else:
            code = encode_fp8(ratio)
        tl.store(codes + row * n + i, code, mask=mask)


def quantize_bases(bases, block=128, dtype=torch.int8):
    _ops.check_quantize(bases, block, dtype)
    n, rows = bases.shape[-1], bases.shape[0] * bases.shape[1]
    blocks = -(-n // block)
    codes = torch.empty(bases.shape, dtype=dtype, device=bases.device)
    scales = torch.empty(*bases.shape[:-1], blocks, dtype=torch.float32, device=bases.device)
    size = TILE * _blocks.LANES // 128
    width = min(block, size)
    at_once = size // width
    tiles = -(-blocks // at_once)
    launch(
        quantize_kernel, (rows * tiles,), bases,
        bases, codes if dtype == torch.int8 else codes.view(torch.uint8), scales,
        n, blocks, tiles, float(_ops.SCALED_DTYPES[dtype]), at_once, width, block // width,
    )  # fmt: skip
    return codes, scales


KERNELS = {"quantize_bases": quantize_bases}
