"""Instructions whose following can be checked: lengths, words, form. No model, no downloads, no language data."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ...task import Example
from ..reasoning import StripReasoning, graded_text
from .fences import fenced_blocks

Check = Callable[..., bool]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    """Makes a function `f(text, **arguments) -> bool` an instruction of its name."""
    CHECKS[function.__name__] = function
    return function


def _within(count: int, at_least: int | None, at_most: int | None) -> bool:
    if at_least is None and at_most is None:
        raise ValueError("expected at_least, at_most or both")
    return (at_least is None or count >= at_least) and (at_most is None or count <= at_most)


@check
def words(text: str, at_least: int | None = None, at_most: int | None = None) -> bool:
    """So many words (runs without white space that contain a letter or digit)."""
    return _within(sum(any(c.isalnum() for c in w) for w in text.split()), at_least, at_most)


@check
def sentences(text: str, at_least: int | None = None, at_most: int | None = None) -> bool:
    """So many sentences: ended by . ! ? or their CJK forms before white space, a closing mark, or the end."""
    pieces = re.split(r"(?<![.!?…])[.!?…]++[\"'”’)\]]{0,16}(?=\s|$)|[。！？]", text)
    return _within(sum(any(c.isalnum() for c in p) for p in pieces), at_least, at_most)


@check
def paragraphs(text: str, at_least: int | None = None, at_most: int | None = None) -> bool:
    """So many paragraphs, separated by blank lines."""
    blank = [not line.strip() for line in text.split("\n")]
    return _within(sum(not b and (i == 0 or blank[i - 1]) for i, b in enumerate(blank)), at_least, at_most)


@check
def bullets(text: str, at_least: int | None = None, at_most: int | None = None) -> bool:
    """So many list items: lines that start with -, *, + or a number with . or )."""
    item = re.compile(r"(?:[-*+•]|\d{1,9}[.)])[ \t]++\S")
    return _within(sum(item.match(line.lstrip(" \t")) is not None for line in text.split("\n")), at_least, at_most)


@check
def contains(text: str, phrases: Sequence[str], at_least: int = 1, at_most: int | None = None) -> bool:
    """Every phrase that many times, as whole words, in any case."""
    return all(_within(_occurrences(text, p), at_least, at_most) for p in _texts(phrases))


@check
def avoids(text: str, phrases: Sequence[str]) -> bool:
    """No phrase anywhere, as whole words, in any case."""
    return not any(_occurrences(text, p) for p in _texts(phrases))


@check
def starts_with(text: str, phrase: str) -> bool:
    """Begins with exactly this text."""
    return text.lstrip().startswith(phrase)


@check
def ends_with(text: str, phrase: str) -> bool:
    """Ends with exactly this text."""
    return text.rstrip().endswith(phrase)


@check
def letter_case(text: str, case: str) -> bool:
    """All letters "lower" or "upper"; a text without letters is neither."""
    if case not in ("lower", "upper"):
        raise ValueError(f"expected case lower or upper, found {case!r}")
    return text.islower() if case == "lower" else text.isupper()


@check
def is_json(text: str, keys: Sequence[str] = ()) -> bool:
    """The whole text is JSON, in a code fence or bare; an object with these keys, if any are given."""
    blocks = fenced_blocks(text) if text.lstrip().startswith(("```", "~~~")) else []
    fenced = len(blocks) == 1 and blocks[0].language in ("", "json") and text.rstrip().endswith(("```", "~~~"))
    try:
        value = json.loads(blocks[0].text if fenced else text)
    except (ValueError, RecursionError):
        return False
    return not keys or (isinstance(value, dict) and set(_texts(keys)) <= value.keys())


@check
def characters(text: str, allowed: str | None = None, forbidden: str | None = None) -> bool:
    """Only characters of `allowed` (besides white space), and none of `forbidden`."""
    if allowed is None and forbidden is None:
        raise ValueError("expected allowed, forbidden or both")
    seen = set("".join(text.split()))
    return (allowed is None or seen <= set(allowed)) and (forbidden is None or not seen & set(forbidden))


@check
def sections(text: str, titles: Sequence[str]) -> bool:
    """These Markdown headings, in this order."""
    headings = (re.match(r"#{1,6}[ \t]([^\n]*)", line) for line in text.split("\n"))
    found = [m[1].strip().rstrip("#").strip() for m in headings if m and m[1].strip()]
    position = iter(found)
    return all(title in position for title in _texts(titles))


def _texts(values: Sequence[str]) -> Sequence[str]:
    if isinstance(values, str) or not values or not all(isinstance(v, str) and v for v in values):
        raise ValueError(f"expected a list of one or more texts, found {values!r}")
    return values


def _occurrences(text: str, phrase: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(phrase.casefold())}(?!\w)", text.casefold()))


def followed(text: str, instructions: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Which instructions a text follows.

    Args:
        text: The response. An empty one follows none: silence is no way to obey.
        instructions: {"check": name, argument: value, ...}.

    Raises:
        ValueError: An unknown check or a wrong argument; names both and what there is.
    """
    out = []
    for instruction in instructions:
        name, arguments = instruction.get("check"), {k: v for k, v in instruction.items() if k != "check"}
        if name not in CHECKS:
            raise ValueError(f"instruction: expected check one of {', '.join(CHECKS)}, found {name!r}")
        try:
            inspect.signature(CHECKS[name]).bind(text, **arguments)
            out.append(CHECKS[name](text, **arguments) and bool(text.strip()))
        except (TypeError, ValueError) as error:
            raise ValueError(f"instruction {name!r} with {arguments}: {error}") from error
    return out


def instructions_followed(example: Example, completion: str, *, strip_reasoning: StripReasoning = True) -> float:
    """Reward: the share of `example.info["instructions"]` that a completion follows.

    Args:
        strip_reasoning: See `rewards.reasoning.strip_reasoning`; an unfinished trace follows none.

    Raises:
        ValueError: The example has none, or one that is not understood.
    """
    instructions = example.info.get("instructions")
    if not instructions:
        raise ValueError(f'expected instructions in example.info["instructions"], {example.prompt!r} has none')
    text = graded_text(completion, strip_reasoning)
    return sum(followed(text or "", instructions)) / len(instructions)


instructions_followed.verifies = True  # type: ignore[attr-defined]
# Refuses an example whose instructions are not understood, before anything is trained on it.
instructions_followed.check = partial(instructions_followed, completion="A text.")  # type: ignore[attr-defined]
