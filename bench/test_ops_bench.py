"""The ops under pytest-benchmark, small shapes: for comparing two commits. `carerl bench` compares with PyTorch and bandwidth.

pytest bench/ --benchmark-save=before; (change something); pytest bench/ --benchmark-compare=*before
"""

from __future__ import annotations

import pytest
import torch
from carerl_kernels.bench.cases import Inputs
from carerl_kernels.bench.cost import Case
from carerl_kernels.bench.expect import Expectation
from carerl_kernels.bench.variants import OURS, ours

F32, BF16, I8 = torch.float32, torch.bfloat16, torch.int8
N = 200_000
CASES = [
    *(Case(op, N=N, grad=t, basis=t) for op in ("project", "edit_", "edit_rotate_", "dacsp_") for t in (F32, BF16)),
    *(Case(op, N=N, grad=BF16, basis=I8) for op in ("project", "edit_", "dacsp_")),
    *(Case(op, D=1, B=4, N=N) for op in ("gram", "rotate_", "pca_update_")),
    *(Case(op, N=N, tensors=100) for op in ("project.list", "dacsp_.list")),
]
SMALL = [Case(op, D=1, k=4, N=64) for op in ("project", "edit_", "dacsp_", "gram")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_op(benchmark, case: Case):
    """One call from fresh inputs; the last one is checked."""
    with torch.no_grad():
        x = Inputs(case)
        expectation, call = Expectation(x), ours(x)
        benchmark.extra_info.update(bytes=case.bytes, flops=case.flops)
        outputs = benchmark.pedantic(call, setup=x.reset, rounds=20, warmup_rounds=2)
        expectation.check(OURS, outputs, exact=True)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.op)
def test_call_overhead(benchmark, case: Case):
    """Next to nothing to do, many calls. Edits by nothing, so that values stay what they are."""
    with torch.no_grad():
        x = Inputs(case)
        x.mix.zero_()
        x.scale.fill_(1.0)
        benchmark(ours(x))
