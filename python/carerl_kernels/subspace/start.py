"""The start of a stage, kept on disk: its displacement is needed once, at the end, and memory has no room for it."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .fingerprint import hash_parameters
from .shards import Shards, local


class StageStart:
    """Local parts of the parameters at the start of a stage, in a temporary directory that goes away with this object.

    Args:
        domain: for messages.
        shards: what of every parameter lives here.
    """

    def __init__(self, domain: str, names: Sequence[str], tensors: Sequence[Tensor], shards: Shards):
        self.domain, self.names, self.shards = domain, tuple(names), shards
        self._keep(dict(zip(self.names, tensors, strict=True)))

    def _keep(self, tensors: Mapping[str, Tensor]) -> None:
        directory = tempfile.mkdtemp(prefix="carerl-stage-")
        self.close = weakref.finalize(self, shutil.rmtree, directory, True)  # at the latest when this object goes away
        self.path = Path(directory) / "start.safetensors"
        try:
            # Tied tensors cannot stand twice in one file, but parameters are listed once.
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, self.path)
        except Exception as error:
            self.close()
            raise OSError(
                f"could not keep the start of stage {self.domain!r} in {self.path.parent}: {error}; free space, or set TMPDIR"
            ) from error
        self.hash = hash_parameters(self.tensors(), self.shards)

    def tensors(self) -> Iterator[Tensor]:
        """Local parts, one at a time, in order."""
        with safe_open(self.path, framework="pt") as file:
            for name in self.names:
                yield file.get_tensor(name)

    def delta(self, index: int, now: Tensor) -> Tensor:
        """Local part of theta_start - theta_now (gradient convention) of one parameter, float32."""
        with safe_open(self.path, framework="pt") as file:
            start = file.get_tensor(self.names[index])
        return start.to(now.device, torch.float32) - now.detach().float()

    def energy(self, parameters: Sequence[Tensor]) -> float:
        """Squared norm of the change since, over all processes."""
        total = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
        for index, now in enumerate(parameters):
            total += self.delta(index, now).norm(dtype=torch.float64).square().to(total.device)
        return float(self.shards.sum_(total))

    def state(self) -> dict[str, Any]:
        """For a checkpoint: the tensors themselves."""
        parts = enumerate(zip(self.names, self.tensors(), strict=True))
        return {name: self.shards.spread(i, part) if part.dim() else part for i, (name, part) in parts}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from :meth:`state`."""
        self.close()
        self._keep({name: local(part) for name, part in state.items()})
