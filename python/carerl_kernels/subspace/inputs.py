"""One-sided input bases: the leading directions of what a stage's forward passes feed into every weight matrix (GPM)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..linalg import pca_core
from ..thin import WORKSPACE, full_precision, times, times_transposed
from .block import change_energy, check_steps
from .factored import FactoredBasis, orthonormal
from .fingerprint import hash_parameters
from .matrices import Group, MatrixLayout, Side
from .start import StageStart
from .store import BasisInfo

TOKENS = 64
"""Input vectors looked at per weight matrix and optimizer step, over all processes."""
OVERSAMPLE = 8


def input_sites(model: nn.Module, named: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[nn.Module, Side]]:
    """The module whose inputs each weight matrix multiplies, and from which side, by parameter name.

    Linear layers (LoRA's adapters are some) have a right side; transformers' Conv1D, whose weight is transposed, and embeddings,
    whose inputs are tokens, a left one. A weight that an embedding shares with an output layer counts as that layer's.
    """
    names = {id(parameter): name for name, parameter in named}
    sites: dict[str, tuple[nn.Module, Side]] = {}
    for module in model.modules():
        name = names.get(id(getattr(module, "weight", None)))
        if name is None:
            continue
        if isinstance(module, nn.Linear):
            sites[name] = (module, "right")
        elif isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D":
            sites.setdefault(name, (module, "left"))
    return sites


def spread(size: int, number: int, step: int) -> Tensor:
    """At most so many of ``size`` positions, one in each of as many equal bins.

    Where in its bin follows the golden ratio and differs from step to step: an even stride can meet the length of the sequences,
    and would look at one position in all of them.
    """
    if size <= number:
        return torch.arange(size)
    edges = torch.arange(number + 1) * size // number
    within = ((torch.arange(1, number + 1, dtype=torch.float64) + number * step) * 0.6180339887498949) % 1.0
    return edges[:-1] + (within * edges.diff()).long()


class InputRecorder:
    """Streams inputs of every covered matrix into a small sketch while a stage runs.

    Only forward passes with gradients count (training's own), or any inside :meth:`observing`; of each optimizer step the first
    one, ``TOKENS`` vectors spread over it. Where the model is called with an ``attention_mask=`` ``[B, T]``, as transformers'
    are, padding does not count; of layers that get another number of tokens (an output layer that is asked for some logits) it
    cannot be told.

    Args:
        domain, layout, parameters, start_checkpoint, architecture, every: see :class:`StageRecorder`.
        sites: from :func:`input_sites`.
        model: whose calls may bring a mask.
        energy: keep the fewest directions with this share of the inputs' energy, at most r.
        group: process group over which batches are spread; None for one process.
    """

    def __init__(
        self,
        domain: str,
        layout: MatrixLayout,
        parameters: Sequence[Tensor],
        sites: Mapping[str, tuple[nn.Module, Side]],
        model: nn.Module,
        energy: float = 0.9,
        start_checkpoint: Path | str | None = None,
        architecture: str = "",
        every: int = 1,
        group: Any = None,
    ):
        self.domain, self.layout, self.sites, self.energy, self.every = domain, layout, sites, energy, every
        self.architecture, self.group, self.model = architecture, group, model
        self.steps = 0
        self._text: tuple[torch.Size, Tensor] | None = (
            None  # of the last forward pass: its [B, T], which are no padding
        )
        self.start = StageStart(domain, layout.names, parameters, layout.shards, start_checkpoint)
        device = parameters[0].device
        width = layout.k + OVERSAMPLE
        self._sketches: dict[str, Tensor] = {}  # [width, n] rows, or [vocabulary] counts of tokens
        self._values: dict[str, Tensor] = {}  # [width]
        self._total: dict[str, Tensor] = {}  # energy seen
        for group_ in layout.groups:
            for _, name, _ in layout.matrices(group_):
                if self._counts_tokens(name):
                    self._sketches[name] = torch.zeros(group_.whole, dtype=torch.float64, device=device)
                else:
                    self._sketches[name] = torch.zeros(width, self._size(group_), device=device)
                    self._values[name] = torch.zeros(width, dtype=torch.float64, device=device)
                self._total[name] = torch.zeros((), dtype=torch.float64, device=device)
        self._buffer: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._observing = False
        self._missed = torch.zeros((), device=device)  # steps whose gradients came from no forward pass

    def _counts_tokens(self, name: str) -> bool:
        return isinstance(self.sites[name][0], nn.Embedding)

    @staticmethod
    def _size(group: Group) -> int:
        """Elements of an input vector."""
        return group.n if group.side == "right" else group.whole

    def begin(self) -> None:
        """Puts the forward hooks on."""
        self._handles.append(self.model.register_forward_pre_hook(self._see_mask, with_kwargs=True))
        for name in self._sketches:
            module = self.sites[name][0]
            self._handles.append(module.register_forward_hook(self._hook(name)))

    def end(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._buffer.clear()

    def _looks(self) -> bool:
        """Whether a forward pass now would count."""
        return self._observing or (torch.is_grad_enabled() and self.steps % self.every == 0)

    def _see_mask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not self._looks() or len(self._buffer) == len(self._sketches):
            return
        mask, self._text = kwargs.get("attention_mask"), None
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self._text = mask.shape, mask.flatten().nonzero().squeeze(1)

    def _positions(self, shape: torch.Size, device: torch.device, number: int | None = None) -> Tensor | slice:
        """Which tokens of ``[*shape]`` on a device to look at: those that are text, all or so many of them.

        A mask tells of inputs ``[B, T]``, or of the same in a row, as experts of a mixture get them.
        """
        text = None
        if self._text is not None and shape.numel() == self._text[0].numel() and len(shape) <= 2:
            text = self._text[1].to(device)  # layers may be spread over devices
        size = shape.numel() if text is None else text.numel()
        if number is None or size <= number:
            return slice(None) if text is None else text
        chosen = spread(size, number, self.steps).to(device)
        return chosen if text is None else text[chosen]

    def _hook(self, name: str) -> Any:
        counting = self._counts_tokens(name)

        def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if name in self._buffer or not args or not self._looks():
                return
            inputs = args[0].detach()
            if counting:
                tokens = inputs.reshape(-1)[self._positions(inputs.shape, inputs.device)]
                self._buffer[name] = torch.bincount(tokens, minlength=self._sketches[name].numel()).double()
            else:
                rows = inputs.reshape(-1, inputs.shape[-1])
                chosen = self._positions(inputs.shape[:-1], rows.device, max(1, TOKENS // self._world()))
                self._buffer[name] = rows[chosen].to(torch.float32, copy=True)

        return look

    def _world(self) -> int:
        return dist.get_world_size(self.group) if self.group is not None else 1

    def discard(self) -> None:
        """Forgets what the hooks have seen since the last step."""
        self._buffer.clear()
        self._text = None

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Inside, a forward pass counts whether it has gradients or not: to show prompts of the domain by themselves."""
        self.discard()
        self._observing = True
        try:
            yield
        finally:
            self._observing = False
        self._absorb()

    def update(self, grads: Sequence[Tensor]) -> None:
        """Takes in the inputs of one optimizer step."""
        if not self._buffer and self.steps % self.every == 0:
            self._missed += torch.stack([g.any() for g in grads]).any()
        self._absorb()
        self.steps += 1

    @torch.no_grad()
    def _absorb(self) -> None:
        for group in self.layout.groups:
            names = [name for _, name, _ in self.layout.matrices(group)]
            for name in filter(self._counts_tokens, names):
                self._count(name)
            sketched = [name for name in names if not self._counts_tokens(name)]
            samples = {name: self._sample(name, self._size(group)) for name in sketched}
            seen = [name for name in sketched if samples[name] is not None]
            step = max(1, WORKSPACE // (4 * self._size(group) * (TOKENS + self.layout.k + OVERSAMPLE)))
            for at in range(0, len(seen), step):
                self._sketch(seen[at : at + step], [samples[name] for name in seen[at : at + step]])
        self.discard()

    def _count(self, name: str) -> None:
        counts = self._buffer.get(name, torch.zeros_like(self._sketches[name]))
        if self.group is not None:
            dist.all_reduce(counts, group=self.group)
        self._sketches[name] += counts
        self._total[name] += counts.sum()

    def _sample(self, name: str, size: int) -> Tensor | None:
        """``[B, size]`` input vectors of all processes; None where no process has any."""
        rows = self._buffer.get(name)
        if self.group is None:
            return rows
        here = max(1, TOKENS // self._world())
        padded = torch.zeros(here, size, device=self._sketches[name].device)
        if rows is not None:
            padded[: rows.shape[0]] = rows
        gathered = padded.new_empty(here * self._world(), size)
        dist.all_gather_into_tensor(gathered, padded, group=self.group)
        return gathered  # zero rows add nothing

    def _sketch(self, names: list[str], samples: list[Any]) -> None:
        """One exact incremental SVD update of some sketches at once (MATH: streaming PCA)."""
        old = torch.stack([self._sketches[name] for name in names])
        B = max(s.shape[0] for s in samples)
        new = torch.stack([torch.nn.functional.pad(s, (0, 0, 0, B - s.shape[0])) for s in samples])
        both = torch.cat([old, new], dim=1)
        with full_precision(both.device):
            gram = (both @ both.mT).double()
            q, values, _ = pca_core(gram, torch.stack([self._values[name] for name in names]), 1.0)
            finite = q.isfinite().all()
            rotated = torch.where(finite, q.float() @ both, old)
        energy = gram.diagonal(dim1=-2, dim2=-1)[:, old.shape[1] :].sum(-1)
        for i, name in enumerate(names):
            self._sketches[name], self._values[name] = rotated[i], values[i]
            self._total[name] += torch.where(finite, energy[i], 0.0)

    @torch.no_grad()
    def finish(self, parameters: Sequence[Tensor]) -> FactoredBasis:
        """Truncates the sketches and measures how far the stage moved along them.

        Raises:
            RuntimeError: no step was taken, or gradients came but no forward pass was seen. Without either (no group of
                answers ever differed in reward) it warns, and the basis is empty: the domain stays an open window.
        """
        check_steps(self.domain, self.steps)
        if all(float(total) == 0 for total in self._total.values()):
            if float(self.layout.shards.sum_(self._missed.clone())) > 0:
                raise RuntimeError(
                    f"stage {self.domain!r}: expected forward passes with gradients inside the stage, found none; run the "
                    "domain's prompts through the model inside the stage, or inside recorder.observing()"
                )
            warnings.warn(
                f"stage {self.domain!r}: expected gradients to record, found zeros alone in its {self.steps} steps; its basis "
                "is empty and nothing will protect the domain. A reward that differs within groups makes gradients",
                stacklevel=2,
            )
        layout, pieces = self.layout, self.layout.shards.pieces
        left, right, values, moved = {}, {}, {}, {}
        held = 0.0
        moved_energy = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
        for group in layout.groups:
            for position, name, _ in layout.matrices(group):
                index = group.indices[position]
                columns, values[name] = self._columns(name, self._size(group))
                held += float(values[name].square().sum())
                delta = [self.start.delta(index, parameters[index]).view(group.m, group.n)]
                with full_precision(delta[0].device):
                    if group.side == "right":
                        right[name] = columns
                        moved[name] = times(delta, columns.unsqueeze(0))[0].double()
                        moved_energy += moved[name].square().sum()
                    else:
                        left[name] = columns[pieces[index].rows]
                        moved[name] = times_transposed(delta, left[name].unsqueeze(0))[0].double()
                        layout.shards.sum_(moved[name])
                        if layout.shards.rank == 0:
                            moved_energy += moved[name].square().sum()
        total = float(sum(self._total.values()))
        layout.shards.sum_(moved_energy)
        info = BasisInfo(
            domain=self.domain,
            kind=layout.kind,
            k=layout.k,
            architecture=self.architecture,
            names=layout.names,
            shapes=layout.shapes,
            start_hash=self.start.hash,
            end_hash=hash_parameters(parameters, layout.shards),
            steps=self.steps,
            skipped=0,
            gradient_capture=held / total if total > 0 else 0.0,
            displacement_capture=float(moved_energy)
            / max(change_energy(self.start, parameters, layout.shards), 1e-300),
        )
        return FactoredBasis(info, left, right, values, moved, layout if layout.shards.sharded else None)

    def _columns(self, name: str, size: int) -> tuple[Tensor, Tensor]:
        """Orthonormal columns ``[size, r]`` and singular values ``[r]``: as many as hold ``energy``, the rest zero."""
        r = self.layout.k
        if self._counts_tokens(name):
            squares, tokens = self._sketches[name].topk(min(r, size))
            columns = torch.zeros(size, r, device=squares.device)
            columns[tokens, torch.arange(tokens.numel(), device=squares.device)] = 1.0
        else:
            squares = self._values[name][:r].square()
            columns = torch.zeros(size, r, device=squares.device)
            columns[:, : squares.numel()] = self._sketches[name][:r].mT
        squares = torch.nn.functional.pad(squares, (0, r - squares.numel()))
        before = squares.cumsum(0) - squares
        keep = (before < self.energy * self._total[name]) & (squares > 0)
        columns = columns * keep.float()
        if not self._counts_tokens(name):
            columns = orthonormal(columns)
        return columns, torch.where(keep, squares, 0.0).sqrt()

    def state_dict(self) -> dict[str, Any]:
        """Everything to go on after an interruption."""
        return {
            "domain": self.domain,
            "steps": self.steps,
            "sketches": dict(self._sketches),
            "values": dict(self._values),
            "total": {name: t.clone() for name, t in self._total.items()},
            "missed": self._missed.clone(),
            "start": self.start.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        for mine, theirs in (
            (self._sketches, state["sketches"]),
            (self._values, state["values"]),
            (self._total, state["total"]),
        ):
            for name, value in theirs.items():
                mine[name] = value.to(mine[name].device, copy=True)
        if "missed" in state:
            self._missed.copy_(state["missed"])
        self.start.load(state["start"])
