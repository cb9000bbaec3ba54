"""Log-probabilities, entropies and advantages of a policy in plain PyTorch: what :mod:`reference` is for ops over rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import _ops

CHUNK = 1 << 16  # logits handled at once


def check_ids(op: str, logits: Tensor, ids: Tensor) -> None:
    """Raises for a token outside the vocabulary, where looking needs no sync."""
    if ids.device.type == "cpu" and ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < logits.shape[1]):
        wrong = int(((ids < 0) | (ids >= logits.shape[1])).nonzero()[0])
        _ops._require(
            False, op, f"ids in 0..{logits.shape[1] - 1}", f"{int(ids[wrong])} at row {wrong}", _ops.MASK_LATER
        )


def _row_chunks(op: str, logits: Tensor, ids: Tensor) -> Iterator[slice]:
    """Rows handled at once, so that no float32 copy of all logits exists."""
    check_ids(op, logits, ids)
    step = max(CHUNK // max(logits.shape[1], 1), 1)
    for start in range(0, logits.shape[0], step):
        yield slice(start, start + step)


def token_logprobs(logits, ids, temperature=1.0):
    _ops.check_token_logprobs("token_logprobs", logits, ids, temperature)
    logp = torch.empty(ids.shape, dtype=torch.float32, device=logits.device)
    entropy = torch.empty_like(logp)
    for rows in _row_chunks("token_logprobs", logits, ids):
        row = (logits[rows].double() / temperature).log_softmax(-1)
        logp[rows] = row.gather(1, ids[rows, None])[:, 0].float()
        entropy[rows] = torch.special.entr(row.exp()).sum(-1).float()
    return logp, entropy


def token_logprobs_backward(grad_logp, grad_entropy, logits, ids, logp, entropy, temperature=1.0):
    """`(grad_logp (onehot - p) - grad_entropy p (log p + entropy)) / temperature`; log p comes from the logits again."""
    _ops.check_token_logprobs_backward(grad_logp, grad_entropy, logits, ids, logp, entropy, temperature)
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    for rows in _row_chunks("token_logprobs_backward", logits, ids):
        log_p = (logits[rows].double() / temperature).log_softmax(-1)
        p = log_p.exp()
        # entr(p) = -p log p is zero where p is
        grad = grad_entropy[rows, None] * (torch.special.entr(p) - p * entropy[rows, None]) - grad_logp[rows, None] * p
        grad.scatter_add_(1, ids[rows, None], grad_logp[rows, None].double())
        out[rows] = (grad / temperature).to(out.dtype)
    return out


def _members(ids: Tensor) -> Tensor:
    """The rank `[B]` of every id among the distinct ones. Not torch.unique: the size of its result is a host sync."""
    ordered, order = ids.sort(stable=True)
    first = torch.cat([ordered.new_zeros(1), (ordered[1:] != ordered[:-1]).to(ordered.dtype)])
    return torch.empty_like(ids).scatter_(0, order, first.cumsum(0)).long()


def group_advantages(rewards, group_ids, domain_ids=None, mode="group", eps=1e-6):
    """Rewards relative to the mean of their group (the completions of one prompt), on a scale that `mode` chooses.

    * `group`: `(r - mean_g) / (std_g + eps)` with the unbiased std, GRPO (arXiv:2402.03300) as TRL and verl have it;
    * `domain`: `(r - mean_g) / (std_d + eps)` with the std pooled over those groups of the domain whose rewards
      differ (all groups are one domain without `domain_ids`): no domain dominates for the spread of its rewards, and
      within one no prompt gains weight for being nearly unanimous;
    * `none`: `r - mean_g`, Dr. GRPO (arXiv:2503.20783).

    A group whose rewards are all equal teaches nothing and gets exact zeros, whatever the rounding of its mean. A NaN
    is a completion that was not judged: advantage 0, and no part in any mean or spread.

    Args:
        rewards: `[B]`; infinity is refused on the CPU (elsewhere that would be a host sync).
        group_ids, domain_ids: `[B]` integers, in any order. A group belongs to the domain of its completions.
        eps: added to the standard deviation: rewards that differ by rounding stay small.

    Returns:
        `[B]` float32.
    """
    _ops.check_group_advantages(rewards, group_ids, domain_ids, mode, eps)
    r = rewards.detach().double()
    if r.numel() == 0:
        return r.float()
    if r.device.type == "cpu" and bool(r.isinf().any()):
        at = int(r.isinf().nonzero()[0])
        _ops._require(False, "group_advantages", "finite rewards, or NaN for those not judged", f"{r[at]} at {at}")
    judged = ~r.isnan()
    group, zeros = _members(group_ids), torch.zeros_like(r)

    def total(index: Tensor, values: Tensor) -> Tensor:
        return zeros.index_add(0, index, values)

    value = r.nan_to_num(0.0)
    count = total(group, judged.double())
    centred = value - (total(group, value) / count.clamp(min=1))[group]
    low = zeros.scatter_reduce(0, group, torch.where(judged, r, torch.inf), "amin", include_self=False)
    high = zeros.scatter_reduce(0, group, torch.where(judged, r, -torch.inf), "amax", include_self=False)
    informative = judged & (high > low)[group]
    centred = torch.where(informative, centred, 0.0)
    if mode != "none":
        index = group if mode == "group" else _members(torch.zeros_like(group) if domain_ids is None else domain_ids)
        # A group of n completions has n - 1 degrees of freedom, and a domain those of its groups that differ at all.
        freedom = total(index, informative.double() * ((count - 1) / count.clamp(min=1))[group])
        centred = centred / ((total(index, centred.square()) / freedom.clamp(min=1)).sqrt() + eps)[index]
    return centred.float()
