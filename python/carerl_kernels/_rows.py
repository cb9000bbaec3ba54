"""Data files of one JSON object a line: the one reader of prompts, answers and responses, whoever wants them."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ._json import parse_json


def read_rows(
    path: Path, needs: Sequence[str] = (), check: Callable[[dict[str, Any]], object] | None = None
) -> Iterator[dict[str, Any]]:
    """The rows of a file; blank lines are skipped. A line ends at a newline and nowhere else: JSON texts may hold the other
    characters that Python, and some editors, take for line ends.

    Args:
        path: The file: UTF-8, with or without a byte order mark.
        needs: Fields that every row must have; only a response may be empty. Prompt and response are text or chat messages.
        check: Looks at every row; a ValueError of its own is raised with file and line.

    Raises:
        ValueError: A line that is no such row; names file and line, what was expected and found.
        OSError: The file cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a file of JSON lines, found none")
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path}: expected UTF-8, found UTF-16; save it as UTF-8")
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{place}: expected UTF-8, found byte 0x{line[error.start]:02x}; save it as UTF-8"
            ) from None
        try:
            row = parse_json(text, unique=True)
        except ValueError as error:
            raise ValueError(f"{place}: expected a JSON object, found {text[:60]!r} ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{place}: expected a JSON object, found {text[:60]!r}")
        for name in ("prompt", "response"):
            wanted = name in row or name in needs
            if wanted and (not is_text_or_chat(row.get(name)) or (name == "prompt" and not row[name])):
                raise ValueError(f'{place}: expected "{name}" as text or chat messages, found {text[:60]!r}')
        missing = [n for n in needs if row.get(n) is None or (n != "response" and row[n] in ("", []))]
        if missing:
            raise ValueError(f"{place}: expected {' and '.join(missing)} in the row, found {sorted(row)}")
        if check is not None:
            try:
                check(row)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
        yield row


def is_text_or_chat(value: object) -> bool:
    """Whether a value is a text, or chat messages: objects with a role and a content that is text, parts or null."""
    if isinstance(value, str):
        return True
    return isinstance(value, list) and all(
        isinstance(m, Mapping)
        and isinstance(m.get("role", "user"), str)
        and (m.get("content") is None or isinstance(m["content"], (str, list)))
        for m in value
    )
