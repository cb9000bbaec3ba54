"""CapabilityGuard: keep what a model can do while it is trained on something else."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from .._files import check_writable
from ..subspace import StoredBasis
from ..subspace.recorder import Recorder
from .following import Following
from .gradients import set_aside
from .mixed import MixedGradient
from .optimizers import real_optimizer
from .protection import Protection
from .report import Report, report_of
from .rules import Rule
from .settings import GuardOptions, Settings

_UNSET: Any = object()


class CapabilityGuard(Protection):
    """Holds what a training run moves along the directions that earlier capabilities live on (DACSP of CARE-RL, 2606.00609).

    Directions of a capability come from prompts shown to the model (:meth:`protect`), from a stage recorded while it trains
    (:meth:`stage`), or from files. What holds it is a projection of the parameters (:mod:`carerl_kernels.guard.box`) behind any
    optimizer: every few steps once :meth:`attach` was called, or whenever :meth:`confine_` is.

    The defaults follow from the comparisons in docs/evidence.md. Directions of inputs: directions of gradients end .09
    lower. 32 a matrix with 90 % of the inputs' energy: on seeds kept for choosing, twice as many with more energy were no
    better (.782, .773); tasks that share their form with what is to be kept want `r=64, energy=0.99` (all parameters;
    adapters do not). Every 8th step: not told apart from every step, for an eighth of the corrections. Half of a matrix's
    inputs at most (`room`): without the limit, eight domains leave little to learn in (.685 for .736).

    Args:
        model: the module whose trainable parameters are guarded, in DistributedDataParallel if it is, or pairs of name and
            parameter.
        rule: "bounded" lets a stage move along a direction by `bound` of what the recorded stage moved, and not at all along
            directions without a stage; "remove" not at all; "integrated", "instant" (one reading of the paper) and
            "probed" decide on the sign of every step, see :mod:`carerl_kernels.guard.rules`.
        process_group: over which the parameters of a plain list are sharded (each process gives a contiguous part of every
            flattened parameter). FSDP2's DTensors bring their own; DDP needs none.
        options: see :class:`~carerl_kernels.guard.settings.GuardOptions`.

    Raises:
        ValueError: an argument out of range, named with what was expected.
        TypeError: an option that there is not.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[tuple[str, nn.Parameter]],
        rule: Rule = "bounded",
        *,
        process_group: Any = None,
        **options: Unpack[GuardOptions],
    ):
        super().__init__(model, Settings.of({"rule": rule, **options}), process_group)
        self._following = Following(self.parameters, self.memory, self._recording, self._census, self._own, self._clock)
        self._current: str | None = _UNSET  # domain of the batch; _UNSET: that of the stage
        self._warned_of_mixed = False

    @property
    def max_grad_norm(self) -> float | None:
        """See the class; a trainer that clips may hand its limit over."""
        return self.memory.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, limit: float | None) -> None:
        self.memory.max_grad_norm = limit

    # ----------------------------------------------------------------------------------------------- where it attaches

    def attach(self, *optimizers: torch.optim.Optimizer) -> None:
        """Follows every step of these optimizers from now on, and drops steps whose gradient is not finite.

        With several (Muon for matrices, AdamW for the rest) a step is over when all of them have taken it. The parameters as
        they are now are where displacements count from; after loading other weights call :meth:`rebase`. Parameters that are not
        guarded are named in a warning, once.

        Raises:
            TypeError: not an optimizer, or one that keeps the weights elsewhere.
            RuntimeError: attached already, or a guarded parameter was replaced.
            ValueError: the optimizers hold none of the guarded parameters, or none were given.
        """
        real = [real_optimizer(optimizer) for optimizer in optimizers]
        if self._following.attached:
            raise RuntimeError(
                "this guard is attached already; call guard.detach() first, or attach all optimizers at once"
            )
        held = {id(p) for optimizer in real for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in held for p in self.parameters):
            raise ValueError(
                "expected an optimizer over the guarded model's parameters, found one that holds none of them; "
                "build optimizer and guard from the same model"
            )
        self._census.check_model()
        self._census.look(real)
        self._following.attach(real)
        self._start_here()

    @torch.no_grad()
    def detach(self) -> None:
        """Puts the parameters back into their box a last time and leaves the optimizers alone. Nothing when not attached."""
        if self._following.attached:
            self._following.settle()
            self._following.detach()

    @contextmanager
    def domain(self, name: str | Collection[str] | None) -> Iterator[None]:
        """Says which domain the batch of the optimizer steps inside came from; several or None for a mixed batch.

        The directions of every *other* domain act on it; on a mixed batch, or one of a domain without history, all do. A batch
        of several domains of which one has history is better served by :meth:`mixed`: a warning says so, once.
        """
        if name is not None and not isinstance(name, str):
            if not self._following.edited:
                self.meets_mixed(name)
            name = None
        if name is not None:
            self._known(name)
        before, self._current = self._current, name
        try:
            yield
        finally:
            self._current = before

    def gradient_norm(self, norm: Tensor | float) -> None:
        """Spares the next step the reading of all gradients that looks for NaN and infinity, if you have their norm already.

        It says nothing of a step after the next. A norm that is not finite changes nothing: gradients are read, and the step
        is dropped if one of them is not finite.

        Args:
            norm: Of all gradients of the optimizer's parameters, for example what `clip_grad_norm_` returned; in a distributed
                run the norm over all processes, so that all of them know the same.
        """
        self._following.known_finite = math.isfinite(norm)

    @torch.no_grad()
    def settle(self) -> None:
        self._following.settle()

    @contextmanager
    def stage(
        self, name: str, path: Path | str | None = None, inputs: Iterable[Any] | None = None, **shown: Any
    ) -> Iterator[Recorder]:
        """Records a stage: on exit what it learned becomes history.

        Steps inside belong to this domain unless `guard.domain` says otherwise; only its own steps are recorded. An
        exception inside makes no history.

        Args:
            path: safetensors file to write on exit, atomically. Whether it can be written is tried before the stage begins.
            inputs: basis "input": batches of the domain to show at the stage's end, as :meth:`protect` takes them; None keeps a
                sample of what the model is called with.
            shown: `run`, `tokenizer`, `positions`, `unseen`: see :meth:`protect`.

        Raises:
            RuntimeError: inside another stage, or no finite gradient arrived.
            OSError: a file could not be written; the basis is history all the same, and `guard.basis(name).save(path)`
                tries again.
        """
        self._known(name, recorded=True)
        self._census.check_model()
        current = self._recording.stage
        if current is not None and not (self._following.restored and current.domain == name):
            raise RuntimeError(f"expected no stage in progress, found {current.domain!r}; stages do not nest")
        if path is not None and self.layout.shards.rank == 0:
            check_writable(path)
        recorder = current or self._recorder(name, inputs=inputs, **shown)
        self._recording.stage = recorder
        self._start_here()
        before, self._current = self._current, name
        recorder.begin()
        try:
            yield recorder
            self.settle()
            basis = recorder.finish(self._locals())
        finally:
            recorder.end()
            self._recording.stage, self._current = None, before
        self._adapt(recorder.layout)
        self._keep(basis, path)

    @torch.no_grad()
    def recorded(self) -> StoredBasis:
        """The stage in progress as it would become history now; it goes on. For trainers that do not say when they end.

        Raises:
            RuntimeError: no stage in progress, or no finite gradient arrived yet.
        """
        if self._recording.stage is None:
            raise RuntimeError("recorded: expected a stage in progress, found none; enter guard.stage(name) first")
        return self._recording.stage.finish(self._locals())

    @contextmanager
    def probe(self, name: str) -> Iterator[None]:
        """Rule "probed": inside, call `loss.backward()` on the earlier domain's own loss on stored prompts.

        The gradient is projected on that domain's rows and thrown away; gradients gathered for training are put back. Entered
        several times before the next step (micro-batches), the projections add up: no second gradient is ever kept.

        Raises:
            KeyError: a domain without history.
            RuntimeError: no gradient arrived.
        """
        self._with_history("probe", name)
        entered = time.perf_counter()
        with set_aside(self.parameters):
            with self._recording.paused():
                yield
            started = time.perf_counter()
            if all(p.grad is None for p in self.parameters):
                raise RuntimeError(f"probe of {name!r}: expected a gradient, found none; call loss.backward() inside")
            with torch.no_grad():
                a = self.stack.project(self._following.gradients(), name)
            # A probe that is not finite leaves the sign of the one before.
            if self.rule == "probed" and bool(self.stack.all_finite(a)):
                self.memory.probes.add(name, a)
            self._clock.spend("probe", time.perf_counter() - started)
            self.memory.probes.seconds += time.perf_counter() - entered

    def probes_due(self) -> bool:
        """Whether rule "probed" wants fresh probes before the next step."""
        return self.rule == "probed" and self.memory.probes.due(self.history)

    # ---------------------------------------------------------------------------------------- domains that appear on the way

    def open_domain(self, name: str, check_every: int = 25) -> None:
        """Records a domain that appears in the middle of a run: from now on its own steps feed its basis.

        Its own steps are those inside `guard.domain(name)`. It acts on other domains' steps as soon as what it found explains
        more of its fresh gradients than noise would, and is renewed every `check_every` own steps; until then the report
        lists it as an open window. The displacement it knows is that of the whole run since it was opened.
        :meth:`close_domain` ends the recording; a checkpoint does not hold it, so open the domain again after resuming.

        Raises:
            ValueError: basis "block", which knows the parameter change only: in a mixed run that is every domain's.
            RuntimeError: the domain is being recorded already.
        """
        self._known(name, recorded=True)
        self._recording.open(name, check_every, self.device, fixed=len(self.stack) > 0)

    def close_domain(self, name: str, path: Path | str | None = None) -> None:
        """Ends the recording of :meth:`open_domain`: what was found becomes history, above the noise floor or not.

        Raises:
            KeyError: the domain is not being recorded.
            RuntimeError: no gradient of the domain arrived.
        """
        self._keep(self._recording.close(name), path, rebase=False)

    # -------------------------------------------------------------------------------------------------------- mixed batches

    def mixed(self) -> MixedGradient:
        """For the gradient of one step on a mixed batch: the directions of all *other* domains act on each domain's part of it.

        Pass the domains backward one after another, and say after each whose it was::

            parts = guard.mixed()
            for name, loss in losses.items():
                loss.backward()
                parts.gained(name)
            parts.finish()
            optimizer.step()

        What is removed is everything along those directions, whatever the guard does on batches of one domain. The step that
        follows is not corrected again; a box counts from where it ends. Clip after `finish`.

        Raises:
            ValueError: a rule that looks at signs; a norm limit, which comes after the edit; a recording in progress, for the
                steps of a mixed batch are nobody's.
        """
        return MixedGradient(self.memory, self._following, self._recording, self._clock, self._known)

    def meets_mixed(self, domains: Collection[str]) -> None:
        """Warns, once, that a mixed batch of these domains is about to be held along its own domains' directions."""
        held = [name for name in domains if name in self.history]
        if held and len(domains) > 1 and self.apply_to == "update" and not self._warned_of_mixed:
            self._warned_of_mixed = True
            warnings.warn(
                f"a batch mixes {', '.join(domains)}: as one step it is nobody's, so all history acts on it, that of "
                f"{', '.join(held)} too, and the model hardly learns. Train with editor='guard' (GRPOTrainer, GRPOConfig, "
                "CareGRPOTrainer; guard.mixed() in your own loop): on each domain's part the directions of the others act",
                stacklevel=3,
            )

    # ----------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on exactly: anchors, rule memory, statistics, a stage in progress, a hash of the weights. Not the
        bases: those are files; :meth:`add` them before :meth:`load_state_dict`.

        Under FSDP2 everything that is spread over processes is a DTensor: torch.distributed.checkpoint saves it, and loads it
        for another number of processes. Hand-made shards without DTensors are this process's part.
        """
        stage = self._recording.stage
        with torch.no_grad():
            state = self.memory.state_dict(self._locals())
        return {**state, "seen": list(self._seen), "recorder": None if stage is None else stage.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from :meth:`state_dict`, before or after `attach` and `stage` of the same stage.

        Raises:
            ValueError: the state is of an earlier version, has another history or rule than this guard, or belongs to other
                weights than those the model has now.
        """
        self.memory.load_state_dict(state, self._locals())
        self._seen.update(dict.fromkeys(state["seen"]))
        if state["recorder"] is not None:
            name = state["recorder"]["domain"]
            if self._recording.stage is None or self._recording.stage.domain != name:
                self._recording.stage = self._recorder(name)
            self._recording.stage.load_state_dict(state["recorder"])
        self._following.restored = True

    @torch.no_grad()
    def report(self) -> Report:
        """What the guard did and what it cannot protect: plain numbers, see :class:`~carerl_kernels.guard.report.Report`."""
        found = report_of(self.memory, self._census, self._recording, self._locals(), self._seen)
        found["seconds"] = dict(self.seconds)
        found["communication"] |= self._following.communication
        return found

    # --------------------------------------------------------------------------------------------------------- internals

    def _recorder(self, name: str, **shown: Any) -> Recorder:
        return self._recording.recorder(name, fixed=len(self.stack) > 0, **shown)

    def _start_here(self) -> None:
        if not self._following.restored:
            self.settle()  # steps before this belong to what was before
            self.rebase()

    def _own(self) -> str | None:
        if self._current is not _UNSET:
            return self._current
        return self._recording.stage.domain if self._recording.stage is not None else None
