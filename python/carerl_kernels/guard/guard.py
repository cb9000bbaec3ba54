"""CapabilityGuard: keep what a model can do while it is trained on something else."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from ..subspace import BasisError, StoredBasis
from ..subspace.fingerprint import hash_parameters
from ..subspace.kinds import KINDS, kind_of, rank_of
from ..subspace.observe import observe
from ..subspace.recorder import Recorder
from ..subspace.shards import local
from ..subspace.sites import unwrapped
from ..subspace.store import read_info
from .build import architecture_of, data_group, lay_out, new_stack, sides_of, trainable
from .checks import at_least
from .following import Following
from .gradients import set_aside
from .memory import Memory
from .mixed import MixedGradient
from .newcomer import Newcomer
from .optimizers import Census, real_optimizer
from .recording import Recording
from .report import Report
from .rules import Rule
from .settings import GuardOptions, Settings
from .stack import Stack

_UNSET: Any = object()


class CapabilityGuard:
    """Holds what a training run moves along the directions that earlier capabilities live on (DACSP of CARE-RL, 2606.00609).

    Directions of a capability come from prompts shown to the model (:meth:`protect`), from a stage recorded while it trains
    (:meth:`stage`), or from files. What holds it is a projection of the parameters (:mod:`carerl_kernels.guard.box`) behind any
    optimizer: every few steps once :meth:`attach` was called, or whenever :meth:`confine_` is.

    Args:
        model: the module whose trainable parameters are guarded, or pairs of name and parameter.
        rule: "bounded" lets a stage move along a direction by `bound` of what the recorded stage moved, and not at all along
            directions without a stage; "remove" not at all; "integrated", "instant" (the literal reading of the paper) and
            "probed" decide on the sign of every step, see :mod:`carerl_kernels.guard.rules`.
        process_group: over which the parameters of a plain list are sharded (each process gives a contiguous part of every
            flattened parameter). FSDP2's DTensors bring their own; DDP needs none.

    The other options, by name:
        basis: "input" (one-sided, r per weight matrix, of what is fed into it) or "block" (two-sided, r x r per weight matrix,
            from a stage's parameter change), whose memory is small enough for full fine-tuning; "per_matrix" (k directions for
            every weight matrix) or "flat" (k over all parameters), both from gradients. None is "input", or "per_matrix" where k
            or a basis_dtype asks for rows or the model is pairs. docs/evidence.md compares them.
        k: directions per domain of row bases, 64 by default; r: rank of "block", 16 by default, and of "input", 32.
        every: rules "bounded" and "remove": steps of one domain between corrections. Weights may be outside of their box by what
            the steps since then did; a stage's end, :meth:`detach` and :meth:`confine_` put them back.
        bound: a number for both sides, (against, along), or one of these per domain.
        aligned, conflict: weights of components along (at least 0, 1 passes) and against (0 removes) prior learning, for the
            rules that decide on signs; a number, or one per domain.
        apply_to: "update" corrects the parameters, whatever the optimizer made of the gradient; "grad" edits `p.grad` before
            the step (Adam largely normalises such an edit away).
        max_grad_norm: grad mode: clips the edited gradient (clip before the step as usual in update mode).
        probe_every: rule "probed": steps between probes; probe_adaptive: this is where the interval starts, and it follows how
            much successive probes agree. Signs that agree no more than a coin's fall back to "bounded".
        basis_dtype: storage of row directions: float32, bfloat16, float16, or block-scaled int8 or float8_e4m3fn.
        record_every: record every n-th gradient of a stage.
        track_energy: measure the share of updates that is aligned, conflicting, orthogonal and touched. In update mode this
            keeps one copy of the parameters.
        domains: all domain names, so that a misspelt one is an error; None accepts any.
        energy: basis "input": keep the fewest directions with this share of the inputs' energy, at most r.
        room: basis "input": in a matrix as many directions of all domains together as this share of its inputs, at most; those
            with the smallest shares of their domain's inputs give way.

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
        self.settings = Settings.of({"rule": rule, **options})
        settings = self.settings
        module = model if isinstance(model, nn.Module) else None
        inner = None if module is None else unwrapped(module)
        if module is None and not isinstance(model, Iterable):
            raise TypeError(
                f"expected a module, or pairs of name and parameter, found {type(model).__name__}; give the model as it was "
                "before torch.compile"
            )
        named = trainable(model)
        sides = sides_of(model, named)
        kind = kind_of(settings.basis, seen=bool(sides), k=settings.k, dtype=settings.basis_dtype)
        self.architecture = architecture_of(inner)
        self.parameters = [p for _, p in named]
        self.layout: Any = lay_out(named, kind, rank_of(kind, settings.k, settings.r), process_group, sides)
        self.data_group = data_group(model, self.layout)
        self.domains = None if settings.domains is None else tuple(settings.domains)
        self.seconds = {"act": 0.0, "record": 0.0, "probe": 0.0}
        self.device = local(self.parameters[0]).device
        self.memory = Memory(self.layout, settings, self.device)
        self._census = Census(dict(named), self.layout.covered_names, inner)
        self._recording = Recording(self.layout, settings, self.architecture, self.data_group, module, self._locals)
        self._following = Following(
            self.parameters, self.memory, self._recording, self._census, self._own, self.seconds
        )
        self._current: str | None = _UNSET  # domain of the batch; _UNSET: that of the stage
        self._seen: dict[str, None] = dict.fromkeys(self.domains or ())
        self._warned_of_mixed = False

    @property
    def rule(self) -> Rule:
        """See the class."""
        return self.settings.rule

    @property
    def apply_to(self) -> str:
        """See the class."""
        return self.settings.apply_to

    @property
    def max_grad_norm(self) -> float | None:
        """See the class; a trainer that clips may hand its limit over."""
        return self._following.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, limit: float | None) -> None:
        self._following.max_grad_norm = limit

    @property
    def stack(self) -> Stack:
        """Directions of all domains."""
        return self.memory.stack

    # ------------------------------------------------------------------------------------------------------ history

    @classmethod
    def load(cls, *paths: Path | str, model: nn.Module, **options: Any) -> CapabilityGuard:
        """A guard with the history in these files; `options` as for the constructor.

        Raises:
            BasisError: a file of another model, format or kind. A file whose end is neither the start of another file's
                stage nor the model's present weights only warns.
        """
        if not paths:
            raise ValueError(
                "expected at least one basis file, found none; make one with guard.protect(name, prompts, path=...), "
                "guard.stage(name, path=...) or `carerl basis record`"
            )
        first = read_info(paths[0])
        guard = cls(model, **{"basis": first.kind, KINDS[first.kind].rank: first.k, **options})
        bases = [StoredBasis.load(path, guard.layout) for path in paths]
        for basis in bases:
            guard.add(basis)
        known = {basis.info.start_hash for basis in bases}
        known.add(hash_parameters(guard._locals(), guard.layout.shards))
        for basis in bases:
            if basis.info.end_hash not in known:
                warnings.warn(
                    f"basis of domain {basis.info.domain!r} ends at weights that are neither another stage's start nor the "
                    "model's present weights; its directions may no longer be where that capability lives",
                    stacklevel=2,
                )
        return guard

    def protect(
        self,
        name: str,
        batches: Iterable[Any],
        path: Path | str | None = None,
        *,
        run: Callable[[Any], Any] | None = None,
        tokenizer: Any = None,
        positions: Callable[[Any], Tensor] | None = None,
        unseen: Literal["error", "free"] = "error",
        progress: bool = True,
    ) -> StoredBasis:
        """Protects what the model can do now, from prompts alone: no stage has to have been recorded.

        The model is shown the batches once, and the leading directions of what every weight matrix is fed become history: from
        here on nothing moves along them (`energy`, `r`, `room`; docs/evidence.md has what that keeps). 64 prompts with
        answers are a good number; prompts alone do, too.

        Args:
            name: of the domain.
            batches: what the model is called with: mappings of keyword arguments, tensors of token ids, tuples of arguments, or
                texts with a `tokenizer`. Attention masks are honoured.
            path: safetensors file to write, atomically.
            run, positions, unseen, progress: see :func:`carerl_kernels.subspace.observe.observe`.

        Returns:
            The recorded basis.

        Raises:
            ValueError: a basis of another kind than "input"; no batch; a covered weight of which nothing was seen.
        """
        self._known(name, recorded=True)
        self._census.check_model()
        module = self._recording.module
        if self._recording.sees != "inputs" or module is None:
            raise ValueError(
                "protect looks at what weights are fed: expected a guard with basis='input' built from a module, found basis="
                f"{self.layout.kind!r}{'' if module is not None else ' over pairs of names and parameters'}"
            )
        options = {"run": run, "tokenizer": tokenizer, "positions": positions, "unseen": unseen, "progress": progress}
        self.settle()  # what is shown to is what will be held
        with self._recording.paused():
            moments = observe(module, batches, self.layout, group=self.data_group, **options)
        if not len(self.stack):
            self._adapt(moments.layout(self.layout, self._locals()))
        basis = moments.basis(
            self.layout,
            name,
            energy=self.settings.energy,
            architecture=self.architecture,
            parameters=self._locals(),
        )
        self.add(basis)
        if path is not None:
            basis.save(path)
        return basis

    @torch.no_grad()
    def add(self, basis: StoredBasis | Path | str, *, rebase: bool = True) -> None:
        """Takes a recorded domain (or its file) into the history; an earlier recording of the same domain is replaced.

        Args:
            basis: of this model.
            rebase: whether all displacements count from here on; False: those of other domains go on.
        """
        basis = basis if isinstance(basis, StoredBasis) else StoredBasis.load(basis, self.layout)
        basis.check_model(self.layout, self.architecture)
        self._known(basis.info.domain, recorded=True)
        (self.memory.add if rebase else self.memory.adopt)(basis, self._locals())

    def basis(self, name: str) -> Any:
        """The recorded basis of a domain (rows rounded to `basis_dtype`): to inspect, or to save once more.

        Raises:
            KeyError: a domain without history.
        """
        self._with_history("basis", name)
        return self.stack.get(name)

    @property
    def history(self) -> list[str]:
        """Names of the domains with a basis, oldest first."""
        return self.memory.history

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

    @torch.no_grad()
    def confine_(self) -> None:
        """Puts the parameters back into their box now: before they are evaluated, saved or sent elsewhere.

        Idempotent, and free of any optimizer: every m steps, after a merge, once at the end of a run.

        Raises:
            RuntimeError: a rule that corrects steps one by one.
        """
        box = self.memory.box
        if box is None:
            raise RuntimeError(
                f"confine_: expected rule 'bounded' or 'remove' with apply_to='update', found {self.rule!r} with "
                f"{self.apply_to!r}, which corrects steps one by one"
            )
        started = time.perf_counter()
        if len(self.stack):
            box.confine_(self._locals())
        self.seconds["act"] += time.perf_counter() - started

    @torch.no_grad()
    def settle(self) -> None:
        """Corrects what waits for a correction: nothing, with a rule that corrects every step. For trainers, before they evaluate
        what a stage came to; its end and :meth:`detach` do it by themselves."""
        self._following.settle()

    @contextmanager
    def stage(
        self,
        name: str,
        path: Path | str | None = None,
        start_checkpoint: Path | str | None = None,
        inputs: Iterable[Any] | None = None,
        **shown: Any,
    ) -> Iterator[Recorder]:
        """Records a stage: on exit what it learned becomes history.

        Steps inside belong to this domain unless `guard.domain` says otherwise; only its own steps are recorded. If the
        block raises, nothing becomes history.

        Args:
            name: of the domain.
            path: safetensors file to write on exit, atomically.
            start_checkpoint: safetensors file with the parameters as they are now; None keeps a temporary one.
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
        recorder = current or self._recorder(name, start_checkpoint, inputs=inputs, **shown)
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
        self.add(basis)
        if path is not None:
            basis.save(path)

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
                raise RuntimeError(
                    f"probe of {name!r}: expected a gradient, found none; call loss.backward() inside the block"
                )
            with torch.no_grad():
                a = self.stack.project(self._following.gradients(), name)
            # A probe that is not finite leaves the sign of the one before.
            if self.rule == "probed" and bool(self.stack.all_finite(a)):
                self.memory.probes.add(name, a)
            self.seconds["probe"] += time.perf_counter() - started
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
        at_least("check_every", check_every, 1)
        if self._recording.sees == "change":
            raise ValueError(
                "open_domain: expected a basis of gradients or inputs, found 'block', whose directions come from the "
                "parameter change of all domains together; use guard.stage, or another basis"
            )
        if name in [recorder.domain for recorder in self._recording.active]:
            raise RuntimeError(f"domain {name!r} is being recorded already")
        recorder = self._recorder(name)
        recorder.begin()
        stack = new_stack(self.layout, torch.float32, self.device)
        self._recording.newcomers[name] = Newcomer(recorder, stack, check_every)

    def close_domain(self, name: str, path: Path | str | None = None) -> None:
        """Ends the recording of :meth:`open_domain`: what was found becomes history, above the noise floor or not.

        Raises:
            KeyError: the domain is not being recorded.
            RuntimeError: no gradient of the domain arrived.
        """
        newcomers = self._recording.newcomers
        if name not in newcomers:
            raise KeyError(f"close_domain: expected a domain opened before ({', '.join(newcomers)}), found {name!r}")
        newcomer = newcomers.pop(name)
        try:
            basis = newcomer.recorder.finish(self._locals())
        finally:
            newcomer.recorder.end()
        self.add(basis, rebase=False)
        if path is not None:
            basis.save(path)

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
        if self.rule not in ("bounded", "remove"):
            raise ValueError(
                f"mixed batches: expected rule 'bounded' or 'remove', found {self.rule!r}; what others' directions hold "
                "is removed from each domain's gradient, and no sign is asked for"
            )
        if self.max_grad_norm is not None:
            raise ValueError(
                f"mixed batches: expected max_grad_norm=None, found {self.max_grad_norm}; clip as usual after finish()"
            )
        if self._recording.active:
            names = ", ".join(recorder.domain for recorder in self._recording.active)
            raise ValueError(
                f"mixed batches: expected no recording in progress, found one of {names}; a step of several domains is no "
                "domain's own. Record each with guard.protect(name, its prompts), before or afterwards"
            )
        return MixedGradient(self.memory, self._following, self.seconds, self._known, self._recording.module)

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

    @torch.no_grad()
    def remove_(self, gradient: Sequence[Tensor]) -> None:
        """Removes what lies in the span of all history from a gradient, in place, without any rule's memory (GPM)."""
        stack = self.stack
        if len(stack):
            stack.remove_(gradient, stack.along(stack.seen(gradient), None))

    # ----------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on exactly: anchors, rule memory, statistics, a stage in progress, a hash of the weights. Not the
        bases: those are files; :meth:`add` them before :meth:`load_state_dict`.

        Under FSDP2 everything that is spread over processes is a DTensor: torch.distributed.checkpoint saves it, and loads it
        for another number of processes. Hand-made shards without DTensors are this process's part.
        """
        stage = self._recording.stage
        with torch.no_grad():
            state = self.memory.state_dict(self._locals(), self.max_grad_norm)
        return {**state, "seen": list(self._seen), "recorder": None if stage is None else stage.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from :meth:`state_dict`, before or after `attach` and `stage` of the same stage.

        Raises:
            ValueError: the state is of an earlier version, has another history or rule than this guard, or belongs to other
                weights than those the model has now.
        """
        self.memory.load_state_dict(state, self._locals(), self.max_grad_norm)
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
        memory, shards = self.memory, self.layout.shards
        return {
            "rule": self.rule,
            "apply_to": self.apply_to,
            "basis": self.layout.kind,
            "k": self.layout.k,
            "every": 1 if memory.box is None else self.settings.every,
            "steps": memory.statistics.steps,
            "dropped_steps": memory.statistics.dropped,
            "waiting": 0 if memory.box is None else memory.box.waiting,
            "touched_share": memory.statistics.touched_share,
            "domains": {name: memory.domain(name, self._locals()) for name in self.history},
            "open_windows": [n for n in self._seen if n not in self.history]
            + [n for n in self.history if memory.blind(n)],
            "unguarded": self._census.report(),
            "recording": {name: newcomer.as_dict() for name, newcomer in self._recording.newcomers.items()},
            **({"probes": memory.probes.report(self.history)} if self.rule == "probed" else {}),
            "seconds": dict(self.seconds),
            "communication": {
                "elements": shards.elements,
                "all_reduces": shards.calls,
                **self._following.communication,
            },
            "memory": memory.bytes(),
            "covered": self.layout.covered / self.layout.parameters,
        }

    # --------------------------------------------------------------------------------------------------------- internals

    def _recorder(self, name: str, start_checkpoint: Path | str | None = None, **shown: Any) -> Recorder:
        return self._recording.recorder(name, start_checkpoint, fixed=len(self.stack) > 0, **shown)

    def _adapt(self, layout: Any) -> None:
        """Another layout, while there is no history yet: how weights are used is known once they were seen."""
        if layout is self.layout or len(self.stack):
            return
        self.layout = self._recording.layout = layout
        self._census.covered = set(layout.covered_names)
        self.memory.adapt(layout)

    def _start_here(self) -> None:
        if not self._following.restored:
            self.settle()  # steps before this belong to what was before
            self.rebase()

    @torch.no_grad()
    def rebase(self) -> None:
        """Counts from the present parameters on: displacements and probes start afresh.

        `attach`, `stage`, `add` and `protect` do it. Call it after changing the parameters by hand (loading weights,
        merging, EMA): otherwise the next correction takes the change for training's and undoes it along protected directions.
        """
        self.memory.rebase(self._locals())

    def _with_history(self, what: str, name: str) -> None:
        if name not in self.stack.names:
            have = ", ".join(self.history) or "none yet"
            raise KeyError(f"{what}: expected a domain with history ({have}), found {name!r}")

    def _known(self, name: str, recorded: bool = False) -> None:
        if recorded:  # its numbers will be needed: better asked for now than when the stage ends
            self.settings.numbers_of(name)
        if self.domains is not None and name not in self.domains:
            raise ValueError(f"domain: expected one of {', '.join(self.domains)}, found {name!r}")
        self._seen[name] = None

    def _own(self) -> str | None:
        if self._current is not _UNSET:
            return self._current
        return self._recording.stage.domain if self._recording.stage is not None else None

    def _locals(self) -> list[Tensor]:
        """The parts of the parameters that live here, sharing their memory."""
        return [local(p) for p in self.parameters]


__all__ = ["BasisError", "CapabilityGuard"]
