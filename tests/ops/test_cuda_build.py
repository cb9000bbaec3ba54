"""The CUDA library as built: where it loads, what it registers, and what the compiler made of the kernels.

The gates read the machine code in the library (cuobjdump and nvdisasm, of the CUDA toolkit or of the triton wheel): no
spills, no local memory, registers within budget, and 16-byte loads and stores wherever N is in it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from carerl_kernels import _load, _ops

LIBRARY = _load.find_library("libcarerl_cuda.so")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(LIBRARY is None, reason="the CUDA library is not built: make gpu-build, which needs nvcc"),
]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")


def _tool_directory() -> Path | None:
    """Where cuobjdump and nvdisasm are: PATH, the toolkit, or the triton wheel."""
    homes = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        homes.append(Path(triton.origin).parent / "backends/nvidia/bin")
    found = shutil.which("cuobjdump")
    homes = [Path(found).parent, *homes] if found else homes
    return next((home for home in homes if (home / "cuobjdump").exists() and (home / "nvdisasm").exists()), None)


TOOLS = _tool_directory()
needs_tools = pytest.mark.skipif(TOOLS is None, reason="no cuobjdump and nvdisasm: pip install triton, or the toolkit")


def tool(name: str, *arguments: str, folder: str | None = None) -> str:
    assert TOOLS is not None
    command = [str(TOOLS / name), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def cuobjdump(*arguments: str, folder: str | None = None) -> str:
    return tool("cuobjdump", *arguments, str(LIBRARY), folder=folder)


# ------------------------------------------------------------------------------------------------------------ loading


def test_every_op_has_a_kernel_on_any_torch():
    """Also beside a torch without CUDA: the library needs its C ABI and nothing else."""
    assert [op for op in _ops.KERNEL_OVERLOADS if not _load.has_kernel(op, "CUDA")] == []
    assert _load.BACKENDS["cuda"].available
    if torch.version.cuda is not None:
        assert "CARERL_BACKEND=triton" in _load.BACKENDS["triton"].remedy  # Triton is for gaps, and is not imported


def test_it_needs_no_cuda_library_and_is_small():
    assert LIBRARY is not None
    assert LIBRARY.stat().st_size < 10 << 20
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    needed = subprocess.run(["readelf", "-d", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    libraries = re.findall(r"NEEDED.*\[(.*)\]", needed)
    assert "libtorch_cpu.so" in libraries
    assert not [name for name in libraries if re.search("cud|nv|c10|torch_cuda|torch_python", name)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cpu_tensors_do_not_reach_it():
    assert torch.ops.carerl.project(torch.ones(2), torch.eye(2).unsqueeze(0)).tolist() == [[1.0, 1.0]]


# -------------------------------------------------------------------------------------------------------------- gates

# Registers that two blocks of 256 threads leave each other; what has fewer runs more of them.
BUDGET = {"project": 128, "gram": 128, "edit": 128, "rotate": 128, "input": 255}  # of input: blocks of 128, two an SM
SMALL_BLOCKS = 168  # where two blocks of 192, or three of 128, share the registers
OTHERS = 64


def budget(kernel: str) -> int:
    name = kernel.split("_kernel")[0]
    if (name == "project" and kernel.endswith(" 16>")) or kernel.startswith(
        ("rotate_kernel<4", "project_mma", "gram_f")
    ):
        return SMALL_BLOCKS
    return BUDGET.get(name, OTHERS)


def short(mangled: str) -> str:
    """`project_kernel<F8, 16>` of the mangled name. Gradients of the type of the bases are left out."""
    match = re.match(r"_ZN6carerl4cuda\d+(\w+?_kernel)(I.*?E)?E", mangled)
    assert match, mangled
    types = re.findall(r"NS0_\d([A-Z]+\d+)E|L[ib](\d+)E", match[2] or "")
    return match[1] + (f"<{', '.join(a or b for a, b in types)}>" if types else "")


@cache
def resources() -> dict[str, dict[str, dict[str, int]]]:
    """{architecture: {kernel: {"REG": ..., "STACK": ..., "LOCAL": ...}}}"""
    found: dict[str, dict[str, dict[str, int]]] = {}
    architecture = kernel = ""
    for line in cuobjdump("-res-usage").splitlines():
        if match := re.match(r"arch = (sm_\d+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            kernel = short(match[1])
        elif "REG:" in line:
            found.setdefault(architecture, {})[kernel] = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
    return found


@cache
def sources(architecture: str) -> tuple[bytes, ...]:
    """What was compiled for it, a source each."""
    with tempfile.TemporaryDirectory() as folder:
        cuobjdump("-xelf", architecture, folder=folder)
        return tuple(path.read_bytes() for path in sorted(Path(folder).iterdir()))


@cache
def instructions_of(source: bytes) -> dict[str, list[str]]:
    """{kernel: its instructions with their widths, in order}. A second or so."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(source)
        file.flush()
        functions = re.split(r"^\.text\.(\w+):$", tool("nvdisasm", "-c", file.name), flags=re.MULTILINE)
    line = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
    return {short(name): line.findall(body) for name, body in zip(functions[1::2], functions[2::2], strict=True)}


