"""`token_logprobs`, forward and backward, against PyTorch. Of a case B is the number of tokens T and N the vocabulary V."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .cost import Case
from .expect import BASELINE_TOLERANCE, STORED_TOLERANCE, WrongResult, judged, relative
from .variants import NOT_RUN, OURS, Variant, compiled

TEMPERATURE = 0.7
ROWS_AT_ONCE = 32  # of the sharp version: fp32 rows that stay in a last-level cache
SAMPLED = 7  # rows of a gradient [T, V] that are compared


def textbook(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of all tokens of the vocabulary in fp32, then the wanted ones and the entropy."""
    logp = torch.log_softmax(logits.float() / TEMPERATURE, -1)
    return logp.gather(-1, ids.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


def log_softmax_gather(logits: Tensor, ids: Tensor) -> Tensor:
    """The least that is usually written: no entropy, in the dtype of the logits."""
    return torch.log_softmax(logits / TEMPERATURE, -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def _rows(count: int) -> Iterator[slice]:
    return (slice(start, start + ROWS_AT_ONCE) for start in range(0, count, ROWS_AT_ONCE))


def sharp(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """A few rows at a time, in one small buffer."""
    logp, entropy = torch.empty(len(ids)), torch.empty(len(ids))
    for at in _rows(len(ids)):
        part = torch.log_softmax(logits[at].float().div_(TEMPERATURE), -1)
        logp[at] = part.gather(-1, ids[at].unsqueeze(-1)).squeeze(-1)
        entropy[at] = -(part.exp() * part).sum(-1)
    return logp, entropy


def sharp_backward(grad_logp: Tensor, grad_entropy: Tensor, logits: Tensor, ids: Tensor, entropy: Tensor) -> Tensor:
    """Softmax once more, a few rows at a time; only the gradient has the size of the logits."""
    out = torch.empty_like(logits)
    for at in _rows(len(ids)):
        part = torch.log_softmax(logits[at].float().div_(TEMPERATURE), -1)
        weight = (part + entropy[at].unsqueeze(1)).mul_(grad_entropy[at].unsqueeze(1)).add_(grad_logp[at].unsqueeze(1))
        part.exp_().mul_(weight).neg_()
        part.scatter_add_(1, ids[at].unsqueeze(1), grad_logp[at].unsqueeze(1))
        out[at] = part.div_(TEMPERATURE)
    return out


def exact(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The same in float64, by another formula."""
    x = logits.double() / TEMPERATURE
    logp = x - torch.logsumexp(x, -1, keepdim=True)
    return logp.gather(-1, ids.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


class LogitsCase:
    """Inputs of a case, and what float64 makes of them."""

    def __init__(self, case: Case):
        self.case = case
        draw = torch.Generator().manual_seed(0)
        self.logits = torch.empty(case.B, case.N, dtype=case.grad).normal_(0, 3, generator=draw)
        self.ids = torch.randint(case.N, (case.B,), generator=draw)
        self.grad_logp = torch.randn(case.B, generator=draw)
        self.grad_entropy = 0.1 * torch.randn(case.B, generator=draw)
        self.sampled = torch.linspace(0, case.B - 1, SAMPLED).long().unique()
        parts = [exact(self.logits[at], self.ids[at]) for at in torch.arange(case.B).split(ROWS_AT_ONCE)]
        self.expected: dict[str, Tensor] = {
            "logp": torch.cat([part[0] for part in parts]),
            "entropy": torch.cat([part[1] for part in parts]),
        }
        self.logp, self.entropy = self.expected["logp"].float(), self.expected["entropy"].float()
        if case.op == "token_logprobs_backward":
            self.expected = {"grad_logits": self._exact_gradient()}

    def _exact_gradient(self) -> Tensor:
        """Of `sum(grad_logp * logp + grad_entropy * entropy)` for the sampled rows, by autograd in float64."""
        at = self.sampled
        with torch.enable_grad():
            x = self.logits[at].double().requires_grad_()
            token, entropy = exact(x, self.ids[at])
            total = (self.grad_logp[at] * token).sum() + (self.grad_entropy[at] * entropy).sum()
            return torch.autograd.grad(total, x)[0]

    def reset(self) -> None:
        """Nothing is changed by these ops."""

    def check(self, variant: str, outputs: Mapping[str, Any], exact: bool) -> dict[str, float]:
        """Relative errors of the outputs that there are.

        Raises:
            WrongResult: a larger one than allowed, or none of the outputs.
        """
        errors = {
            name: relative(outputs[name][self.sampled] if name == "grad_logits" else outputs[name], value)
            for name, value in self.expected.items()
            if name in outputs
        }
        if "logp" not in errors and "grad_logits" not in errors:
            raise WrongResult(f"{self.case.name}: {variant} returned none of {sorted(self.expected)}")
        stored = STORED_TOLERANCE[self.case.grad] if self.case.op.endswith("backward") else 1e-5
        return judged(self.case, variant, errors, lambda name: stored if exact else BASELINE_TOLERANCE)

    def variants(self, compiling: bool) -> tuple[dict[str, Variant], dict[str, str]]:
        """Competitors, ours first, and why others are missing."""
        if self.case.op != "token_logprobs":
            return self._backward(), {}
        make = lambda: _named(torch.compile(textbook, dynamic=False), self.logits, self.ids)  # noqa: E731
        way = compiled(make, self.reset, self) if compiling else NOT_RUN
        if isinstance(way, str):
            return self._forward(), {"compiled": way}
        return {**self._forward(), "compiled": way}, {}

    def _forward(self) -> dict[str, Variant]:
        x, op = (self.logits, self.ids), torch.ops.carerl.token_logprobs
        return {
            OURS: Variant(_named(lambda a, b: op(a, b, TEMPERATURE), *x), exact=True),
            "textbook": Variant(_named(textbook, *x)),
            "sharp": Variant(_named(sharp, *x), note=f"{ROWS_AT_ONCE} rows at a time"),
            "log_softmax+gather": Variant(lambda: {"logp": log_softmax_gather(*x)}, note="without entropy"),
        }

    def _backward(self) -> dict[str, Variant]:
        op, gradients = torch.ops.carerl.token_logprobs_backward, (self.grad_logp, self.grad_entropy)

        def ours() -> dict[str, Tensor]:
            out = op(*gradients, self.logits, self.ids, self.logp, self.entropy, TEMPERATURE)
            return {"grad_logits": out}

        def sharper() -> dict[str, Tensor]:
            return {"grad_logits": sharp_backward(*gradients, self.logits, self.ids, self.entropy)}

        with torch.enable_grad():
            leaf = self.logits.detach().requires_grad_()
            outputs = textbook(leaf, self.ids)  # what autograd keeps of it is not part of the time

        def autograd() -> dict[str, Tensor]:
            return {"grad_logits": torch.autograd.grad(outputs, leaf, gradients, retain_graph=True)[0]}

        return {
            OURS: Variant(ours, exact=True),
            "textbook": Variant(autograd, note="autograd"),
            "sharp": Variant(sharper, note=f"{ROWS_AT_ONCE} rows at a time"),
        }


def _named(function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], *x: Tensor) -> Callable[[], dict[str, Any]]:
    return lambda: dict(zip(("logp", "entropy"), function(*x), strict=True))
