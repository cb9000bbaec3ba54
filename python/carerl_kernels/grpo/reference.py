"""Weights of an earlier step: what the KL term compares with, what a stage is drawn back to.

No second model: only trainable tensors are kept (of an adapter, the adapter's), sharded as the model is, and exchanged with the
model's for a forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..subspace.shards import local


class FrozenWeights:
    """A copy of a model's trainable parameters, as they are now.

    Args:
        model: Whose `in_place` puts the copy into, for a moment.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._kept = {n: local(p).clone() for n, p in self.parameters.items()}

    @torch.no_grad()
    def take(self) -> None:
        """Copies the present weights."""
        for name, p in self.parameters.items():
            self._kept[name].copy_(local(p))

    @torch.no_grad()
    def pull(self, fraction: float) -> None:
        """Moves the model to kept + fraction * (model - kept)."""
        for name, p in self.parameters.items():
            local(p).copy_(torch.lerp(self._kept[name], local(p), fraction))

    @torch.no_grad()
    def put(self, name: str, value: Tensor) -> None:
        """Sets one tensor: this process's part of it."""
        self._kept[name].copy_(value)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the frozen weights, and is in eval mode, for the length of a block; bit by bit its own afterwards."""
        training = self.model.training
        self._exchange()
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, p in self.parameters.items():
            here, kept = local(p), self._kept[name]
            before = here.clone()
            here.copy_(kept)
            kept.copy_(before)
