"""What storing directions in fewer bits costs in accuracy: `python bench/storage.py`.

Rows of unit length with normally distributed elements, the hardest case for a scale per block short of outliers. 4-bit codes
are simulated: they exist here only, to be compared. `row`: |U - U'| / |U|, which is also the share of a displacement along a
direction that a guard acting on U' misses. `coefficient`: error of u . g in units of |g| / sqrt(N), that is of the
coefficient that pure noise has; `removed`: what is left, after `g - U'^T U' g`, of a gradient along u.
"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table

K, N = 8, 1 << 20
ops = torch.ops.carerl


def four_bits(rows: torch.Tensor, block: int) -> torch.Tensor:
    """Symmetric codes -7..7 with an fp32 scale per block, to nearest."""
    parts = rows.unflatten(1, (-1, block))
    scale = parts.abs().amax(2, keepdim=True) / 7
    return ((parts / scale).round() * scale).flatten(1)


def scaled(rows: torch.Tensor, block: int, dtype: torch.dtype) -> torch.Tensor:
    codes, scales = ops.quantize_bases(rows.unsqueeze(0), block, dtype)
    return (codes[0].float().unflatten(1, (-1, block)) * scales[0].unsqueeze(2)).flatten(1)


def main() -> None:
    draw = torch.Generator().manual_seed(0)
    rows = torch.linalg.qr(torch.randn(N, K, generator=draw)).Q.T.contiguous()
    g = torch.randn(N, generator=draw)
    ways = {
        "bfloat16": (2, rows.bfloat16().float()),
        "float16": (2, rows.half().float()),
        "int8, blocks of 128": (1 + 4 / 128, scaled(rows, 128, torch.int8)),
        "int8, blocks of 32": (1 + 4 / 32, scaled(rows, 32, torch.int8)),
        "float8_e4m3fn, blocks of 128": (1 + 4 / 128, scaled(rows, 128, torch.float8_e4m3fn)),
        "4 bits, blocks of 128": (0.5 + 4 / 128, four_bits(rows, 128)),
        "4 bits, blocks of 32": (0.5 + 4 / 32, four_bits(rows, 32)),
    }
    table = Table("storage", "bytes", "row", "coefficient", "removed: left")
    for name, (size, stored) in ways.items():
        row = float((stored - rows).norm() / rows.norm())
        coefficient = float((stored.double() - rows.double()).mv(g.double()).norm() / K**0.5 * N**0.5 / g.norm())
        left = (rows - (rows @ stored.T) @ stored).norm() / rows.norm()
        table.add_row(name, f"{size:.2f}", f"{row:.4f}", f"{coefficient:.4f}", f"{float(left):.4f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    import carerl_kernels  # noqa: F401  (registers the ops)

    main()
