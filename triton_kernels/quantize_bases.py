"""Block-scaled int8: scale = max|u| / 127 of each block, codes to nearest even."""

import torch
import triton
import triton.language as tl

from .. import _ops
from . import _blocks
from ._plan import launch

TILE = 4096  # elements of a program at a time


@triton.jit
def quantize_kernel(
    bases, codes, scales, n, blocks, tiles, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr
):  # fmt: skip
    """BLOCKS blocks of WIDTH * STEPS elements of one row. Blocks too long for a tile are read twice, the second time from L2."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    block = tl.program_id(0) % tiles * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks
    first = block.to(tl.int64) * (WIDTH * STEPS)
    largest = tl.zeros([BLOCKS], tl.float32)
    for step in range(0, STEPS):
        i = first[:, None] + (step * WIDTH + tl.arange(0, WIDTH))[None, :]
        u = tl.load(bases + row * n + i, mask=inside[:, None] & (i < n), other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(u), axis=1))
    scale = tl.div_rn(largest, tl.full([BLOCKS], 127.0, tl.float32))
    tl.store(scales + row * blocks + block, scale, mask=inside)
    for step in range(0, STEPS):
        i = first[:, None] + (step * WIDTH + tl.arange(0, WIDTH))[None, :]
        mask = inside[:, None] & (i < n)
        u = tl.load(bases + row * n + i, mask=mask, other=0.0).to(tl.float32)
        wide = tl.broadcast_to(scale[:, None], [BLOCKS, WIDTH])
        ratio = tl.where(wide > 0, tl.div_rn(u, tl.where(wide > 0, wide, 1.0)), 0.0)
        # A subnormal scale is so coarse that the ratio may exceed 127. Adding 1.5 * 2^23 rounds to nearest even.
        ratio = tl.minimum(tl.maximum(ratio, -127.0), 127.0)
        tl.store(codes + row * n + i, ((ratio + 12582912.0) - 12582912.0).to(tl.int8), mask=mask)


def quantize_bases(bases, block=128):
    _ops.check_quantize(bases, block)
    n, rows = bases.shape[-1], bases.shape[0] * bases.shape[1]
    blocks = -(-n // block)
    codes = torch.empty(bases.shape, dtype=torch.int8, device=bases.device)
    scales = torch.empty(*bases.shape[:-1], blocks, dtype=torch.float32, device=bases.device)
    size = TILE * _blocks.LANES // 128
    width = min(block, size)
    at_once = size // width
    tiles = -(-blocks // at_once)
    launch(
        quantize_kernel, (rows * tiles,), bases,
        bases, codes, scales, n, blocks, tiles, at_once, width, block // width,
    )  # fmt: skip
    return codes, scales


KERNELS = {"quantize_bases": quantize_bases}
