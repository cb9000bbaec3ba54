"""History from a look: a model is shown batches, and every covered weight is watched at work (see :mod:`.watch`)."""

from __future__ import annotations

import random
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from .._errors import one_of
from .._wrapped import unwrapped
from .batches import Positions, call, prepared, text_positions, to_device
from .matrices import MatrixLayout, some, unlabel
from .moments import Accumulator, Moments, sketch_width
from .rows import Rows
from .shards import reshard
from .sites import guess_sides, plain_name
from .watch import Watch

SHOWN_AFTER = 2.0
"""Seconds after which a progress bar appears."""


@torch.no_grad()
def observe(
    model: nn.Module,
    batches: Iterable[Any],
    layout: MatrixLayout,
    *,
    run: Callable[[Any], Any] | None = None,
    tokenizer: Any = None,
    positions: Positions | None = None,
    group: Any = None,
    unseen: Literal["error", "free"] = "error",
    progress: bool = True,
) -> Moments:
    """Shows batches to a model and sums up the inputs of every covered weight, however it is used.

    The pass is without gradients, eager, and without dropout and autocast, whatever the caller has set; afterwards modes, random
    numbers and compiled code are as they were. Of a padded batch only text counts. Under FSDP2 every process calls it, each with
    its own share of the batches; a process that runs out shows its last one again, uncounted, until all are done.

    Args:
        model: bare, or inside `DistributedDataParallel`, `torch.compile` or `fully_shard`.
        batches: each a mapping of keyword arguments, a tuple of arguments, or a tensor (token ids); or a text, a list of texts,
            or a row with a list of `input_ids`, which are put together, padded and masked.
        layout: which weights are covered; its k is the rank that will be asked for.
        run: `run(batch)` calls the model, where it is not called as `model(**batch)`.
        positions: `positions(batch) -> bool [B, T]`, which positions count, where the batch does not hold the mask.
        group: process group over which batches are spread; None: this process has all of them, or FSDP2's processes have.
        unseen: "error" refuses a covered weight of which nothing was seen; "free" warns and leaves it without directions.
        progress: shows a bar on stderr where it takes longer than two seconds.

    Raises:
        ValueError: no batch; a covered weight that no batch reached; inputs that are not finite.
    """
    one_of("unseen", unseen, ("error", "free"))
    inner = unwrapped(model)
    group = group if group is not None else layout.shards.group
    named = [(plain_name(name), p) for name, p in inner.named_parameters()]
    sides = guess_sides(inner, [(name, p) for name, p in named if name in layout.names])
    accumulator = Accumulator(sketch_width(layout.k))
    watch = Watch(inner, layout.names, accumulator)
    device = next(p for name, p in named if name in layout.names).device
    shown, useless = 0, set[str]()
    with _quiet(inner), _bar(batches, progress, group) as step:
        for batch, counts in _together(prepared(batches, tokenizer), layout):
            batch = to_device(batch, device)
            mask, name = (positions(batch), None) if positions is not None else text_positions(inner, batch)
            watch.rows = Rows(None if mask is None else mask.to(device=device, dtype=torch.bool))
            with watch if counts else ExitStack():
                run(batch) if run is not None else call(inner, batch)
            accumulator.settle()
            shown += counts
            useless |= {name} - {None}  # type: ignore[arg-type]
            step()
    other = watch.other
    if group is not None:
        found: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(found, (shown, other), group=group)
        shown = sum(part[0] for part in found)
        names = {name for part in found for name in part[1]}
        other = {name: set().union(*(part[1].get(name, ()) for part in found)) for name in names}
    if not shown:
        raise ValueError(
            "expected at least one batch to show the model, found none; pass batches of what it is called with"
        )
    if group is not None:
        accumulator.reduce(group)
    moments = Moments(accumulator, sides, shown)
    moments.check_finite()
    if useless or watch.untold:
        what = f"mask {min(useless)!r} is no [B, T]" if useless else f"inputs of {some(sorted(watch.untold))}"
        warnings.warn(
            f"padding was not told apart ({what}) and counts there; show batches without padding, or pass positions=",
            stacklevel=3,
        )
    _settle(moments, layout, sides, other, unseen)
    return moments


