"""Confinement of SmolLM2-135M's weight matrices: one native call against two products of torch and a clamp. `python
bench/inputs.py`.

96 directions of the inputs (three domains of 32), bounds on both sides, one thread. Both run in turn in every round; a ratio is
taken within a round; median and quartiles over rounds. Times are the thread's own processor time, so that other processes cost
what they take of caches and memory and not their turns. torch's way casts to fp32, clamps, adds in place and casts back.

The last two columns are walls: the ratio there would be if a call were its two products alone, at the rate that torch's `mm`
reaches in the same run on square matrices. In fp32 a product is one product. On bf16 units a number of fp32 is three terms, and
the products of terms that count are six of fp32 with fp32 and three of bf16 with fp32.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from carerl_kernels import _host
from rich.console import Console
from rich.table import Table
from torch import Tensor

SHAPES = ((4, 576, 576), (4, 1536, 576), (4, 576, 1536), (8, 192, 576))  # matrices, rows, columns
DIRECTIONS, ROUNDS, WARM_UP = 96, 9, 2
SQUARE = 1024  # rows of the matrices whose product is the limit
PRODUCTS = {torch.float32: 12, torch.bfloat16: 9}  # of bf16 terms, for the coefficients and for the correction
ops = torch.ops.carerl


def confine(matrices: list[Tensor], directions: Tensor, anchor: Tensor, bound: Tensor, left: bool) -> None:
    for matrix, rows, start, most in zip(matrices, directions, anchor, bound, strict=True):
        w = matrix.float()
        d = start - (w.T if left else w) @ rows.T
        x = d - torch.clamp(d, -most, most)
        w.addmm_(*((rows.T, x.T) if left else (x, rows)))
        if w is not matrix:
            matrix.copy_(w)


def compare(calls: list[Callable[[], object]], reset: Callable[[], None]) -> list[list[float]]:
    """Seconds of every call, a row for each round."""
    rounds = []
    for _ in range(WARM_UP + ROUNDS):
        spent = []
        for call in calls:
            reset()
            started = time.thread_time()
            call()
            spent.append(time.thread_time() - started)
        rounds.append(spent)
    return rounds[WARM_UP:]


def rate_of_mm(dtype: torch.dtype) -> float:
    """Operations a second of torch's product of two square matrices, the best of some."""
    left, right = torch.ones(SQUARE, SQUARE, dtype=dtype), torch.ones(SQUARE, SQUARE, dtype=dtype)
    out = torch.empty_like(left)
    return 2 * SQUARE**3 / min(spent for (spent,) in compare([lambda: torch.mm(left, right, out=out)], lambda: None))


def main() -> None:
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    rate = {dtype: rate_of_mm(dtype) for dtype in PRODUCTS}
    table = Table(title=f"confinement along {DIRECTIONS} directions, 1 thread, {_host.select_isa()}")
    for name in ("matrices", "dtype", "side", "ms", "GF/s", "two products and a clamp", "fp32 wall", "bf16 wall"):
        table.add_column(name, justify="left" if name in ("matrices", "dtype", "side") else "right")
    total = {dtype: [0.0, 0.0] for dtype in PRODUCTS}
    for dtype in PRODUCTS:
        for left in (False, True):
            for count, m, n in SHAPES:
                start = [(0.03 * torch.randn(m, n, generator=draw)).to(dtype) for _ in range(count)]
                matrices = [matrix.clone() for matrix in start]
                random = torch.randn(count, m if left else n, DIRECTIONS, generator=draw)
                directions = torch.linalg.qr(random)[0].mT.contiguous()
                anchor = ops.input_project(matrices, directions, left)
                anchor += 0.01 * torch.randn(anchor.shape, generator=draw)
                bound = torch.full_like(anchor, 1e-3)

                def reset(matrices: list[Tensor] = matrices, start: list[Tensor] = start) -> None:
                    torch._foreach_copy_(matrices, start)

                args = matrices, directions, anchor, bound
                rounds = compare(
                    [
                        lambda args=args, left=left: ops.input_confine_(*args, args[-1], left),
                        lambda args=args, left=left: confine(*args, left),
                    ],
                    reset,
                )
                own = statistics.median(mine for mine, _ in rounds)
                low, middle, high = statistics.quantiles((other / mine for mine, other in rounds), n=4)
                work = 4 * count * m * n * DIRECTIONS
                torch_seconds = statistics.median(other for _, other in rounds)
                total[dtype] = [total[dtype][0] + own, total[dtype][1] + torch_seconds]
                one, terms = work / rate[torch.float32], PRODUCTS[dtype] / 2 * work / rate[torch.bfloat16]
                table.add_row(
                    f"{count} x \\[{m}, {n}]", str(dtype)[6:], "left" if left else "right",
                    f"{1e3 * own:.2f}", f"{work / own / 1e9:.0f}",
                    f"{middle:.2f}x [{low:.2f}, {high:.2f}]".replace("[", "\\["),
                    f"{torch_seconds / one:.2f}x", f"{torch_seconds / terms:.2f}x",
                )  # fmt: skip
    Console(width=100).print(table)
    print(*(f"all lines of {str(dtype)[6:]}: {other / own:.2f}x" for dtype, (own, other) in total.items()), sep=", ")
    print(*(f"mm of {str(dtype)[6:]}: {per_second / 1e9:.0f} GF/s" for dtype, per_second in rate.items()), sep=", ")


if __name__ == "__main__":
    main()
