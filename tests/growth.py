"""Work that grows faster than its input: inputs made to keep a pattern busy, and a measure that a busy machine does not fool."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from re import _constants as c
from re import _parser
from typing import Any

SIZES = (500, 1_000, 2_000, 4_000, 8_000)
NOTICEABLE = 0.002  # seconds below which growth cannot be told from noise
_CANDIDATES = "a0 -\n.!A_\"'`{<\\$=:,;()[]|#*é\u2029"
_PLAIN = (
    "a",
    " ",
    "-",
    "\n",
    "0",
    "=",
    "`",
    "<",
    "{",
    "(",
    "[",
    '"',
    "'",
    "\\",
    ".",
    ",",
    "a ",
    "a\n",
    "- ",
    "\n ",
    "1,",
    "{}",
    "<>",
)


def superlinear(work: Callable[[str], Any], texts: Callable[[int], str]) -> str | None:
    """Why the time of `work(texts(n))` grows faster than n, or None: twice the text may take little more than twice as long.

    The shortest of several runs counts, in processor time, and a suspicion is looked at again.
    """
    seconds: list[float] = []
    for size in SIZES:
        seconds.append(_shortest(work, texts(size), 1 if seconds and seconds[-1] > 0.1 else 2))
        if len(seconds) < 3 or seconds[-3] < NOTICEABLE or seconds[-1] < 9 * seconds[-3]:
            continue
        again = [_shortest(work, texts(n), 1 if seconds[-1] > 1 else 5) for n in (size // 4, size)]
        if again[1] > 9 * again[0]:
            return f"{[round(s, 4) for s in seconds]} s for {SIZES[: len(seconds)]} repetitions as in {texts(1)!r}"
    return None


def _shortest(work: Callable[[str], Any], text: str, runs: int) -> float:
    best = float("inf")
    for _ in range(runs):
        started = time.thread_time()
        work(text)
        best = min(best, time.thread_time() - started)
    return best


def attacks(pattern: re.Pattern[str] | None = None) -> Iterator[Callable[[int], str]]:
    """Texts of any length: one character for ever, what a pattern's repetitions repeat, behind what comes before them."""
    for unit in _PLAIN:
        yield lambda n, unit=unit: unit * n
    if pattern is None:
        return
    tree = _parser.parse(pattern.pattern, pattern.flags & ~re.DEBUG)
    whole = _sample(tree)
    for unit in {whole, whole + " ", whole + "\n"} - {"", " ", "\n"}:
        yield lambda n, unit=unit: unit * n
    found = list(dict.fromkeys(_repeated(tree, "")))
    for before, unit in found:
        yield lambda n, before=before, unit=unit: before + unit * n + "\0"
        if before:
            yield lambda n, before=before, unit=unit: (before + unit * 3) * n
            yield lambda n, before=before, unit=unit: before * n + unit * n
    for (_, one), (_, two) in pairwise(found):
        yield lambda n, one=one, two=two: one * n + two * n + "\0"


def _repeated(tree: Iterable[Any], before: str) -> Iterator[tuple[str, str]]:
    """What every repetition in a pattern repeats, and what stands before it."""
    for op, argument in tree:
        if op in (c.MAX_REPEAT, c.MIN_REPEAT, c.POSSESSIVE_REPEAT):
            body = _sample(argument[2])
            if argument[1] > 1 and body:
                yield before, body
            yield from _repeated(argument[2], before)
        elif op is c.SUBPATTERN:
            yield from _repeated(argument[3], before)
        elif op is c.ATOMIC_GROUP:
            yield from _repeated(argument, before)
        elif op is c.BRANCH:
            for branch in argument[1]:
                yield from _repeated(branch, before)
        elif op in (c.ASSERT, c.ASSERT_NOT):
            yield from _repeated(argument[1], before)
        before += _sample([(op, argument)])


def _sample(tree: Iterable[Any]) -> str:
    """A text that a pattern matches, more or less."""
    out = ""
    for op, argument in tree:
        if op is c.LITERAL:
            out += chr(argument)
        elif op is c.NOT_LITERAL:
            out += next(x for x in _CANDIDATES if ord(x) != argument)
        elif op is c.ANY:
            out += "a"
        elif op is c.IN:
            out += next((x for x in _CANDIDATES if _member(x, argument)), "") or _first(argument)
        elif op in (c.MAX_REPEAT, c.MIN_REPEAT, c.POSSESSIVE_REPEAT):
            out += _sample(argument[2]) * min(max(argument[0], 1), 5)
        elif op is c.SUBPATTERN:
            out += _sample(argument[3])
        elif op is c.ATOMIC_GROUP:
            out += _sample(argument)
        elif op is c.BRANCH:
            out += _sample(argument[1][0])
    return out


def _member(character: str, items: Iterable[Any]) -> bool:
    code, negated, inside = ord(character), False, False
    for op, argument in items:
        if op is c.NEGATE:
            negated = True
        elif op is c.LITERAL:
            inside |= argument == code
        elif op is c.RANGE:
            inside |= argument[0] <= code <= argument[1]
        elif op is c.CATEGORY:
            name = str(argument)
            member = (
                character.isdigit()
                if "DIGIT" in name
                else character.isspace()
                if "SPACE" in name
                else (character.isalnum() or character == "_")
            )
            inside |= member is not ("NOT" in name)
    return inside is not negated


def _first(items: Iterable[Any]) -> str:
    return next((chr(a if op is c.LITERAL else a[0]) for op, a in items if op in (c.LITERAL, c.RANGE)), "a")
