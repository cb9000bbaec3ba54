"""Block sizes, by formula: no autotuning, so that a result does not depend on the GPU or on what ran before.

The kernels are bound by memory. A tile is as wide as the 128 threads of a program reading 16 bytes each; as many rows are
taken side by side as fit into some 64 accumulators per thread, so that about eight independent 16-byte loads are in
flight per thread, more than enough to cover the latency of HBM at half occupancy. ``tests/test_triton_codegen.py`` reads
from the machine code that these sizes spill nothing.
"""

import torch

WARPS = 4  # of a program: 128 threads (256 on AMD)
LANES = 128  # vector loads side by side in a tile; the interpreter of the tests takes more, it is fast on long vectors
UNIT = 8192  # elements; chunks are multiples of it
CHUNKS = 2048  # at most, about: ten or more programs for every multiprocessor of any present GPU
PARTIALS = 16 << 20  # bytes; at most, of the fp64 partial sums of a reduction
FOLD = 65536  # products summed in fp32 (128 at most in one lane, the rest in a tree) before they go to fp64
LARGEST_ROTATION = 1024  # rows of one domain that rotate_ and edit_rotate_ take; more go to the reference


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n and 1."""
    return 1 << max(n - 1, 0).bit_length()


def batch_tile(batch: int) -> int:
    """Gradients handled together; larger batches are done in turns, each reading the bases again."""
    return min(power_of_two(batch), 8)


def width(*dtypes: torch.dtype) -> int:
    """Columns of a tile: 16 bytes per thread of the narrowest operand."""
    return LANES * 16 // min(dtype.itemsize for dtype in dtypes)


def rows_tile(tile: int, batch: int, rows: int) -> int:
    """Rows of the bases read side by side, for tiles of this width and batch."""
    accumulators = 64 * LANES if batch == 1 else 128 * LANES
    return max(min(accumulators // (tile * batch), power_of_two(rows)), 1)


def rotation(rows: int) -> tuple[int, int, int, int]:
    """Rows held, rows read at a time, columns and warps of a rotation: 32 fp32 numbers of new rows per thread."""
    held = max(power_of_two(rows), 16)
    warps = 4 if held <= 32 else 8 if held <= 512 else 16
    columns = min(max(32 * 32 * warps // held, 16), 128)
    return held, 4 * warps, columns * LANES // 128, warps


GRAM_WIDTH = 64  # columns of a tile of gram: they are summed in one fp32 chain, then go to fp64


def gram_tile(rows: int, codes: int) -> tuple[int, int]:
    """Rows and columns of a tile of gram; dequantising takes registers, hence fewer columns of coded bases."""
    return 16 if rows <= 16 else 32, GRAM_WIDTH // 2 if codes else GRAM_WIDTH
