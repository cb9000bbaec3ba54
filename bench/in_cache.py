"""What the passes take when memory does not: `python bench/in_cache.py`.

One thread, D=3, k=8, rows that fit the second-level cache (192 KiB), the cost of a call taken off. Bytes are counted as in
docs/performance.md. Where all cores together do little more than the memory streams, the two add up instead of hiding each
other.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from carerl_kernels.bench.cost import Shape, bytes_of
from rich.console import Console
from rich.table import Table

D, K = 3, 8
ROWS_BYTES = 192 << 10
CALLS = 200
ops = torch.ops.carerl


def seconds(call: Callable[[], object]) -> float:
    """Of one call: the fastest of several rounds."""
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, (time.perf_counter() - started) / CALLS)
    return best


def calls(dtype: torch.dtype, grad: torch.dtype, n: int) -> dict[str, Callable[[], object]]:
    """The ops on N columns; edits so small that nothing grows."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(D, K, n, generator=draw) / 64
    bases, scales = ops.quantize_bases(rows) if dtype == torch.int8 else (rows.to(dtype), None)
    g = torch.randn(n, generator=draw).to(grad)
    mix, scale, q = torch.full((1, D * K), 1e-9), torch.ones(1), torch.eye(K, K + 1)
    out: dict[str, Callable[[], object]] = {
        "project": lambda: ops.project(g, bases, scales),
        "edit_": lambda: ops.edit_(g, bases, mix, scale, scales),
    }
    if scales is None:
        out["edit_rotate_"] = lambda: ops.edit_rotate_(g, bases, mix, scale, 1, q)
    return out


def main() -> None:
    torch.set_num_threads(1)
    table = Table(title="one core, rows in the second-level cache")
    for name in ("op", "bases, gradient", "ns per column", "GB/s"):
        table.add_column(name, justify="left" if name in ("op", "bases, gradient") else "right")
    kinds = {
        "fp32, fp32": (torch.float32, torch.float32),
        "bf16, bf16": (torch.bfloat16, torch.bfloat16),
        "int8, bf16": (torch.int8, torch.bfloat16),
        "int8, fp32": (torch.int8, torch.float32),
    }
    for kind, (dtype, grad) in kinds.items():
        n = ROWS_BYTES // (D * K * dtype.itemsize) // 128 * 128 - 128  # rows 8 KiB apart would share a few lines of L1
        small = calls(dtype, grad, 128)
        for op, call in calls(dtype, grad, n).items():
            spent = (seconds(call) - seconds(small[op])) / (n - 128)
            counted = bytes_of(op, Shape(D, K, 1, n, grad, dtype)) / n
            table.add_row(op, kind, f"{spent * 1e9:.2f}", f"{counted / spent / 1e9:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
