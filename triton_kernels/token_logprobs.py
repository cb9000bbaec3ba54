"""Log-probability of one token and entropy of its distribution, and their gradient, without a row of probabilities."""

import torch
import triton
import triton.language as tl

from .. import _ops, reference_policy
from . import _blocks
from ._plan import launch


@triton.jit
def load_logits(row, start, vocabulary, inverse_temperature, WIDTH: tl.constexpr, TAIL: tl.constexpr):
    """logits / temperature of one tile in fp32, -inf beyond the vocabulary."""
    i = start + tl.arange(0, WIDTH)
    if TAIL:
        z = tl.load(row + i, mask=i < vocabulary, other=float("-inf")).to(tl.float32)
    else:
        z = tl.load(row + i).to(tl.float32)
    return z * inverse_temperature


@triton.jit
def accumulate(z, largest, sums, moments):
    """A tile into lanes of sum e^(z - largest) and sum e^(z - largest) (z - largest), largest being the running maximum."""
    higher = tl.maximum(largest, tl.max(z, axis=0))
    # While everything is masked there is no maximum to subtract; zero leaves -inf and NaN what they are.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    shift = tl.where(largest == float("-inf"), 0.0, largest - base)
    factor = tl.exp(shift)
    x = z - base
    e = tl.exp(x)
    moments = (moments + shift * sums) * factor + tl.where(x < -87.0, 0.0, e * x)  # 0 * -inf has no place in the sum
    return higher, sums * factor + e, moments


@triton.jit
def row_sums(row, vocabulary, inverse_temperature, WIDTH: tl.constexpr):
    """largest, log sum e^(z - largest) and the entropy of one row, which is read once."""
    largest = float("-inf") + tl.zeros([1], tl.float32)
    sums = tl.zeros([WIDTH], tl.float32)
    moments = tl.zeros([WIDTH], tl.float32)
    full = vocabulary // WIDTH * WIDTH
    for start in range(0, full, WIDTH):
        z = load_logits(row, start, vocabulary, inverse_temperature, WIDTH, False)
        largest, sums, moments = accumulate(z, largest, sums, moments)
    if full < vocabulary:
        z = load_logits(row, full, vocabulary, inverse_temperature, WIDTH, True)
        largest, sums, moments = accumulate(z, largest, sums, moments)
    total = tl.sum(sums.to(tl.float64), axis=0)
    log_sum = tl.log(total)
    return tl.max(largest, axis=0), log_sum, log_sum - tl.sum(moments.to(tl.float64), axis=0) / total


@triton.jit
def token_logit(row, id, vocabulary, inverse_temperature):
    """The logit of the row's token; an id outside the vocabulary has none (NaN) and reads nothing."""
    valid = (id >= 0) & (id < vocabulary)
    return tl.load(row + id, mask=valid, other=float("nan")).to(tl.float32) * inverse_temperature


@triton.jit
def token_logprobs_kernel(
    logits, ids, logp, entropy, vocabulary, stride, inverse_temperature: tl.float32, WIDTH: tl.constexpr
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    row = logits + t * stride
    chosen = token_logit(row, tl.load(ids + t), vocabulary, inverse_temperature)
    largest, log_sum, spread = row_sums(row, vocabulary, inverse_temperature, WIDTH)
    tl.store(logp + t, (chosen.to(tl.float64) - largest - log_sum).to(tl.float32))
    tl.store(entropy + t, spread.to(tl.float32))


@triton.jit
def gradient(
    row, out, id, start, vocabulary, inverse_temperature, log_total, along, spread, entropy,
    WIDTH: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One tile of (grad_logp (onehot - p) - grad_entropy p (log p + entropy)) / temperature."""
    log_p = load_logits(row, start, vocabulary, inverse_temperature, WIDTH, TAIL) - log_total
    p = tl.where(log_p < -87.0, 0.0, tl.exp(log_p))
    bounded = tl.where(log_p < -87.0, -87.0, log_p)  # p is zero there, log p may be -inf
    i = start + tl.arange(0, WIDTH)
    value = p * -along - p * (bounded + entropy) * spread + tl.where(i == id, along, 0.0)
    if TAIL:
        tl.store(out + i, value.to(out.dtype.element_ty), mask=i < vocabulary)
    else:
        tl.store(out + i, value.to(out.dtype.element_ty))


@triton.jit
def token_logprobs_backward_kernel(
    grad_logp, grad_entropy, logits, ids, logp, entropy, out, vocabulary, stride, inverse_temperature: tl.float32,
    WIDTH: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    row, to = logits + t * stride, out + t * vocabulary
    id = tl.load(ids + t)
    log_total = token_logit(row, id, vocabulary, inverse_temperature) - tl.load(logp + t)
    if log_total != log_total:  # a masked token (-inf - -inf), as on padding; or NaN, which stays NaN
        largest, log_sum, _ = row_sums(row, vocabulary, inverse_temperature, WIDTH)
        log_total = (largest + log_sum).to(tl.float32)
    along = tl.load(grad_logp + t) * inverse_temperature
    spread = tl.load(grad_entropy + t) * inverse_temperature
    own = tl.load(entropy + t)
    full = vocabulary // WIDTH * WIDTH
    for start in range(0, full, WIDTH):
        gradient(
            row, to, id, start, vocabulary, inverse_temperature, log_total, along, spread, own, WIDTH, False
        )  # fmt: skip
    if full < vocabulary:
        gradient(
            row, to, id, full, vocabulary, inverse_temperature, log_total, along, spread, own, WIDTH, True
        )  # fmt: skip


def _width(dtype: torch.dtype) -> int:
    """Four vector loads per thread and tile: the maximum of a tile takes two barriers, which want to be rare."""
    return 4 * _blocks.width(dtype)


def token_logprobs(logits, ids, temperature=1.0):
    _ops.check_token_logprobs("token_logprobs", logits, ids, temperature)
    reference_policy.check_ids("token_logprobs", logits, ids)
    logp = torch.empty(ids.shape, dtype=torch.float32, device=logits.device)
    entropy = torch.empty_like(logp)
    launch(
        token_logprobs_kernel, (logits.shape[0],), logits,
        logits, ids, logp, entropy, logits.shape[1], logits.stride(0), 1.0 / temperature, _width(logits.dtype),
    )  # fmt: skip
    return logp, entropy


def token_logprobs_backward(grad_logp, grad_entropy, logits, ids, logp, entropy, temperature=1.0):
    _ops.check_token_logprobs_backward(grad_logp, grad_entropy, logits, ids, logp, entropy, temperature)
    reference_policy.check_ids("token_logprobs_backward", logits, ids)
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    launch(
        token_logprobs_backward_kernel, (logits.shape[0],), logits,
        grad_logp, grad_entropy, logits, ids, logp, entropy, out, logits.shape[1], logits.stride(0),
        1.0 / temperature, _width(logits.dtype),
    )  # fmt: skip
    return out


KERNELS = {"token_logprobs": token_logprobs, "token_logprobs_backward": token_logprobs_backward}
