"""Recording a stage: streaming gradient PCA while it runs, orientation and displacement from its parameter change at the end."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .fingerprint import hash_parameters
from .layout import Layout
from .pca import StreamingPCA
from .start import StageStart
from .store import BasisInfo, DomainBasis, StoredBasis


class Recorder:
    """What the guard asks of the recorder of a stage, whatever the kind of basis. Calls of the model are nothing to it, unless a
    subclass listens to them.

    The start of the stage is kept on disk, because the stage's displacement needs it once, at the end: no N-sized memory beside
    what the recorder itself has.

    Args:
        parameters: the tensors themselves (of sharded ones, the local parts), at the start of the stage.
        architecture: class name of the model, for the fingerprint.
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
        """The basis of the stage, given the parameters at its end.

        Raises:
            RuntimeError: no step was taken, so there is nothing to remember.
        """
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
