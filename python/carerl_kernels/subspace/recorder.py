"""Recording a stage: streaming gradient PCA while it runs, orientation and displacement from its parameter change at the end."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .fingerprint import hash_parameters
from .layout import Layout
from .pca import StreamingPCA
from .shards import Shards, local
from .store import BasisInfo, DomainBasis, StoredBasis


class StageStart:
    """Local parts of the parameters at the start of a stage, in a temporary directory that goes away with this object: the
    stage's displacement needs them once, at the end, and memory has no room for them.
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


class Recorder:
    """What the guard asks of the recorder of a stage, whatever the kind of basis. Calls of the model are nothing to it, unless a
    subclass listens to them.

    The start of the stage is kept on disk: no N-sized memory beside what the recorder itself has.

    Args:
        parameters: the tensors themselves (of sharded ones, the local parts), at the start of the stage.
    """

    def __init__(self, domain: str, layout: Any, parameters: Sequence[Tensor], architecture: str = ""):
        self.domain, self.layout, self.architecture = domain, layout, architecture
        self.steps = 0
        self.start = StageStart(domain, layout.names, parameters, layout.shards)

    def begin(self) -> None:
        """The stage begins."""

    def end(self) -> None:
        """The stage is over, however it ended."""
        self.start.close()

    def see(self, batch: Any) -> None:
        """A trainer says what the model is called with for the step that comes."""

    def paused(self) -> AbstractContextManager[None]:
        """Inside, calls of the model are not the stage's."""
        return nullcontext()

    def update(self, grads: Sequence[Tensor]) -> None:
        """Takes in the gradient of one optimizer step."""
        self.steps += 1

    def discard(self) -> None:
        """A step was dropped, or another domain's was taken: what the model was called with since the last one does not count."""

    def finish(self, parameters: Sequence[Tensor]) -> StoredBasis:
        """The basis of the stage, given the parameters at its end. RuntimeError: no step was taken, so there is none."""
        raise NotImplementedError

    def info(self, parameters: Sequence[Tensor], **known: Any) -> BasisInfo:
        """What is known about the basis of the stage that ends at these parameters."""
        end = hash_parameters(parameters, self.layout.shards)
        hashes = {"start_hash": self.start.hash, "end_hash": end}
        return BasisInfo.of(self.layout, self.domain, architecture=self.architecture, **hashes, **known)

    def check_steps(self, seen: int, note: str = "") -> None:
        """Refuses a stage without steps; see :meth:`finish`."""
        if seen == 0:
            raise RuntimeError(
                f"stage {self.domain!r}: expected at least one finite gradient, found none{note}; call "
                "guard.attach(optimizer) before training, inside or before the stage"
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything to go on after an interruption, the start of the stage included."""
        return {"domain": self.domain, "steps": self.steps, "start": self.start.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.start.load(state["start"])


class StageRecorder(Recorder):
    """Collects the directions along which one domain learns during one stage, by streaming PCA of every n-th gradient."""

    layout: Layout

    def __init__(
        self, domain: str, layout: Layout, parameters: Sequence[Tensor], architecture: str = "", every: int = 1
    ):
        super().__init__(domain, layout, parameters, architecture)
        self.every = every
        self.pca = StreamingPCA(layout, layout.k, device=parameters[0].device)

    def update(self, grads: Sequence[Tensor]) -> None:
        if self.steps % self.every == 0:
            self.pca.update(grads)
        self.steps += 1

    @torch.no_grad()
    def finish(self, parameters: Sequence[Tensor]) -> DomainBasis:
        """Truncates, orients every direction by the stage's parameter change and measures the displacement along it."""
        self.check_steps(int(self.pca.seen), f" ({int(self.pca.skipped)} skipped)")
        directions, singular_values = self.pca.directions()
        layout = self.layout
        moved = torch.zeros(layout.T, directions.shape[0], dtype=torch.float64, device=directions.device)
        energy = torch.zeros((), dtype=torch.float64, device=directions.device)
        for index, row, _ in layout.places():
            delta = self.start.delta(index, parameters[index])  # gradient convention: the step was -delta
            coeffs = torch.ops.carerl.project.list(
                [delta], directions.unsqueeze(0), [layout.offsets[index]], None, torch.float64
            )
            moved[row] += coeffs[0]
            energy += delta.double().square().sum()
        layout.shards.sum_(moved)
        total = float(layout.shards.sum_(energy))
        # Rows are flipped so that the stage moved against them: theta_start - theta_end has a positive coefficient.
        sign = torch.where(moved < 0, -1.0, 1.0).to(directions.dtype)  # [T, k]
        for _, row, columns in layout.places():
            directions[:, columns] *= sign[row].unsqueeze(1)
        seen = float(self.pca.energy.sum())
        info = self.info(
            parameters,
            steps=int(self.pca.seen),
            skipped=int(self.pca.skipped),
            gradient_capture=float(singular_values.square().sum()) / seen if seen > 0 else 0.0,
            displacement_capture=float(moved.square().sum()) / total if total > 0 else 0.0,
        )
        part = layout if layout.shards.sharded else None
        return DomainBasis(info, directions, singular_values.clone(), moved.abs(), None, part)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "pca": self.pca.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.pca.load_state_dict(state["pca"])
