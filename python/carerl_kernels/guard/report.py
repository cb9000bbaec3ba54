"""What a guard did and what it cannot protect, as plain numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .memory import Memory
    from .optimizers import Census
    from .recording import Recording


PACKAGE = __name__.partition(".")[0]


class DomainReport(TypedDict):
    """One domain with history.

    Attributes:
        energy: shares of raw updates aligned, conflicting and orthogonal, where energy is tracked or every step is projected.
        net_displacement: along its directions in this stage or, between stages, the last one, relative to the recorded
            stage's own; None where no stage was recorded, and in grad mode. moved: its norm.
        capture: share of what was recorded that the directions hold: "gradient" of the energy of gradients or inputs,
            "displacement" of the squared displacement of the stage (None without one).
        acting: share of what its directions hold that acts: less than 1 where `room` was short.
        steps: of the recorded stage, or batches that were shown.
    """

    energy: dict[str, float | None] | None
    net_displacement: float | None
    moved: float | None
    capture: dict[str, float | None]
    acting: float
    steps: int


class Report(TypedDict, total=False):
    """The whole report; JSON can hold it.

    Attributes:
        steps, dropped_steps: optimizer steps taken; those dropped for a gradient that is not finite.
        waiting: steps since the last correction; the weights may be outside of their box by what these did.
        touched_share: energy of corrections over energy of updates; None unless tracked.
        open_windows: domains that nothing protects: no basis, or one that holds no more than chance.
        unguarded: parameters of the optimizer that move freely, by reason, with their number and how many elements they have.
        recording: What is known of newcomers.
        probes: What is known of the probes of rule "probed".
        seconds: The seconds spent acting, recording and probing.
        communication: The numbers summed over processes, and all-reduces.
        memory: bytes of directions, anchors and what belongs to them in this process.
        covered: share of the guarded parameters that directions exist for.
    """

    rule: str
    apply_to: str
    basis: str
    k: int
    every: int
    steps: int
    dropped_steps: int
    waiting: int
    touched_share: float | None
    domains: dict[str, DomainReport]
    open_windows: list[str]
    unguarded: dict[str, dict[str, int]]
    recording: dict[str, Any]
    probes: dict[str, Any]
    seconds: dict[str, float]
    communication: dict[str, int]
    memory: int
    covered: float


def report_of(
    memory: Memory, census: Census, recording: Recording, parameters: Sequence[Tensor], seen: Iterable[str]
) -> Report:
    """The report of a guard that has heard of the `seen` domains, but for its seconds and what its last step communicated."""
    settings, layout, statistics, box = memory.settings, memory.layout, memory.statistics, memory.box
    history = memory.history
    return {
        "rule": settings.rule,
        "apply_to": settings.apply_to,
        "basis": layout.kind,
        "k": layout.k,
        "every": 1 if box is None else settings.every,
        "steps": statistics.steps,
        "dropped_steps": statistics.dropped,
        "waiting": 0 if box is None else box.waiting,
        "touched_share": statistics.touched_share,
        "domains": {name: memory.domain(name, parameters) for name in history},
        "open_windows": [n for n in seen if n not in history] + [n for n in history if memory.blind(n)],
        "unguarded": {reason: dict(found) for reason, found in census.free.items()},
        "recording": {name: newcomer.as_dict() for name, newcomer in recording.newcomers.items()},
        **({"probes": memory.probes.report(history)} if settings.rule == "probed" else {}),
        "communication": {"elements": layout.shards.elements, "all_reduces": layout.shards.calls},
        "memory": memory.bytes(),
        "covered": layout.covered / layout.parameters,
    }


def bytes_held(*holders: Any) -> int:
    """Bytes of the tensors that objects of this package hold in this process, each memory once."""
    found: dict[tuple[torch.device, int], int] = {}
    seen: set[int] = set()
    todo = list(holders)
    while todo:
        held = todo.pop()
        if id(held) in seen:
            continue
        seen.add(id(held))
        if isinstance(held, Tensor):
            memory = held.untyped_storage()
            found[held.device, memory.data_ptr()] = memory.nbytes()
        elif isinstance(held, Mapping):
            todo += held.values()
        elif isinstance(held, list | tuple):
            todo += held
        elif type(held).__module__.startswith(PACKAGE):
            todo += vars(held).values()
    return sum(found.values())


def flat_numbers(report: Mapping[str, Any]) -> dict[str, float]:
    """The report's numbers under names for a trainer's log; what is not known is left out."""
    numbers = {
        "guard/touched_share": report["touched_share"],
        "guard/dropped_steps": report["dropped_steps"],
        "guard/open_windows": len(report["open_windows"]),
        "guard/seconds": sum(report["seconds"].values()),
    }
    for name, domain in report["domains"].items():
        numbers |= {f"guard/{name}/{key}": domain[key] for key in ("net_displacement", "moved")}
        numbers |= {f"guard/{name}/{share}": value for share, value in (domain["energy"] or {}).items()}
    return {name: float(value) for name, value in numbers.items() if value is not None}


def guard_figures(report: Mapping[str, Any]) -> dict[str, Any]:
    """Of `CapabilityGuard.report()`, since the guard was attached.

    Returns:
        "touched_share", "steps", "dropped_steps", "open_windows" and "domains": per domain with history "aligned",
        "conflicting", "orthogonal" (shares of raw update energy), "net_displacement" (relative to the recorded stage's) and
        "capture" (share of the recorded stage's squared displacement that its directions hold). None: not measured.
    """
    domains = {}
    for name, found in report["domains"].items():
        energy = found["energy"] or {}
        domains[name] = {
            **{key: energy.get(key) for key in ("aligned", "conflicting", "orthogonal")},
            "net_displacement": found["net_displacement"],
            "capture": found["capture"]["displacement"],
        }
    kept = {key: report[key] for key in ("touched_share", "steps", "dropped_steps", "open_windows")}
    return {**kept, "domains": domains}
