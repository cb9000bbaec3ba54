"""Verifiable domains for a very small language model, its tokenizer, and its supervised warm-up.

The demonstration trains the first three. Every task is one line of text answered by another, and has one right answer:

    code   `c^dba>` -> `abd`    sort the letters (`^` ascending, `v` descending): follow an instruction on a sequence
    chat   `s3b!x>` -> `bbb!`   say the letter n times, then the punctuation mark; the last letter is chatter to ignore
    math   `m^372>` -> `7`      the largest (`^`) or smallest (`v`) digit

Six more of the same shape (`MORE`) make long sequences:

    shift  `t^abh>` -> `bca`    the next (`^`) or previous (`v`) letter of each, around the end
    turn   `r^abc>` -> `cba`    backwards (`^`), or with the first letter moved to the end (`v`)
    pick   `p2abc>` -> `b`      the n-th letter
    flip   `f^372>` -> `627`    nine minus (`^`) each digit, or (`v`) one more, without carry
    count  `nbabb>` -> `2`      how often the first letter occurs among the others
    merge  `zab12>` -> `a1b2`   letters and digits in turns

The tasks share letters, digits, an instruction symbol and position-dependent copying, so the same few attention heads
serve all of them: learning one by reinforcement overwrites the others, as it does at scale, within seconds.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from .._errors import one_of, require
from ..grpo import Domain, Example, SpecialTokens, answer_loss, special_tokens
from ..rewards import exact_match
from .split import split_domain

DOMAINS = ("code", "chat", "math")
LETTERS = "abcdefgh"
DIGITS = "0123456789"
MARKS = "!?."
MAX_NEW_TOKENS = 5  # four characters and the end
EVAL_EXAMPLES = 128
PROBE_EXAMPLES = 32
PAD, EOS = "<pad>", "<eos>"


def _asked(kind: str, symbols: str, answers: Mapping[str, Callable[[str], str]]) -> list[Example]:
    """All ordered triples of different symbols under every instruction."""
    words = ["".join(word) for word in itertools.permutations(symbols, 3)]
    return [Example(f"{kind}{op}{word}>", answer(word)) for word in words for op, answer in answers.items()]


def _chat() -> list[Example]:
    """All counts, letters, marks and distractors."""
    asked = itertools.product((1, 2, 3), LETTERS, MARKS, LETTERS)
    return [Example(f"s{n}{letter}{mark}{noise}>", letter * n + mark) for n, letter, mark, noise in asked]


def _count() -> list[Example]:
    """All pairs of a letter to count and another, and all words of both that hold the other."""
    return [
        Example(f"n{letter}{''.join(word)}>", str(word.count(letter)))
        for letter, other in itertools.permutations(LETTERS, 2)
        for word in itertools.product((letter, other), repeat=3)
        if other in word
    ]


def _merge() -> list[Example]:
    """All ordered pairs of different letters and of different digits."""
    pairs = itertools.product(itertools.permutations(LETTERS, 2), itertools.permutations(DIGITS, 2))
    return [Example(f"z{a}{b}{x}{y}>", f"{a}{x}{b}{y}") for (a, b), (x, y) in pairs]


def _next(word: str, by: int) -> str:
    return "".join(LETTERS[(LETTERS.index(x) + by) % len(LETTERS)] for x in word)


_SORT = {"^": lambda w: "".join(sorted(w)), "v": lambda w: "".join(sorted(w, reverse=True))}
_SHIFT = {"^": lambda w: _next(w, 1), "v": lambda w: _next(w, -1)}
_TURN = {"^": lambda w: w[::-1], "v": lambda w: w[1:] + w[0]}
_PICK = {"1": lambda w: w[0], "2": lambda w: w[1], "3": lambda w: w[2]}
_FLIP = {"^": lambda w: "".join(str(9 - int(x)) for x in w), "v": lambda w: "".join(str((int(x) + 1) % 10) for x in w)}
GENERATORS: dict[str, Callable[[], list[Example]]] = {
    "code": partial(_asked, "c", LETTERS, _SORT),
    "chat": _chat,
    "math": partial(_asked, "m", DIGITS, {"^": max, "v": min}),
    "shift": partial(_asked, "t", LETTERS, _SHIFT),
    "turn": partial(_asked, "r", LETTERS, _TURN),
    "pick": partial(_asked, "p", LETTERS, _PICK),
    "flip": partial(_asked, "f", DIGITS, _FLIP),
    "count": _count,
    "merge": _merge,
}
"""All examples of a task, by its name."""
MORE = {"shift": "t", "turn": "r", "pick": "p", "flip": "f", "count": "n", "merge": "z"}
"""Domains beyond the demonstration's, and the letter that begins their prompts ("f" is a letter of the tasks already)."""


def demo_domains(seed: int, names: Sequence[str] = DOMAINS) -> list[Domain]:
    """Domains, the demonstration's three or any of `GENERATORS`. The seed splits the examples of each into 128 for evaluation
    and the rest for training; 32 of the latter are stored for probes."""
    return [character_domain(name, name, seed, PROBE_EXAMPLES) for name in names]


def character_domain(name: str, task: str, seed: int, stored: int) -> Domain:
    """One task as a domain of any name; `stored` of the training examples are stored.

    Raises:
        ValueError: There is no such task.
    """
    one_of(f"domain {name!r}: task", task, GENERATORS)
    return split_domain(name, GENERATORS[task](), exact_match, EVAL_EXAMPLES, seed, "exact", stored)


def character_tokenizer(names: Sequence[str] = DOMAINS) -> Any:
    """A fast transformers tokenizer with one token per character of the tasks; those beyond the demonstration's add the letters
    that their prompts begin with.

    Raises:
        ImportError: transformers is missing; says what to install.
    """
    require("transformers", "a model of characters")
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kinds = "".join(MORE.get(name, "") for name in names)
    symbols = [PAD, EOS, *sorted(set("cms^v>" + LETTERS + DIGITS + MARKS + kinds))]
    backend = Tokenizer(models.WordLevel({s: i for i, s in enumerate(symbols)}, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=EOS)


def tiny_model(tokenizer: Any, seed: int) -> Any:
    """A two-layer Qwen3 with about 80 thousand parameters, initialised from a seed.

    Raises:
        ImportError: transformers is missing; says what to install.
    """
    require("transformers", "a model of characters")
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        # with the usual 0.02 the logits of so small a model stay tiny and reinforcement barely sharpens them
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def warm_up(
    model: Any,
    tokenizer: Any,
    domains: Sequence[Domain],
    *,
    seed: int,
    steps: int = 60,
    batch_per_domain: int = 32,
    lr: float = 1e-3,
) -> list[float]:
    """Supervised steps on all domains: the "pretrained" model whose skills reinforcement then sharpens.

    Args:
        model: Trained in place.
        seed: Draws the examples.
        steps: Adam steps.
        batch_per_domain: Examples of each domain per step.

    Returns:
        The loss of every step (nats per token).
    """
    tokens: SpecialTokens = special_tokens(tokenizer, model)
    rng = random.Random(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        examples = [e for d in domains for e in d.draw(rng, batch_per_domain)]
        loss = answer_loss(model, tokenizer, examples, tokens)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
