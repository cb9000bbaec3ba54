"""Confinement: the net displacement along protected directions stays inside a box, whatever the optimizer did in between.

Given anchors A = W_0 U^T of where a stage began, a call puts every weight matrix back by as much as it has left the box:
`D = A - W U^T`, `X = D - clip(D, -against, along)`, `W <- W + X U` with U orthonormal over all acting domains. It is a
projection: a second call changes nothing (of directions that several domains have in common to 1e-4, with different bounds, it
comes closer), the anchored weights themselves are left alone, and neither the number of optimizer steps before a call nor their
order matters. So it may run after every step, every few steps, or once on a finished checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .rules import RuleParams
from .stack import Stack
from .statistics import Statistics, energies, squared_distance

OFF = 0.01
"""A LoRA matrix of which directions hold less than this share counts as off them: random ones hold ten times as much."""


class Box:
    """Anchors of all protected directions, and when the parameters are put back into the box around them.

    Steps of one domain in a row are a *segment*: the domain's own directions do not act on it, and at its end their anchors
    move by what it moved. A mixed batch belongs to nobody, and all directions act.

    A fresh LoRA adapter (B = 0) adds nothing yet, and B A x stays nothing on every protected input for as long as A is off the
    directions: so A is anchored at zero, and B moves freely. An adapter that was trained before is held like any two matrices.

    Args:
        stack: directions of all domains.
        bounds: how far "bounded" lets rows move; None: nowhere ("remove").
        every: steps of a segment between corrections.
        statistics: counts updates and corrections, where energy is tracked; a copy of the parameters is kept for it.

    Attributes:
        anchor: see :meth:`Stack.measure`.
        waiting: steps taken since the last correction.
        released: steps were taken that the box has nothing to say of: anchors count from where the next segment begins.
        also: another copy of the weights that an optimizer keeps, confined together with the parameters.
    """

    def __init__(
        self,
        stack: Stack[Any, Any],
        names: Sequence[str],
        bounds: RuleParams | None,
        every: int,
        statistics: Statistics | None = None,
    ):
        self.stack, self.bounds, self.every, self._statistics = stack, bounds, every, statistics
        self.anchor = torch.zeros(stack.layout.T, 0, device=stack.device)  # a state has it by parameter
        self.waiting = 0
        self.released = False
        self.also: Sequence[Tensor] | None = None
        self._snapshot: list[Tensor] | None = None
        self._adapters = lora_pairs(names) if stack.layout.kind == "input" else []
        self._tight: frozenset[int] = frozenset()  # A of fresh adapters: no bound, however far a stage moved
        self._open = False  # a segment is under way
        self._own: str | None = None
        self._own_before: Tensor | None = None  # of its own domain, when the segment began
        self._exempt: frozenset[int] = frozenset()

    def rebase(self, parameters: Sequence[Tensor]) -> None:
        """Counts from the present parameters on."""
        self.anchor = self.stack.measure(parameters)
        self._open, self.waiting, self._exempt, self._snapshot, self.released = False, 0, frozenset(), None, False
        self._tight = frozenset(self._fresh(parameters))
        for a in self._tight:
            self.anchor[self.stack.layout.rows_of(a)] = 0
        if self._tight:
            self.confine_(parameters)

    def begin(self, parameters: Sequence[Tensor], own: str | None) -> None:
        """A step of this domain (None: of nobody's) is about to be taken."""
        if self.released:
            self.rebase(parameters)
        if self._statistics is not None and self._snapshot is None:
            self._snapshot = [p.clone() for p in parameters]
        own = own if own in self.stack.names else None
        if self._open and own == self._own:
            return
        self.close(parameters)
        self._open, self._own = True, own
        self._own_before = None if own is None else self.stack.measure(parameters, own)
        if self._adapters:
            self._settle_adapters(parameters)

    def step(self, parameters: Sequence[Tensor]) -> None:
        """The step was taken."""
        self.waiting += 1
        if self.waiting >= self.every:
            self.confine_(parameters)

    def release(self, parameters: Sequence[Tensor]) -> None:
        """A step is about to be taken whose gradient was edited already, one domain at a time: it goes where it goes."""
        self.close(parameters)
        self.released, self._snapshot = True, None

    def confine_(self, parameters: Sequence[Tensor]) -> None:
        """Puts the parameters back into the box now."""
        if self.released:
            return
        own = self._own if self._open else None
        before, self._snapshot = self._snapshot, None
        raw = None if before is None else self._update_since(before, parameters)
        touched = self._confined(parameters, own)
        if self.also is not None:
            self._confined(self.also, own)
        self.waiting = 0
        if self._statistics is not None and raw is not None:
            self._statistics.count(self.stack, raw[0], self.stack.layout.shards.sum_(touched), raw[1])

    def account(self, parameters: Sequence[Tensor]) -> None:
        """Counts the update so far, without correcting it: a checkpoint holds no copy of the parameters to go on from."""
        before, self._snapshot = self._snapshot, None
        if self._statistics is not None and before is not None:
            sums, total = self._update_since(before, parameters)
            self._statistics.count(self.stack, sums, torch.zeros_like(total), total)

    def _confined(self, parameters: Sequence[Tensor], own: str | None) -> Tensor:
        return self.stack.confine_(parameters, self.anchor, self.bounds, own, self._exempt, self._tight)

    def _update_since(self, before: Sequence[Tensor], parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Energies of the update along all rows `[2, K]`, and its squared norm."""
        c = self.stack.project(before) - self.stack.project(parameters)
        total = self.stack.layout.shards.sum_(squared_distance(before, parameters))
        return self.stack.column_sums(energies(c)), total

    def close(self, parameters: Sequence[Tensor]) -> None:
        """Ends the segment under way: corrects what is left of it, and lets its own domain's anchors follow."""
        if not self._open:
            return
        if self.waiting:
            self.confine_(parameters)
        if self._own is not None and self._own_before is not None:
            columns = self.stack.columns(self._own)
            self.anchor[:, columns] += self.stack.measure(parameters, self._own) - self._own_before
        self._open, self._own, self._own_before = False, None, None

    def moved(self, parameters: Sequence[Tensor], domain: str) -> float:
        """Norm of the net displacement along a domain's directions since its anchors were taken."""
        apart = self.anchor[:, self.stack.columns(domain)] - self.stack.measure(parameters, domain)
        return float(self.stack.column_sums(apart.double().square()).sum().sqrt())

    def _fresh(self, parameters: Sequence[Tensor]) -> Iterator[int]:
        """A of every adapter that adds nothing on protected inputs: B is zero, or A is off the directions already."""
        shards = self.stack.layout.shards
        for a, b in self._adapters:
            sums = torch.stack([parameters[i].double().square().sum() for i in (a, b)])
            whole, size = shards.sum_(sums).tolist()
            rows = self.stack.layout.rows_of(a)
            held = self.stack.own_sums(self.anchor[rows].double().square(), rows)
            if size == 0 or self.stack.summed(held).sum() < OFF**2 * whole:
                yield a

    def _settle_adapters(self, parameters: Sequence[Tensor]) -> None:
        """B of an adapter moves freely while its A is off all that acts; else it is held from here on."""
        active = self.stack.active(self._own)
        free = set()
        for a, b in self._adapters:
            if a in self._tight and not bool(self.anchor[self.stack.layout.rows_of(a)][:, active].any()):
                free.add(b)
        held = [b for _, b in self._adapters if b in self._exempt and b not in free]
        if held:
            fresh = self.stack.measure(parameters)
            for b in held:
                rows = self.stack.layout.rows_of(b)
                self.anchor[rows] = fresh[rows]
        self._exempt = frozenset(free)

    # -------------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        return {
            "anchor": self.stack.unpack(self.anchor),
            "waiting": self.waiting,
            "open": self._open,
            "own": self._own,
            "own_before": None if self._own_before is None else self.stack.unpack(self._own_before),
            "exempt": sorted(self._exempt),
            "tight": sorted(self._tight),
            "released": self.released,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.stack.pack_(self.anchor, state["anchor"])
        self.waiting, self._open, self._own = state["waiting"], state["open"], state["own"]
        self._own_before = None
        if state["own_before"] is not None:
            self._own_before = torch.zeros_like(self.anchor[:, self.stack.columns(str(self._own))])
            self.stack.pack_(self._own_before, state["own_before"])
        self._exempt, self._tight = frozenset(state["exempt"]), frozenset(state["tight"])
        self.released = state.get("released", False)


def lora_pairs(names: Sequence[str]) -> list[tuple[int, int]]:
    """Indices of A and B of every LoRA adapter, by PEFT's names. DoRA's are none: its magnitudes see more than B A x."""
    at = {name: index for index, name in enumerate(names)}
    if any("lora_magnitude_vector" in name for name in names):
        return []
    pairs = []
    for name, index in at.items():
        for a, b in ((".lora_A.", ".lora_B."), (".lora_embedding_A.", ".lora_embedding_B.")):
            other = at.get(name.replace(a, b)) if a in name else None
            if other is not None:
                pairs.append((index, other))
    return pairs
