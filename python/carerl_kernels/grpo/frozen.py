"""Weights of an earlier step: what the KL term compares with, what a stage is drawn back to.

No second model: only trainable tensors are kept (of an adapter, the adapter's), sharded as the model is, and exchanged with the
model's for a forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..logprobs import evaluating
from ..subspace.shards import local
from .config import GRPOConfig
from .rundir import RunDirectory, load_tensors, save_tensors


class FrozenWeights:
    """A copy of a model's trainable parameters, as they are now."""

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
        """Inside, the model has the frozen weights, and is in eval mode; afterwards it has its own again, bit by bit."""
        self._exchange()
        try:
            with evaluating(self.model):
                yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, p in self.parameters.items():
            here, kept = local(p), self._kept[name]
            before = here.clone()
            here.copy_(kept)
            kept.copy_(before)


class EarlierWeights:
    """The frozen weights of a run, on the disk as long as a checkpoint needs them.

    The configuration says whether and with what the KL term compares, and where a stage ends.
    """

    def __init__(self, model: nn.Module, config: GRPOConfig, directory: RunDirectory | None) -> None:
        self.model, self.config, self.directory = model, config, directory
        self.reference: FrozenWeights | None = None  # the weights of the KL term
        self._start: FrozenWeights | None = None
        self._reference_step: int | None = None
        self._start_step: int | None = None

    def begin(self, index: int, offset: int, step: int, state: dict[str, Any] | None) -> FrozenWeights | None:
        """A stage begins, or goes on after an interruption: takes the present weights, or brings back those kept.

        Args:
            index, offset, step: The number of the stage, how many of its steps are done, and the step of the run.
            state: The state of the checkpoint that the run goes on from; None in between.

        Returns:
            `reference`.
        """
        config = self.config
        if config.kl_beta > 0:
            here = offset == 0 and (index == 0 or config.kl_reference == "stage")
            known = self.reference is not None
            self.reference = self.reference or FrozenWeights(self.model)
            if here or (state is not None and not known):
                self._reference_step = self._keep(
                    self.reference, step, None if here or state is None else state["reference"]
                )
        if config.stage_interpolation != 1:
            self._start = self._start or FrozenWeights(self.model)
            kept = None if state is None or offset == 0 else state["stage_start"]
            self._start_step = self._keep(self._start, step, kept)
        return self.reference

    def interpolate(self) -> None:
        """A stage is over: it ends part of the way from its start, where the configuration says so."""
        if self._start is not None:
            self._start.pull(self.config.stage_interpolation)

    def state(self) -> dict[str, int | None]:
        """The steps whose weights are kept, for a checkpoint."""
        return {"reference": self._reference_step, "stage_start": self._start_step}

    def _keep(self, weights: FrozenWeights, step: int, kept: int | None) -> int:
        """Takes the present weights, or those kept at an earlier step; returns the step they are of."""
        if kept is not None and self.directory is not None:
            load_tensors(self.directory.reference(kept), weights.parameters, weights.put)
            return kept
        weights.take()
        if self.directory is not None:
            save_tensors(self.directory.reference(step), weights.parameters, self.directory.ranks)
        return step
