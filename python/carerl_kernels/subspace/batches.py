"""What a model is shown: batches of several forms, which of their positions are text, and a sample of what it was called with."""

from __future__ import annotations

import inspect
import io
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..text import encode_prompts, right_pad

BATCH = 8
"""Texts, or rows of token ids, that are shown at a time."""
_NOT_PADDING = ("loss", "completion", "label", "prompt", "special", "assistant", "global", "head", "token_type", "tool")
"""Masks that say something else than which positions are text, by a part of their name."""


def prepared(batches: Iterable[Any], tokenizer: Any, size: int = BATCH) -> Iterator[Any]:
    """Batches as the model is called with: texts and rows of token ids put together, so many at a time, padded and masked."""
    rows: list[list[int]] = []
    for batch in batches:
        new = _token_rows(batch, tokenizer)
        if new is None:
            yield batch
            continue
        rows += filter(None, new)
        while len(rows) >= 4 * size:  # of similar length together
            rows.sort(key=len)
            yield _padded(rows[-size:], tokenizer)
            del rows[-size:]
    rows.sort(key=len)
    for start in range(0, len(rows), size):
        yield _padded(rows[start : start + size], tokenizer)


def _token_rows(batch: Any, tokenizer: Any) -> list[list[int]] | None:
    """Token ids of a text, of several, or of a row of a data set; None: a batch as it is."""
    if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), list):
        ids = batch["input_ids"]
        return ids if ids and isinstance(ids[0], list) else [ids]
    texts = [batch] if isinstance(batch, str) else batch
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        return None
    if tokenizer is None:
        raise ValueError(
            f"expected a tokenizer with batches that are texts, found none (first text: {texts[0][:40]!r}); pass tokenizer="
        )
    return [tokenizer(text)["input_ids"] for text in texts]


def _padded(rows: list[list[int]], tokenizer: Any) -> dict[str, Tensor]:
    ids, mask = right_pad(rows, getattr(tokenizer, "pad_token_id", None) or 0, torch.device("cpu"))
    return {"input_ids": ids, "attention_mask": mask}


def call(model: nn.Module, batch: Any) -> Any:
    """Calls a model with a batch: keyword arguments, a tuple of arguments, or both as `(args, kwargs)`, or one argument."""
    args, kwargs = arguments(batch)
    return model(*args, **kwargs)


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a batch."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple | list):
        if len(batch) == 2 and isinstance(batch[0], tuple) and isinstance(batch[1], dict):
            return batch[0], batch[1]
        return tuple(batch), {}
    return (batch,), {}


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device, and with plain dictionaries."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), bare(batch))


def bare(batch: Any) -> Any:
    """The batch with plain dictionaries, as torch takes trees of tensors, in place of mappings of other types."""
    if isinstance(batch, Mapping):
        return {key: bare(value) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts = map(bare, batch)
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def text_positions(model: nn.Module, batch: Any) -> tuple[Tensor | None, str | None]:
    """Which positions of a batch are text, by the mask in it, wherever that stands.

    `attention_mask` first, by key or by the name that the model's `forward` gives an argument; then another mask, of which
    those with "padding" in their name say what is *not* text. Unnamed: a tensor of zeros and ones shaped as the first.

    Returns:
        bool `[B, T]`, or None: all are; and the name of a mask that is there and of no use, or None.
    """
    args, kwargs = arguments(batch)
    found: list[tuple[str, Tensor]] = []
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
        named = {
            ("" if parameter.kind is parameter.VAR_POSITIONAL else name): bound.arguments[name]
            for name, parameter in inspect.signature(model.forward).parameters.items()
            if name in bound.arguments
        }
    except (TypeError, ValueError):
        named = {"": args, **kwargs}
    _collect("", named, found)
    masks = [(name, t) for name, t in found if "mask" in name and not any(word in name for word in _NOT_PADDING)]
    masks.sort(key=lambda item: item[0] != "attention_mask")
    useless = None
    for name, mask in masks:
        if mask.dim() == 2:
            return (~mask.bool() if "padding" in name else mask > 0 if mask.dtype != torch.bool else mask), None
        useless = useless or name
    for name, t in found[1:]:
        alike = t.dim() == 2 and t.shape == found[0][1].shape and len(name) <= 1 and not t.is_floating_point()
        if alike and bool(((t == 0) | (t == 1)).all()) and bool(t.any()):
            return t.bool(), None
    return None, useless


def _collect(name: str, value: Any, found: list[tuple[str, Tensor]]) -> None:
    if isinstance(value, Tensor):
        found.append((name, value))
    elif isinstance(value, Mapping):
        for key, part in value.items():
            _collect(str(key), part, found)
    elif isinstance(value, tuple | list):
        for part in value:
            _collect(name if hasattr(value, "_fields") else "", part, found)
    elif hasattr(value, "__dataclass_fields__"):
        for key in value.__dataclass_fields__:
            _collect(key, getattr(value, key), found)


Positions = Callable[[Any], Tensor]


def shown_rows(rows: Iterable[Any], tokenizer: Any) -> Iterator[Any]:
    """Rows of a data set as :func:`prepared` takes them: a prompt with the completion after it where there is one, messages, or a
    text. Texts are taken as they are, messages through the chat template; what is already a batch stays as it is.

    Raises:
        ValueError: rows that need a tokenizer, and none; rows of texts under other names.
    """
    for row in rows:
        if not isinstance(row, Mapping) or not {"prompt", "messages", "text"} & set(row):
            if isinstance(row, Mapping) and not any(isinstance(value, Tensor | list | tuple) for value in row.values()):
                raise ValueError(
                    "expected rows with prompt (and completion), messages or text, or batches that the model is called with, "
                    f"found a row with {', '.join(map(repr, row)) or 'nothing'}; rename its columns"
                )
            yield row
            continue
        if tokenizer is None:
            raise ValueError(f"rows with {', '.join(row)}: expected a tokenizer to read them with, found none")
        prompt = row["prompt"] if "prompt" in row else row.get("messages", row.get("text"))
        answer = next((row[key] for key in ("completion", "answer") if isinstance(row.get(key), str | list)), "")
        if "prompt" not in row and not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
            prompt, answer = prompt[:-1], prompt[-1:]
        (ids,) = encode_prompts(tokenizer, [prompt])
        if not isinstance(answer, str):  # chat messages
            answer = "".join(message["content"] for message in answer)
        ids = ids + (tokenizer(answer, add_special_tokens=False)["input_ids"] if answer else [])
        yield {"input_ids": ids}


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
