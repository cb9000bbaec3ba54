"""What a method uses beyond the plain run of its setting: data that it keeps, passes that it makes, what it stores."""

from __future__ import annotations

from typing import Any, get_args

from ..subspace.layout import RowKind
from ..subspace.replay import SEQUENCES
from .grid import Cell


def memory(cell: Cell) -> str:
    """What a method keeps of earlier domains' data."""
    train, guard = cell.recipe.train, cell.recipe.guard
    replays = getattr(train, "replay_fraction", 0) > 0
    stored = {(d.replay, d.probes) for d in getattr(cell.recipe, "domains", {}).values()}
    if replays and any(replay == "all" for replay, _ in stored):
        return "all prompts"
    reads = getattr(train, "rehearsal_weight", 0) > 0 or (guard and guard.options.get("rule") == "probed")
    return f"{max(n for _, n in stored)} a domain" if replays or reads else cell.added.keeps(cell.recipe) or "none"


def beyond(cell: Cell) -> str:
    """Sequences that a whole run takes besides those that the plain run trains on, relative to these; what else it stores.

    Evaluations, and products with what is stored, are not counted.
    """
    recipe, extra = cell.recipe, cell.added.extra(cell.recipe)
    lengths = _lengths(recipe)
    batch = getattr(recipe.train, "prompts_per_step", 0) * getattr(recipe.train, "group_size", 0)
    trained = sum(lengths) * (batch or cell.runner.BATCH)
    both, forward = _passes(recipe, lengths, trained)
    counts = {
        "sampled and trained on": extra.trained,
        "forward and backward": extra.both + both,
        "forward": extra.forward + forward,
    }
    stores = [extra.stores] if extra.stores else []
    stores += ["directions"] if recipe.guard is not None else []
    pulled = getattr(recipe.train, "stage_interpolation", 1) != 1
    stores += ["1 model"] if pulled or getattr(recipe.train, "kl_beta", 0) else []
    found = [f"{n} sequences {how} (+{n / trained:.1%})" for how, n in counts.items() if n]
    return "; ".join([*found, *([f"stores {' and '.join(stores)}"] if stores else [])])


def _lengths(recipe: Any) -> list[int]:
    """Steps of every stage that is trained."""
    if hasattr(recipe, "steps"):
        return [recipe.steps for name in getattr(recipe, "stages", recipe.__dict__.get("domains")) if name != "text"]
    return [stage.steps for stage in recipe.stages]


def _passes(recipe: Any, lengths: list[int], trained: int) -> tuple[int, int]:
    """Sequences passed forward and backward, and forward alone, for what the recipe itself says."""
    train, guard = recipe.train, recipe.guard
    earlier = len(getattr(recipe, "stages", lengths)) - 1
    both, forward, drawn = 0, 0, getattr(train, "rehearsal_batch", 32)
    if getattr(train, "rehearsal_weight", 0):
        both += drawn * sum(lengths[1:])
    if getattr(train, "self_rehearsal_weight", 0):
        both += drawn * sum(lengths)
    if getattr(train, "kl_beta", 0):
        forward += trained
    if guard is not None and guard.options.get("rule") == "probed":
        probes, every = max(d.probes for d in recipe.domains.values()), guard.options.get("probe_every", 20)
        both += sum(i * probes * -(-steps // every) for i, steps in enumerate(lengths))
    if guard is not None and guard.options.get("basis") not in (*get_args(RowKind), "block"):
        forward += (guard.shown or SEQUENCES) * earlier
    return both, forward
