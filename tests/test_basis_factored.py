"""Block and input bases: acting equals dense oracles, recording equals the exact SVD, files load back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from carerl_kernels import BasisError, CapabilityGuard, DomainBasis
from carerl_kernels.guard import COMBINES
from carerl_kernels.subspace import FactoredBasis, MatrixLayout, StoredBasis
from carerl_kernels.subspace.block import leading_factors
from carerl_kernels.subspace.shards import Shards
from factored_helpers import FactoredWalk, make_factored
from guard_helpers import make_model

R = 3


def numpy_of(tensors):
    return [t.detach().double().numpy().copy() for t in tensors]


def run(walk: FactoredWalk, steps: int = 9) -> float:
    """Guarded AdamW steps; the largest deviation from the oracle on a copy that takes the raw step."""
    optimizer = torch.optim.AdamW(walk.params, lr=3e-3, weight_decay=0.1)
    twin = [torch.nn.Parameter(p.detach().clone()) for p in walk.params]
    twin_optimizer = torch.optim.AdamW(twin, lr=3e-3, weight_decay=0.1)
    walk.guard.attach(optimizer)
    worst = 0.0
    for step in range(steps):
        own = (None, "code", "chat", "math")[step % 4]
        generator = torch.Generator().manual_seed(step)
        old = numpy_of(walk.params)
        for p, q in zip(walk.params, twin, strict=True):
            p.grad = torch.randn(p.shape, generator=generator) * (1 + step % 3)
            q.data.copy_(p.data)
            q.grad = p.grad.clone()
        twin_optimizer.step()
        with walk.guard.domain(own):
            optimizer.step()
        for i, (a, b, c) in enumerate(zip(old, numpy_of(twin), numpy_of(walk.params), strict=True)):
            worst = max(worst, float(np.abs((a - c) - walk.expect(i, a - b, own)).max()))
    return worst


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("rule", ["instant", "ema", "integrated", "bounded", "remove"])
@pytest.mark.parametrize("kind", ["block", "input"])
def test_acting_equals_dense_oracle(kind, rule, overlap):
    assert run(FactoredWalk(make_model(), rule, kind, r=R, overlap=overlap)) < 3e-6


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("kind", ["block", "input"])
def test_every_combine_with_three_domains(kind, combine):
    names = ("math", "chat", "logic")
    walk = FactoredWalk(make_model(), "integrated", kind, r=2, overlap=0.6, combine=combine, names=names, aligned=1.3)
    assert run(walk) < 5e-6


@pytest.mark.parametrize("rule", ["bounded", "integrated"])
def test_left_sided_inputs_equal_dense_oracle(rule):
    """Weights that multiply from the other side, beside right-sided ones; what is not named is left alone."""
    sides = {"0.weight": "left", "2.weight": "right"}
    model = make_model()
    walk = FactoredWalk.__new__(FactoredWalk)
    from carerl_kernels.guard import guard as module

    before = module.sites_of
    module.sites_of = lambda *_: {name: (None, side) for name, side in sides.items()}
    try:
        walk.__init__(model, rule, "input", r=R, sides=sides)
    finally:
        module.sites_of = before
    assert set(walk.oracles) == {0, 2}
    assert run(walk) < 3e-6
