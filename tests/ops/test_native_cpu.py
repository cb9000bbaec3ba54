"""What only the native CPU kernels promise: the same bits on any number of threads, agreement between instruction sets, any
alignment, no memory that grows with N, calls about as cheap as torch's own."""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from carerl_kernels import _load, reference
from helpers import DTYPES, SCALED, assert_within, dispatched, rng_of, same_bits, to64

pytestmark = pytest.mark.skipif(
    not _load.BACKENDS["cpu"].available, reason=f"no native CPU kernels: {_load.BACKENDS['cpu'].reason}"
)


@cache
def normal(label: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(rng_of("native", label, shape).standard_normal(shape))


def draw(label: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return normal(label, shape).to(dtype, copy=True)


@cache
def stack(n: int, basis: str, domains: int = 2, slots: int = 5) -> tuple[torch.Tensor, torch.Tensor | None]:
    rows = draw("rows", domains, slots, n) / n**0.5
    dtype = DTYPES[basis]
    return reference.quantize_bases(rows, 128, dtype) if dtype in SCALED else (rows.to(dtype), None)


def every_result(n: int, basis: str, grad: str, batch: int = 3) -> dict[str, torch.Tensor]:
    """Outputs and mutated arguments of every op with a pass over N, once as a batch and once as a list."""
    bases, scales = stack(n, basis)
    grads = draw("grads", batch, n, dtype=DTYPES[grad])
    mix, scale = 0.1 * draw("mix", batch, 10), torch.linspace(0.5, 1.5, batch)
    out = {
        "project": dispatched("project")(grads, bases, scales, torch.float64),
        "gram": dispatched("gram")(bases, grads, scales),
    }
    out["edit"] = grads.clone()
    dispatched("edit_")(out["edit"], bases, mix, scale, scales)
    out["dacsp"] = grads.clone()
    out["coefficients"], out["classes"] = dispatched("dacsp_")(out["dacsp"], bases, 1.5, 0.2, 0.01, None, scales)
    if DTYPES[basis] not in SCALED:
        q = draw("q", 4, 5 + batch) / 3
        for seed in (0, 11):
            out[f"rotate{seed}"] = bases[0].clone()
            dispatched("rotate_")(out[f"rotate{seed}"], grads, q, seed)
        out["edited"], out["rotated"] = grads.clone(), bases.clone()
        dispatched("edit_rotate_")(out["edited"], out["rotated"], mix, scale, 1, q)
    cuts = [0, n // 3 // 128 * 128, n // 2 // 128 * 128, n]
    parts = [grads[0, a:b].clone() for a, b in itertools.pairwise(cuts)]
    out["list"] = dispatched("project.list")(parts, bases, cuts[:-1], scales, torch.float64, True)
    dispatched("dacsp_.list")(parts, bases, cuts[:-1], 1.5, 0.2, 0.01, None, scales, True)
    out["list_edit"] = torch.cat(parts)
    return out


def every_matrix_result(grad: str, rows: int = 2500) -> dict[str, torch.Tensor]:
    """Of the ops over weight matrices: many small ones, and one of so many rows that it is cut into pieces."""
    out = {}
    for count, m, n in ((5, 96, 130), (1, rows, 601)):
        matrices = [draw(f"matrix{i}", m, n, dtype=DTYPES[grad]) for i in range(count)]
        left, right = draw("left", count, m, 48) / m**0.5, draw("right", count, n, 48) / n**0.5
        out[f"block_project {m}"] = dispatched("block_project")(matrices, left, right, 3)
        dispatched("block_edit_")(matrices, left, draw("mix", count, 3, 16, 16), right)
        out[f"block_edit {m}"] = torch.stack(matrices)
        for side, inputs in ((False, n), (True, m)):  # every time from the same matrices: roundings do not add up
            parts = [[draw(f"matrix{i}", m, n, dtype=DTYPES[grad]) for i in range(count)] for _ in range(2)]
            directions = draw("directions", count, 40, inputs) / inputs**0.5
            before = dispatched("input_project")(parts[0], directions, side)
            anchor, bound = before + draw("away", *before.shape), torch.full_like(before, 0.1)
            energies = [dispatched("input_confine_")(parts[0], directions, anchor, bound, None, side)]
            energies.append(dispatched("input_dacsp_")(parts[1], directions, 1.5, 0.5, 0.0, side))
            out |= {f"input {side} {m}": before, f"energies {side} {m}": torch.stack(energies)}
            out[f"inputs {side} {m}"] = torch.stack(parts[0] + parts[1])
    out["packed_times"] = dispatched("packed_times")(draw("packed", 7, 5050), draw("x", 2, 7, 100).double())
    return out


@pytest.mark.parametrize(
    ("basis", "grad"), [("fp32", "fp32"), ("bf16", "bf16"), ("int8", "fp32"), ("fp16", "bf16"), ("fp8", "bf16")]
)
def test_bits_do_not_depend_on_the_number_of_threads(basis, grad):
    assert_same_on_any_number_of_threads(lambda: every_result(240_003, basis, grad))


@pytest.mark.parametrize("grad", ["fp32", "bf16"])
def test_bits_of_matrices_do_not_depend_on_the_number_of_threads(grad):
    assert_same_on_any_number_of_threads(lambda: every_matrix_result(grad))


def assert_same_on_any_number_of_threads(compute: Callable[[], dict[str, torch.Tensor]]) -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(compute())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in results[0].items():
            assert same_bits(value, other[name]), name


# A process picks its set when it imports the package; torch is imported once, by the one that they are forked from.
WORKERS = """
import os, sys
from pathlib import Path
import pytest, sympy, torch  # torch imports sympy when rows are quantised
sys.path.insert(0, sys.argv[1])
for name in sys.argv[3:]:
    if os.fork():
        if os.wait()[1]:
            sys.exit(f"{name} failed")
        continue
    os.environ["CARERL_CPU_ISA"] = name
    import test_native_cpu as t
    kinds = [("fp32", "fp32"), ("bf16", "fp16"), ("int8", "bf16"), ("fp16", "fp32"), ("fp8", "fp32")]
    results = {f"{b}-{g}-{n}": t.every_result(n, b, g) for n in (5, 33_001) for b, g in kinds}
    results |= {grad: t.every_matrix_result(grad, 1000) for grad in ("fp32", "bf16", "fp16")}
    torch.save(results, Path(sys.argv[2]) / f"{name}.pt")
    os._exit(0)  # taking torch down would take a second
"""


def test_instruction_sets_agree(tmp_path):
    names = importlib.import_module("carerl_kernels._host").supported_isas()
    if len(names) < 2:
        pytest.skip(f"this CPU supports {names[0]} only")
    subprocess.run([sys.executable, "-c", WORKERS, str(Path(__file__).parent), str(tmp_path), *names], check=True)
    found = {name: torch.load(tmp_path / f"{name}.pt") for name in names}
    for name in names[1:]:
        for case, results in found[names[0]].items():
            for what, value in results.items():
                other = found[name][case][what]
                if what == "classes":
                    assert torch.equal(value, other), (name, case)
                    continue
                # Sums in another order, and now and then the neighbouring number of the storage type.
                unit = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(value.dtype, 2e-6)
                size = to64(value).__abs__().max(initial=0.0)
                assert_within(other, to64(value), unit * size, f"{name} {case} {what}")


@pytest.mark.parametrize("grad", ["fp32", "bf16"])
@pytest.mark.parametrize("shift", [1, 2, 3, 6])
def test_tensors_at_any_byte(grad, shift):
    """Views of a byte buffer (memory-mapped files) need not even be aligned to their elements."""
    n, width = 1003, DTYPES[grad].itemsize

    def misaligned(source: torch.Tensor) -> torch.Tensor:
        buffer = torch.zeros(source.numel() * width + 64, dtype=torch.uint8)
        memory = memoryview(buffer.numpy())[shift:]
        view = torch.frombuffer(memory, dtype=source.dtype, count=source.numel()).view(source.shape)
        return view.copy_(source)

    bases, grads = stack(n, grad)[0], draw("grads", 2, n, dtype=DTYPES[grad])
    mix, scale, q = draw("mix", 2, 10), torch.ones(2), draw("q", 5, 7) / 3
    for name in ("edit", "rotate"):
        results = []
        for place in (torch.clone, misaligned):
            u, g = place(bases), place(grads)
            if name == "edit":
                dispatched("edit_")(g, u, mix, scale)
            else:
                dispatched("rotate_")(u[1], g, q)
            results.append((dispatched("project")(g, u), u, g))
        for plain, odd in zip(*results, strict=True):
            assert same_bits(plain, odd)


@pytest.mark.parametrize("basis", ["bf16", "fp16"])
@pytest.mark.parametrize("seed", [1, -5, 2**40 + 3])
def test_stochastic_rounding_is_the_reference_bit_for_bit(basis, seed):
    """With one term a row, so that the fp32 values before rounding are the same."""
    bases, grads = stack(5001, basis)[0][0], 0.1 * draw("grads", 5001)
    q = torch.zeros(5, 6)
    q[torch.arange(5), torch.tensor([1, 0, 5, 2, 5])] = torch.tensor([1.1, -0.3, 1.0, 1e-3, 7.0])
    native, expected = bases.clone(), bases.clone()
    dispatched("rotate_")(native, grads, q, seed)
    reference.rotate_(expected, grads, q, seed)
    assert same_bits(native, expected)


def test_calls_from_several_python_threads():
    """Scratch memory belongs to a thread; two calls at once do not meet in it."""
    bases, _ = stack(50_001, "bf16")
    inputs = [draw(f"grads{i}", 50_001) for i in range(4)]
    expected = [dispatched("gram")(bases, g) for g in inputs]
    failures = []

    def work(i: int) -> None:
        for _ in range(10):
            if not same_bits(dispatched("gram")(bases, inputs[i]), expected[i]):
                failures.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


MEMORY = """
import sys, torch, carerl_kernels
from pathlib import Path
def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))
torch.set_num_threads(2)
def extra(tensors, length, per_tensor, grad, basis):
    stride = -(-length // 128) * 128
    bases = torch.full((3, 8, tensors * stride), (tensors * length) ** -.5, dtype=basis)
    grads, offsets = [torch.randn(length).to(grad) for _ in range(tensors)], [t * stride for t in range(tensors)]
    def call():
        return torch.ops.carerl.dacsp_.list(grads, bases, offsets, 1.2, 0.5, 0.0, None, None, per_tensor)
    call()  # the pool's threads and the scratch of each are kept
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    call()
    return max(status("VmHWM") - before, 0)
print(max(extra(300, 4_000, False, torch.float32, torch.float32), extra(300, 4_000, True, torch.bfloat16, torch.float16)))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux's /proc")
def test_peak_memory_of_three_hundred_tensors():
    """1.2 million gradients and 120 MB of bases; an N-sized temporary would be 2 to 5 MB."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 1 << 20


def test_a_call_costs_little():
    """N = 64: what a call costs besides its work, next to an in-place op of torch reached the same way."""
    grads, other, bases = draw("g", 64), draw("o", 64), stack(64, "fp32")[0]
    mix, scale = draw("mix", 1, 10), torch.ones(1)

    def best(call, *args) -> float:
        times = []
        for _ in range(50):
            start = time.perf_counter()
            for _ in range(50):
                call(*args)
            times.append(time.perf_counter() - start)
        return min(times) / 50

    add = best(torch.ops.aten.add_.Tensor, grads, other)
    # Measured 1.2 and 1.4 times add_ on a quiet machine; 3 leaves room for a busy one.
    assert best(dispatched("edit_"), grads, bases, mix, scale) < 3 * add
    assert best(dispatched("project"), grads, bases) < 3 * add


def test_an_unknown_instruction_set_is_refused():
    env = {**os.environ, "CARERL_CPU_ISA": "mmx"}
    run = subprocess.run([sys.executable, "-c", "import carerl_kernels"], env=env, capture_output=True, text=True)
    assert run.returncode != 0
    assert "CARERL_CPU_ISA: expected one of generic" in run.stderr
    assert "found mmx" in run.stderr


def test_the_bandwidth_probe_measures_something_plausible():
    host = importlib.import_module("carerl_kernels._host")
    probe = host.BandwidthProbe(bytes=64 << 20, threads=2)
    assert (probe.bytes, probe.threads) == (64 << 20, 2)
    assert 1e8 < max(probe.read() for _ in range(3)) < 1e13
    with pytest.raises(ValueError, match="threads >= 0"):
        host.BandwidthProbe(threads=-1)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001])
def test_a_nan_of_any_payload_stays_one(bits):
    """Rounding to bf16 adds to the payload: without care 0x7FFFFFFF becomes -0."""
    nan = torch.full((1, 100), bits, dtype=torch.int32).view(torch.float32)
    half = torch.full((1, 100), bits >> 16, dtype=torch.int16).view(torch.float16)
    assert nan.isnan().all() and half.isnan().all()
    rows, q = torch.zeros(2, 100, dtype=torch.bfloat16), torch.eye(2, 3).roll(1, 1)
    for seed in (0, 5):
        for grad in (nan, half):
            rows.zero_()
            dispatched("rotate_")(rows, grad, q, seed)
            assert rows[1].isnan().all()
            rows.zero_()
            still = torch.zeros(1, 2), torch.ones(1)
            dispatched("edit_rotate_")(grad.clone(), rows.unsqueeze(0), *still, 0, q, seed)
            assert rows[1].isnan().all()
    low = torch.zeros(1, 100, dtype=torch.bfloat16)
    dispatched("edit_")(low, nan.view(1, 1, 100), torch.ones(1, 1), torch.ones(1))
    assert low.isnan().all()