def _settle(
    moments: Moments, layout: MatrixLayout, sides: dict[str, Any], other: dict[str, set[str]], unseen: str
) -> None:
    """What of the covered weights was not seen: idle experts, weights without products, and the rest, which is refused."""
    labels = [name for group in layout.groups for name in layout.labels(group)]
    missing = [name for name in labels if not moments.saw(name)]
    families = {_family(name) for name in labels if moments.saw(name)}
    # Experts that no token was routed to have no directions, and nothing is said of them.
    rest = [name for name in missing if _family(name) == name or _family(name) not in families]
    unused = {name: sorted(other[name]) for name in dict.fromkeys(unlabel(n)[0] for n in rest) if name in other}
    free = [name for name in rest if unlabel(name)[0] not in unused]
    unseen_names = some(list(dict.fromkeys(unlabel(name)[0] for name in free)))
    moments.uncoverable = frozenset(unused)
    if free and unseen == "error":
        raise ValueError(
            f"expected inputs of every covered weight, found none of {unseen_names}; show batches that use them, pass run= where "
            "the model is called otherwise, freeze them (requires_grad_(False)), or leave them unprotected with unseen='free'"
        )
    if free:
        warnings.warn(f"nothing was seen of {unseen_names}: nothing protects them", stacklevel=4)
    if unused:
        how = "; ".join(f"{name} ({', '.join(ops)})" for name, ops in list(unused.items())[:3])
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        warnings.warn(
            f"not coverable, for no input is multiplied by them: {how}{more}; they move freely, freeze them to protect them",
            stacklevel=4,
        )


def _family(text: str) -> str:
    """Experts of one layer have the same: the stack's name, or the module's without its number."""
    name, index = unlabel(text)
    return name + "[]" if index is not None else re.sub(r"(experts?\.)\d+(?=\.)", r"\1*", name)


def _together(batches: Iterator[Any], layout: MatrixLayout) -> Iterator[tuple[Any, bool]]:
    """Batches, and whether they count: where parameters are sharded all processes call the model equally often."""
    if not layout.shards.sharded:
        yield from ((batch, True) for batch in batches)
        return
    last: Any = None
    while True:
        batch = next(batches, None)
        more = torch.tensor([batch is not None, batch is None and last is None], dtype=torch.int32)
        more = more.to(layout.shards.mesh.device_type if layout.shards.mesh is not None else "cpu")
        dist.all_reduce(more, group=layout.shards.group)
        if not int(more[0]):
            return
        if int(more[1]):
            raise ValueError(
                "expected at least one batch in every process, found a process without any; spread them evenly"
            )
        last = batch if batch is not None else last
        yield last, batch is not None


@contextmanager
def same_random_numbers(cuda: Sequence[int] = ()) -> Iterator[None]:
    """Inside, whatever draws random numbers takes none of the caller's: a model, or a module imported for the first time."""
    python, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002 (the caller's global state is what has to stay)
    try:
        with torch.random.fork_rng(devices=list(cuda)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)  # noqa: NPY002


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Inside, the model runs in eager mode without dropout, autocast, fused fast paths and random numbers of the caller's."""
    training = [module for module in model.modules() if module.training]
    fast = torch.backends.mha.get_fastpath_enabled()
    cuda = [d.index for d in {p.device for p in model.parameters()} if d.type == "cuda"]
    kinds = {p.device.type for p in model.parameters()}
    with ExitStack() as stack:
        stack.enter_context(same_random_numbers(cuda))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for kind in kinds - {"meta"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        torch.backends.mha.set_fastpath_enabled(False)
        for module in training:
            module.training = False
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for module in training:
                module.training = True
            reshard(model)


@contextmanager
def _bar(batches: Any, progress: bool, group: Any) -> Iterator[Callable[[], None]]:
    """A function to call after every batch; shows a bar when it has taken a while."""
    from rich.console import Console
    from rich.progress import Progress

    quiet = not progress or (group is not None and dist.get_rank(group) > 0)
    bar, began = Progress(console=Console(stderr=True), transient=True, disable=quiet), time.monotonic()
    task = bar.add_task("observing", total=len(batches) if hasattr(batches, "__len__") else None)

    def step() -> None:
        bar.advance(task)
        if time.monotonic() - began >= SHOWN_AFTER:
            bar.start()

    try:
        yield step
    finally:
        if bar.live.is_started:
            bar.stop()
