"""Texts for a pretrained model: documentation, facts, and tasks on lists of words; nothing is downloaded.

General text to show a model is documentation of the Python language, which every Python carries (`pydoc_data`). General text to
score it on is of another source: the descriptions of packages that training needs anyway. A new version of one
of them may shift figures a little.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import metadata
from typing import Any

import torch
from torch import Tensor, nn

from ..text import right_pad

TEXT = "text"
"""The domain that a pretrained model comes with: predicting general text."""
LENGTH = 64
"""Tokens of a sequence of text."""
HELD_OUT = 32
"""Sequences of text, and examples of a task, behind a score."""
PACKAGES = ("accelerate", "huggingface_hub", "numpy", "safetensors", "tokenizers", "torch", "transformers")
WORDS = (
    "apple river stone cloud tiger lemon piano grape tower candle button window basket ladder mirror pillow garden rocket "
    "saddle turtle violin wagon zebra anchor bridge castle dragon engine forest guitar hammer island jacket kettle lantern "
    "magnet needle orange pencil quartz ribbon silver ticket umbrella valley walnut yellow"
)
SORTED: dict[str, tuple[str, Callable[[list[str]], list[str]]]] = {
    "backwards": ("Sorted backwards:", lambda words: sorted(words, reverse=True)),
    "shortest": ("Shortest first:", lambda words: sorted(words, key=len)),
}
"""Tasks: what the prompt asks of four words, and the answer."""
FACTS = (
    "The capital of France is| Paris;The capital of Italy is| Rome;The capital of Spain is| Madrid;The capital of Japan is|"
    " Tokyo;The capital of Egypt is| Cairo;The capital of Germany is| Berlin;The capital of England is| London;The capital "
    "of Russia is| Moscow;The opposite of hot is| cold;The opposite of big is| small;The opposite of up is| down;The "
    "opposite of black is| white;The color of the sky is| blue;The color of grass is| green;The color of blood is| red;Two "
    "plus two equals| four;The sun rises in the| east;Water freezes at zero degrees| Celsius;The first president of the "
    "United States was George| Washington;Romeo and| Juliet;Once upon a| time;The largest planet in the solar system is| "
    "Jupiter;The Earth orbits around the| Sun;Monday, Tuesday, Wednesday,| Thursday;January, February, March,| April;one, "
    "two, three, four,| five;A baby dog is called a| puppy;The author of Hamlet is William| Shakespeare;Bees make| honey"
)

Pair = tuple[str, str]
"""A prompt and its answer."""


@dataclass(frozen=True)
class Batch:
    """Sequences, padded at their ends.

    Attributes:
        ids: `[B, L]` token ids.
        mask: `[B, L]`, 1 where there is a token.
        scored: `[B, L]` bool, tokens whose prediction counts: answers, or all of a text but its first.
    """

    ids: Tensor
    mask: Tensor
    scored: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        """As the model is called."""
        return {"input_ids": self.ids, "attention_mask": self.mask}


def pairs_batch(tokenizer: Any, pairs: Iterable[Pair]) -> Batch:
    """Prompts with their answers, which alone are scored."""
    rows = [(tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]) for prompt, answer in pairs]
    ids, mask = right_pad([prompt + answer for prompt, answer in rows], 0, torch.device("cpu"))
    starts = torch.tensor([len(prompt) for prompt, _ in rows])
    return Batch(ids, mask, mask.bool() & (torch.arange(ids.shape[1]) >= starts.unsqueeze(1)))


def text_batch(tokenizer: Any, documents: list[str], n: int, seed: int) -> Batch:
    """`n` pieces of `LENGTH` tokens from anywhere in the documents, longer ones more often."""
    rng, tokens = random.Random(seed), [ids for d in documents if len(ids := tokenizer(d)["input_ids"]) > LENGTH]
    rows = []
    for document in rng.choices(tokens, weights=[len(t) for t in tokens], k=n):
        start = rng.randrange(len(document) - LENGTH)
        rows.append(document[start : start + LENGTH])
    ids = torch.tensor(rows)
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[:, 0] = False
    return Batch(ids, torch.ones_like(ids), scored)


def documentation(shown: bool) -> list[str]:
    """Pages on the Python language: those to show, or the others, which repeat some of their paragraphs."""
    from pydoc_data.topics import topics

    return [prose(topics[name]) for name in sorted(topics)[not shown :: 2]]


def descriptions() -> list[str]:
    """What `PACKAGES` say of themselves."""
    return [prose(str(metadata(name).json.get("description", ""))) for name in PACKAGES]


def prose(text: str) -> str:
    """The text without tags, rules, tables, links and line breaks."""
    return re.sub(r"\s+", " ", re.sub(r"</?[a-z][^>]*>|https?://\S+|[|`*#\[\]()<>=_:~-]{2,}", " ", text)).strip()


def facts() -> list[Pair]:
    """Beginnings of sentences that everybody can end."""
    return [(prompt, answer) for prompt, _, answer in (fact.partition("|") for fact in FACTS.split(";"))]


def general(tokenizer: Any) -> dict[str, Batch]:
    """What a pretrained model could before it was trained further: text of two sources, and facts.

    Pieces of documentation are of pages that `documentation(shown=True)` leaves out.
    """
    return {
        TEXT: text_batch(tokenizer, descriptions(), HELD_OUT, seed=0),
        "documentation": text_batch(tokenizer, documentation(shown=False), HELD_OUT, seed=0),
        "facts": pairs_batch(tokenizer, facts()),
    }


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean nats of the scored tokens."""
    logits = model(**batch.inputs).logits[:, :-1]
    nats = nn.functional.cross_entropy(logits.transpose(1, 2), batch.ids[:, 1:], reduction="none")
    return nats[batch.scored[:, 1:]].mean()


def task_pairs(task: str, seed: str, apart: Iterable[Pair] = ()) -> Iterator[Pair]:
    """Endless examples of a task, none of those `apart`."""
    rng, (asked, answer) = random.Random(f"{task}-{seed}"), SORTED[task]
    excluded = set(apart)
    while True:
        words = rng.sample(WORDS.split(), 4)
        pair = f"Words: {' '.join(words)}\n{asked}", f" {' '.join(answer(words))}\n"
        if pair not in excluded:
            yield pair
