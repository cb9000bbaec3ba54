"""The program in a completion: Markdown code fences read line by line, as models write them."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

_PYTHON = {"python", "python2", "python3", "py", "py3", "ipython", "ipython3", "sage"}
_FENCE = re.compile(r"(?P<quote>(?:[ \t]{0,8}>){0,8})(?P<indent>[ \t]{0,64})(?P<run>`{3,64}|~{3,64})(?P<info>.*)")
_QUOTE = re.compile(r"(?:[ \t]{0,8}> ?){0,8}")
_RUN = re.compile(r"`{3,}+")
_BEHIND_TEXT = re.compile(r"[^`]`{3,64}[ \t]?(?P<info>[\w+#.-]{0,32})$")
_WORD = re.compile(r"\{?[ \t.]{0,4}([\w+#-]{1,32})")
_TOKEN = re.compile(r'"""|\'\'\'|\\.|"|\'|#', re.DOTALL)
# What stands before a block that is no program: said at the beginning of the line, not somewhere in it.
_OUTPUT = re.compile(
    r"[^\w]{0,8}(?:(?:the|sample|expected|example|and|its|will|should|this|it|program|code)\s{1,4}){0,4}"
    r"(?:outputs?|inputs?|prints?|printed|results?|logs?|returns?)\b",
    re.IGNORECASE,
)
_USE = re.compile(
    r"[^\w]{0,8}(?:(?:an|example|sample|how|you|can|to|and|quick)\s{1,4}){0,4}"
    r"(?:usage|use|run|running|execute|install|test|tests|testing|example|call)\b[^.\n]{0,40}[^\w]{0,8}$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Block:
    """A fenced code block.

    Attributes:
        language: First word after the opening fence, in lower case; "" for none.
        text: Its lines, without the fence's own indentation.
        before: The last line of text before it.
    """

    language: str
    text: str
    before: str


class _Strings:
    """Which triple-quoted string, if any, Python text is inside of after the lines read so far."""

    def __init__(self) -> None:
        self.inside: str | None = None

    def read(self, line: str) -> None:
        single = None
        for token in _TOKEN.findall(line):
            if token[0] == "\\":
                continue
            if self.inside is not None:
                self.inside = None if token == self.inside else self.inside
            elif single is not None:
                single = None if token[0] == single else single
            elif token == "#":
                return
            elif len(token) == 3:
                self.inside = token
            else:
                single = token


@dataclass
class _Open:
    """A block that is being read: what its fence says, and its lines."""

    quoted: bool
    indent: int
    run: str
    language: str
    before: str
    lines: list[str] = field(default_factory=list)
    strings: _Strings = field(default_factory=_Strings)

    def add(self, line: str) -> None:
        if self.quoted and (marks := _QUOTE.match(line)):
            line = line[marks.end() :]
        indent = min(self.indent, len(line) - len(line.lstrip(" \t")))
        self.lines.append(line[indent:])
        if self.language in _PYTHON or not self.language:
            self.strings.read(line)

    def block(self) -> Block:
        return Block(self.language, "".join(line + "\n" for line in self.lines), self.before)


def fenced_blocks(text: str) -> list[Block]:
    """The fenced code blocks of a text, in order; one that is never closed goes to the end.

    Fences are three or more backticks or tildes, indented or quoted as they may be. A block ends at a fence of the same
    characters, at least as long, without a language; or, as models forget to close one, where another with a language opens.
    A fence inside a triple-quoted string belongs to the string, in a block and in a program without fences. Takes time linear
    in the text.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    ends, outside = _StringEnds(lines), _Strings()
    blocks: list[Block] = []
    current: _Open | None = None
    before = ""
    for number, line in enumerate(lines):
        fence = _FENCE.fullmatch(line)
        if current is None:
            if not ends.inside(outside, number):
                current = _opening(line, fence, before, blocks)
            if current is None:
                outside.read(line)
                before = line.strip() or before
            continue
        if fence is None or not fence["run"].startswith(current.run) or ends.inside(current.strings, number):
            current.add(line)
            continue
        info = fence["info"]
        language = _language(info)
        if language in _PYTHON or (language and not info[0].isspace()):
            blocks.append(current.block())
            current = _opening(line, fence, before, blocks)
        elif not info.strip() or info[0].isspace():
            blocks.append(current.block())
            before = info.strip() or before
            current = _opening(info, None, before, blocks)  # "``` and then ```python"
        else:
            current.add(line)
    return blocks if current is None else [*blocks, current.block()]


def extract_code(completion: str, names: Sequence[str] = ()) -> str:
    """The program of a completion: its last block marked as Python, or the last unmarked one, or all of it without either.

    Blocks in other languages are no programs; nor are unmarked ones announced as output or input, and blocks announced as usage,
    where there are others.

    Args:
        completion: Without reasoning.
        names: Functions that the program shall define: the last block that defines one is taken, where there is one.
    """
    blocks = fenced_blocks(completion)
    marked = [b for b in blocks if b.language in _PYTHON]
    plain = [b for b in blocks if not b.language]
    if names:
        one = "|".join(re.escape(name) for name in names)
        define = re.compile(
            rf"^[ \t]{{0,16}}(?:async[ ]{{1,4}})?(?:def|class)[ \t]{{1,8}}(?:{one})\b|^(?:{one})[ \t]{{0,8}}=",
            re.MULTILINE,
        )
        for found in (marked, plain):
            defining = [b for b in found if define.search(b.text)]
            if defining:
                return defining[-1].text
    programs = [b for b in plain if not _OUTPUT.match(b.before) and not b.text.lstrip().startswith(("$ ", ">>> "))]
    for found in (marked, programs):
        if found:
            return ([b for b in found if not _USE.match(b.before[:200])] or found)[-1].text
    return plain[-1].text if plain else completion


def _opening(line: str, fence: re.Match[str] | None, before: str, blocks: list[Block]) -> _Open | None:
    """The block that a line outside of blocks opens; one that it contains whole ("```python print(1)```") goes to `blocks`."""
    if fence is not None and (fence["run"][0] == "~" or "`" not in fence["info"]):
        return _Open(bool(fence["quote"]), len(fence["indent"]), fence["run"], _language(fence["info"]), before)
    if fence is not None and fence["info"].rstrip().endswith(fence["run"]):
        body = fence["info"].rstrip()[: -len(fence["run"])]
        word = body.split(" ", 1)[0]
        if "`" not in body and word.lower() in _PYTHON:
            blocks.append(Block(word.lower(), body[len(word) :].strip() + "\n", before))
            return None
    behind = _BEHIND_TEXT.search(line.rstrip()[-100:])
    if behind is None or len(_RUN.findall(line)) % 2 == 0:
        return None
    return _Open(False, 0, "```", behind["info"].lower(), line[:200].strip())


class _StringEnds:
    """Where triple quotes stand, to tell a string that is closed below from one that a broken program left open."""

    def __init__(self, lines: Sequence[str]) -> None:
        self._quotes = {quote: [i for i, line in enumerate(lines) if quote in line] for quote in ('"""', "'''")}
        self._opens = [
            i for i, line in enumerate(lines) if line.startswith("```") and _language(line.strip("`")) in _PYTHON
        ]

    def inside(self, strings: _Strings, number: int) -> bool:
        """Whether line `number` is inside a string that is closed below, before another program begins."""
        quote = strings.inside
        if quote is None:
            return False
        at, other = (bisect_left(found, number) for found in (self._quotes[quote], self._opens))
        end = self._quotes[quote][at] if at < len(self._quotes[quote]) else None
        return end is not None and (other == len(self._opens) or end < self._opens[other])


def _language(info: str) -> str:
    """ "python" of `python`, `Python title="x"`, `{.python .numberLines}`, `python:main.py`; "" where there is none."""
    word = _WORD.match(info.strip()[:64])
    return word[1].lower() if word else ""
