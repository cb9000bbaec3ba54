"""The guard on finished checkpoints, without any access to training: confinement of a change, and sums of confined changes.

Anchors come from one checkpoint, weights from another (docs/math.md, "finished checkpoints"). Matrices are read and
written a few at a time; what needs no correction is not touched.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..subspace.correspond import Correspondence
from ..subspace.factored import FactoredBasis
from ..subspace.fingerprint import hash_parameters
from ..subspace.portions import Portion, portions
from ..subspace.weights import Copy, Weights, check_same, copied
from .adapters import confine_adapter
from .changes import Confined, Confinement, Matrix
from .settings import Settings


def confine(
    start: Path | str,
    end: Path | str,
    bases: Sequence[FactoredBasis],
    out: Path | str,
    bound: float = 0.1,
    room: float = 0.5,
    device: torch.device | str = "cpu",
) -> Confined:
    """Puts what training from one checkpoint to another moved along protected directions back into its box.

    Args:
        start: directory of a transformers model or a safetensors file: what is protected.
        end: the same after training, or the directory of a LoRA adapter trained on it.
        bases: input bases of the protected domains, recorded on `start` or on what it came from.
        out: directory to write, a copy of `end` but for what was corrected.
        bound: rows may move by this fraction of the recorded stage's own displacement; domains that were observed without a
            stage have none, and nothing moves along their directions.
        room: directions of all domains together that a matrix has at most, as a share of its inputs.

    Raises:
        ValueError: checkpoints or bases that do not belong together, named with the first difference; numbers out of range.
        OSError: files that are missing, or cannot be written; nothing is left half-written.
    """
    began = time.perf_counter()
    Settings(bound=bound, room=room)  # names what is out of range
    first, last, bases = Weights(start), Weights(end), list(bases)
    if not bases:
        raise ValueError("confine: expected at least one basis to protect, found none")
    if first.is_adapter:
        raise ValueError(f"{first.path}: expected the model that the adapter was trained on as start, found an adapter")
    there = Correspondence(first, bases, None if last.is_adapter else last)
    by = Confinement(bases, bound, room, torch.device(device), out)
    (confine_adapter if last.is_adapter else _confine)(there, last, by)
    result = by.result
    result.shares()
    result.warnings += warnings_of(first, there, bases)
    result.seconds = time.perf_counter() - began
    return result


def _confine(there: Correspondence, last: Weights, by: Confinement) -> None:
    first, result = there.weights, by.result
    check_same(first, last, there.same)
    here = Correspondence(last, by.bases, first)

    def change_of(portion: Portion) -> Matrix | None:
        before = portion.read(first, _key_in(first, portion.key, here))
        return by.compared(portion, before, portion.read(last))

    def correct(group: Sequence[Portion], copy: Copy) -> None:  # a function, so that nothing outlives its group
        moved = [(portion, matrix) for portion in group if (matrix := change_of(portion))]
        matrices = [matrix for _, matrix in moved]
        inside = by.confined(matrices, group[0].entry.dtype)
        for (portion, matrix), new in zip(moved, inside, strict=True):
            if not torch.equal(new, matrix.end):
                portion.write(copy, new)
                if portion.key not in result.corrected[-1:]:
                    result.corrected.append(portion.key)

    with copied(last, by.out) as (copy, result.left_out):
        for group in portions(last, here.units):
            correct(group, copy)
        result.kept = len(last.entries) - len(result.corrected)


@dataclass
class Merged:
    """What was summed; see :class:`Confined`, too."""

    out: str
    experts: dict[str, Confined]  # what was done to the change of each
    seconds: float = 0.0
    left_out: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def merge(
    start: Path | str,
    experts: Mapping[str, Path | str],
    bases: Sequence[FactoredBasis],
    out: Path | str,
    scale: float = 1.0,
    room: float = 0.5,
    device: torch.device | str = "cpu",
) -> Merged:
    """Start, plus `scale` times every expert's change, each confined off the directions of the other domains.

    Args:
        start: directory of a transformers model, or a safetensors file, that every expert was trained from.
        experts: For every domain the same model after training on it.
        bases: input bases of those domains and, perhaps, of others that nobody was trained on.
        out: directory to write, a copy of `start` but for the sums, in its dtypes.
        scale: What the changes are multiplied by.
        room, device: See :func:`confine`.

    Raises:
        ValueError, OSError: as :func:`confine`.
    """
    began = time.perf_counter()
    Settings(room=room)
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, found {scale}")
    first, lasts, bases = Weights(start), {name: Weights(path) for name, path in experts.items()}, list(bases)
    domains = [basis.info.domain for basis in bases]
    if not lasts:
        raise ValueError("merge: expected at least one NAME=END, found none")
    for name, last in lasts.items():
        if name not in domains:
            raise ValueError(
                f"merge: expected a basis of domain {name!r}, found those of {', '.join(domains) or 'none'}; "
                "record one with `carerl basis record`"
            )
        if last.is_adapter:
            raise ValueError(
                f"{last.path}: expected a whole model, found an adapter; put it into its model with PEFT's merge_and_unload"
            )
    here, where = Correspondence(first, bases), torch.device(device)
    for last in lasts.values():
        check_same(first, last, here.same)
    parts = {
        name: Confinement([b for b in bases if b.info.domain != name], 0.0, room, where, last.path)
        for name, last in lasts.items()
    }
    result = Merged(str(out), {name: part.result for name, part in parts.items()})

    def add(group: Sequence[Portion], copy: Copy) -> None:
        starts = [portion.read(first) for portion in group]
        sums: dict[int, Matrix] = {}
        for name, last in lasts.items():
            ends = (portion.read(last, _key_in(last, portion.key, here)) for portion in group)
            found = [
                parts[name].compared(portion, before, end, name)
                for portion, before, end in zip(group, starts, ends, strict=True)
            ]
            moved = {i: matrix for i, matrix in enumerate(found) if matrix}
            inside = parts[name].confined(list(moved.values()), torch.float32)
            for (i, matrix), new in zip(moved.items(), inside, strict=True):
                total = sums[i].end if i in sums else matrix.start
                total = torch.add(total, new - matrix.start, alpha=scale)
                sums[i] = replace(matrix, start=total, end=total)
        totals, dtype = list(sums.values()), group[0].entry.dtype
        # What is stored in 16 bits is rounded so that little of it is lost along any domain's directions.
        if dtype in (torch.bfloat16, torch.float16):
            stored = Confinement(bases, 0.0, room, where).confined(totals, dtype)
        else:
            stored = [matrix.end for matrix in totals]
        for i, total in zip(sums, stored, strict=True):
            group[i].write(copy, total)

    with copied(first, out) as (copy, result.left_out):
        for group in portions(first, here.units):
            add(group, copy)
    for part in result.experts.values():
        part.shares()
    result.warnings = warnings_of(first, here, bases)
    result.seconds = time.perf_counter() - began
    return result


def _key_in(weights: Weights, key: str, here: Correspondence) -> str:
    """The name of a tensor in other files of the model: its own, or that of what it is tied to."""
    return key if key in weights.entries else here.same[key]


def warnings_of(start: Weights, there: Correspondence, bases: Sequence[FactoredBasis]) -> list[str]:
    """What to know of bases that were recorded neither on this checkpoint nor on one that another basis leads on from."""
    names = bases[0].info.names
    lost = next((name for name in names if name not in there.names), None)
    if lost is not None:
        return [
            f"whether the bases were recorded on {start.path} cannot be told: its files do not hold {lost} as the model does"
        ]
    entries = [start.entries[there.names[name]] for name in names]
    dtypes = [None] if all(e.dtype == torch.float32 for e in entries) else [None, torch.float32]
    known: set[str] = set()
    for dtype in dtypes:  # as stored, or as a trainer in float32 had it
        tensors = (start.read(there.names[name]) for name in names)
        known.add(hash_parameters(t if dtype is None else t.to(dtype) for t in tensors))
        if known & {basis.info.end_hash for basis in bases}:
            break
    out = []
    for basis in bases:
        info = basis.info
        led_on = {other.info.start_hash for other in bases if other is not basis} - {""}
        if not known & {info.start_hash, info.end_hash} and info.end_hash not in led_on:
            out.append(
                f"domain {info.domain!r} was recorded on other weights (start {info.start_hash or '-'}, end "
                f"{info.end_hash or '-'}) than {start.path}: what its prompts feed into these may differ; record it on them"
            )
    return out
