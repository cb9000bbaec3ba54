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
    """Parameters at the start of a stage, in a temporary file or in a checkpoint of the caller's.

    Args:
        domain: The name of the domain, for messages.
        names: The names of the parameters.
        tensors: their local parts.
        shards: what of every parameter lives here.
        checkpoint: safetensors file with the whole parameters under these names; None writes the local parts into a temporary
            directory, which goes away with this object.

    Attributes:
        hash: The hash of the parameters at the start.
    """

    def __init__(
        self,
        domain: str,
        names: Sequence[str],
        tensors: Sequence[Tensor],
        shards: Shards,
        checkpoint: Path | str | None = None,
    ):
        self.domain, self.names, self.shards = domain, tuple(names), shards
        self._temporary: weakref.finalize[..., Any] | None = (
            None  # removes the directory, at the latest when this object goes away
        )
        if checkpoint is None:
            self._keep(dict(zip(self.names, tensors, strict=True)))
        else:
            self._refer(Path(checkpoint))
        self.hash = hash_parameters(self.tensors(), shards)

    def close(self) -> None:
        """Removes the temporary file; nothing is asked of the start after this."""
        if self._temporary is not None:
            self._temporary()

    def _keep(self, tensors: Mapping[str, Tensor]) -> None:
        self.close()
        directory = tempfile.mkdtemp(prefix="carerl-stage-")
        self._temporary = weakref.finalize(self, shutil.rmtree, directory, True)
        self.path = Path(directory) / "start.safetensors"
        try:
            # Tied tensors cannot stand twice in one file, but parameters are listed once.
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, self.path)
        except Exception as error:
            self.close()
            raise OSError(
                f"could not keep the start of stage {self.domain!r} in {self.path.parent}: {error}; free space, set TMPDIR, "
                "or pass start_checkpoint="
            ) from error

    def _refer(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise ValueError(f"start_checkpoint {path}: expected a readable safetensors file ({error})") from error
        for name, piece in zip(self.names, self.shards.pieces, strict=True):
            if found.get(name) != piece.shape:
                raise ValueError(
                    f"start_checkpoint {path}: expected {name} {list(piece.shape)}, found {found.get(name, 'nothing')}"
                )

    def tensors(self) -> Iterator[Tensor]:
        """Local parts, one at a time, in order."""
        with safe_open(self.path, framework="pt") as file:
            for name, piece in zip(self.names, self.shards.pieces, strict=True):
                if self._temporary is not None or not self.shards.sharded:
                    yield file.get_tensor(name)
                else:  # the whole parameter is in the caller's file
                    yield file.get_slice(name)[piece.rows] if piece.shape else file.get_tensor(name)

    def deltas(self, parameters: Sequence[Tensor]) -> Iterator[Tensor]:
        """Local parts of theta_start - theta_now (gradient convention), float32, one at a time, in order."""
        for start, now in zip(self.tensors(), parameters, strict=True):
            yield start.to(now.device, torch.float32) - now.detach().float()

    def delta(self, index: int, now: Tensor) -> Tensor:
        """The same of one parameter."""
        name, piece = self.names[index], self.shards.pieces[index]
        with safe_open(self.path, framework="pt") as file:
            whole = self._temporary is not None or not self.shards.sharded or not piece.shape
            start = file.get_tensor(name) if whole else file.get_slice(name)[piece.rows]
        return start.to(now.device, torch.float32) - now.detach().float()

    def state(self) -> Any:
        """For a checkpoint: the caller's path, or the tensors themselves."""
        if self._temporary is None:
            return str(self.path)
        parts = enumerate(zip(self.names, self.tensors(), strict=True))
        return {name: self.shards.spread(i, part) if part.dim() else part for i, (name, part) in parts}

    def load(self, state: Any) -> None:
        """Goes on from :meth:`state`."""
        if isinstance(state, str):
            self.close()
            self._temporary = None
            self._refer(Path(state))
        else:
            self._keep({name: local(part) for name, part in state.items()})
        self.hash = hash_parameters(self.tensors(), self.shards)
