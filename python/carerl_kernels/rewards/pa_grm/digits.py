"""Scores by token probabilities: the mean over the scale's digits instead of the one digit that was written."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from .backend import Token

# An unescaped `"score"` followed by a colon is a key: in a string value the quote before the colon would end the value, and
# a value is never followed by a colon.
_SCORE = re.compile(rb'"score"\s{0,64}:\s{0,64}(\d)')


# Probability that the alternatives must give to the scale's digits together where some digits are not among them; below it, the
# number would rest on a tail that the backend did not report.
_LEAST_MASS = 0.5


def expected_levels(
    text: str, tokens: Sequence[Token], scale: int, *, start: int = 0, end: int | None = None
) -> list[float | None]:
    """For every `"score": d` in a JSON text, in order, the mean level under the model's own probabilities.

    Args:
        tokens: Those of the reply, with alternatives.
        scale: Levels are 0..scale.
        start, end: Where in the text the JSON is; the whole text by default.

    Returns:
        One number in [0, scale] per score, None where the tokens do not tell.
    """
    data = text.encode(errors="surrogatepass")
    first = len(text[:start].encode(errors="surrogatepass"))
    last = len(data) if end is None else first + len(text[start:end].encode(errors="surrogatepass"))
    starts = [m.start(1) for m in _SCORE.finditer(data, first, last)]
    if b"".join(t.text for t in tokens) != data:
        return [None] * len(starts)
    out: list[float | None] = []
    position, i = 0, 0
    for start in starts:
        while position + len(tokens[i].text) <= start:
            position += len(tokens[i].text)
            i += 1
        before = tokens[i].text[: start - position]
        out.append(_mean_level(tokens[i].alternatives, before, scale))
    return out


def _mean_level(alternatives: Mapping[bytes, float], before: bytes, scale: int) -> float | None:
    """The mean over alternatives that read `before`, one digit of the scale, and no further digit."""
    levels: dict[int, float] = {}
    for text, logp in alternatives.items():
        rest = text[len(before) :]
        if text.startswith(before) and rest[:1].isdigit() and not rest[1:2].isdigit() and int(rest[:1]) <= scale:
            levels[int(rest[:1])] = levels.get(int(rest[:1]), 0.0) + math.exp(logp)
    mass = sum(levels.values())
    if not 0 < mass < 1.01 or (mass < _LEAST_MASS and len(levels) <= scale):  # more than 1 is no distribution
        return None
    return sum(level * probability for level, probability in levels.items()) / mass
