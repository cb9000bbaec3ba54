"""Stages and newcomers: what is being recorded while the model trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import at_least
from ..subspace.kinds import KINDS
from ..subspace.layout import Layout
from ..subspace.matrices import MatrixLayout
from ..subspace.recorder import Recorder
from ..subspace.store import StoredBasis
from .build import new_stack
from .settings import Settings
from .stack import Stack, noise_floor

LEAST = 8
"""Fresh gradients that have to be explained before a basis may act."""


class Newcomer:
    """Records a domain that appears in the middle of a run, and asks of every fresh gradient how much the directions found so
    far explain *before* seeing it.

    In-sample capture says nothing while there are fewer gradients than directions; this is out of sample. The mean less two
    standard errors has to lie above the noise floor. `stack` is empty at first; `check_every` own steps lie between looks.
    """

    def __init__(self, recorder: Recorder, stack: Stack[Any, Any], check_every: int):
        self.recorder, self.stack, self.check_every = recorder, stack, check_every
        self.steps = 0
        self.acting = False
        self._shares: list[Tensor] = []

    def look(self, grads: Sequence[Tensor], parameters: Sequence[Tensor]) -> StoredBasis | None:
        """Takes in one gradient of the domain; gives a basis when it may act from now on, or has been renewed since."""
        if len(self.stack):
            self._shares.append(self.stack.explained(grads)[0])
        self.recorder.update(grads)
        self.steps += 1
        if self.steps % self.check_every:
            return None
        basis = self.recorder.finish(parameters)
        known = self.explained()
        if known is not None and known[0] - 2 * known[1] > noise_floor(self.stack.chance(self.recorder.domain)):
            self.acting = True
        self._shares = self._shares[-LEAST * 4 :]
        self.stack.put(basis, parameters)
        return basis if self.acting else None

    def explained(self) -> tuple[float, float] | None:
        """Mean share of fresh gradients' energy explained and its standard error; None before `LEAST` of them."""
        if len(self._shares) < LEAST:
            return None
        shares = torch.stack(self._shares)
        return float(shares.mean()), float(shares.std() / len(shares) ** 0.5)

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        known = self.explained()
        return {"steps": self.steps, "acting": self.acting, "explained": None if known is None else known[0]}


@dataclass
class Recording:
    """The recorders of a guard."""

    layout: Layout | MatrixLayout  # this and the next three: of the guard
    settings: Settings
    architecture: str
    data_group: Any
    module: nn.Module | None  # what the training calls; None where the guard was built from pairs
    locals: Callable[[], list[Tensor]]  # gives the parameters' local parts
    stage: Recorder | None = None  # of the stage in progress
    newcomers: dict[str, Newcomer] = field(default_factory=dict)  # of domains that appeared on the way
    seconds: float = 0.0  # spent recording

    @property
    def sees(self) -> str:
        """What recorders look at: "gradients", "change" or "inputs"."""
        return KINDS[self.layout.kind].sees

    def recorder(self, name: str, *, fixed: bool, **shown: Any) -> Recorder:
        """A new recorder of this guard's kind.

        Args:
            fixed: there is history, so that the layout has to stay.
            shown: what an input basis shows the model, and how.

        Raises:
            RuntimeError: an input basis of a guard without a module.
            ValueError: inputs to show, and a basis that does not look at them.
        """
        options: dict[str, Any] = {"architecture": self.architecture}
        shown = {key: value for key, value in shown.items() if value is not None}
        if self.sees != "inputs" and shown:
            raise ValueError(
                f"stage {name!r}: expected {', '.join(shown)} with basis='input' alone, found {self.layout.kind!r}"
            )
        if self.sees == "gradients":
            options["every"] = self.settings.record_every
        if self.sees == "inputs":
            if self.module is None:
                raise RuntimeError(
                    "an input basis is made of what the model is fed: expected a guard built from a module, found one built "
                    "from pairs of names and parameters"
                )
            options |= {"model": self.module, "energy": self.settings.energy, "group": self.data_group, "fixed": fixed}
        return KINDS[self.layout.kind].recorder(name, self.layout, self.locals(), **options, **shown)

    def open(self, name: str, check_every: int, device: torch.device, *, fixed: bool) -> None:
        """Begins to record a newcomer; see :meth:`CapabilityGuard.open_domain`."""
        at_least("check_every", check_every, 1)
        if self.sees == "change":
            raise ValueError(
                "open_domain: expected a basis of gradients or inputs, found 'block', whose directions come from the "
                "parameter change of all domains together; use guard.stage, or another basis"
            )
        if name in [recorder.domain for recorder in self.active]:
            raise RuntimeError(f"domain {name!r} is being recorded already")
        recorder = self.recorder(name, fixed=fixed)
        recorder.begin()
        self.newcomers[name] = Newcomer(recorder, new_stack(self.layout, torch.float32, device), check_every)

    def close(self, name: str) -> StoredBasis:
        """Ends the recording of a newcomer; what was found."""
        if name not in self.newcomers:
            raise KeyError(
                f"close_domain: expected a domain opened before ({', '.join(self.newcomers)}), found {name!r}"
            )
        recorder = self.newcomers.pop(name).recorder
        try:
            return recorder.finish(self.locals())
        finally:
            recorder.end()

    @property
    def wants_gradients(self) -> bool:
        """Whether gradients are looked at: newcomers ask of every one how much of it is known."""
        return bool(self.newcomers) or (self.stage is not None and self.sees == "gradients")

    @property
    def active(self) -> list[Recorder]:
        """All recorders in progress."""
        return ([] if self.stage is None else [self.stage]) + [n.recorder for n in self.newcomers.values()]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, no recorder looks: what the model is called with is not the stage's."""
        with ExitStack() as stack:
            for recorder in self.active:
                stack.enter_context(recorder.paused())
            yield

    def discard(self) -> None:
        """What was seen since the last step belongs to no step: it was dropped."""
        for recorder in self.active:
            recorder.discard()

    def update(self, own: str | None, gradient: Sequence[Tensor], stage: bool = True) -> list[StoredBasis]:
        """Feeds the recordings of this step's domain, and tells the others that it was not theirs.

        Args:
            gradient: of every parameter; nothing where nobody looks at it.
            stage: whether the stage's recorder is fed here, and not by the edit.

        Returns:
            Bases of newcomers that may act from now on, or have been renewed.
        """
        started, found = time.perf_counter(), []
        if self.stage is not None and own == self.stage.domain:
            if stage:
                self.stage.update(gradient)
        elif self.stage is not None:
            self.stage.discard()
        for name, newcomer in self.newcomers.items():
            if name == own:
                basis = newcomer.look(gradient, self.locals())
                found += [] if basis is None else [basis]
            else:
                newcomer.recorder.discard()
        self.seconds += time.perf_counter() - started
        return found
