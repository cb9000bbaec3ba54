"""Weights of an earlier step: what the KL term compares with, what a stage is drawn back to.

No second model: only trainable tensors are kept (of an adapter, the adapter's), sharded as the model is, and exchanged with the
model's for a forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..guard.build import trainable
from ..logprobs import evaluating
from ..subspace.shards import Shards, local, reshard
from .config import GRPOConfig
from .parallel import Ranks
from .rundir import RunDirectory, load_tensors, save_tensors

Named = nn.Module | Iterable[tuple[str, nn.Parameter]]


class KeptWeights:
    """The trainable weights as they are now, to come back to bit for bit.

    Args:
        model: a module, or pairs of name and parameter; of LoRA models the adapter alone is trainable.
        path: safetensors file that holds them; None: they stay in memory (of sharded parameters this process's parts).
    """

    def __init__(self, model: Named, path: Path | None = None) -> None:
        self._module = model if isinstance(model, nn.Module) else None
        self._ready()
        self.parameters = dict(trainable(model))
        self._shards = Shards.of(list(self.parameters.items()))
        self.path = path
        self._kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self) -> KeptWeights:
        """Keeps the present weights; collective where they are sharded."""
        self._ready()
        if self.path is None:
            self._kept = {name: local(p).detach().clone() for name, p in self.parameters.items()}
        else:
            save_tensors(self.path, self.parameters, Ranks.of(nn.ParameterList(self.parameters.values())))
        return self

    @torch.no_grad()
    def put_back(self) -> None:
        """The weights are those that were kept, bit for bit."""
        self._each(lambda name, parameter, kept: parameter.copy_(kept))

    @torch.no_grad()
    def mirror(self) -> float:
        """Moves the weights to kept - (present - kept); returns the norm of present - kept."""
        return self._move(lambda name, parameter, kept: wide(parameter) - wide(kept), -1.0)

    @torch.no_grad()
    def go(self, offset: Sequence[Tensor], scale: float) -> float:
        """Moves the weights to kept + scale * offset (a tensor per parameter); returns the norm of the offset."""
        offsets = dict(zip(self.parameters, offset, strict=True))
        return self._move(lambda name, parameter, kept: wide(offsets[name]), scale)

    @torch.no_grad()
    def pull(self, fraction: float) -> None:
        """Moves the weights to kept + fraction * (present - kept)."""
        self._each(lambda name, parameter, kept: parameter.copy_(torch.lerp(kept, parameter, fraction)))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the module has the kept weights, which are in memory, and is in eval mode; afterwards its own, bit by bit."""
        assert self._module is not None
        self._exchange()
        try:
            with evaluating(self._module):
                yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        def exchange(name: str, parameter: Tensor, kept: Tensor) -> None:
            before = parameter.clone()
            parameter.copy_(kept)
            kept.copy_(before)

        self._each(exchange)

    def load(self, path: Path) -> None:
        """Keeps, in memory, what a file has instead of the present weights."""
        self.take()
        load_tensors(path, self.parameters, lambda name, value: self._kept[name].copy_(value))

    def drop(self) -> None:
        """Forgets them; a file is deleted."""
        self._kept = {}
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _move(self, offset: Callable[[str, Tensor, Tensor], Tensor], scale: float) -> float:
        square = torch.zeros((), dtype=torch.float64)

        def move(name: str, parameter: Tensor, kept: Tensor) -> None:
            by = offset(name, parameter, kept)
            square.add_(by.double().square().sum().cpu())
            parameter.copy_(wide(kept).add(by, alpha=scale))

        self._each(move)
        place = next(iter(self.parameters.values())).device if self._shards.sharded else square.device
        return math.sqrt(float(self._shards.sum_(square.to(place))))

    def _each(self, work: Callable[[str, Tensor, Tensor], object]) -> None:
        """Calls `work(name, parameter, kept)` with this process's parts, of a file one after another."""
        self._ready()
        if self.path is None:
            for name, p in self.parameters.items():
                work(name, local(p), self._kept[name])
            return

        def read(name: str, kept: Tensor) -> None:
            parameter = local(self.parameters[name])
            work(name, parameter, kept.to(parameter.device))

        load_tensors(self.path, self.parameters, read)

    def _ready(self) -> None:
        if self._module is not None:
            reshard(self._module)


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least: differences of rounded weights are no rounded numbers."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class EarlierWeights:
    """The frozen weights of a run, on the disk as long as a checkpoint needs them.

    The configuration says whether and with what the KL term compares, and where a stage ends.
    """

    def __init__(self, model: nn.Module, config: GRPOConfig, directory: RunDirectory | None) -> None:
        self.model, self.config, self.directory = model, config, directory
        self.reference: KeptWeights | None = None  # the weights of the KL term
        self._start: KeptWeights | None = None
        self._reference_step: int | None = None
        self._start_step: int | None = None

    def begin(self, index: int, offset: int, step: int, state: dict[str, Any] | None) -> KeptWeights | None:
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
            self.reference = self.reference or KeptWeights(self.model)
            if here or (state is not None and not known):
                self._reference_step = self._keep(
                    self.reference, step, None if here or state is None else state["reference"]
                )
        if config.stage_interpolation != 1:
            self._start = self._start or KeptWeights(self.model)
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

    def _keep(self, weights: KeptWeights, step: int, kept: int | None) -> int:
        """Takes the present weights, or those kept at an earlier step; returns the step they are of."""
        if kept is not None and self.directory is not None:
            weights.load(self.directory.reference(kept))
            return kept
        weights.take()
        if self.directory is not None:
            save_tensors(self.directory.reference(step), weights.parameters, self.directory.ranks)
        return step
