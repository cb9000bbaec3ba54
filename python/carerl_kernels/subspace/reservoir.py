"""A uniform sample of the sequences that a model was called with during a stage."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .batches import BATCH, bare

Item = tuple[Any, list[bool]]
"""A call with one sequence, tensors on the CPU; and which of its leaves are the sequence's own, the others belong to all."""


class Reservoir:
    """Keeps `size` of all sequences of accepted steps, every one as likely as any other (algorithm R, Vitter 1985).

    What is offered waits until its step is accepted; it is copied only where it was drawn, never kept by reference.
    """

    def __init__(self, size: int, seed: int):
        self.size, self.items = size, list[Item]()
        self.seen = 0
        self._random = random.Random(seed)
        self._waiting: list[tuple[int, Item]] = []
        self._offered = 0

    def offer(self, batch: Any) -> None:
        """Sequences of the step that is being prepared."""
        leaves, spec = pytree.tree_flatten(bare(batch))
        sizes = [t.shape[0] for t in leaves if isinstance(t, Tensor) and t.dim()]
        size = sizes[0] if sizes else 1
        for at in range(size):
            number = self.seen + self._offered
            slot = number if number < self.size else self._random.randrange(number + 1)
            self._offered += 1
            if slot < self.size:
                self._waiting.append((slot, _cut(leaves, spec, size, at)))

    def accept(self) -> None:
        """The step was taken."""
        for slot, item in self._waiting:
            if slot < len(self.items):
                self.items[slot] = item
            else:
                self.items.append(item)
        self.seen += self._offered
        self.drop()

    def drop(self) -> None:
        """The step was not taken, or was not this stage's."""
        self._waiting, self._offered = [], 0

    @property
    def offered(self) -> bool:
        """Whether anything waits."""
        return self._offered > 0

    def batches(self) -> Iterator[Any]:
        """The sample in batches again: sequences that fit together come together."""
        waiting: dict[Any, list[Item]] = {}
        for item in self.items:
            key = _likeness(item)
            waiting.setdefault(key, []).append(item)
            if len(waiting[key]) == BATCH:
                yield _joined(waiting.pop(key))
        for rest in waiting.values():
            yield _joined(rest)

    def state(self) -> bytes:
        """For a checkpoint: one opaque value, because how many sequences there are is not known to who loads it."""
        file = io.BytesIO()
        torch.save({"items": self.items, "seen": self.seen, "random": self._random.getstate()}, file)
        return file.getvalue()

    def load(self, state: bytes) -> None:
        """Goes on from :meth:`state`."""
        kept = torch.load(io.BytesIO(state), weights_only=True)
        self.items, self.seen = kept["items"], kept["seen"]
        self._random.setstate(kept["random"])
        self.drop()


def _cut(leaves: list[Any], spec: Any, size: int, at: int) -> Item:
    own = [isinstance(t, Tensor) and t.dim() > 0 and t.shape[0] == size for t in leaves]
    parts = [
        (t[at : at + 1] if mine else t).detach().to("cpu", copy=True) if isinstance(t, Tensor) else t
        for t, mine in zip(leaves, own, strict=True)
    ]
    return pytree.tree_unflatten(parts, spec), own


def _likeness(item: Item) -> Any:
    """Equal for sequences that can stand in one batch."""
    call, own = item
    leaves, spec = pytree.tree_flatten(call)
    parts = []
    for leaf, mine in zip(leaves, own, strict=True):
        if not isinstance(leaf, Tensor):
            parts.append(repr(leaf))
        else:
            parts.append(str((leaf.shape[1:], leaf.dtype) if mine else (leaf.shape, leaf.tolist())))
    return str(spec), tuple(parts)


def _joined(items: list[Item]) -> Any:
    trees = [pytree.tree_flatten(call) for call, _ in items]
    first, spec = trees[0]
    leaves = [torch.cat([tree[i] for tree, _ in trees]) if mine else first[i] for i, mine in enumerate(items[0][1])]
    return pytree.tree_unflatten(leaves, spec)
