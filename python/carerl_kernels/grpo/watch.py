"""What the trainer asks of a drift monitor, and the gradients it shows to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn

from ..logprobs import answer_loss
from ..task import Domain
from ..text import SpecialTokens

Scores = Mapping[str, Sequence[float | None]]


class Monitor(Protocol):
    """`carerl_kernels.monitor.DriftMonitor` provides it."""

    def step(
        self,
        step: int,
        metrics: Any = None,
        *,
        scores: Scores | None = None,
        losses: Callable[[], Mapping[str, float]] | None = None,
        acting: str | None = None,
    ) -> dict[str, Any]: ...
    def rebase(self, domains: Sequence[str]) -> Any: ...
    def gradients_due(self) -> bool: ...
    def gradients(self, name: str, *, training: bool = True) -> AbstractContextManager[Any]: ...
    def keep_gradients(self, name: str) -> Any: ...
    def domains_due(self, evaluation: bool = False) -> bool: ...
    def domain(self, name: str, optimizer: Any = None) -> AbstractContextManager[Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Any) -> Any: ...


def show_gradients(
    monitor: Monitor, model: nn.Module, tokenizer: Any, tokens: SpecialTokens, domains: Mapping[str, Domain]
) -> None:
    """Between backward and step: the batch's own gradient, as "batch", and that of every domain's loss on its stored examples.

    The monitor keeps them until its next step. The batch's gradient is in its place again afterwards; domains without
    probe_examples are not shown.
    """
    monitor.keep_gradients("batch")
    for name, domain in domains.items():
        if domain.probe_examples:
            with monitor.gradients(name, training=False):
                answer_loss(model, tokenizer, domain.probe_examples, tokens).backward()


def per_example(scores: Mapping[str, Sequence[tuple[float, int]]]) -> dict[str, list[float | None]]:
    """Mean score of every example from (sum, completions judged); None where none was judged."""
    return {name: [total / count if count else None for total, count in values] for name, values in scores.items()}
