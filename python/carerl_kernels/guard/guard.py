"""CapabilityGuard: three lines around ``optimizer.step()`` that keep one domain from eating another (DACSP)."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from .._ops import BASIS_DTYPES
from ..subspace import BasisError, BlockRecorder, Layout, MatrixLayout, ReplayRecorder, StageRecorder, StoredBasis
from ..subspace.fingerprint import hash_parameters
from ..subspace.layout import Kind, RowKind
from ..subspace.recorder import Recorder
from ..subspace.shards import local
from ..subspace.sites import unwrapped
from ..subspace.store import read_info
from .build import architecture_of, data_group, kind_of, lay_out, new_stack, rank_of, sides_of, trainable
from .checks import at_least, for_domain, one_of, pair, refuse_masters
from .frames import COMBINES, Combine
from .newcomer import Newcomer
from .probes import Probes
from .rules import RULES, Rule, RuleParams, RuleState, decide
from .stack import noise_floor
from .statistics import Statistics, energies

_UNSET = object()


class CapabilityGuard:
    """Projects what each optimizer step did onto the directions earlier stages learned along, and corrects it (DACSP).

    Args:
        model: the module whose trainable parameters are guarded, or pairs of name and parameter.
        rule: what passes; see :mod:`carerl_kernels.guard.rules`. The default, "bounded" by .1, is level with "remove" and learns
            new domains a little better (docs/evidence.md).
        basis: "input" (one-sided, r per weight matrix, from what is fed into it) or "block" (two-sided, r x r per
            weight matrix, from the stage's parameter change), whose memory is small enough for full fine-tuning; "per_matrix"
            (k directions for every weight matrix) or "flat" (k over all parameters), both from gradients. None is "input", or
            "per_matrix" where k or a basis_dtype asks for rows or the model is pairs. With three domains in sequence input
            directions kept the full learning rate and ended .14 above the best plain one and .09 above gradient directions
            at the rate that suits those (docs/evidence.md: five seeds; .19 and .04 above plain training on other tasks and
            in another order). With eight domains, at half of the learning rate, they ended .14 above it.
        k: directions per domain of row bases, 64 by default; r: rank of "block", 16 by default, and of "input", 32.
        combine: "symmetric" never reverses a component whatever the overlap; "sum" and "min_norm" for comparison.
        apply_to: "update" corrects the parameters after the step, whatever the optimizer made of the gradient, without a copy
            of them; "grad" edits ``p.grad`` before the step (Adam largely normalises such an edit away).
        aligned, conflict: weights of components along (at least 0, 1 passes) and against (0 removes) prior learning; a
            number, or one per domain.
        bound: rule "bounded": how far a stage may move along a direction in all, as a fraction of the recorded stage's own
            displacement: a number for both sides, (against, along), or one of these per domain.
        z, beta: significance level and moving-average decay of the rules that use them.
        norm_cap: update: the correction is at most this times the update's component in the guarded subspace;
            grad: the edited gradient is at most this times the raw one.
        max_grad_norm: grad mode: clips the edited gradient (clip before the step as usual in update mode).
        probe_every: rule "probed": steps between probes; probe_adaptive: this is where the interval starts, and it follows how
            much successive probes agree. Signs that agree no more than a coin's fall back to "bounded".
        basis_dtype: storage of the acting directions: float32, bfloat16, float16, or block-scaled int8 or float8_e4m3fn.
        record_every: record every n-th gradient of a stage.
        oversample: extra rows while recording.
        track_energy: measure the share of the update that is aligned, conflicting, orthogonal and touched. In update mode this
            keeps one copy of the parameters.
        domains: all domain names, so that a misspelt one is an error; None accepts any.
        energy: basis "input": keep the fewest directions with this share of the inputs' energy, at most r.
        room: basis "input": in a matrix as many directions of all domains together as this share of its inputs, at most; those
            with the smallest shares of their domain's inputs give way. With eight domains in a narrow model half was a
            little better than three quarters; with three it made no difference, to an MLP on bandits it did harm.
        process_group: over which the parameters of a plain list are sharded (each process gives a contiguous part of every
            flattened parameter). FSDP2's DTensors bring their own; DDP needs none.

    Raises:
        ValueError: an argument out of range, named with what was expected.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[tuple[str, nn.Parameter]],
        rule: Rule = "bounded",
        *,
        basis: Kind | None = None,
        k: int | None = None,
        r: int | None = None,
        combine: Combine = "symmetric",
        apply_to: str = "update",
        aligned: float | Mapping[str, float] = 1.0,
        conflict: float | Mapping[str, float] = 0.0,
        bound: float | tuple[float, float] | Mapping[str, float | tuple[float, float]] = 0.1,
        z: float = 3.0,
        beta: float = 0.95,
        norm_cap: float | None = None,
        max_grad_norm: float | None = None,
        probe_every: int = 20,
        probe_adaptive: bool = False,
        basis_dtype: torch.dtype = torch.float32,
        record_every: int = 1,
        oversample: int = 4,
        track_energy: bool = False,
        domains: Sequence[str] | None = None,
        energy: float = 0.9,
        room: float = 0.5,
        process_group: Any = None,
    ):
        one_of("rule", rule, RULES)
        one_of("combine", combine, COMBINES)
        one_of("apply_to", apply_to, ("update", "grad"))
        if rule == "bounded" and apply_to == "grad":
            raise ValueError(
                "rule 'bounded' compares with displacements of parameters: expected apply_to='update', found 'grad'; "
                "for gradients choose another rule, such as 'remove'"
            )
        if max_grad_norm is not None and apply_to == "update":
            raise ValueError(
                "max_grad_norm belongs to apply_to='grad'; in update mode clip before optimizer.step() as usual"
            )
        for name, number in (("z", z), ("norm_cap", norm_cap), ("max_grad_norm", max_grad_norm)):
            if number is not None and not 0 < number < float("inf"):
                raise ValueError(f"{name}: expected a positive number, found {number}")
        if not 0 <= beta < 1:
            raise ValueError(f"beta: expected 0 <= beta < 1, found {beta}")
        if not 0 < energy <= 1:
            raise ValueError(f"energy: expected 0 < energy <= 1, found {energy}")
        if not 0 < room <= 1:
            raise ValueError(f"room: expected 0 < room <= 1, found {room}")
        at_least("probe_every", probe_every, 1)
        at_least("record_every", record_every, 1)
        at_least("oversample", oversample, 0)
        if basis_dtype not in BASIS_DTYPES:
            raise ValueError(f"basis_dtype: expected one of {', '.join(map(str, BASIS_DTYPES))}, found {basis_dtype}")
        self._weights = {"aligned": aligned, "conflict": conflict, "bound": bound}
        for name, value in self._weights.items():
            for one in value.values() if isinstance(value, Mapping) else (value,):
                pair(name, one)
        named = trainable(model)
        sides = sides_of(model, named)
        basis = kind_of(basis, seen=bool(sides), k=k, dtype=basis_dtype)
        self._module = model if isinstance(model, nn.Module) else None
        self.architecture = architecture_of(model if self._module is None else unwrapped(self._module))
        self.parameters = [p for _, p in named]
        self.layout: Any = lay_out(named, basis, rank_of(basis, k, r), process_group, sides)
        self.energy, self.room, self._data_group = energy, room, data_group(model, self.layout)
        self.rule, self.combine, self.apply_to = rule, combine, apply_to
        self.z, self.beta, self.norm_cap, self.max_grad_norm = z, beta, norm_cap, max_grad_norm
        self.probe_adaptive = probe_adaptive
        self.probe_every, self.record_every, self.oversample = probe_every, record_every, oversample
        self.track_energy = track_energy
        self.domains = tuple(domains) if domains is not None else None
        self.seconds = {"act": 0.0, "record": 0.0, "probe": 0.0}

        self.device = local(self.parameters[0]).device
        self._stack = new_stack(self.layout, combine, basis_dtype, self.device, room)
        self._statistics = Statistics()
        self._recorder: Recorder | None = None
        self._handles: list[Any] = []
        self._current: Any = _UNSET  # domain of the batch; _UNSET: that of the stage
        self._seen: dict[str, None] = dict.fromkeys(self.domains or ())
        self._snapshot: list[Tensor] | None = None
        self._dropped = False  # this optimizer step was dropped for a non-finite gradient
        self._edited = False  # edit_domains made the gradient of the step to come: it is recorded and edited already
        self._restored = False  # state was loaded: the next attach or stage goes on instead of starting afresh
        self._probes = Probes(probe_every, probe_adaptive)
        self._newcomers: dict[str, Newcomer] = {}
        self._steps_here = 0  # since displacements were last counted from zero
        self._displaced: dict[str, float | None] = {}
        self._sent_before = 0, 0  # numbers and all-reduces before this step
        self._step_communication = {"elements_last_step": 0, "all_reduces_last_step": 0}
        # coefficients [T, K] of the parameters after the last step and when the stage began
        self._q_prev = self._q_start = torch.empty(0)
        self._resize()

    # ------------------------------------------------------------------------------------------------------ history

    @classmethod
    def load(cls, *paths: Path | str, model: nn.Module, **options: Any) -> CapabilityGuard:
        """A guard with the history recorded in these files; ``options`` as for the constructor.

        Raises:
            BasisError: a file of another model, format or kind. A file whose end is neither the start of another file's
                stage nor the model's present weights only warns.
        """
        if not paths:
            raise ValueError(
                "expected at least one basis file, found none; record one with guard.stage(name, path=...)"
            )
        first = read_info(paths[0])
        rank = "k" if first.kind in get_args(RowKind) else "r"
        guard = cls(model, **{"basis": first.kind, rank: first.k, **options})
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

    def add(self, basis: StoredBasis | Path | str) -> None:
        """Takes a recorded domain (or its file) into the history; an earlier recording of the same domain is replaced."""
        basis = basis if isinstance(basis, StoredBasis) else StoredBasis.load(basis, self.layout)
        basis.check_model(self.layout, self.architecture)
        self._known(basis.info.domain, recorded=True)
        self._close()
        with torch.no_grad():
            self._stack.put(basis, self._locals())
        self._resize()
        self.rebase()

    def basis(self, name: str) -> Any:
        """The recorded basis of a domain (rows rounded to ``basis_dtype``): to inspect, or to save once more.

        Raises:
            KeyError: a domain without history.
        """
        self._with_history("basis", name)
        return self._stack.get(name)

    @property
    def history(self) -> list[str]:
        """Names of the domains with a basis, oldest first."""
        return list(self._stack.names)

    # ----------------------------------------------------------------------------------------------- where it attaches

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Corrects every step of this optimizer from now on, and drops steps whose gradient is not finite.

        The parameters as they are now are where displacements count from; after loading other weights call :meth:`rebase`.

        Raises:
            TypeError: not an optimizer, or one that overwrites parameters from float32 masters.
            RuntimeError: already attached.
            ValueError: the optimizer holds none of the guarded parameters.
        """
        refuse_masters(optimizer)
        while hasattr(optimizer, "optimizer"):  # accelerate and others wrap the real one, which is where hooks work
            optimizer = optimizer.optimizer
            refuse_masters(optimizer)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"expected a torch.optim.Optimizer, found {type(optimizer).__name__}")
        if self._handles:
            raise RuntimeError("this guard is attached already; call guard.detach() first")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in held for p in self.parameters):
            raise ValueError(
                "expected an optimizer over the guarded model's parameters, found one that holds none of them; "
                "build optimizer and guard from the same model"
            )
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self._start_here()

    def detach(self) -> None:
        """Leaves the optimizer alone again. Does nothing when not attached."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def domain(self, name: str | None) -> Iterator[None]:
        """Says which domain the batch of the optimizer steps inside came from; None for a mixed batch.

        The rows of every *other* domain act on it; on a mixed batch, or one of a domain without history, all rows do.
        """
        if name is not None:
            self._known(name)
        before, self._current = self._current, name
        try:
            yield
        finally:
            self._current = before

    @contextmanager
    def stage(
        self,
        name: str,
        path: Path | str | None = None,
        start_checkpoint: Path | str | None = None,
        inputs: Iterable[Any] | None = None,
        **shown: Any,
    ) -> Iterator[Recorder]:
        """Records a stage: inside, gradients stream into the domain's basis; on exit it becomes history.

        Steps inside belong to this domain unless ``guard.domain`` says otherwise; only its own steps are recorded. If the
        block raises, nothing becomes history.

        Args:
            name: of the domain.
            path: safetensors file to write on exit, atomically.
            start_checkpoint: safetensors file with the parameters as they are now; None keeps a temporary one.
            inputs: basis "input": batches of the domain to show at the stage's end, as :func:`observe` takes them; None keeps a
                sample of what the model is called with.
            **shown: ``run``, ``tokenizer``, ``positions``: how, see :func:`observe`.

        Raises:
            RuntimeError: inside another stage, or no finite gradient arrived.
            OSError: a file could not be written; the basis is history all the same, and ``guard.basis(name).save(path)``
                tries again.
        """
        self._known(name, recorded=True)
        if self._recorder is not None and not (self._restored and self._recorder.domain == name):
            raise RuntimeError(f"expected no stage in progress, found {self._recorder.domain!r}; stages do not nest")
        recorder = self._recorder or self._new_recorder(name, start_checkpoint, inputs=inputs, **shown)
        self._recorder = recorder
        self._start_here()
        before, self._current = self._current, name
        recorder.begin()
        try:
            yield recorder
            basis = recorder.finish(self._locals())
        finally:
            recorder.end()
            self._recorder, self._current = None, before
        self._lay(recorder)
        self.add(basis)
        if path is not None:
            basis.save(path)

    @torch.no_grad()
    def recorded(self) -> StoredBasis:
        """The stage in progress as it would become history now; it goes on. For trainers that do not say when they end.

        Raises:
            RuntimeError: no stage in progress, or no finite gradient arrived yet.
        """
        if self._recorder is None:
            raise RuntimeError("recorded: expected a stage in progress, found none; enter guard.stage(name) first")
        return self._recorder.finish(self._locals())

    def _lay(self, recorder: Recorder) -> None:
        """Before there is history, weights lie as they were seen to be used."""
        layout = getattr(recorder, "layout", self.layout)
        if isinstance(layout, MatrixLayout) and layout is not self.layout and not len(self._stack):
            self.layout = layout
            self._stack = new_stack(layout, self.combine, torch.float32, self.device, self.room)
            self._resize()

    def _new_recorder(self, name: str, start_checkpoint: Path | str | None = None, **shown: Any) -> Recorder:
        common = {"start_checkpoint": start_checkpoint, "architecture": self.architecture}
        if isinstance(self.layout, Layout):
            k, every = self.layout.k, self.record_every
            return StageRecorder(
                name,
                self.layout,
                self._locals(),
                k,
                self.oversample,
                every=every,
                **common,  # type: ignore[arg-type]
            )
        if self.layout.kind == "block":
            return BlockRecorder(name, self.layout, self._locals(), **common)  # type: ignore[arg-type]
        if self._module is None:
            raise RuntimeError(
                "recording an input basis shows the model batches: expected a guard built from a module, found one built "
                "from pairs of names and parameters"
            )
        return ReplayRecorder(
            name,
            self.layout,
            self._locals(),
            self._module,
            energy=self.energy,
            group=self._data_group,
            fixed=bool(len(self._stack)),
            **common,  # type: ignore[arg-type]
            **shown,
        )

    def _recorders(self) -> list[Recorder]:
        return [*([] if self._recorder is None else [self._recorder]), *(n.recorder for n in self._newcomers.values())]

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Inside, calls of the model belong to no recording."""
        with ExitStack() as stack:
            for recorder in self._recorders():
                stack.enter_context(recorder.paused())
            yield

    @contextmanager
    def probe(self, name: str) -> Iterator[None]:
        """Rule "probed": inside, call ``loss.backward()`` on the earlier domain's own loss on stored prompts.

        The gradient is projected on that domain's rows and thrown away; gradients gathered for training are put back. Entered
        several times before the next step (micro-batches), the projections add up: no second gradient is ever kept.

        Raises:
            KeyError: a domain without history.
            RuntimeError: no gradient arrived.
        """
        self._with_history("probe", name)
        kept = [p.grad for p in self.parameters]
        for p in self.parameters:
            p.grad = None
        entered = time.perf_counter()
        try:
            with self._aside():
                yield
            started = time.perf_counter()
            if all(p.grad is None for p in self.parameters):
                raise RuntimeError(
                    f"probe of {name!r}: expected a gradient, found none; call loss.backward() inside the block"
                )
            with torch.no_grad():
                a = self._stack.project(self._gradients(), name)
            # A probe that is not finite leaves the sign of the one before.
            if self.rule == "probed" and bool(self._stack.all_finite(a)):
                self._probes.add(name, a)
            self.seconds["probe"] += time.perf_counter() - started
            self._probes.seconds += time.perf_counter() - entered
        finally:
            for p, grad in zip(self.parameters, kept, strict=True):
                p.grad = grad

    def probes_due(self) -> bool:
        """Whether rule "probed" wants fresh probes before the next step."""
        return self.rule == "probed" and self._probes.due(self.history)

    def _settle_probes(self) -> None:
        for name in self._probes.pending():
            columns = self._stack.columns(name)
            self._state.probe[:, columns] = self._probes.settle(name, self._state.probe[:, columns], self._stack)

    # ---------------------------------------------------------------------------------------- domains that appear on the way

    def open_domain(self, name: str, check_every: int = 25) -> None:
        """Records a domain that appears in the middle of a run: from now on its own steps feed its basis.

        Its own steps are those inside ``guard.domain(name)``. It acts on other domains' steps as soon as what it found explains
        more of its fresh gradients than noise would, and is renewed every ``check_every`` own steps; until then the report
        lists it as an open window. The displacement it knows is that of the whole run since it was opened.
        :meth:`close_domain` ends the recording; a checkpoint does not hold it, so open the domain again after resuming.

        Raises:
            ValueError: basis "block", which knows the parameter change only: in a mixed run that is every domain's.
            RuntimeError: the domain is being recorded already.
        """
        self._known(name, recorded=True)
        at_least("check_every", check_every, 1)
        if self.layout.kind == "block":
            raise ValueError(
                "open_domain: expected a basis of gradients or inputs, found 'block', whose directions come from the "
                "parameter change of all domains together; use guard.stage, or another basis"
            )
        if name in self._newcomers or (self._recorder is not None and self._recorder.domain == name):
            raise RuntimeError(f"domain {name!r} is being recorded already")
        recorder = self._new_recorder(name)
        recorder.begin()
        stack = new_stack(self.layout, self.combine, torch.float32, self.device)
        self._newcomers[name] = Newcomer(recorder, stack, check_every)

    def close_domain(self, name: str, path: Path | str | None = None) -> None:
        """Ends the recording of :meth:`open_domain`: what was found becomes history, above the noise floor or not.

        Raises:
            KeyError: the domain is not being recorded.
            RuntimeError: no gradient of the domain arrived.
        """
        if name not in self._newcomers:
            raise KeyError(
                f"close_domain: expected a domain opened before ({', '.join(self._newcomers)}), found {name!r}"
            )
        newcomer = self._newcomers.pop(name)
        try:
            basis = newcomer.recorder.finish(self._locals())
        finally:
            newcomer.recorder.end()
        self._adopt(basis)
        if path is not None:
            basis.save(path)

    def _adopt(self, basis: StoredBasis) -> None:
        """Adds a domain without starting the others' displacements afresh."""
        before = {
            name: {what: rows[:, self._stack.columns(name)].clone() for what, rows in self._counted().items()}
            for name in self.history
            if name != basis.info.domain
        }
        acted = {name: self._stack.present(name) for name in before}
        with torch.no_grad():
            self._stack.put(basis, self._locals())
            self._resize()
            self._q_start = self._stack.project(self._locals())
            self._q_prev = self._q_start.clone()
            counted = self._counted()
            for name, kept in before.items():
                columns, same = self._stack.columns(name), self._stack.present(name) & acted[name]
                for what, rows in kept.items():  # what lost its room, or found it, starts afresh
                    counted[what][:, columns] = torch.where(same, rows, counted[what][:, columns])

    def _counted(self) -> dict[str, Tensor]:
        """Everything that is remembered per coefficient."""
        state = {name: rows for name, rows in vars(self._state).items() if rows.shape[1]}
        return {**state, "q_prev": self._q_prev, "q_start": self._q_start}

    # --------------------------------------------------------------------------------------------------- the step itself

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if any(callable(a) for a in (*args, *kwargs.values()) if a is not optimizer):
            raise RuntimeError(
                "a guarded optimizer.step() expected gradients that are there already, found a closure that computes them "
                "inside the step; call loss.backward() first and step() without arguments"
            )
        started = time.perf_counter()
        self._sent_before = self.layout.shards.elements, self.layout.shards.calls
        held = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._dropped = not self._finite([local(p.grad) for p in held if p.grad is not None])
        if self._dropped:
            self._statistics.dropped += 1
            for p in held:
                p.grad = None
            for recorder in self._recorders():
                recorder.discard()
            return
        own = self._own()
        if not self._edited:  # before any edit: history is made of raw gradients
            started += self._record(own, self._gradients())
            self._settle_probes()
            if len(self._stack) and self.apply_to == "grad":
                self._edit_gradients(own, self._gradients())
        if len(self._stack) and self.apply_to == "update" and self.track_energy:
            self._snapshot = [p.clone() for p in self._locals()]
        self.seconds["act"] += time.perf_counter() - started

    def _record(self, own: str | None, gradient: Sequence[Tensor], others: bool = True) -> float:
        """Feeds the recordings of this gradient's domain, and tells the others that it was not theirs; returns seconds."""
        if self._recorder is None and not self._newcomers:
            return 0.0
        started = time.perf_counter()
        if self._recorder is not None and own == self._recorder.domain:
            self._recorder.update(gradient)
        elif self._recorder is not None and others:
            self._recorder.discard()
        for name, newcomer in self._newcomers.items():
            if name == own:
                basis = newcomer.look(gradient, self._locals())
                if basis is not None:
                    self._adopt(basis)
            elif others:
                newcomer.recorder.discard()
        spent = time.perf_counter() - started
        self.seconds["record"] += spent
        return spent

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._restored = self._edited = False
        if self._dropped:
            return
        started = time.perf_counter()
        if len(self._stack) and self.apply_to == "update":
            self._edit_update(self._own())
        shards, (elements, calls) = self.layout.shards, self._sent_before
        self._step_communication = {
            "elements_last_step": shards.elements - elements,
            "all_reduces_last_step": shards.calls - calls,
        }
        self._statistics.steps += 1
        self._steps_here += 1
        self._probes.step()
        self.seconds["act"] += time.perf_counter() - started

    def _edit_update(self, own: str | None) -> None:
        """Corrects the step just taken by projecting the parameters themselves (MATH: apply_to="update").

        Rows are in the gradient convention, so a step that repeats prior learning lowers q: c = q_prev - q. The coefficients
        after the edit are predicted as q + S x; what rounding of the parameters makes of it shows up in the next c and is
        corrected there, so errors do not accumulate.
        """
        stack, parameters = self._stack, self._locals()
        q = stack.project(parameters, out=self._q)  # [T, K]
        finite = stack.all_finite(q)
        total: Tensor | None = None
        if self._snapshot is not None:
            steps = (a.double() - b.double() for a, b in zip(self._snapshot, parameters, strict=True))
            total = self.layout.shards.sum_(torch.stack([step.square().sum() for step in steps]).sum())
            self._snapshot = None
        correction, sums = self._x, torch.zeros(3, stack.rows, dtype=q.dtype, device=q.device)
        free = ~stack.active(own)
        # Coefficients of input bases outnumber their directions by far: block by block they stay in the caches.
        for rows in stack.blocks if self.norm_cap is None else (slice(0, self.layout.T),):
            before, start = self._q_prev[rows], self._q_start[rows]
            c = torch.where(finite, before - q[rows], 0.0)
            x = self._decide(c, own, total, finite, rows)
            x = x * self._cap(x, c, own)
            overlapped = stack.overlap_times(x, rows)
            sums += stack.own_sums(energies(c, x, overlapped), rows)
            correction[rows] = x
            moved = overlapped - c
            # The batch's own rows move freely: their baseline goes along instead of counting as displacement.
            start += torch.where(free, moved, 0.0)
            before += moved
        self._statistics.count(stack, stack.summed(sums), total)
        stack.edit_(parameters, correction)

    def _edit_gradients(self, own: str | None, grads: Sequence[Tensor]) -> None:
        """Edits a gradient in place; norm cap and clipping fold into the scale, known before the second pass."""
        stack = self._stack
        c = stack.project(grads)  # [T, K]
        total = None
        limited = self.norm_cap is not None or self.max_grad_norm is not None
        if self.track_energy or limited or (stack.rounding and self.rule in ("instant", "significance")):
            squares = torch.stack([g.norm(dtype=torch.float32).double().square() for g in grads])
            total = self.layout.shards.sum_(squares.sum())
        x = self._decide(c, own, total, stack.all_finite(c))
        scale = torch.ones((), dtype=torch.float64, device=c.device)
        overlapped = stack.overlap_times(x)
        if limited and total is not None:
            change = stack.column_sums(x * (overlapped - 2 * c)).sum()  # |g - A^T x|^2 - |g|^2
            edited = (total + change).clamp_min(0.0).sqrt()
            for limit in (
                None if self.norm_cap is None else self.norm_cap * total.sqrt(),
                None if self.max_grad_norm is None else self.max_grad_norm,
            ):
                if limit is not None:
                    scale = torch.minimum(scale, limit / edited.clamp_min(1e-30))
        self._statistics.count(
            stack, stack.column_sums(energies(c, x, overlapped)), total if self.track_energy else None
        )
        # In place; a parameter without gradient took no part in the step and stays out of it.
        stack.edit_(grads, -x, scale)

    def _decide(
        self, c: Tensor, own: str | None, total: Tensor | None, finite: Tensor, rows: slice = slice(None)
    ) -> Tensor:
        """The correction of all rows or a block, given its raw coefficients and, where known, the squared norm of the step."""
        stack = self._stack
        floor: Tensor | float = 0.0
        if total is not None:  # what rounding of the directions alone makes of a step, times three
            floor = 3 * stack.rounding * (total / self.layout.parameters).sqrt()
        return decide(
            self.rule,
            c,
            stack.active(own),
            self._state.part(rows),
            self._params.part(rows),
            stack.frame(own).part(rows),
            stack.displacement[rows],
            finite,
            self._fallback(),
            floor,
        )

    def _fallback(self) -> Tensor | None:
        """``[K]`` bool: rows whose probes cannot be trusted; None where none are."""
        if self.rule != "probed" or not (names := self._probes.distrusted(self.history)):
            return None
        mask = torch.zeros(self._stack.rows, dtype=torch.bool, device=self.device)
        for name in names:
            mask[self._stack.columns(name)] = True
        return mask

    def _cap(self, x: Tensor, c: Tensor, own: str | None) -> Tensor | float:
        if self.norm_cap is None:
            return 1.0
        inner = self._stack.frame(own).inside(c).square()
        inside, size = self._stack.column_sums(torch.stack([inner, x * self._stack.overlap_times(x)])).sum(-1)
        return (self.norm_cap * inside.sqrt() / size.clamp_min(0.0).sqrt().clamp_min(1e-30)).clamp_max(1.0)

    @torch.no_grad()
    def edit_domains(self, gradients: Mapping[str, Sequence[Tensor]]) -> list[Tensor]:
        """Grad mode with one gradient per domain of the same step (B = D): the rows of all *other* domains act on each.

        The step that follows leaves ``p.grad`` alone, so put the result there (:func:`carerl_kernels.guard.editors.assign`) and
        clip as usual. Recordings in progress see their own domain's gradient, though the batch was mixed. The ``touched_share``
        of :meth:`report` is then over the sum of the domains' energies, each gradient by itself, not over the energy of their
        sum: where domains agree or cancel, the share of the step's gradient that was changed is another.

        Args:
            gradients: per domain a tensor per guarded parameter (of sharded ones the local parts), adding up to the step's
                gradient; edited in place.

        Returns:
            The edited gradients' sum, a tensor per parameter; it shares memory with the first of them.

        Raises:
            ValueError: not in grad mode; a rule that counts steps, or a norm limit, which would see each gradient for a step;
                no gradient.
        """
        if self.apply_to != "grad" or self.rule in ("ema", "significance"):
            raise ValueError(
                "edit_domains: expected apply_to='grad' and a rule without averages over steps (remove, integrated, instant, "
                f"probed), found apply_to={self.apply_to!r} and rule={self.rule!r}"
            )
        if self.norm_cap is not None or self.max_grad_norm is not None:
            raise ValueError(
                "edit_domains: expected norm_cap=None and max_grad_norm=None, for the limits would act on each domain's gradient "
                f"by itself, found {self.norm_cap} and {self.max_grad_norm}; clip the sum instead"
            )
        if not gradients:
            raise ValueError("edit_domains: expected a gradient for at least one domain, found none")
        recorders = self._recorders()
        if recorders and self.layout.kind == "input":
            raise ValueError(
                "edit_domains: a recording of basis 'input' looks at calls of the model and cannot tell whose they are in a "
                "mixed batch; record the stage by itself, or use a basis of gradients"
            )
        started = time.perf_counter()
        for name in gradients:
            self._known(name)
        parts = {name: [local(g) for g in gradient] for name, gradient in gradients.items()}
        if self._finite([g for part in parts.values() for g in part]):  # else the step to come is dropped
            self._settle_probes()
            for recorder in recorders:
                if recorder.domain not in parts:
                    recorder.discard()
            for name, part in parts.items():
                started += self._record(name, part, others=False)
                if len(self._stack):
                    self._edit_gradients(name, part)
        first, *others = parts.values()
        for other in others:
            torch._foreach_add_(first, other)
        self._edited = True
        self.seconds["act"] += time.perf_counter() - started
        return first

    @torch.no_grad()
    def remove_(self, gradient: Sequence[Tensor]) -> None:
        """Removes what lies in the span of all history from a gradient, in place, without any rule's memory (GPM)."""
        stack = self._stack
        if len(stack):
            frame = stack.frame(None)
            stack.edit_(list(gradient), -frame.out(frame.into(stack.project(gradient))))

    # ----------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on exactly: rule memory, baselines, statistics, a stage in progress. Not the bases: those are
        files; :meth:`add` them before :meth:`load_state_dict`.

        Under FSDP2 everything that is spread over processes is a DTensor: torch.distributed.checkpoint saves it, and loads it
        for another number of processes. Hand-made shards without DTensors are this process's part.
        """
        return {
            "history": self.history,
            "settings": self._settings(),
            "state": {name: self._stack.unpack(value) for name, value in vars(self._state).items()},
            "q_prev": self._stack.unpack(self._q_prev),
            "q_start": self._stack.unpack(self._q_start),
            "probes": self._probes.state_dict(),
            "statistics": self._statistics.state_dict(self.history, self.device),
            "steps_here": self._steps_here,
            "displaced": dict(self._displaced),
            "seen": list(self._seen),
            "recorder": None if self._recorder is None else self._recorder.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from :meth:`state_dict`, before or after ``attach`` and ``stage`` of the same stage.

        Raises:
            ValueError: the state has another history or rule than this guard.
        """
        settings = {
            **({"room": 1.0} if self.layout.kind == "input" else {}),
            **state["settings"],
        }  # earlier versions: no limit
        for name, saved, here in (
            ("history", state["history"], self.history),
            ("settings", settings, self._settings()),
        ):
            if saved != here:
                raise ValueError(
                    f"guard state: expected {name} {saved!r} as saved, found {here!r}; add the same basis files in the "
                    "same order, and construct the guard with the same settings, first"
                )
        for name, value in state["state"].items():
            if getattr(self._state, name).shape[1]:  # earlier versions saved more than their rule remembers
                self._stack.pack_(getattr(self._state, name), value)
        self._stack.pack_(self._q_prev, state["q_prev"])
        self._stack.pack_(self._q_start, state["q_start"])
        self._probes.load_state_dict(state["probes"])
        self._statistics.load_state_dict(state["statistics"])
        self._steps_here, self._displaced = state["steps_here"], dict(state["displaced"])
        self._seen.update(dict.fromkeys(state["seen"]))
        if state["recorder"] is not None:
            name = state["recorder"]["domain"]
            if self._recorder is None or self._recorder.domain != name:
                self._recorder = self._new_recorder(name)
            self._recorder.load_state_dict(state["recorder"])
        self._restored = True

    def report(self) -> dict[str, Any]:
        """What the guard did and what it cannot protect.

        Returns a dictionary that JSON can hold: ``rule``, ``combine``, ``apply_to``, ``basis``, ``k``, ``steps``,
        ``dropped_steps``, ``touched_share`` (share of update energy the edits took or gave; None unless tracked), ``seconds``,
        ``open_windows`` (domains without a basis above the noise floor: nothing protects them), ``communication`` (numbers
        summed over processes and in how many all-reduces, in all and in the last step), ``memory`` (bytes of directions and
        what belongs to them in this process), ``covered`` (share of parameters with directions) and ``domains``; for each with
        history

        - ``energy``: shares aligned / conflicting / orthogonal of the raw updates; orthogonal None unless tracked,
        - ``net_displacement``: along its rows in this stage or, between stages, the last one, relative to the recorded
          stage's own; None in grad mode,
        - ``capture``: shares of the recorded stage's gradient energy and squared displacement that the rows hold,
        - ``acting``: share of what its directions hold that acts: less than 1 where ``room`` was short,
        - ``steps``: gradients recorded.
        """
        domains: dict[str, dict[str, Any]] = {}
        for name in self.history:
            info = self._stack.infos[name]
            domains[name] = {
                "energy": self._statistics.shares(name),
                "net_displacement": self._displaced.get(name, 0.0)
                if self._steps_here == 0
                else self._net_displacement(name),
                "capture": {"gradient": info.gradient_capture, "displacement": info.displacement_capture},
                "acting": self._stack.acting(name),
                "steps": info.steps,
            }
        # Random directions hold a share of any displacement: a basis that holds not much more than that knows nothing.
        blind = [
            n
            for n in self.history
            if not domains[n]["acting"]
            or (
                (moved := domains[n]["capture"]["displacement"]) is not None  # None: no stage was recorded
                and moved <= noise_floor(self._stack.chance(n))
            )
        ]
        return {
            "rule": self.rule,
            "combine": self.combine,
            "apply_to": self.apply_to,
            "basis": self.layout.kind,
            "k": self.layout.k,
            "steps": self._statistics.steps,
            "dropped_steps": self._statistics.dropped,
            "touched_share": self._statistics.touched_share,
            "domains": domains,
            "open_windows": [n for n in self._seen if n not in self.history] + blind,
            "recording": {name: newcomer.as_dict() for name, newcomer in self._newcomers.items()},
            **({"probes": self._probes.report(self.history)} if self.rule == "probed" else {}),
            "seconds": dict(self.seconds),
            "communication": {
                "elements": self.layout.shards.elements,
                "all_reduces": self.layout.shards.calls,
                **self._step_communication,
            },
            "memory": self._stack.memory(),
            "covered": self.layout.covered / self.layout.parameters,
        }

    # --------------------------------------------------------------------------------------------------------- internals

    def _resize(self) -> None:
        """Fresh rule memory for the present number of rows; per-domain numbers spread over the rows."""
        rows, device = self._stack.rows, self.device
        self._state = RuleState.zeros(self.rule, self.layout.T, rows, device)
        self._q_prev = torch.zeros(self.layout.T, rows, dtype=torch.float64, device=device)
        self._q_start = self._q_prev.clone()
        # where a step's coefficients and its correction go: memory that is there already costs no page faults
        self._q, self._x = torch.empty_like(self._q_prev), torch.empty_like(self._q_prev)
        numbers: dict[str, list[float]] = {"aligned": [], "conflict": [], "lower": [], "upper": []}
        for name in self._stack.names:
            lower, upper = pair("bound", for_domain("bound", self._weights["bound"], name))
            for key, value in (
                ("aligned", for_domain("aligned", self._weights["aligned"], name)),
                ("conflict", for_domain("conflict", self._weights["conflict"], name)),
                ("lower", lower),
                ("upper", upper),
            ):
                numbers[key] += [float(value)] * self.layout.width
        tensors = {key: torch.tensor(v, dtype=torch.float64, device=device) for key, v in numbers.items()}
        self._params = RuleParams(**tensors, z=self.z, beta=self.beta)

    def _net_displacement(self, name: str) -> float | None:
        if self.apply_to == "grad":
            return None  # parameters are not measured in this mode
        columns = self._stack.columns(name)
        both = torch.stack([self._q_start - self._q_prev, self._stack.displacement]).square()
        moved, size = self._stack.column_sums(both)[:, columns].sum(1).sqrt()
        return float(moved / size) if size > 0 else 0.0

    def _start_here(self) -> None:
        if not self._restored:
            self.rebase()

    def _close(self) -> None:
        """Keeps what the report says of the stage that ends here."""
        if self._steps_here:
            self._displaced = {name: self._net_displacement(name) for name in self.history}
        self._steps_here = 0

    @torch.no_grad()
    def rebase(self) -> None:
        """Counts from the present parameters on: displacements, averages and probes start afresh.

        ``attach``, ``stage`` and ``add`` do it. Call it after changing the parameters by hand (loading weights, merging, EMA):
        otherwise the next step takes the change for its own and corrects it.
        """
        self._close()
        self._state.begin_stage()
        self._probes.restart()
        if len(self._stack):
            self._q_start = self._stack.project(self._locals())
            self._q_prev = self._q_start.clone()

    def _settings(self) -> dict[str, Any]:
        """What decides how steps are corrected, for comparison with a saved state."""
        names = (
            "rule",
            "combine",
            "apply_to",
            "z",
            "beta",
            "norm_cap",
            "max_grad_norm",
            "probe_every",
            "probe_adaptive",
        )
        weights = {name: dict(v) if isinstance(v, Mapping) else v for name, v in self._weights.items()}
        return {
            **{name: getattr(self, name) for name in names},
            **weights,
            "kind": self.layout.kind,
            "k": self.layout.k,
            **({"room": self.room} if self.layout.kind == "input" else {}),
        }

    def _with_history(self, what: str, name: str) -> None:
        if name not in self._stack.names:
            have = ", ".join(self.history) or "none yet"
            raise KeyError(f"{what}: expected a domain with history ({have}), found {name!r}")

    def _known(self, name: str, recorded: bool = False) -> None:
        if recorded:  # its numbers will be needed: better asked for now than when the stage ends
            for what, value in self._weights.items():
                for_domain(what, value, name)
        if self.domains is not None and name not in self.domains:
            raise ValueError(f"domain: expected one of {', '.join(self.domains)}, found {name!r}")
        self._seen[name] = None

    def _own(self) -> str | None:
        if self._current is not _UNSET:
            return self._current
        return self._recorder.domain if self._recorder is not None else None

    def _gradients(self) -> list[Tensor]:
        """A gradient per guarded parameter; one without counts as zero."""
        return [local(p.grad) if p.grad is not None else torch.zeros_like(local(p)) for p in self.parameters]

    def _locals(self) -> list[Tensor]:
        """The parts of the parameters that live here, sharing their memory."""
        return [local(p) for p in self.parameters]

    def _finite(self, tensors: Sequence[Tensor]) -> bool:
        """One flag for all gradients of all processes: the only synchronisation of a guarded step."""
        tensors = [tensor.contiguous() for tensor in tensors if tensor.numel()]
        flag = torch.ones((), dtype=torch.bool, device=self.device)
        for device in dict.fromkeys(tensor.device for tensor in tensors):  # parameters may be spread over several
            here = [tensor for tensor in tensors if tensor.device == device]
            flag = flag & torch.ops.carerl.all_finite(here).to(self.device)
        return bool(self.layout.shards.all(flag))


__all__ = ["BasisError", "CapabilityGuard"]
