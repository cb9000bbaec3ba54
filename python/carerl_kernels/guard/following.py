"""Following optimizers: when a step begins and when it is over, whether it counts, and what is corrected then."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._clock import Clock
from ..subspace.recorder import StageRecorder
from .gradients import finite_parts, gradients
from .memory import Memory
from .optimizers import Census, inside_another_step, refuse_copies, second_weights
from .recording import Recording


class Following:
    """The hooks of attached optimizers. Of several, the first to step begins a step, and it is over when all of them took
    it. `owner` says whose it is."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        memory: Memory,
        recording: Recording,
        census: Census,
        owner: Callable[[], str | None],
        clock: Clock,
    ):
        self.parameters, self._memory, self._recording, self._census = parameters, memory, recording, census
        self._owner, self._clock, self.locals = owner, clock, recording.locals
        self.edited = False  # the gradient of the step to come was edited already, one domain at a time
        self.restored = False  # state was loaded: the next attach or stage goes on instead of starting afresh
        self.known_finite = False  # the gradients of the step to come are finite: somebody has their norm
        self.communication = {"elements_last_step": 0, "all_reduces_last_step": 0}
        self._optimizers: list[torch.optim.Optimizer] = []
        self._handles: list[Any] = []
        self._stepped: set[int] = set()  # attached optimizers that have taken the step under way
        self._looked_for_copies: Any = None  # the correction for which that was done
        self._snapshot: list[Tensor] | None = None
        self._dropped = False  # this step was dropped for a non-finite gradient
        self._sent_before = 0, 0  # numbers and all-reduces before this step

    @property
    def attached(self) -> bool:
        """Whether optimizers are followed."""
        return bool(self._handles)

    def attach(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Puts the hooks on."""
        self._optimizers, self._looked_for_copies, self.edited, self.known_finite = list(optimizers), None, False, False
        self._stepped.clear()
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before))
            self._handles.append(optimizer.register_step_post_hook(self._after))

    def detach(self) -> None:
        """Takes the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizers = [], []
        if self._memory.box is not None:
            self._memory.box.also = None

    def settle(self) -> None:
        """Ends a step that only some of several optimizers have taken, and corrects what waits."""
        if self._stepped:
            self._end()
        self._memory.settle(self.locals())

    def gradients(self) -> list[Tensor]:
        """Of the guarded parameters; see :func:`carerl_kernels.guard.gradients.gradients`."""
        return gradients(self.parameters, self._memory.layout.names)

    def finite(self, tensors: Sequence[Tensor]) -> bool:
        """One flag for all gradients of all processes: the only synchronisation of a guarded step."""
        tensors = [tensor for tensor in tensors if tensor.numel()]
        flag = torch.ones((), dtype=torch.bool, device=self._memory.device)
        for device in dict.fromkeys(tensor.device for tensor in tensors):  # parameters may be spread over several
            here = [tensor for tensor in tensors if tensor.device == device]
            flag = flag & torch.ops.carerl.all_finite(here).to(flag.device)
        return bool(self._memory.layout.shards.all(flag))

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if inside_another_step(optimizer):
            return
        if any(callable(a) for a in (*args, *kwargs.values()) if a is not optimizer):
            raise RuntimeError(
                "a guarded optimizer.step() expected gradients that are there already, found a closure that computes them "
                "inside the step; call loss.backward() first and step() without arguments"
            )
        if id(optimizer) in self._stepped:  # the others sat this one out: a scaler skips them, or they step less often
            self._end()
        if self._stepped:
            return  # the first of several optimizers has looked at all gradients
        started, recorded_before = time.perf_counter(), self._recording.seconds
        memory, shards = self._memory, self._memory.layout.shards
        self._census.look(self._optimizers)
        self._sent_before = shards.elements, shards.calls
        held = [p for o in self._optimizers for group in o.param_groups for p in group["params"] if p.grad is not None]
        self._dropped = not (self.known_finite or self.finite(list(finite_parts(held))))
        if self._dropped:
            memory.statistics.dropped += 1
            self._recording.discard()
            for p in held:
                p.grad = None
            return
        own = self._owner()
        if not self.edited:  # before any edit: history is made of raw gradients
            self._record_and_edit(optimizer, own)
        elif len(memory.stack) and memory.box is not None:
            memory.box.release(self.locals())
        if len(memory.stack) and memory.settings.apply_to == "update" and not self.edited:
            if memory.box is not None:
                memory.box.begin(self.locals(), own)
            elif memory.settings.track_energy:
                self._snapshot = [p.clone() for p in self.locals()]
        recorded = self._recording.seconds - recorded_before
        self._clock.spend("record", recorded)
        self._clock.spend("act", time.perf_counter() - started - recorded)

    def _record_and_edit(self, optimizer: torch.optim.Optimizer, own: str | None) -> None:
        memory = self._memory
        edits = len(memory.stack) > 0 and memory.settings.apply_to == "grad"
        grads: list[Tensor] = []
        if edits or self._recording.wants_gradients:
            self._unscale(optimizer)
            grads = self.gradients()
        together = self._recorded_while_edited(own) if edits else None
        for basis in self._recording.update(own, grads, stage=together is None):
            memory.adopt(basis, self.locals())
        if memory.box is None:
            memory.steps.settle_probes()
        if edits:
            memory.steps.edit_gradients(grads, own, memory.max_grad_norm, together)

    def _recorded_while_edited(self, own: str | None) -> StageRecorder | None:
        """The recorder that a fused edit of this step's gradient serves, too."""
        stage, settings = self._recording.stage, self._memory.settings
        if not isinstance(stage, StageRecorder) or stage.domain != own or settings.record_every > 1:
            return None
        exact = settings.basis_dtype == torch.float32 and not self._recording.newcomers
        return stage if exact and self._memory.steps.fuses(self._memory.max_grad_norm) else None

    def _unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """A fused optimizer under GradScaler divides inside its step: what looks at gradients before has to divide now."""
        scale = getattr(optimizer, "grad_scale", None)
        if scale is None:
            return
        if len(self._optimizers) > 1:
            raise RuntimeError(
                "several fused optimizers under GradScaler: expected gradients that are unscaled before the first step, found "
                "grad_scale on one of them; call scaler.unscale_(optimizer) for each before scaler.step"
            )
        for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            p.grad.div_(scale.to(p.grad.device))
        optimizer.grad_scale = None  # type: ignore[attr-defined]

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if inside_another_step(optimizer):
            return
        self._stepped.add(id(optimizer))
        if len(self._stepped) == len(self._optimizers):
            self._end()

    def _end(self) -> None:
        self._stepped.clear()
        edited = self.edited
        self.restored = self.edited = self.known_finite = False
        if self._dropped:
            return
        started, memory = time.perf_counter(), self._memory
        if memory.settings.apply_to == "update":
            self._look_for_copies()
        if len(memory.stack) and memory.box is not None:
            if not edited:
                memory.box.step(self.locals())
        elif len(memory.stack) and memory.settings.apply_to == "update":
            memory.steps.edit_update(self.locals(), self._owner(), self._snapshot)
            self._snapshot = None
        shards, (elements, calls) = memory.layout.shards, self._sent_before
        sent = {"elements_last_step": shards.elements - elements, "all_reduces_last_step": shards.calls - calls}
        self.communication = sent
        memory.statistics.steps += 1
        memory.steps_here += 1
        memory.probes.step()
        self._clock.spend("act", time.perf_counter() - started)

    def _look_for_copies(self) -> None:
        """After a first step optimizers have their state: a second sequence of weights is confined, too, other copies refused."""
        box = self._memory.box
        if self._looked_for_copies is self._memory.correction:
            return
        second = None if box is None else second_weights(self._optimizers, self.parameters)
        refuse_copies(self._optimizers, self.parameters, second is not None)
        if box is not None:
            box.also = second
        self._looked_for_copies = self._memory.correction