def code(architecture: str, *kernels: str) -> dict[str, list[str]]:
    """The instructions of all kernels, or of those in the sources of these."""
    names = [f"{kernel}_kernel".encode() for kernel in kernels]
    chosen = [s for s in sources(architecture) if not names or any(name in s for name in names)]
    return {kernel: lines for source in chosen for kernel, lines in instructions_of(source).items()}


def memory(counts: Counter, kind: str) -> Counter:
    """Bits of the accesses of a kind (LDG, STG): 8 to 128. Hints such as .E, .EF, .CONSTANT do not matter."""
    widths: Counter = Counter()
    for name, count in counts.items():
        parts = name.split(".")
        if parts[0] == kind:
            width = next((p.lstrip("US") for p in parts if re.fullmatch(r"[US]?(8|16|64|128)", p)), "32")
            widths[int(width)] += count
    return widths


@needs_tools
def test_every_architecture_is_in_it_and_ptx_of_the_first_and_the_last():
    assert set(resources()) == set(ARCHITECTURES)
    kernels = set(resources()["sm_90"])
    assert {name.split("_kernel")[0] for name in kernels} == {
        "project", "project_mma", "gram", "gram_float",
        "reduce", "edit", "rotate", "prepare_rotation", "classify", "quantize", "logprobs",
        "logprobs_backward", "input", "input_energy"}  # fmt: skip
    assert all(set(resources()[a]) == kernels for a in ARCHITECTURES)
    assert set(re.findall(r"sm_\d+", cuobjdump("-lptx"))) == {"sm_80", "sm_120"}


@needs_tools
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_spills_no_local_memory_and_few_registers(architecture):
    for kernel, used in resources()[architecture].items():
        assert used["STACK"] == used["LOCAL"] == 0, f"{kernel} keeps {used} in local memory"
        assert used["REG"] <= budget(kernel), f"{kernel} uses {used['REG']} registers, more than {budget(kernel)}"


def in_flight(kernel: str) -> int:
    """16-byte loads that the main loop has to issue together: of the bases, or of what it stages."""
    if kernel.startswith("project_mma"):
        return 6
    if kernel.startswith("project"):
        return 8 if kernel.endswith(" 1>") else 4
    if kernel.startswith(("edit", "rotate")):
        return 4
    return {"gram": 3, "gram_float": 3, "logprobs": 2, "logprobs_backward": 2, "input": 2}.get(
        kernel.split("_kernel")[0], 0
    )


def together(instructions: list[str]) -> int:
    """The longest row of 16-byte loads that nothing computes or branches between: what a thread has in flight."""
    longest = run = 0
    for name in instructions:
        run += name.startswith("LDG.E.128")
        if name.startswith(("FFMA", "FADD", "FMUL", "HMMA", "DMMA", "BRA")):
            longest, run = max(longest, run), 0
    return longest


def threads(kernel: str) -> int:
    """Of a block, as it is launched."""
    if (kernel.startswith("project") and kernel.endswith(" 16>")) or kernel.startswith("gram_float"):
        return 192
    return 128 if kernel.startswith(("rotate", "input", "project_mma")) else 256


HIDDEN = 18 << 10  # bytes in flight on a multiprocessor that hide 700 ns at 3.35 TB/s over 132 of them, an H100


