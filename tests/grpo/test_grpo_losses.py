"""Losses against an oracle in plain floats, and laws: micro-batches add up, padding and clipped units are silent."""

import math

import numpy as np
import pytest
import torch
from carerl_kernels.grpo import kl_k3, policy_loss

KINDS = ["grpo", "dr_grpo", "dapo", "gspo"]


def oracle(logp, old, advantages, mask, ref, *, kind, low, high, max_tokens, beta):
    """The four losses written as sums over sequences and tokens, straight from the papers, in float64."""
    rows, columns = logp.shape
    total = 0.0
    tokens_everywhere = sum(mask[i][t] for i in range(rows) for t in range(columns))
    for i in range(rows):
        live = [t for t in range(columns) if mask[i][t]]
        if not live:
            continue
        kl = [math.exp(ref[i][t] - logp[i][t]) - (ref[i][t] - logp[i][t]) - 1 for t in live]
        if kind == "gspo":
            ratio = math.exp(sum(logp[i][t] - old[i][t] for t in live) / len(live))
            objective = min(ratio * advantages[i], min(max(ratio, 1 - low), 1 + high) * advantages[i])
            total += (objective - beta * sum(kl) / len(live)) / rows
            continue
        terms = []
        for t, k in zip(live, kl, strict=True):
            ratio = math.exp(logp[i][t] - old[i][t])
            clipped = min(max(ratio, 1 - low), 1 + high)
            terms.append(min(ratio * advantages[i], clipped * advantages[i]) - beta * k)
        divisor = {"grpo": len(live) * rows, "dr_grpo": rows * max_tokens, "dapo": tokens_everywhere}[kind]
        total += sum(terms) / divisor
    return -total


def case(seed, rows=5, columns=7):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, columns + 1, rows)
    mask = (np.arange(columns) < lengths[:, None]).astype(np.int64)
    logp = rng.normal(-1.5, 0.7, (rows, columns))
    old = logp + rng.normal(0, 0.25, (rows, columns))  # ratios on both sides of both clips
    ref = logp + rng.normal(0, 0.3, (rows, columns))
    advantages = rng.normal(0, 1, rows)
    advantages[0] = 0.0
    return logp, old, advantages, mask, ref


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_value_and_gradient_match_the_oracle(kind, beta, seed):
    logp, old, advantages, mask, ref = case(seed)
    arguments = {"kind": kind, "low": 0.2, "high": 0.28, "max_tokens": 9, "beta": beta}
    expected = oracle(logp, old, advantages, mask, ref, **arguments)

    x = torch.tensor(logp, requires_grad=True)
    loss, stats = policy_loss(
        x,
        torch.tensor(old),
        torch.tensor(advantages),
        torch.tensor(mask),
        kind=kind,
        clip_low=0.2,
        clip_high=0.28,
        max_tokens=9,
        ref_logp=torch.tensor(ref),
        kl_beta=beta,
    )
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-14)
    assert stats.tokens == mask.sum()

    step = 1e-6
    for i, t in [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (1, mask[1].sum() - 1), (4, mask[4].sum() - 1)]:
        up, down = logp.copy(), logp.copy()
        up[i, t] += step
        down[i, t] -= step
        slope = (
            oracle(up, old, advantages, mask, ref, **arguments) - oracle(down, old, advantages, mask, ref, **arguments)
        ) / (2 * step)
        assert x.grad[i, t].item() == pytest.approx(slope, abs=2e-8)
    assert (x.grad[torch.tensor(mask) == 0] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_add_up_to_the_batch(kind):
    logp, old, advantages, mask, ref = (torch.tensor(a) for a in case(3, rows=6))
    common = {"kind": kind, "max_tokens": 7, "kl_beta": 0.1}
    whole = logp.clone().requires_grad_()
    loss, _ = policy_loss(whole, old, advantages, mask, ref_logp=ref, **common)
    loss.backward()
    parts = logp.clone().requires_grad_()
    total = 0.0
    for rows in ([0], [1, 2, 3], [4, 5]):
        part, _ = policy_loss(
            parts[rows],
            old[rows],
            advantages[rows],
            mask[rows],
            ref_logp=ref[rows],
            total_sequences=6,
            total_tokens=float(mask.sum()),
            **common,
        )
        part.backward()
        total += part.item()
    assert total == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_ignored_whatever_it_holds(kind):
    logp, old, advantages, mask, ref = (torch.tensor(a) for a in case(4))
    clean, _ = policy_loss(logp, old, advantages, mask, kind=kind, max_tokens=7, ref_logp=ref, kl_beta=0.1)
    dirty = logp.masked_fill(mask == 0, -torch.inf).requires_grad_()
    loss, _ = policy_loss(
        dirty, old.masked_fill(mask == 0, 1e30), advantages, mask, kind=kind, max_tokens=7, ref_logp=ref, kl_beta=0.1
    )
    loss.backward()
    assert loss.item() == clean.item()
    assert torch.isfinite(dirty.grad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_on_policy_gradient_is_reinforce(kind):
    """At ratio 1 every kind is -A * grad logp with its own weights; nothing is clipped."""
    logp, _, advantages, mask, _ = (torch.tensor(a) for a in case(5))
    x = logp.clone().requires_grad_()
    loss, stats = policy_loss(x, x.detach(), advantages, mask, kind=kind, max_tokens=7)
    loss.backward()
    weight = mask.double()
    divisor = {
        "grpo": weight.sum(1, keepdim=True) * 5,
        "gspo": weight.sum(1, keepdim=True) * 5,
        "dr_grpo": torch.full((5, 1), 35.0),
        "dapo": weight.sum().expand(5, 1),
    }[kind]
    torch.testing.assert_close(x.grad, -advantages[:, None] * weight / divisor, rtol=1e-12, atol=1e-15)
    assert stats.clipped == 0


@pytest.mark.parametrize("kind", ["grpo", "gspo"])
@pytest.mark.parametrize(
    ("shift", "advantage", "silent"), [(1.0, 1.0, True), (1.0, -1.0, False), (-1.0, -1.0, True), (-1.0, 1.0, False)]
)
def test_clip_silences_only_what_goes_further_the_same_way(kind, shift, advantage, silent):
    logp = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 3)
    loss, stats = policy_loss(logp, torch.full((1, 3), -shift), torch.tensor([advantage]), mask, kind=kind)
    loss.backward()
    assert (logp.grad == 0).all() == silent
    assert stats.clipped == (stats.units if silent else 0)


def test_k3_is_nonnegative_zero_at_equality_and_unbiased():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(50, generator=generator, dtype=torch.float64).log_softmax(-1)
    q = torch.randn(50, generator=generator, dtype=torch.float64).log_softmax(-1)
    estimate = kl_k3(p, q)
    assert (estimate >= 0).all()
    assert (kl_k3(p, p) == 0).all()
    torch.testing.assert_close((p.exp() * estimate).sum(), (p.exp() * (p - q)).sum())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "ppo"}, "kind: expected one of grpo, dr_grpo, dapo, gspo, found 'ppo'"),
        ({"kind": "dr_grpo"}, "needs max_tokens"),
        ({"kl_beta": 0.1}, "needs ref_logp of shape \\(2, 3\\), found None"),
    ],
)
def test_errors_say_what_is_missing(change, message):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=message):
        policy_loss(x, x, torch.zeros(2), torch.ones(2, 3), **change)
    with pytest.raises(ValueError, match="found \\(2, 3\\), \\(2, 3\\), \\(2, 3\\), \\(3,\\)"):
        policy_loss(x, x, torch.zeros(3), torch.ones(2, 3))
