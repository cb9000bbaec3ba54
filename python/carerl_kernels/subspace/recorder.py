"""Recording a stage: streaming gradient PCA while it runs, orientation and displacement from its parameter change at the end."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .layout import Layout
from .pca import StreamingPCA
from .store import BasisInfo, DomainBasis, hash_parameters


class StageRecorder:
    """Collects the directions along which one domain learns during one stage.

    The start of the stage is kept on disk (a file that this object removes when it goes away, or a checkpoint of the
    caller's), because the stage's displacement needs it once, at the end: no N-sized memory beside the rows themselves.

    Args:
        domain: name of the domain.
        layout: where the parameters lie.
        parameters: the tensors themselves, at the start of the stage.
        k, oversample, dtype: see :class:`StreamingPCA`.
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
        k: int,
        oversample: int = 4,
        dtype: torch.dtype = torch.float32,
        start_checkpoint: Path | str | None = None,
        architecture: str = "",
        every: int = 1,
    ):
        self.domain, self.layout, self.architecture, self.every = domain, layout, architecture, every
        self.pca = StreamingPCA(layout, k, oversample, dtype, parameters[0].device)
        self.steps = 0
        self._temporary: tempfile.TemporaryDirectory | None = None
        if start_checkpoint is None:
            self._keep_start({n: p.detach().cpu() for n, p in zip(layout.names, parameters, strict=True)})
        else:
            self.start = Path(start_checkpoint)
            _check_start(self.start, layout)
        self.start_hash = hash_parameters(self._start_tensors())

    def _keep_start(self, tensors: dict[str, Tensor]) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="carerl-stage-")
        self.start = Path(self._temporary.name) / "start.safetensors"
        try:
            save_file(tensors, self.start)
        except Exception as error:
            self._temporary.cleanup()
            raise OSError(
                f"could not keep the start of stage {self.domain!r} in {self.start.parent}: {error}; free space, set TMPDIR, "
                "or pass start_checkpoint="
            ) from error

    def _start_tensors(self):
        with safe_open(self.start, framework="pt") as file:
            for name in self.layout.names:
                yield file.get_tensor(name)

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
        moved = torch.zeros(self.layout.T, directions.shape[0], dtype=torch.float64, device=directions.device)
        energy = 0.0
        for call in self.layout.calls:
            for position, index in enumerate(call.indices):
                with safe_open(self.start, framework="pt") as file:
                    start = file.get_tensor(self.layout.names[index]).to(parameters[index].device, torch.float32)
                delta = start - parameters[index].detach().float()  # gradient convention: the step was -delta
                coeffs = torch.ops.carerl.project.list(
                    [delta], directions.unsqueeze(0), [self.layout.offsets[index]], None, torch.float64
                )
                moved[call.row_of(position)] += coeffs[0]
                energy += float(delta.double().square().sum())
        self._orient(directions, moved)
        seen = float(self.pca.energy.sum())
        info = BasisInfo(
            domain=self.domain,
            kind=self.layout.kind,
            k=directions.shape[0],
            architecture=self.architecture,
            names=self.layout.names,
            shapes=self.layout.shapes,
            start_hash=self.start_hash,
            end_hash=hash_parameters(parameters),
            steps=int(self.pca.seen),
            skipped=int(self.pca.skipped),
            gradient_capture=float(singular_values.square().sum()) / seen if seen > 0 else 0.0,
            displacement_capture=float(moved.square().sum()) / energy if energy > 0 else 0.0,
        )
        return DomainBasis(info, directions, singular_values.clone(), moved.abs())

    def _orient(self, directions: Tensor, moved: Tensor) -> None:
        """Flips rows so that the stage moved against them (theta_start - theta_end has a positive coefficient)."""
        sign = torch.where(moved < 0, -1.0, 1.0).to(directions.dtype)  # [T, k]
        for call in self.layout.calls:
            for position, index in enumerate(call.indices):
                start = self.layout.offsets[index]
                stop = start + torch.Size(self.layout.shapes[index]).numel()
                row = call.row_of(position)
                directions[:, start:stop] *= sign[row].unsqueeze(1)

    def state_dict(self) -> dict[str, Any]:
        """Everything to go on after an interruption, the start of the stage included (unless the caller keeps it)."""
        start: Any = str(self.start)
        if self._temporary is not None:
            start = dict(zip(self.layout.names, self._start_tensors(), strict=True))
        return {"domain": self.domain, "steps": self.steps, "pca": self.pca.state_dict(), "start": start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.pca.load_state_dict(state["pca"])
        if isinstance(state["start"], str):
            self.start = Path(state["start"])
            _check_start(self.start, self.layout)
        else:
            self._keep_start(state["start"])
        self.start_hash = hash_parameters(self._start_tensors())


def _check_start(path: Path, layout: Layout) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"start_checkpoint {path}: expected a readable safetensors file ({error})") from error
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        if found.get(name) != shape:
            raise ValueError(
                f"start_checkpoint {path}: expected {name} {list(shape)}, found {found.get(name, 'nothing')}"
            )
