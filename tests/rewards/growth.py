"""Work that grows faster than its input: inputs made to keep a pattern busy, and a measure that a busy machine does not fool."""

from __future__ import annotations

import gc
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from re import _constants as c
from re import _parser
from typing import Any

SIZES = (250, 2_000, 16_000)  # characters, each eight times the one before
LIMIT = 20  # times as long for eight times the text: halfway between a line (8) and a square (64)
NOTICEABLE = 0.003  # seconds below which growth cannot be told from noise; a square is far above it at the largest size
BUDGET = 0.4  # seconds of processor time after which nothing waits for the end
_CANDIDATES = "a0 -\n.!A_\"'`{<\\$=:,;()[]|#*é\u2029"
_PLAIN = (*"a -\n0=`<{([\"'\\.,", "a ", "a\n", "- ", "\n ", "1,", "{}", "<>")


def superlinear(work: Callable[[str], Any], texts: Callable[[int], str]) -> str | None:
    """Why the time of `work(texts(n))` grows faster than its text, or None.

    In processor time; a suspicion is looked at again, and then the shortest of several runs counts.
    """
    unit = max(1, len(texts(2)) - len(texts(1)))
    shorter, before = "", 0.0
    for size in SIZES:
        text = texts(max(1, size // unit))
        took = _seconds(work, text)
        if took > max(NOTICEABLE, LIMIT * before):
            took = min(took, *(_seconds(work, text) for _ in range(1 if took >= BUDGET else 2)))
            before = min(_seconds(work, shorter) for _ in range(5)) if before else before
        if took >= BUDGET or took > max(NOTICEABLE, LIMIT * before) > NOTICEABLE:
            return f"{took:.2g} s for {size} characters as in {texts(1)!r}, {before:.2g} s for an eighth of them"
        shorter, before = text, took
    return None


def _seconds(work: Callable[[str], Any], text: str) -> float:
    """Of processor time; no less than `BUDGET` where the work was stopped (patterns, too, look for signals).

    Without the garbage of others: one collection in a large process takes seconds.
    """

    def stop(*_: object) -> None:
        raise _Stopped

    previous = signal.signal(signal.SIGVTALRM, stop)
    collects = gc.isenabled()
    gc.disable()
    started = time.thread_time()
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, BUDGET)
        work(text)
        return time.thread_time() - started
    except _Stopped:
        return max(BUDGET, time.thread_time() - started)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)
        if collects:
            gc.enable()


class _Stopped(BaseException):
    """No error of the work's own."""


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
