"""Compiles every Triton kernel for a GPU that is not there and reads from the generated code what became of it.

Run as a program (`python tests/ops/triton_codegen.py cuda:80 cuda:90`), in a process of its own: kernels that were decorated for
the interpreter cannot be compiled. The ops are called as usual, on CPU tensors; instead of launching, a recorder compiles the
kernel with the same arguments, specialised as Triton's launcher would (sizes of 1, multiples of 16). Prints JSON: reports by
place. Places are forked from one process, which has imported everything, and share the cores.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

# Every storage there. Elsewhere the usual ones (bf16 gradients, bf16 and int8 bases). Of what does not depend on each other every
# value, not every product: storage of bases and batch or list, storage and a root or none, op on matrices and side; of rotations
# every pair of storage, size and whether gradients are edited.
EVERYTHING = "cuda:90"
N = 40_000  # columns; a multiple of 16 and not of any tile


@dataclass
class Report:
    """What the gates look at; one kernel of one variant.

    Attributes:
        wide_loads, wide_stores: instructions that move 16 bytes per thread. wanted_loads, wanted_stores: how many of them
            one full tile needs.
    """

    variant: str
    kernel: str
    registers: int
    spilled: int
    shared: int
    wide_loads: int
    wide_stores: int
    wanted_loads: int
    wanted_stores: int


def bases(d: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    rows = torch.zeros(d, k, N, dtype=dtype)
    return rows, torch.ones(d, k, -(-N // 128)) if dtype in (torch.int8, torch.float8_e4m3fn) else None


def variants(all_of_them: bool):
    """(name, overload, arguments, wanted 16-byte loads and stores of each tile by kernel)."""
    from carerl_kernels.triton_kernels import _blocks

    F32, BF16, F16, I8, F8 = torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn
    root = torch.eye(24, dtype=torch.float64)
    mixes = [(BF16, BF16, 1), (BF16, I8, 1)]
    if all_of_them:
        mixes += [(F32, F32, 1), (F32, BF16, 1), (F16, F8, 1), (BF16, BF16, 4)]

    def vectors(elements: int, dtype: torch.dtype, threads: int = _blocks.THREADS) -> int:
        return elements * dtype.itemsize // (16 * threads)

    for g, u, batch in mixes:
        (rows, scales), grads = bases(3, 8, u), torch.zeros(batch, N, dtype=g)
        name = f"{str(g)[6:]}x{str(u)[6:]}-B{batch}"
        width = _blocks.width(u)
        tile = _blocks.rows_tile(width, batch, 24)
        wanted = {"project_kernel": (vectors(tile * width, u) + vectors(batch * width, g), 0)}
        width = _blocks.width(u, g)
        tile = _blocks.rows_tile(width, batch, 24)
        stores = vectors(batch * width, g)
        wanted["edit_kernel"] = (vectors(tile * width, u) + stores, stores)
        if u == I8:
            parts = [grads[0, :16384], grads[0, 16384:30000]]
            yield f"dacsp_.list-{name}", "dacsp_.list", (parts, rows, [0, 16384], 1.5, 0.5, 0.0, None, scales), wanted
        elif g == u == BF16 and batch == 1:
            yield f"dacsp_.tensor-{name}-root", "dacsp_.tensor", (grads, rows, *[torch.ones(24)] * 3, root), wanted
        else:
            yield f"dacsp_-{name}", "dacsp_", (grads, rows, 1.5, 0.5, 0.0, None, scales), wanted
        if u == I8 or (all_of_them and g == u):
            yield f"gram-{name}", "gram", (rows, grads, scales), {}

    rotations = [("rotate_", BF16, 12), ("edit_rotate_", BF16, 12)]
    if all_of_them:
        rotations = [("rotate_", BF16, 12), ("edit_rotate_", BF16, 68), ("rotate_", F32, 68), ("edit_rotate_", F32, 12)]
    for op, dtype, k in rotations:
        held, depth, columns, threads = _blocks.rotation(k)
        loads, stores = vectors(depth * columns, dtype, threads), vectors(held * columns, dtype, threads)
        grads, stack = torch.zeros(1, N, dtype=dtype), torch.zeros(2, k, N, dtype=dtype)
        q, mix, scale = torch.zeros(k, k + 1), torch.zeros(1, 2 * k), torch.ones(1)
        arguments = (stack[0], grads, q, 3) if op == "rotate_" else (grads, stack, mix, scale, 1, q, 3)
        yield f"{op}-{str(dtype)[6:]}-k{k}", op, arguments, {f"{op}kernel": (loads, stores)}

    yield "quantize_bases-int8", "quantize_bases", (torch.zeros(1, 2, N, dtype=BF16),), {"quantize_kernel": (2, 0)}
    if all_of_them:
        float8 = torch.zeros(1, 2, N), 32, F8
        yield "quantize_bases-fp8", "quantize_bases", float8, {"quantize_kernel": (2, 0)}
        grads, rows = torch.zeros(1, N), torch.zeros(3, 8, N)
        parts, offsets, each = [grads[0, :16384], grads[0, 16384:]], [0, 16384], torch.eye(24).repeat(2, 1, 1)
        yield "dacsp_.list-per_tensor", "dacsp_.list", (parts, rows, offsets, 1.5, 0.5, 0.0, each, None, True), {}
    for dtype, rows, side in ((BF16, 96, False), (BF16, 96, True), (F32, 24, False), (F16, 256, False)):
        if not all_of_them and rows != 96:
            continue
        matrices = [torch.zeros(576, 576, dtype=dtype)] * 2
        name = f"{str(dtype)[6:]}-K{rows}" + ("-left" if side else "")
        directions, anchor = torch.zeros(2, rows, 576), torch.zeros(2, 576, rows)
        if all_of_them or side:
            yield f"input_project-{name}", "input_project", (matrices, directions, side), {}
        if not side:
            yield f"input_confine_-{name}", "input_confine_", (matrices, directions, anchor, anchor, None, side), {}
        if side or dtype != BF16:
            yield f"input_dacsp_-{name}", "input_dacsp_", (matrices, directions, 1.5, 0.5, 0.0, side), {}
    for dtype in (BF16, F32) if all_of_them else (BF16,):
        logits, ids, row = torch.zeros(4, N, dtype=dtype), torch.zeros(4, dtype=torch.int64), torch.zeros(4)
        name = str(dtype)[6:]
        yield f"token_logprobs-{name}", "token_logprobs", (logits, ids), {"token_logprobs_kernel": (4, 0)}
        yield (
            f"token_logprobs_backward-{name}",
            "token_logprobs_backward",
            (row, row, logits, ids, row, row),
            {"token_logprobs_backward_kernel": (4, 4)},
        )


def compile_as_launched(kernel, args: tuple, threads: int, target):
    """What the launcher would compile for these arguments."""
    import triton
    from carerl_kernels.triton_kernels import _blocks
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    signature, constants, attributes = {}, {}, {}
    for at, (parameter, value) in enumerate(zip(kernel.params, args, strict=True)):
        if parameter.is_constexpr or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = parameter.annotation_type or mangle_type(value)
        size = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if isinstance(size, int) and size % 16 == 0 and not parameter.do_not_specialize:
            attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=_blocks.options(threads, target.backend == "hip"))


def cuda_report(compiled) -> dict[str, int]:
    """Widths are read from PTX: ptxas splits no load or store, and disassembling would take half as long as compiling."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tools / "cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    wide = r"\b{}\.global\S*\.v(?:4\.[bfu]32|2\.[bfu]64)\b"
    return {
        "registers": used["REG"],
        "spilled": used["STACK"] + used["LOCAL"],
        "shared": compiled.metadata.shared,
        "wide_loads": len(re.findall(wide.format("ld"), compiled.asm["ptx"])),
        "wide_stores": len(re.findall(wide.format("st"), compiled.asm["ptx"])),
    }


