"""What each kind of setting honours: anything else in a cell would be ignored without a word, and is refused."""

from __future__ import annotations

from typing import Any

from .grid import Cell, GridError

POOLED = ("shares", "noise", "scale", "earlier", "earlier_steps")
IGNORED = {
    "lm": ("lora_rank",),
    "bandit": ("warm_up", *POOLED, "lora_rank"),
    "smollm2": ("warm_up", *POOLED, "lora_rank"),
    "merge": (*POOLED, "k", "lora_rank"),
    "sft": ("warm_up", *POOLED, "k"),
}
"""Fields of a setting, by kind, that its runner does not read."""
BANDIT_TRAIN = {"replay_fraction", "rehearsal_weight", "stage_interpolation", "kl_beta", "kl_reference"}
SHOWN = ("lm", "sft", "merge")
"""Kinds of settings that can show a guard examples."""
CELLS_OWN = {"lr", "seed"}
"""Fields of `GRPOConfig` that the cell decides."""


def refuse_ignored(cell: Cell) -> None:
    """Look for what the cell's runner would not honour.

    Raises:
        GridError: The setting or the method asks for something that would not happen.
    """
    setting, method = cell.setting, cell.method
    train = {**setting.train, **method.train}

    def refuse(expected: str, found: Any) -> None:
        raise GridError(f"{cell.name}: expected {expected}, found {found}")

    ignored = [f for f in IGNORED[setting.kind] if f in setting.model_dump(exclude_defaults=True)]
    if ignored:
        refuse(f"a {setting.kind} setting without what it does not know", ", ".join(ignored))
    if CELLS_OWN & train.keys():
        refuse("lr and seed from the cell's name, not from train", ", ".join(sorted(CELLS_OWN & train.keys())))
    if method.experiment and method.guard is None:
        refuse(f"a guard to go with experiment {method.experiment!r}", "none")
    stores = train.get("replay_fraction", 0) > 0 or train.get("rehearsal_weight", 0) > 0 or _probes(cell)
    if stores and method.stored == 0:
        refuse("stored examples for replay, rehearsal or probes", "stored: 0")
    for what, of in (("shares", setting.shares or {}), ("noise", setting.noise), ("scale", setting.scale)):
        if of.keys() - set(setting.domains):
            refuse(f"{what} of {', '.join(setting.domains)}", ", ".join(sorted(of.keys() - set(setting.domains))))
    if setting.shares is not None:
        shared = [group for group in setting.groups if len(group) >= len(setting.shares)]
        if not shared or any(setting.shares.keys() != set(group) for group in shared):
            refuse("a mixed stage of just the domains that have shares", f"stages {setting.groups}")
    if bool(setting.earlier) != bool(setting.earlier_steps) or set(setting.earlier) - set(setting.domains):
        refuse("earlier domains out of the setting's, and their steps", f"{setting.earlier}, {setting.earlier_steps}")
    if method.alone and not (setting.pooled and setting.kind == "lm"):
        refuse("domains trained alone in a pooled setting of kind lm", f"stages {setting.groups}")
    if method.editor == "guard" and (method.guard is None or setting.kind != "lm"):
        refuse("a guard to go with editor guard, in a setting of kind lm", f"guard: {method.guard}, {setting.kind}")
    if method.shown and (method.guard is None or setting.kind not in SHOWN):
        refuse(f"examples shown to a guard, in settings of kind {', '.join(SHOWN)}", f"shown: {method.shown}")
    if method.ties is not None and setting.kind != "merge":
        refuse("TIES in settings of kind merge", f"ties: {method.ties}")
    if setting.kind == "bandit":
        _refuse_bandit(cell, train, refuse)
    if setting.kind in ("sft", "merge"):
        _refuse_alone(cell, train, refuse)


def _refuse_alone(cell: Cell, train: dict[str, Any], refuse: Any) -> None:
    """What settings without GRPO, or without an order of stages, do not know."""
    kind, method = cell.setting.kind, cell.method
    known = {"stage_interpolation"} if kind == "sft" else set()
    unknown = sorted(train.keys() - known) + (["editor"] if method.editor else [])
    if unknown:
        refuse(f"methods of {kind} that train with {', '.join(known) or 'nothing else'}", ", ".join(unknown))
    if method.guard is not None and not method.shown:
        refuse(f"guards of {kind} that are shown examples", f"shown: {method.shown}")
    if kind == "sft" and any(len(group) > 1 for group in cell.setting.groups):
        refuse("sft in stages of one domain each", cell.setting.stages)
    if kind == "merge" and set(cell.setting.groups[-1]) != {d for group in cell.setting.groups[:-1] for d in group}:
        refuse("merge in stages of one domain each, and a last one of all", cell.setting.stages)


def _refuse_bandit(cell: Cell, train: dict[str, Any], refuse: Any) -> None:
    groups, unknown = cell.setting.groups, sorted(train.keys() - BANDIT_TRAIN)
    if unknown:
        refuse(f"bandits to train with {', '.join(sorted(BANDIT_TRAIN))} alone", ", ".join(unknown))
    if any(len(group) > 1 for group in groups) or len(groups) > len(cell.setting.domains):
        refuse("bandits in stages of one domain each, none twice", cell.setting.stages)
    if train.get("kl_reference", "stage") != "stage":
        refuse("kl_reference: stage, all that bandits know", train["kl_reference"])
    if cell.method.stored is None and (train.get("rehearsal_weight", 0) > 0 or _probes(cell)):
        refuse("a number of stored contexts, for bandits have no end of them", "stored: null")


def _probes(cell: Cell) -> bool:
    return (cell.method.guard or {}).get("rule") == "probed"
