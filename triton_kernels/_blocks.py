"""Block sizes, by formula: no autotuning, so that a result does not depend on what ran before.

The kernels are bound by memory. A tile is as wide as the 128 threads of a program reading 16 bytes each; as many rows are
taken side by side as fit into some 64 accumulators per thread, so that about eight independent 16-byte loads are in
flight per thread, more than enough to cover the latency of HBM at half occupancy. `tests/ops/test_triton_codegen.py` reads
from the machine code that these sizes spill nothing.
"""

import torch

THREADS = 128  # of a program, where nothing else is said
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
    return max(min(accumulators // (tile * batch), power_of_two(rows), 8), 1)


def rotation(rows: int) -> tuple[int, int, int, int]:
    """Rows held, rows read at a time, columns and threads of a rotation: 32 fp32 numbers of new rows per thread."""
    held = max(power_of_two(rows), 16)
    threads = 128 if held <= 32 else 256 if held <= 512 else 512
    columns = min(max(32 * threads // held, 16), 128)
    return held, threads // 8, columns * LANES // 128, threads


def options(threads: int, hip: bool) -> dict[str, int]:
    """How a kernel is compiled.

    Registers are limited to what the device has, which tells the assembler not to spill a few bytes for the sake of one
    more program on a multiprocessor, as it otherwise does. Loads are not pipelined through asynchronous copies (one
    stage): nothing here is reused often enough to gain from it, rotations would spill, and the interpreter that tests the
    kernels has no such copies.
    """
    warps = {"num_warps": threads // (64 if hip else 32), "num_stages": 1}
    return warps if hip else warps | {"maxnreg": min(65536 // threads, 255)}


LARGEST_INPUTS = 256  # directions of a matrix's inputs; more go to the reference


def input_tile(rows: int) -> tuple[int, int, int]:
    """Outputs, inputs and (padded) directions of a tile of a matrix: 32 sums a thread, operands of 24 KiB at most."""
    held = max(power_of_two(rows), 16)
    side = max(min(4096 // held, 64), 16)
    return side, side, held


GRAM_WIDTH = 64  # columns of a tile of gram


def gram_tile(rows: int, codes: int) -> tuple[int, int]:
    """Rows and columns of a tile of gram; dequantising takes registers, hence fewer columns of coded bases."""
    return 16 if rows <= 16 else 32, GRAM_WIDTH // 2 if codes else GRAM_WIDTH
