"""JSON that others wrote (servers, models, data files), read under limits so that it breaks nothing afterwards; and what others
hand over as plain values."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

DEPTH = 100  # brackets within brackets: far from Python's recursion limit, which whoever walks the value would meet
DIGITS = 300  # of an integer: every number that is read fits a float
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)  # a text without an end takes all that follows


def parse_json(text: str | bytes, *, unique: bool = False, lenient: bool = False) -> Any:
    """The value of a JSON text (UTF-8) whose numbers are finite and whose nesting is at most `DEPTH`.

    Args:
        unique: Whether an object with the same key twice is refused; otherwise the last one counts.
        lenient: Takes null for a number that is not finite, as loggers write them, instead of refusing it.

    Raises:
        ValueError: No such JSON; says in one line what was found.
    """
    if isinstance(text, (bytes, bytearray)):
        text = text.decode("utf-8-sig")
    _check_depth(text)
    try:
        return _whole((_LENIENT if lenient else _UNIQUE if unique else _PLAIN).decode(text), text)
    except RecursionError:
        raise ValueError(f"expected brackets nested at most {DEPTH} deep") from None


def last_object(text: str) -> tuple[dict[str, Any], int, int]:
    """The one JSON object of a model's reply, with where it starts and ends, whatever stands around it.

    A train of thought may hold drafts: where the reply has a `</think>` outside of its objects, only what follows counts.
    Objects inside other objects are parts of those. Work is linear in the length of the text.

    Raises:
        ValueError: None, or several that differ: which one is meant nobody can say.
    """
    problems: list[str] = []
    found = list(_objects(text, problems))
    gaps = zip([0, *(end for _, _, end in found)], [*(start for _, start, _ in found), len(text)], strict=True)
    thought = max((text.rfind("</think>", a, b) for a, b in gaps), default=-1)
    found = [entry for entry in found if entry[1] > thought]
    if not found:
        why = f" ({problems[0]})" if problems else ""
        raise ValueError(f"expected a JSON object, found {text[:60]!r}{why}")
    if any(value != found[-1][0] for value, _, _ in found):
        raise ValueError(f"expected one JSON object, found {len(found)} that differ")
    return found[-1]


def plain(value: Any) -> Any:
    """Python's own numbers, texts, lists and dicts for numpy's and torch's, as parquet files and tensors hold them."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist") and hasattr(value, "dtype"):
        return plain(value.tolist())  # of a scalar: the number
    return value


def as_logprob(value: Any) -> float | None:
    """A log-probability as a server reports it: a finite number of at most 0, or of its rounding above; else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -math.inf < value <= 1e-4:
        return None
    return min(float(value), 0.0)


def _objects(text: str, problems: list[str]) -> Iterator[tuple[dict[str, Any], int, int]]:
    """JSON objects that are in no other one, in order. What starts like one and is none costs what was read of it; a text
    of nothing but such beginnings is given up after a few times its length. `problems` gets what was wrong with each."""
    at, budget = text.find("{"), 20 * len(text) + 1000
    while at >= 0 and budget > 0:
        try:
            value, end = _UNIQUE.raw_decode(text, at)
            _check_depth(text[at:end])
            yield _whole(value, text), at, end
        except json.JSONDecodeError as error:
            problems.append(str(error))
            budget -= error.pos - at + 1
            end = at + 1
        except (ValueError, RecursionError) as error:
            problems.append(str(error))
            budget -= len(text) - at
            end = at + 1
        at = text.find("{", end)


def _whole(value: Any, text: str) -> Any:
    """The value with a question mark for every half of a surrogate pair, which could be written nowhere."""
    if "\\ud" not in text and "\\uD" not in text:
        return value
    return json.loads(json.dumps(value, ensure_ascii=False).encode(errors="replace"))


def _check_depth(text: str) -> None:
    if text.count("[") + text.count("{") <= DEPTH:
        return
    depth = 0
    for match in _BRACKETS.finditer(text):
        character = match.group()
        depth += (character in "[{") - (character in "]}")
        if depth > DEPTH:
            raise ValueError(f"expected brackets nested at most {DEPTH} deep")


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"expected numbers of at most {DIGITS} digits, found one of {len(digits)}")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"expected finite numbers, found {digits[:20]}")
    return value


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in pairs:
        if name in out:
            raise ValueError(f"expected every key once, found {name[:60]!r} twice")
        out[name] = value
    return out


_FINITE: dict[str, Any] = {"parse_float": _float, "parse_int": _integer, "parse_constant": _float}
_PLAIN = json.JSONDecoder(**_FINITE)
_UNIQUE = json.JSONDecoder(**_FINITE, object_pairs_hook=_no_twins)
_LENIENT = json.JSONDecoder(
    parse_float=lambda digits: value if math.isfinite(value := float(digits)) else None,
    parse_int=lambda digits: int(digits) if len(digits) <= DIGITS else None,
    parse_constant=lambda name: None,
)


def nested_tuples(value: Any) -> Any:
    """Lists to tuples all the way down, as `random.setstate` insists."""
    return tuple(nested_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value
