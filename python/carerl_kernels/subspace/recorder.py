"""Recording a stage: streaming gradient PCA while it runs, orientation and displacement from its parameter change at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .fingerprint import hash_parameters
from .layout import Layout
from .pca import StreamingPCA
from .start import StageStart
from .store import BasisInfo, DomainBasis, StoredBasis


class Recorder(Protocol):
    """What the guard asks of the recorder of a stage, whatever the kind of basis."""

    domain: str
    layout: Any
    steps: int

    def begin(self) -> None:
        """The stage begins."""

    def end(self) -> None:
        """The stage is over, however it ended."""

    def see(self, batch: Any) -> None:
        """A trainer says what the model is called with for the step that comes."""

    def paused(self) -> AbstractContextManager[None]:
        """Inside, calls of the model are not the stage's."""

    def update(self, grads: Sequence[Tensor]) -> None:
        """Takes in the gradient of one optimizer step."""

    def discard(self) -> None:
        """A step was dropped, or another domain's was taken: what the model was called with since the last one does not count."""

    def finish(self, parameters: Sequence[Tensor]) -> StoredBasis:
        """The basis of the stage, given the parameters at its end."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class GradientRecorder:
    """What recorders have in common that look at gradients and parameters alone: calls of the model are nothing to them."""

    start: StageStart

    def begin(self) -> None:
        """Nothing to do."""

    def end(self) -> None:
        """The start of the stage is not needed any more."""
        self.start.close()

    def see(self, batch: Any) -> None:
        """Nothing to do."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing to pause."""
        yield

    def discard(self) -> None:
        """Nothing to do."""


class StageRecorder(GradientRecorder):
    """Collects the directions along which one domain learns during one stage.

    The start of the stage is kept on disk (a file that this object removes when it goes away, or a checkpoint of the
    caller's), because the stage's displacement needs it once, at the end: no N-sized memory beside the rows themselves.

    Args:
        domain: name of the domain.
        layout: where the parameters lie.
        parameters: the tensors themselves (of sharded ones, the local parts), at the start of the stage.
        start_checkpoint: safetensors file with the parameters at the start, under the layout's names; None writes one
            into a temporary directory.
        architecture: class name of the model, for the fingerprint.
        every: take in every n-th gradient.
    """

    def __init__(
        self,
        domain: str,
        layout: Layout,
        parameters: Sequence[Tensor],
        start_checkpoint: Path | str | None = None,
        architecture: str = "",
        every: int = 1,
    ):
        self.domain, self.layout, self.architecture, self.every = domain, layout, architecture, every
        self.pca = StreamingPCA(layout, layout.k, device=parameters[0].device)
        self.steps = 0
        self.start = StageStart(domain, layout.names, parameters, layout.shards, start_checkpoint)

    def update(self, grads: Sequence[Tensor]) -> None:
        """Takes in the gradient of one optimizer step (every n-th of them)."""
        if self.steps % self.every == 0:
            self.pca.update(grads)
        self.steps += 1

    @torch.no_grad()
    def finish(self, parameters: Sequence[Tensor]) -> DomainBasis:
        """Truncates, orients every direction by the stage's parameter change and measures the displacement along it.

        Raises:
            RuntimeError: no finite gradient arrived, so there is nothing to remember.
        """
        if int(self.pca.seen) == 0:
            skipped = int(self.pca.skipped)
            raise RuntimeError(
                f"stage {self.domain!r}: expected at least one finite gradient, found none ({skipped} skipped); call "
                "guard.attach(optimizer) before training, inside or before the stage"
            )
        directions, singular_values = self.pca.directions()
        layout = self.layout
        moved = torch.zeros(layout.T, directions.shape[0], dtype=torch.float64, device=directions.device)
        energy = torch.zeros((), dtype=torch.float64, device=directions.device)
        for call in layout.calls:
            for position, index in enumerate(call.indices):
                delta = self.start.delta(index, parameters[index])  # gradient convention: the step was -delta
                coeffs = torch.ops.carerl.project.list(
                    [delta], directions.unsqueeze(0), [layout.offsets[index]], None, torch.float64
                )
                moved[call.row_of(position)] += coeffs[0]
                energy += delta.double().square().sum()
        layout.shards.sum_(moved)
        total = float(layout.shards.sum_(energy))
        self._orient(directions, moved)
        seen = float(self.pca.energy.sum())
        info = BasisInfo.of(
            layout,
            self.domain,
            k=directions.shape[0],
            architecture=self.architecture,
            start_hash=self.start.hash,
            end_hash=hash_parameters(parameters, layout.shards),
            steps=int(self.pca.seen),
            skipped=int(self.pca.skipped),
            gradient_capture=float(singular_values.square().sum()) / seen if seen > 0 else 0.0,
            displacement_capture=float(moved.square().sum()) / total if total > 0 else 0.0,
        )
        part = layout if layout.shards.sharded else None
        return DomainBasis(info, directions, singular_values.clone(), moved.abs(), None, part)

    def _orient(self, directions: Tensor, moved: Tensor) -> None:
        """Flips rows so that the stage moved against them (theta_start - theta_end has a positive coefficient)."""
        sign = torch.where(moved < 0, -1.0, 1.0).to(directions.dtype)  # [T, k]
        for call in self.layout.calls:
            for position, index in enumerate(call.indices):
                start = self.layout.offsets[index]
                piece = self.layout.shards.pieces[index]
                stop = start + piece.stop - piece.start
                row = call.row_of(position)
                directions[:, start:stop] *= sign[row].unsqueeze(1)

    def state_dict(self) -> dict[str, Any]:
        """Everything to go on after an interruption, the start of the stage included (unless the caller keeps it)."""
        return {
            "domain": self.domain,
            "steps": self.steps,
            "pca": self.pca.state_dict(),
            "start": self.start.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.pca.load_state_dict(state["pca"])
        self.start.load(state["start"])
