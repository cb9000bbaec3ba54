"""What a guard remembers: directions of all domains, and how far the weights have moved along them since displacements count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..subspace.fingerprint import hash_parameters
from ..subspace.kinds import KINDS
from ..subspace.store import StoredBasis
from .box import Box
from .build import new_stack
from .correct import StepCorrection, rule_params
from .probes import Probes
from .report import DomainReport, bytes_held
from .settings import Settings
from .stack import Stack, noise_floor
from .statistics import Statistics

VERSION = 2
"""Of saved states."""


class Memory:
    """Directions, and what corrects steps along them: a box, or a rule that looks at every step."""

    box: Box | None  # where the rule is a projection
    steps: StepCorrection  # where it is not

    def __init__(self, layout: Any, settings: Settings, device: torch.device):
        self.settings, self.device = settings, device
        self.max_grad_norm = settings.max_grad_norm  # grad mode: clips the edited gradient
        self.statistics, self.probes = Statistics(), Probes(settings.probe_every, settings.probe_adaptive)
        self.steps_here = 0  # since displacements were last counted from zero
        self._moved: dict[str, float | None] = {}  # what the last stage moved along every domain's directions
        self.adapt(layout)

    @property
    def history(self) -> list[str]:
        """Names of the domains with directions, oldest first."""
        return list(self.stack.names)

    @property
    def correction(self) -> Box | StepCorrection:
        """What corrects steps."""
        return self.steps if self.box is None else self.box

    def adapt(self, layout: Any) -> None:
        """Lies over this layout; there is no history yet."""
        self.layout = layout
        self.stack: Stack[Any, Any] = new_stack(layout, self.settings.basis_dtype, self.device, self.settings.room)
        self._renew()

    def _renew(self) -> None:
        """Fresh numbers for the present directions."""
        settings, self.box = self.settings, None
        if settings.confines:
            bounds = rule_params(self.stack, settings) if settings.rule == "bounded" else None
            tracked = self.statistics if settings.track_energy else None
            self.box = Box(self.stack, self.layout.names, bounds, settings.every, tracked)
        else:
            self.steps = StepCorrection(self.stack, settings, self.probes, self.statistics)

    def add(self, basis: StoredBasis, parameters: Sequence[Tensor]) -> None:
        """Takes a domain in; all displacements count from here on."""
        self.settle(parameters)
        self.close(parameters)
        self.stack.put(basis, parameters)
        self._renew()
        self.rebase(parameters)

    def adopt(self, basis: StoredBasis, parameters: Sequence[Tensor]) -> None:
        """Takes a domain in. What is remembered of others goes on where their directions act as before; the rest begins here."""
        self.settle(parameters)
        stack, before = self.stack, self._remembered()
        kept = {
            name: ({what: rows[:, stack.columns(name)].clone() for what, rows in before.items()}, stack.present(name))
            for name in self.history
            if name != basis.info.domain
        }
        stack.put(basis, parameters)
        self._renew()
        if self.box is None:
            self.steps.rebase(parameters)
        else:
            self.box.anchor = stack.measure(parameters)
        for name, (parts, acted) in kept.items():
            columns, same = stack.columns(name), stack.present(name) & acted
            for what, rows in self._remembered().items():
                rows[:, columns] = torch.where(same, parts[what], rows[:, columns])

    def _remembered(self) -> Mapping[str, Tensor]:
        """What is remembered per coefficient `[T, K]`."""
        return self.steps.remembered() if self.box is None else {"anchor": self.box.anchor}

    def rebase(self, parameters: Sequence[Tensor]) -> None:
        """Counts from the present parameters on."""
        self.close(parameters)
        self.probes.restart()
        if self.box is None:
            self.steps.rebase(parameters)
        elif len(self.stack):
            self.box.rebase(parameters)

    def settle(self, parameters: Sequence[Tensor]) -> None:
        """Corrects what waits for a correction."""
        if self.box is not None and len(self.stack):
            self.box.close(parameters)

    def close(self, parameters: Sequence[Tensor]) -> None:
        """Keeps what the report says of the stage that ends here."""
        if self.steps_here:
            self._moved = {name: self._moved_now(name, parameters) for name in self.history}
        self.steps_here = 0

    def _moved_now(self, name: str, parameters: Sequence[Tensor]) -> float | None:
        return self.steps.moved(name) if self.box is None else self.box.moved(parameters, name)

    # ------------------------------------------------------------------------------------------------------------ report

    def domain(self, name: str, parameters: Sequence[Tensor]) -> DomainReport:
        """The report of one domain."""
        info, size = self.stack.infos[name], self.stack.recorded_size(name)
        moved = self._moved_now(name, parameters) if self.steps_here else self._moved.get(name, 0.0)
        return {
            "energy": self.statistics.shares(name),
            "net_displacement": None if moved is None or size == 0 else moved / size,
            "moved": moved,
            "capture": {"gradient": info.gradient_capture, "displacement": info.displacement_capture},
            "acting": self.stack.acting(name),
            "steps": info.steps,
        }

    def blind(self, name: str) -> bool:
        """Whether a domain's directions hold no more than chance: random ones hold a share of any displacement."""
        held = self.stack.infos[name].displacement_capture
        known = held is None or held > noise_floor(self.stack.chance(name))
        return not known or not self.stack.acting(name)

    def bytes(self) -> int:
        """Of directions, anchors and what belongs to them in this process."""
        return bytes_held(self.stack, None if self.box is None else self.box.anchor)

    # ------------------------------------------------------------------------------------------------------------- state

    def state_dict(self, parameters: Sequence[Tensor]) -> dict[str, Any]:
        """What is needed to go on exactly, and of which weights."""
        if self.box is not None and len(self.stack):
            self.box.account(parameters)
        return {
            "version": VERSION,
            "history": self.history,
            "settings": self._deciding(),
            "weights": hash_parameters(parameters, self.layout.shards),
            "correction": self.correction.state_dict(),
            "probes": self.probes.state_dict(),
            "statistics": self.statistics.state_dict(self.history, self.device),
            "steps_here": self.steps_here,
            "moved": dict(self._moved),
        }

    def load_state_dict(self, state: Mapping[str, Any], parameters: Sequence[Tensor]) -> None:
        """Goes on from :meth:`state_dict`; raises as :meth:`CapabilityGuard.load_state_dict`."""
        if state.get("version") != VERSION:
            raise ValueError(
                f"guard state: expected version {VERSION}, found {state.get('version', 1)}, which remembers other numbers; "
                "finish the run with the package that wrote it, or start from its weights and basis files without the state"
            )
        for name, here in (("history", self.history), ("settings", self._deciding())):
            if state[name] != here:
                raise ValueError(
                    f"guard state: expected {name} {state[name]!r} as saved, found {here!r}; add the same basis files in the "
                    "same order, and construct the guard with the same settings, first"
                )
        weights = hash_parameters(parameters, self.layout.shards)
        if state["weights"] != weights:
            raise ValueError(
                f"guard state: expected the weights it was saved with (hash {state['weights']}), found others ({weights}); load "
                "the checkpoint's weights first, or leave the state out and count from the present ones"
            )
        self.correction.load_state_dict(state["correction"])
        self.probes.load_state_dict(state["probes"])
        self.statistics.load_state_dict(state["statistics"])
        self.steps_here, self._moved = state["steps_here"], dict(state["moved"])

    def _deciding(self) -> dict[str, Any]:
        """What decides how steps are corrected."""
        kind = self.layout.kind
        room = {"room": self.settings.room} if KINDS[kind].sees == "inputs" else {}
        mine = {"max_grad_norm": self.max_grad_norm, "kind": kind, "k": self.layout.k}
        return {**self.settings.deciding(), **mine, **room}
