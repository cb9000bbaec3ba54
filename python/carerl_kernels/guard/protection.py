"""History of a guard: directions come in, and the parameters are put back into their box."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from .._clock import Clock
from .._errors import one_of
from .._wrapped import unwrapped
from ..subspace import StoredBasis
from ..subspace.fingerprint import hash_parameters
from ..subspace.kinds import KINDS, kind_of, rank_of
from ..subspace.observe import observe
from ..subspace.shards import local
from ..subspace.store import read_info
from .build import architecture_of, data_group, sides_of, trainable
from .memory import Memory
from .optimizers import Census
from .recording import Recording
from .rules import Rule
from .settings import Settings
from .stack import Stack


class Protection:
    """What is protected of a model, and the box that holds it: all of a guard that asks nothing of a training loop.

    See :class:`~carerl_kernels.guard.guard.CapabilityGuard` for the arguments.
    """

    def __init__(
        self, model: nn.Module | Iterable[tuple[str, nn.Parameter]], settings: Settings, process_group: Any = None
    ):
        self.settings = settings
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
        self.layout: Any = KINDS[kind].layout(named, kind, rank_of(kind, settings.k, settings.r), process_group, sides)
        self.data_group = data_group(model, self.layout)
        self.domains = None if settings.domains is None else tuple(settings.domains)
        self._clock = Clock("act", "record", "probe")
        self.seconds = self._clock.seconds
        self.device = local(self.parameters[0]).device
        self.memory = Memory(self.layout, settings, self.device)
        self._census = Census(dict(named), self.layout.covered_names, inner)
        self._recording = Recording(self.layout, settings, self.architecture, self.data_group, module, self._locals)
        self._seen: dict[str, None] = dict.fromkeys(self.domains or ())

    @property
    def rule(self) -> Rule:
        return self.settings.rule

    @property
    def apply_to(self) -> str:
        return self.settings.apply_to

    @property
    def stack(self) -> Stack[Any, Any]:
        """Directions of all domains."""
        return self.memory.stack

    @property
    def history(self) -> list[str]:
        """Names of the domains with a basis, oldest first."""
        return self.memory.history

    @classmethod
    def load(cls, *paths: Path | str, model: nn.Module, **options: Any) -> Self:
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
        present = hash_parameters(guard._locals(), guard.layout.shards)
        known = {present, *(basis.info.start_hash for basis in bases)}
        for basis in bases:
            guard.add(basis)
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
            self.layout, name, energy=self.settings.energy, architecture=self.architecture, parameters=self._locals()
        )
        self._keep(basis, path)
        return basis

    @torch.no_grad()
    def add(self, basis: StoredBasis | Path | str, *, rebase: bool = True) -> None:
        """Takes a recorded domain (or its file) into the history; an earlier recording of the same domain is replaced.

        Args:
            rebase: whether all displacements count from here on; False: those of other domains go on.
        """
        basis = basis if isinstance(basis, StoredBasis) else StoredBasis.load(basis, self.layout)
        basis.check_model(self.layout, self.architecture)
        self._known(basis.info.domain, recorded=True)
        (self.memory.add if rebase else self.memory.adopt)(basis, self._locals())

    def basis(self, name: str) -> Any:
        """The recorded basis of a domain with history (rows rounded to `basis_dtype`): to inspect, or to save once more."""
        self._with_history("basis", name)
        return self.stack.get(name)

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
        with self._clock.timed("act"):
            if len(self.stack):
                box.confine_(self._locals())

    @torch.no_grad()
    def settle(self) -> None:
        """Corrects what waits for a correction: nothing, with a rule that corrects every step. For trainers, before they evaluate
        what a stage came to; its end and :meth:`CapabilityGuard.detach` do it by themselves."""
        self.memory.settle(self._locals())

    @torch.no_grad()
    def rebase(self) -> None:
        """Counts from the present parameters on: displacements and probes start afresh.

        `attach`, `stage`, `add` and `protect` do it. Call it after changing the parameters by hand (loading weights,
        merging, EMA): otherwise the next correction takes the change for training's and undoes it along protected directions.
        """
        self.memory.rebase(self._locals())

    @torch.no_grad()
    def remove_(self, gradient: Sequence[Tensor]) -> None:
        """Removes what lies in the span of all history from a gradient, in place, without any rule's memory (GPM)."""
        stack = self.stack
        if len(stack):
            stack.remove_(gradient, stack.along(stack.seen(gradient), None))

    def _adapt(self, layout: Any) -> None:
        """Another layout, while there is no history yet: how weights are used is known once they were seen."""
        if layout is self.layout or len(self.stack):
            return
        self.layout = self._recording.layout = layout
        self._census.covered = set(layout.covered_names)
        self.memory.adapt(layout)

    def _keep(self, basis: StoredBasis, path: Path | str | None, rebase: bool = True) -> None:
        """Takes in what was just recorded, and writes its file where one is asked for."""
        self.add(basis, rebase=rebase)
        if path is not None:
            basis.save(path)

    def _with_history(self, what: str, name: str) -> None:
        if name not in self.stack.names:
            have = ", ".join(self.history) or "none yet"
            raise KeyError(f"{what}: expected a domain with history ({have}), found {name!r}")

    def _known(self, name: str, recorded: bool = False) -> None:
        if recorded:  # its numbers will be needed: better asked for now than when the stage ends
            self.settings.numbers_of(name)
        if self.domains is not None:
            one_of("domain", name, self.domains)
        self._seen[name] = None

    def _locals(self) -> list[Tensor]:
        """The parts of the parameters that live here, sharing their memory."""
        return [local(p) for p in self.parameters]
