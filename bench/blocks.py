"""Block directions of SmolLM2-135M's weight matrices, native kernels against torch's matmuls: `python bench/blocks.py`.

Rank 16, one to three acting domains, fp32. Both run in turn in every round; a ratio is taken within a round. torch's way is the
reference of the ops: stacked where matrices are small, `mm` and `addmm_` where they are not. `roots` are those of two vectors
on the 211 matrices, where three domains act: fp32 triangles against squares of doubles in one batched product.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from carerl_kernels import reference
from rich.console import Console
from rich.table import Table

GROUPS = ((1, 49152, 576), (60, 576, 576), (60, 192, 576), (60, 1536, 576), (30, 576, 1536))  # matrices, rows, columns
RANK, ROUNDS = 16, 5
ops = torch.ops.carerl


def compare(ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[float, float, float]:
    """Median milliseconds of both, and median ratio."""
    times: list[tuple[float, ...]] = []
    for _ in range(ROUNDS + 1):
        spent = []
        for call in (ours, theirs):
            started = time.perf_counter()
            call()
            spent.append(1e3 * (time.perf_counter() - started))
        times.append(tuple(spent))
    kept = times[1:]  # the first round warms up
    mine, others = (statistics.median(column) for column in zip(*kept, strict=True))
    return mine, others, statistics.median(other / own for own, other in kept)


def main() -> None:
    draw = torch.Generator().manual_seed(0)
    table = Table(title=f"block directions, rank {RANK}, {torch.get_num_threads()} threads")
    for name in ("what", "native, ms", "torch, ms", "ratio", "native, GF/s"):
        table.add_column(name, justify="left" if name == "what" else "right")

    def add(what: str, ours: Callable[[], object], theirs: Callable[[], object], operations: int) -> None:
        mine, others, ratio = compare(ours, theirs)
        table.add_row(what, f"{mine:.0f}", f"{others:.0f}", f"{ratio:.2f}x", f"{operations / mine / 1e6:.0f}")

    weights = [[torch.randn(m, n, generator=draw) for _ in range(count)] for count, m, n in GROUPS]
    elements = sum(count * m * n for count, m, n in GROUPS)
    for domains in (1, 2, 3):
        q = domains * RANK
        factors = [
            (torch.randn(c, m, q, generator=draw) / m**0.5, torch.randn(c, n, q, generator=draw) / n**0.5)
            for c, m, n in GROUPS
        ]
        mixes = [torch.full((count, domains, RANK, RANK), 1e-6) for count, _, _ in GROUPS]

        def coefficients(project: Callable, domains: int = domains, factors: list = factors) -> None:
            for matrices, (left, right) in zip(weights, factors, strict=True):
                project(matrices, left, right, domains)

        def edits(edit: Callable, factors: list = factors, mixes: list = mixes) -> None:
            for matrices, (left, right), mix in zip(weights, factors, mixes, strict=True):
                edit(matrices, left, mix, right)

        for what, one_pass, op, plain in (
            ("coefficients", coefficients, ops.block_project, reference.block_project),
            ("edit", edits, ops.block_edit_, reference.block_edit_),
        ):
            add(
                f"{what}, {domains} domains",
                lambda one_pass=one_pass, op=op: one_pass(op),
                lambda one_pass=one_pass, plain=plain: one_pass(plain),
                2 * elements * q,
            )

    matrices, size = sum(count for count, _, _ in GROUPS), 3 * RANK**2
    packed = torch.randn(matrices, size * (size + 1) // 2, generator=draw)
    square = torch.randn(matrices, size, size, generator=draw, dtype=torch.float64)
    x = torch.randn(2, matrices, size, generator=draw, dtype=torch.float64)
    across = x.transpose(0, 1).contiguous()
    add("roots", lambda: ops.packed_times(packed, x), lambda: across @ square, 4 * matrices * size**2)
    Console().print(table)


if __name__ == "__main__":
    main()