def hip_report(compiled) -> dict[str, int]:
    code = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", code).group(1))

    return {
        "registers": number("vgpr_count"),
        # A few scalar registers that move into lanes of vector ones, as those of input_edit_kernel do, cost no memory.
        "spilled": number("vgpr_spill_count") + max(number("sgpr_spill_count") - 8, 0),
        "shared": compiled.metadata.shared,
        "wide_loads": len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", code)),
        "wide_stores": len(re.findall(r"\b(?:global|buffer)_store_dwordx4\b", code)),
    }


def reports_of(place: str) -> list[dict]:
    from carerl_kernels import triton_kernels
    from carerl_kernels.triton_kernels import _blocks
    from triton.backends.compiler import GPUTarget

    platform, arch = place.split(":")
    target = GPUTarget("cuda", int(arch), 32) if platform == "cuda" else GPUTarget("hip", arch, 64)
    served = triton_kernels.kernels()
    current: list = []
    reports: dict[tuple, dict] = {}
    known: dict[str, dict[str, int]] = {}  # by what was compiled: several ops launch the same kernel

    def record(kernel, grid, like, *args, threads=_blocks.THREADS):
        name, wanted = current
        compiled = compile_as_launched(kernel, args, threads, target)
        if compiled.hash not in known:
            known[compiled.hash] = cuda_report(compiled) if platform == "cuda" else hip_report(compiled)
        loads, stores = wanted.get(kernel.__name__, (0, 0))
        if platform == "hip" and "rotate" in kernel.__name__:
            stores = 0  # 8 bytes wide there
        report = Report(name, kernel.__name__, **known[compiled.hash], wanted_loads=loads, wanted_stores=stores)
        reports[name, kernel.__name__] = asdict(report)

    for module in list(sys.modules.values()):
        if module.__name__.startswith("carerl_kernels.triton_kernels.") and hasattr(module, "launch"):
            module.launch = record
    for name, overload, args, wanted in variants(place == EVERYTHING):
        current[:] = name, wanted
        served[overload](*args)
    return list(reports.values())


if __name__ == "__main__":
    import sympy  # noqa: F401  # once here, not in every place: torch imports it at the first check of a size
    from carerl_kernels import triton_kernels
    from triton.backends import backends  # noqa: F401
    from triton.runtime.cache import triton_key

    triton_kernels.kernels()
    triton_key()  # reads all of Triton
    gc.freeze()
    gc.disable()  # trees of syntax are many objects, and a place ends before they fill anything
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        print(json.dumps(dict(zip(sys.argv[1:], pool.map(reports_of, sys.argv[1:], chunksize=1), strict=True))))