@needs_tools
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_enough_bytes_are_in_flight_to_hide_the_latency_of_memory(architecture):
    """With as many blocks as the registers leave room for. Quantising reads each block of 32 to 512 elements at once."""
    for kernel, instructions in code(architecture).items():
        if in_flight(kernel) == 0 or kernel.startswith("input"):
            continue  # those of inputs are bound by tensor cores
        registers = resources()[architecture][kernel]["REG"]
        blocks = min(65536 // (threads(kernel) * -(-registers // 8) * 8), 2048 // threads(kernel))
        found = blocks * threads(kernel) * 16 * together(instructions)
        assert found >= HIDDEN, f"{kernel}: {found} bytes in flight on a multiprocessor"


@needs_tools
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_products_of_warps_are_in_tensor_cores(architecture):
    """And as many as there are to be: split operands of `input_kernel<terms, terms of directions, groups>` for each tile
    of 32 inputs, first 4 steps x 4 columns of a group of directions, then 4 steps x 4 columns of inputs. Operands come from
    shared memory a word at a time, each lane's from another bank: one wavefront each."""
    found = code(architecture, "input", "gram")
    kernels = {kernel: Counter(name.split(".")[0] for name in names) for kernel, names in found.items()}
    assert kernels["gram_kernel"]["DMMA"] in (
        9,
        27,
    )  # a side of three eights with another, for one step or unrolled for three
    products = {(1, 1): 1, (1, 2): 2, (2, 1): 2, (2, 2): 3}
    seen = 0
    for kernel, counts in kernels.items():
        if not kernel.startswith("input_kernel"):
            continue
        own, directions, groups = map(int, re.findall(r"\d+", kernel))
        wanted = 16 * groups * (products[own, directions] + products[2, directions])
        assert counts["HMMA"] == wanted, f"{kernel}: {counts['HMMA']} products, not {wanted}"
        most = (1.7 if groups > 1 else 2.5) * wanted
        assert counts["LDS"] <= most, f"{kernel}: {counts['LDS']} wavefronts for {wanted} products"
        seen += 1
    assert seen == 8


@needs_tools
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_products_of_several_gradients_are_in_tensor_cores(architecture):
    """`project_mma_kernel<bases, gradients, tiles>`: of 32 rows and tiles of eight gradients, 16 columns to a product. An fp32
    gradient is three terms of bf16, fp16 ones beside other bases two. Chunks are of 32 columns, two at once where both sides
    have 16 bits, or of 64. No operand comes from shared memory."""
    seen = 0
    for kernel, names in code(architecture, "project_mma").items():
        if not kernel.startswith("project_mma"):
            continue
        basis, *gradient, tiles = re.findall(r"\w+", kernel.split("<")[1])
        terms = {(): 1, ("BF16",): 1, ("F16",): 2, ("F32",): 3}[tuple(gradient)]
        steps = 2 if basis in ("BF16", "F16") and terms == 3 else 4
        assert sum(name.startswith("HMMA") for name in names) == 2 * int(tiles) * terms * steps, kernel
        seen += 1
    assert seen == 20


@needs_tools
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_passes_over_n_use_16_byte_loads_and_stores(architecture):
    kernels = code(architecture)
    over_n = [k for k in kernels if not k.startswith(("reduce", "prepare", "classify", "input_energy"))]
    assert len(over_n) > 25
    for kernel in over_n:
        counts = Counter(kernels[kernel])
        assert not any(name.startswith(("LDL", "STL")) for name in counts), kernel
        loads, stores = memory(counts, "LDG"), memory(counts, "STG")
        # Next to the bases: gradients of three types; those of 16 bits are read by 8 bytes beside fp32 bases.
        split = kernel.startswith("edit") and "F32" in kernel
        assert loads[128] >= in_flight(kernel) + (1 if split else 3), f"{kernel}: {loads}"
        if kernel.startswith(("edit", "rotate", "quantize", "logprobs_backward")):
            assert stores[128] >= (1 if split else 3), f"{kernel}: {stores}"
        if kernel.startswith("edit") and not split:
            assert loads[64] == stores[64] == 0, f"{kernel}: a vector was split: {loads} {stores}"
        if kernel.startswith("project"):
            # Nothing else is read but by `gather`, one narrow load per 16 bytes and type, and a scale per vector.
            gathers = in_flight(kernel) * (2 if re.search("I8|F8", kernel) else 1) + 3
            if kernel.startswith("project_mma"):
                gathers = loads[128] // 2 + 4  # every vector is loaded or gathered; four rows have a scale
            assert loads[64] == 0, f"{kernel}: {loads}"
            assert sum(n for bits, n in loads.items() if bits < 64) <= gathers, f"{kernel}: {loads}"
        assert together(kernels[kernel]) >= in_flight(kernel), kernel


# ---------------------------------------------------------------------------------------------------------- on a device


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_can_be_captured_into_a_cuda_graph():
    """No synchronisation, no allocation but torch's: a replayed graph leaves the bits that eager calls leave."""
    torch.manual_seed(0)
    start = torch.randn(3, 100_003, device="cuda"), torch.randn(2, 5, 100_003, device="cuda") / 300
    mix, scale = torch.randn(3, 10, device="cuda"), torch.full((3,), 0.5, device="cuda")
    q = torch.randn(5, 8, device="cuda") / 3
    ops = torch.ops.carerl

    def step(grads: torch.Tensor, bases: torch.Tensor) -> list[torch.Tensor]:
        seen = [ops.project(grads, bases, None, torch.float64), ops.gram(bases, grads)]
        ops.edit_(grads, bases, mix, scale)
        ops.rotate_(bases[0], grads, q)
        seen.extend(ops.dacsp_(grads, bases, 1.5, 0.5, 0.0))
        return [*seen, grads, bases]

    expected = step(*(t.clone() for t in start))
    static = [t.clone() for t in start]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(*static)
    for _ in range(2):
        for tensor, value in zip(static, start, strict=True):
            tensor.copy_(value)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
