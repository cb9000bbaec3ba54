"""Triton's interpreter as the tests use it: its patches do what they claim, and the dispatcher takes the kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton_interpreted
from helpers import same_bits

pytestmark = pytest.mark.skipif(triton_interpreted.missing() is not None, reason=str(triton_interpreted.missing()))

if triton_interpreted.missing() is None:
    import triton
    import triton.language as tl

    @triton.jit
    def copy_kernel(source, target, n, OVERRUN: tl.constexpr, WRITTEN: tl.constexpr):
        i = tl.arange(0, 64)
        value = tl.load(source + i, mask=i < n + OVERRUN, other=0.0)
        tl.store(target + i, value.to(target.dtype.element_ty), mask=i < WRITTEN)


@pytest.fixture(autouse=True)
def _patched():
    triton_interpreted.patch()


def test_a_copy_inside_its_tensors_goes_through():
    source, target = torch.randn(50), torch.zeros(50)
    copy_kernel[(1,)](source, target, 50, 0, 50)
    assert same_bits(source, target)


@pytest.mark.parametrize(("overrun", "written", "what"), [(1, 50, "load of 1 "), (-8, 51, "store of 1 ")])
def test_one_element_too_many_is_caught(overrun, written, what):
    """The neighbour belongs to the same buffer: only its address tells that it is not the kernel's."""
    source, target = torch.randn(100), torch.zeros(100)
    with pytest.raises(Exception, match=f"{what}elements outside every tensor"):
        copy_kernel[(1,)](source[:50], target[:50], 50, overrun, written)
    assert not target[50:].any()


def test_memory_before_a_tensor_and_between_tensors_is_caught():
    buffer = torch.zeros(100)
    guard = triton_interpreted.Guard()
    with guard.allowing([buffer[10:20], {"rows": (buffer[30:40].view(2, 5),)}]):
        for first, last, inside in ((10, 20, True), (30, 40, True), (9, 12, False), (18, 32, False), (39, 41, False)):
            addresses = np.arange(first, last, dtype=np.uint64) * 4 + np.uint64(buffer.data_ptr())
            if inside:
                guard.check("load", addresses, 4)
            else:
                with pytest.raises(triton_interpreted.OutOfBounds):
                    guard.check("load", addresses, 4)
    assert guard.ranges == []


def test_conversion_to_bfloat16_rounds_to_nearest_even():
    """All the patterns that round differently: ties up and down, carries into the exponent, subnormals, infinities, NaN."""
    low = torch.tensor([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int64)
    high = torch.tensor([0x0000, 0x0001, 0x007F, 0x3F80, 0x3F81, 0x3FFF, 0x7F7F, 0x7F80, 0xFF7F, 0xBF81]).unsqueeze(1)
    values = ((high << 16) + low).flatten().to(torch.uint32).view(torch.float32)
    values = torch.cat([values, torch.randn(10_000) * 10.0 ** torch.randint(-38, 38, (10_000,))])
    found = torch.from_numpy(triton_interpreted.to_bfloat16(values.numpy()).view(np.int16)).view(torch.bfloat16)
    expected = values.bfloat16()
    assert torch.equal(found.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert same_bits(found[number], expected[number])


def test_a_kernel_stores_rounded_bfloat16():
    source, target = torch.randn(50), torch.zeros(50, dtype=torch.bfloat16)
    copy_kernel[(1,)](source, target, 50, 0, 50)
    assert same_bits(target, source.bfloat16())
    back = torch.zeros(50)
    copy_kernel[(1,)](target, back, 50, 0, 50)
    assert same_bits(back, target.float())


DISPATCHED = """
import sys, torch, carerl_kernels.triton_kernels
assert "triton" not in sys.modules
import triton_interpreted
from carerl_kernels import _load, _ops
from torch._dynamo.testing import CompileCounterWithBackend

kernels = triton_interpreted.kernels()
for name, kernel in kernels.items():  # as register() does for GPU tensors; no native kernels here
    if not name.startswith(("pca_update_", "group_advantages")):
        assert not _load.has_kernel(name, "CPU")
        _ops._LIB.impl(name, triton_interpreted.kernel(name), "CPU")

def loop(grads, bases, root, q):
    seen = []
    for _ in range(2):
        seen.append(torch.ops.carerl.project(grads, bases))
        seen.extend(torch.ops.carerl.dacsp_(grads, bases, 1.25, 0.5, 0.1, root))
        torch.ops.carerl.rotate_(bases[0], grads, q)
    return seen

draw = torch.Generator().manual_seed(0)
grads, bases = torch.randn(2, 300, generator=draw), torch.randn(2, 3, 300, generator=draw)
root, q = torch.eye(6), torch.randn(3, 5, generator=draw) / 3
mine, theirs = (grads.clone(), bases.clone()), (grads.clone(), bases.clone())
counter = CompileCounterWithBackend("aot_eager")
found = torch.compile(loop, backend=counter, fullgraph=True)(*mine, root, q)
expected = loop(*theirs, root, q)
assert counter.frame_count == 1
assert all(torch.equal(a, b) for a, b in zip([*found, *mine], [*expected, *theirs], strict=True))
assert not torch.equal(mine[0], grads) and not torch.equal(mine[1], bases)
torch.library.opcheck(torch.ops.carerl.edit_.default, (grads, bases, torch.ones(2, 6), torch.ones(2)))
torch.library.opcheck(torch.ops.carerl.dacsp_.list, ([grads[0]], bases, [0], 1.25, 0.5, 0.1))
logits = torch.randn(3, 50, generator=draw).requires_grad_()
torch.ops.carerl.token_logprobs(logits, torch.tensor([0, 1, 2]))[0].sum().backward()
torch.testing.assert_close(logits.grad.sum(1), torch.zeros(3), atol=1e-5, rtol=0)
print("dispatched")
"""


def test_registered_kernels_compile_into_one_graph():
    """What `register` does for GPU tensors, done for CPU tensors in a process without native kernels. Importing the package
    and its Triton kernels imports no triton."""
    environment = dict(os.environ) | {"CARERL_BACKEND": "reference"}
    child = subprocess.run(
        [sys.executable, "-c", DISPATCHED],
        env=environment,
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert child.stdout.strip() == "dispatched", child.stderr[-3000:]


def test_tables_of_a_graph_are_its_own_and_stay(monkeypatch):
    """Replays copy them again: neither side may go to somebody else, and what was copied before is in no graph."""
    from carerl_kernels.triton_kernels import _plan

    tensors = [torch.randn(300), torch.randn(40)]
    table, first, chunks, _ = _plan._table(tensors, (300, 40), (0, 384), 128, True)
    assert first.tolist() == [0, 3, 4] and chunks == 4
    assert table[: 4 * chunks].view(4, 4)[:, 1:].tolist() == [[0, 128, 0], [128, 128, 0], [256, 44, 0], [384, 40, 1]]
    assert _plan._table(tensors, (300, 40), (0, 384), 128, True)[0] is table
    monkeypatch.setattr(_plan, "_capturing", lambda device: True)
    monkeypatch.setattr(_plan, "_captured", [])
    kept = dict(_plan._tables)
    seen = [_plan._table(tensors, (300, 40), (0, 384), 128, True)[0] for _ in range(2)]
    assert seen[0] is not seen[1] and all(same_bits(own, table) for own in seen)
    assert [device for _, device in _plan._captured] == seen and dict(_plan._tables) == kept
