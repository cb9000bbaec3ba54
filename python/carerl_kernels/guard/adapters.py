"""LoRA adapters as checkpoints: what an adapter adds is B A x, and A alone sees x.

With A off the directions U of what is fed into the base layer, `A <- A (I - U^T U)`, the adapter adds nothing on protected
inputs whatever B is. So A is confined around zero, and B stays what it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import Any

import torch

from ..subspace.correspond import Correspondence, Unit
from ..subspace.portions import Portion
from ..subspace.weights import Weights, copied
from .changes import Confinement, Matrix

_PREFIX = "base_model.model."
_PAIRS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}
_STARTS = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Initialisations that change the base weights: the adapter alone is not what was added to them."""


def confine_adapter(there: Correspondence, adapter: Weights, by: Confinement) -> None:
    """Writes the adapter with every A off the protected inputs of its base layer. Whole tensors that were trained beside it
    (`modules_to_save`) are confined as those of a model.

    Args:
        there: What the tensors of the base model are called, and where directions lie in them.
        adapter: directory that PEFT saved.

    Raises:
        ValueError: an adapter of another form than W + B A, named with the setting or the tensor.
    """
    config = adapter.config
    _check(adapter, config)
    result = by.result
    with copied(adapter, by.out) as (copy, result.left_out):
        for key in adapter.entries:
            if any(key.endswith(b) for b in _PAIRS.values()):
                continue
            portion = Portion(key, adapter.entries[key], None)
            matrix = _factor(there, adapter, portion, config, by) or _whole(there, adapter, portion, by)
            if matrix is None:
                continue
            (new,) = by.confined([matrix], portion.entry.dtype)
            if not torch.equal(new, matrix.end):
                portion.write(copy, new)
                result.corrected.append(key)
        result.kept = len(adapter.entries) - len(result.corrected)


def _check(adapter: Weights, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{adapter.path}: expected an adapter_config.json with peft_type LORA, found {kind}")
    wrong = [name for name, value in config.items() if name.startswith("use_") and name != "use_rslora" and value]
    wrong += [name for name in ("lora_bias", "target_parameters", "layer_replication") if config.get(name)]
    if str(config.get("init_lora_weights")).lower().startswith(_STARTS):
        wrong.append(f"init_lora_weights={config['init_lora_weights']}")
    if wrong:
        raise ValueError(
            f"{adapter.path}: expected an adapter that adds B A to the weights of its model, found one with {', '.join(wrong)}; "
            "put it into the model with PEFT's merge_and_unload and confine the two models"
        )


def _factor(
    there: Correspondence, adapter: Weights, portion: Portion, config: Mapping[str, Any], by: Confinement
) -> Matrix | None:
    """A of an adapter, to be confined around zero; None where the key is no A."""
    end = next((end for end in _PAIRS if portion.key.endswith(end)), None)
    if end is None:
        return None
    layer, other = portion.key.removeprefix(_PREFIX).removesuffix(end), portion.key.removesuffix(end) + _PAIRS[end]
    if other not in adapter.entries:
        raise ValueError(f"{adapter.path}: expected {other} beside {portion.key}, found none")
    a, b = (t.reshape(len(t), -1).to(by.device, torch.float32) for t in map(adapter.read, (portion.key, other)))
    for name, values in ((portion.key, a), (other, b)):
        if not bool(values.isfinite().all()):
            raise ValueError(f"{adapter.path}: expected finite numbers in {name}, found NaN or infinity")
    base = there.key_of(f"{layer}.weight")
    if base is None:
        raise ValueError(
            f"{adapter.path}: expected adapters of layers in {there.weights.path}, found {portion.key}; START has to be the "
            "model that the adapter was trained on"
        )
    units = there.units.get(base, ())
    unit = None
    if len(units) == 1 and units[0].rows is None and (end == ".lora_A.weight" or units[0].side == "left"):
        shape = there.weights.entries[base].shape
        inputs = shape[0] if units[0].side == "left" else prod(shape[1:])  # length of what the weight multiplies
        unit = Unit(units[0].label, "right") if inputs == a.shape[1] else None
    gain = b.double().mT @ b.double() * _scale(config, layer, a.shape[0]) ** 2
    matrix = Matrix(unit, slice(None), torch.zeros_like(a), a, gain)
    energy = matrix.energy(a)
    by.result.norm += energy
    if unit is None and energy:
        by.result.free += energy
        by.result.uncovered.append(portion.key)
    return matrix


def _whole(there: Correspondence, adapter: Weights, portion: Portion, by: Confinement) -> Matrix | None:
    """A tensor of the model itself that was trained with the adapter; None where it did not move."""
    name = there.key_of(portion.key.removeprefix(_PREFIX).replace(".base_layer.", "."))
    if name is None or there.weights.entries[name].shape != portion.entry.shape:
        raise ValueError(
            f"{adapter.path}: expected lora_A, lora_B or tensors of {there.weights.path}, found {portion.key} "
            f"{list(portion.entry.shape)}; put the adapter into its model with PEFT's merge_and_unload and confine the two models"
        )
    units = there.units.get(name, ())
    found = Portion(portion.key, portion.entry, units[0] if len(units) == 1 and units[0].at is None else None)
    start = there.weights.read(name).reshape(found.shape)
    return by.compared(found, start, found.read(adapter))


def _scale(config: Mapping[str, Any], layer: str, r: int) -> float:
    """What PEFT multiplies B A of a layer by."""
    alpha = next(
        (a for key, a in (config.get("alpha_pattern") or {}).items() if re.match(rf"(.*\.)?({key})$", layer)),
        config.get("lora_alpha", r),
    )
    return alpha / r**0.5 if config.get("use_rslora") else alpha / r
