"""Which matrices of a checkpoint's files a basis has directions for.

A basis names the parameters of a model; files may have them with another prefix, leave out tied ones, or hold the experts of a
mixture one by one where the model has them in one tensor. What transformers knows of a model type (ties, conversions) is asked of
the model itself, on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .factored import FactoredBasis
from .matrices import Side, label, unlabel
from .store import BasisError
from .weights import Weights


@dataclass(frozen=True)
class Unit:
    """A matrix in a tensor of a file, and where a basis has its directions."""

    label: str  # of the matrix in the basis: a parameter's name, or `name[e]` of a slice
    side: Side
    at: int | None = None  # which slice of a stack of matrices in the file it is; None where it is all of the tensor
    rows: Tensor | None = None  # the rows of the labelled matrix that stand here, in this order; None: all


class Correspondence:
    """From the tensors of a checkpoint to the directions of some input bases.

    Args:
        weights: The weights of the model that the bases were recorded on, or one like it.
        like: others of the same model, for its configuration where `weights` have none.

    Raises:
        BasisError: another kind of basis, or another model; the first difference is named.
    """

    def __init__(self, weights: Weights, bases: Sequence[FactoredBasis], like: Weights | None = None):
        self.weights, self._bases = weights, bases
        self._sides = sides_of(bases)
        self._shapes = {name: shape for basis in bases for name, shape in basis.info.shape_of.items()}
        model = model_of(weights if weights.config or like is None else like)
        ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
        ties |= {source: target for target, source in ties.items()}
        owners = {unlabel(name)[0] for name in self._sides}
        wanted = owners | set(ties)
        cut, add = _prefix(weights.entries, wanted)
        keys = {key: add + key.removeprefix(cut) for key in weights.entries if key.startswith(cut)}
        self.names = {name: key for key, name in keys.items()}  # by name in the model the tensor of the files
        self._ties = ties
        # names of tied tensors, each with the other one's
        self.same = {cut + a.removeprefix(add): cut + b.removeprefix(add) for a, b in ties.items()}
        plain = set(self.names) | {ties[name] for name in self.names if name in ties}
        self._pieces = _converted(model, owners - plain)
        # by tensor the matrices in it that have directions
        self.units = {key: units for key, name in keys.items() if (units := self._units_of(key, name))}
        self._check()

    def key_of(self, name: str) -> str | None:
        """The tensor of the files that a parameter is, or is tied to; None where there is none."""
        return self.names.get(name) or self.names.get(self._ties.get(name, ""))

    def _units_of(self, key: str, name: str) -> list[Unit]:
        if name in self._sides:
            return [Unit(name, self._sides[name])]
        entry = self.weights.entries[key]
        if len(entry.shape) == 3:
            slices = [(label(name, e), e) for e in range(entry.shape[0])]
            if units := [Unit(text, self._sides[text], e) for text, e in slices if text in self._sides]:
                return units
        if name in self._pieces:
            return self._from_rows(self._pieces[name], entry.shape)
        tied = self._ties.get(name)
        return [Unit(tied, self._sides[tied])] if tied in self._sides else []

    def _from_rows(self, piece: _Rows, shape: Sequence[int]) -> list[Unit]:
        """Units of a tensor that stands in the file as some rows of parameters."""
        if (*piece.rows.shape, piece.shape[-1]) != tuple(shape) or self._shapes.get(piece.name) != piece.shape:
            return []
        units = []
        for at in [None] if len(shape) == 2 else range(shape[0]):
            rows = piece.rows if at is None else piece.rows[at]
            each = piece.shape[-2]
            slices = (rows // each).unique()
            text = label(piece.name, None if len(piece.shape) == 2 else int(slices[0]))
            side = self._sides.get(text)
            if slices.numel() != 1 or side is None:
                continue
            within = rows - int(slices[0]) * each
            whole = torch.equal(within, torch.arange(each))
            if side == "left" and not whole:
                continue  # its directions would be cut apart
            units.append(Unit(text, side, at, None if whole else within))
        return units

    def _check(self) -> None:
        first = self._bases[0].info
        for name, key in self.names.items():
            if name in self._shapes and self.weights.entries[key].shape != self._shapes[name]:
                raise BasisError(
                    f"{self.weights.path}: expected {key} {list(self._shapes[name])} as in the basis of domain {first.domain!r} "
                    f"({first.architecture}), found {list(self.weights.entries[key].shape)}; record it on this model"
                )
        there = {unit.label for units in self.units.values() for unit in units}
        for text in self._sides:
            if text not in there:
                raise BasisError(
                    f"{self.weights.path}: expected {text}, which the basis of domain {first.domain!r} ({first.architecture}) "
                    f"has directions for, found no tensor of that name and shape among {len(self.weights.entries)}; record it on "
                    "this model, or save the checkpoint with transformers' save_pretrained"
                )


def sides_of(bases: Sequence[FactoredBasis]) -> dict[str, Side]:
    """The side of every matrix that any of the bases, all of kind "input" and of one model, has directions for."""
    sides: dict[str, Side] = {}
    first = bases[0].info
    for basis in bases:
        info = basis.info
        if info.kind != "input":
            raise BasisError(
                f"basis of domain {info.domain!r}: expected kind input, found {info.kind}; record what the domain's prompts feed "
                "into the model with basis='input'"
            )
        if (info.names, info.shapes) != (first.names, first.shapes):
            one, other = first.shape_of, info.shape_of
            name = next((n for n in [*one, *other] if one.get(n) != other.get(n)), "the order of names")
            raise BasisError(
                f"basis of domain {info.domain!r}: expected the parameters of domain {first.domain!r}, found another {name}; "
                "record both on one model"
            )
        for side, factors in (("left", basis.left), ("right", basis.right)):
            for name in factors:
                if sides.setdefault(name, side) != side:  # type: ignore[arg-type]
                    raise BasisError(
                        f"basis of domain {info.domain!r}: expected directions of {name} on its {sides[name]}, found them on "
                        f"its {side}; record both domains on one model"
                    )
    domains = [basis.info.domain for basis in bases]
    if doubled := sorted({d for d in domains if domains.count(d) > 1}):
        raise BasisError(
            f"bases: expected one per domain, found {doubled[0]!r} twice; merge them with carerl basis merge"
        )
    return sides


def model_of(weights: Weights) -> Any:
    """The model of a directory on the meta device; None where transformers does not know it, or is missing."""
    if not weights.config:
        return None
    try:
        import transformers
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(weights.folder, local_files_only=True, trust_remote_code=False)
        kind = getattr(transformers, (config.architectures or [""])[0], None)
        with torch.device("meta"):
            return kind(config) if kind is not None else AutoModelForCausalLM.from_config(config)
    except (ImportError, OSError, TypeError, ValueError, KeyError, AttributeError):
        return None  # names are compared as they stand; what does not fit is refused by name


@dataclass(frozen=True)
class _Rows:
    """Rows of one parameter, counted over its slices, as they stand in a tensor of a file."""

    name: str
    shape: tuple[int, ...]
    rows: Tensor


def _converted(model: Any, wanted: Iterable[str]) -> dict[str, _Rows]:
    """Where transformers puts the rows of these parameters when it saves the model, by tensor name.

    Its own conversion is run on numbered rows instead of weights: whatever takes tensors apart along rows is understood.
    """
    wanted = set(wanted)
    named = model.named_parameters() if wanted and model is not None else ()
    parameters = {name: p for name, p in named if name in wanted and p.dim() in (2, 3)}
    if not parameters:
        return {}
    state, firsts, end = {}, [], 0
    for name, p in parameters.items():
        size = p.shape[:-1].numel()
        state[name] = torch.arange(end, end + size).view(*p.shape[:-1], 1)
        firsts.append(end)
        end += size
    try:
        from transformers.core_model_loading import revert_weight_conversion

        saved = revert_weight_conversion(model, state)
    except Exception:  # a conversion that needs the weights themselves: the parameters stay missing and are named
        return {}
    out, starts, names = {}, torch.tensor(firsts), list(parameters)
    for key, numbers in saved.items():
        at = (torch.searchsorted(starts, numbers.flatten(), right=True) - 1).unique()
        if at.numel() == 1 and numbers.shape[-1] == 1:
            index = int(at)
            out[key] = _Rows(names[index], tuple(parameters[names[index]].shape), numbers.squeeze(-1) - firsts[index])
    return out


def _prefix(keys: Iterable[str], names: Iterable[str]) -> tuple[str, str]:
    """What to cut from the keys of a file, and to put before them, so that most names are among them."""
    keys, names = set(keys), set(names)
    candidates = {("", "")}
    for ours, theirs, cut in ((keys, names, True), (names, keys, False)):
        for name in ours:
            parts = name.split(".")
            for i in range(1, len(parts)):
                if ".".join(parts[i:]) in theirs:
                    prefix = ".".join(parts[:i]) + "."
                    candidates.add((prefix, "") if cut else ("", prefix))

    def hits(candidate: tuple[str, str]) -> int:
        cut, add = candidate
        return sum(key.startswith(cut) and add + key.removeprefix(cut) in names for key in keys)

    return max(sorted(candidates), key=hits)
