"""token_logprobs: against float64 log-softmax, its gradient, masked and extreme logits, bad input, memory."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers import BACKENDS, naming

ON_CPU = [pytest.param(b, id=b.name) for b in BACKENDS if b.device == "cpu" and b.missing() is None]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# One rounding of log-probabilities of size up to ~30 to fp32, and fp32 exponentials over a row: a few 1e-6.
TOLERANCE = 2e-5


def softmax64(logits: torch.Tensor, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """log p and p of each row in float64 numpy, -inf where masked."""
    z = logits.double().numpy() / temperature
    top = z.max(1, keepdims=True)
    log_p = z - top - np.log(np.exp(z - top).sum(1, keepdims=True))
    return log_p, np.exp(log_p)


def make(T: int, V: int, dtype: str, scale: float = 4.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(T * V)
    logits = (scale * torch.randn(T, V, generator=generator)).to(DTYPES[dtype])
    return logits, torch.randint(V, (T,), generator=generator)


@pytest.mark.parametrize(("T", "V"), [(1, 1), (3, 7), (5, 123), (2, 2048), (3, 2049), (2, 50257)])
@pytest.mark.parametrize("op", ON_CPU)
def test_forward_against_float64(op, T, V):
    for dtype, temperature in itertools.product(DTYPES, (1.0, 0.6, 3.0)):
        with naming(dtype, temperature):
            logits, ids = make(T, V, dtype)
            logp, entropy = op("token_logprobs", logits, ids, temperature)
            log_p, p = softmax64(logits, temperature)
            np.testing.assert_allclose(logp, log_p[np.arange(T), ids], rtol=1e-6, atol=TOLERANCE)
            np.testing.assert_allclose(entropy, -(p * log_p).sum(1), rtol=1e-5, atol=TOLERANCE)


@pytest.mark.parametrize(("T", "V"), [(3, 7), (5, 123), (3, 2049), (2, 50257)])
@pytest.mark.parametrize("op", ON_CPU)
def test_backward_against_float64(op, T, V):
    for dtype in DTYPES:
        with naming(dtype):
            check_backward(op, T, V, dtype)


def check_backward(op, T, V, dtype):
    logits, ids = make(T, V, dtype)
    generator = torch.Generator().manual_seed(T + V)
    g_logp, g_entropy = torch.randn(T, generator=generator), torch.randn(T, generator=generator)
    logp, entropy = op("token_logprobs", logits, ids, 0.8)
    found = op("token_logprobs_backward", g_logp, g_entropy, logits, ids, logp, entropy, 0.8)
    log_p, p = softmax64(logits, 0.8)
    H = -(p * log_p).sum(1, keepdims=True)
    onehot = (np.arange(V) == ids.numpy()[:, None]).astype(float)
    want = (
        g_logp.double().numpy()[:, None] * (onehot - p) - g_entropy.double().numpy()[:, None] * p * (log_p + H)
    ) / 0.8
    # log p carries an absolute error of some 1e-6 where logits are near 10, and the two terms may cancel; then one rounding
    rtol = {"fp32": 1e-5, "bf16": 2.0**-8, "fp16": 2.0**-10}[dtype]
    assert found.dtype == DTYPES[dtype]
    np.testing.assert_allclose(found.double().numpy(), want, rtol=rtol, atol=5e-6)


@pytest.mark.parametrize("op", ON_CPU)
def test_gradient_of_tokens_of_next_to_no_probability(op):
    """log p = -800: fp32 holds it to 3e-5, and what is taken back from it moves every probability of the row by as much. The
    reference and CUDA sum such rows again."""
    logits, ids = make(3, 700, "fp32", scale=1.0)
    logits[:, 350:] += 400
    logits[:, :350] -= 400
    ids = torch.tensor([5, 360, 699])
    logp, entropy = op("token_logprobs", logits, ids)
    found = op("token_logprobs_backward", torch.ones(3), torch.ones(3), logits, ids, logp, entropy)
    log_p, p = softmax64(logits, 1.0)
    onehot = (np.arange(700) == ids.numpy()[:, None]).astype(float)
    want = onehot - p - p * (log_p - (p * log_p).sum(1, keepdims=True))
    bound = 2e-7 if op.name in ("reference", "cuda-emulated") else 1e-5
    np.testing.assert_allclose(found.double().numpy(), want, rtol=0, atol=bound)


def test_autograd_agrees_with_log_softmax():
    logits, ids = make(6, 301, "fp32")
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    weight = torch.randn(6)
    logp, entropy = torch.ops.carerl.token_logprobs(ours, ids, 0.9)
    (weight * logp + 0.3 * entropy).sum().backward()
    rows = (plain / 0.9).log_softmax(-1)
    (weight * rows.gather(1, ids[:, None])[:, 0] - 0.3 * (rows.exp() * rows).sum(1)).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-4, atol=1e-6)
    # one output alone
    ours.grad = None
    torch.ops.carerl.token_logprobs(ours, ids)[0].sum().backward()
    torch.testing.assert_close(ours.grad.sum(1), torch.zeros(6), atol=1e-5, rtol=0)  # shifting a row changes nothing


@pytest.mark.parametrize("op", ON_CPU)
def test_masked_logits_have_no_probability_and_no_gradient(op):
    logits, ids = make(4, 5000, "fp32")
    logits[:, 100:4500] = -torch.inf  # whole tiles
    logits[:, 0] = -torch.inf
    ids = ids % 50 + 1
    logp, entropy = op("token_logprobs", logits, ids)
    log_p, p = softmax64(logits, 1.0)
    np.testing.assert_allclose(logp, log_p[np.arange(4), ids], atol=TOLERANCE)
    kept = np.where(p > 0, log_p, 0)
    np.testing.assert_allclose(entropy, -(p * kept).sum(1), atol=TOLERANCE)
    grad = op("token_logprobs_backward", torch.ones(4), torch.ones(4), logits, ids, logp, entropy)
    assert bool(grad.isfinite().all())
    assert float(grad[:, 100:4500].abs().max()) == 0.0 == float(grad[:, 0].abs().max())
    masked = torch.zeros(4, dtype=torch.int64)
    logp, entropy = op("token_logprobs", logits, masked)
    assert bool((logp == -torch.inf).all())
    nothing = op("token_logprobs_backward", torch.zeros(4), torch.zeros(4), logits, masked, logp, entropy)
    assert not bool(nothing.any())  # padding with a masked token is harmless where the loss ignores it


@pytest.mark.parametrize("op", ON_CPU)
def test_extreme_logits_stay_finite_and_nan_is_not_hidden(op):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e38, 3e38, 1.0], [0.0, 0.0, 0.0]])
    logp, entropy = op("token_logprobs", logits, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(logp, torch.tensor([0.0, 0.0, -np.log(3.0)]).float())
    torch.testing.assert_close(entropy, torch.tensor([0.0, 0.0, np.log(3.0)]).float())
    for where in (0, 2500, 4999):
        logits = torch.zeros(1, 5000)
        logits[0, where] = torch.nan
        assert bool(op("token_logprobs", logits, torch.tensor([7]))[0].isnan().all())


@pytest.mark.parametrize("op", ON_CPU)
def test_strided_rows_and_shift_invariance(op):
    logits, ids = make(6, 400, "fp32")
    wide = torch.full((6, 901), torch.nan)
    wide[:, 3:403] = logits
    for a, b in zip(op("token_logprobs", wide[:, 3:403], ids), op("token_logprobs", logits, ids), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    for a, b in zip(op("token_logprobs", logits + 8.0, ids), op("token_logprobs", logits, ids), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("op", ON_CPU)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(5)}, r"logits with 2 dimensions, found \(5,\)"),
        (
            {"logits": torch.zeros(5, 9, dtype=torch.float64)},
            "logits of dtype float32, bfloat16, float16, found float64",
        ),
        ({"logits": torch.zeros(9, 5).T}, "contiguous in its last dimension"),
        ({"ids": torch.zeros(4, dtype=torch.int64)}, r"ids \[5\] of dtype int64, found int64 \[4\]"),
        ({"ids": torch.zeros(5, dtype=torch.int32)}, "of dtype int64, found int32"),
        ({"ids": torch.tensor([0, 1, 9, 0, 0])}, r"ids in 0\.\.8, found 9 at row 2; give padding any valid id"),
        ({"ids": torch.tensor([0, -1, 1, 0, 0])}, r"found -1 at row 1"),
        ({"temperature": 0.0}, "a positive temperature, found 0"),
        ({"temperature": float("nan")}, "a positive temperature, found nan"),
    ],
)
def test_bad_input_is_named(op, change, message):
    args = {"logits": torch.zeros(5, 9), "ids": torch.zeros(5, dtype=torch.int64), "temperature": 1.0, **change}
    with pytest.raises(RuntimeError, match=f"carerl::token_logprobs: expected .*{message}"):
        op("token_logprobs", *args.values())
