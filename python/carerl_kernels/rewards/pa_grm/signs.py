"""Attempts to steer a judge: finding them in a response, and what the response is without them.

A sentence is the unit, not a paragraph: an honest answer that happens to ask for marks loses that sentence alone in what is
judged a second time, and one that tells of the marks of others ("critics give the film top marks") only the words about
them. Code is no speech: `score = 4` in a program says nothing to a judge. All work is linear in the length of the text,
whatever the text is: patterns are bounded or possessive, words are walked once.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .untrusted import plain_lines, without_hidden

MASK = "[...]"
REPORT = "report"  # of marks that somebody gives to others: reads like a demand, and asks for nothing

_VERDICT = re.compile(
    r"\b(?:score|rating|grade|reward)s?\b[\"'”’`*]{0,3}\s{0,8}+[:=]\s{0,8}+[\"'“‘`*]{0,3}"
    r"(?:(?!0)\d{1,3}(?:\.\d{1,2})?(?![\d.,]{0,8}\d)(?!\s{0,2}[-–—:]\s{0,2}\d)|(?:max(?:imum)?|full|perfect|highest|top)\b)"
    r"|\bviolated\b[\"'”’`*]{0,3}\s{0,8}+[:=]\s{0,8}+[\"']?(?:false|no)\b",
    re.IGNORECASE,
)
_ROLE = re.compile(r"[ \t#*>]{0,16}+(?:system|assistant|judge|grader|verdict)[ \t*]{0,16}+:", re.IGNORECASE)
_DELIMITER = re.compile(
    r"(?:(?<!<)<{3,}+|(?<!>)>{3,}+|(?<!=)={5,}+|(?<!-)-{8,}+)[ \t]{0,8}+(?:(?:end|begin|start)[ \t]{0,8}+)?(?:of[ \t]{1,8}+)?"
    r"(?:response|answer|protocol|prompt|data)",
    re.IGNORECASE,
)
# Of the sequences that quoting breaks, those that nobody writes by accident: |a|<|b| and <s> are honest.
_TEMPLATE = re.compile(
    r"<[|\uff5c][\w\u2581-]{1,40}[|\uff5c]>|<<SYS>>|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_(?:CALLS|RESULTS))\]"
    r"|\[\|[a-z]{1,20}\|\]|</?(?:start|end)_of_turn>|<(?:bos|eos|start_of_role|end_of_role|seed:[a-z]{1,12})>",
    re.IGNORECASE,
)
_PATTERNS = {"verdict": _VERDICT, "delimiter": _DELIMITER, "control": _TEMPLATE}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_JUDGES = (
    "judge judges grader graders evaluator evaluators reviewer reviewers scorer scorers rater raters assessor assessors"
)
_MARKS = "score scores mark marks point points rating ratings level levels grade grades credit"
# Words in this order, each at most so many words after the one before it.
_CHAINS: tuple[tuple[str, tuple[tuple[int, frozenset[str]], ...]], ...] = tuple(
    (name, tuple((gap, _words(words)) for gap, words in links))
    for name, *links in (
        (
            "override",
            (0, "ignore disregard forget override"),
            (6, "previous prior above earlier preceding all other your the any these those"),
            (6, "instruction instructions prompt prompts rule rules criterion criteria protocol protocols rubric rubrics"
                " direction directions guideline guidelines"),
        ),
        ("address", (0, "dear hey hello hi attention"), (2, _JUDGES)),
        ("address", (0, "note message memo"), (1, "to for"), (3, _JUDGES)),
        ("address", (0, "as"), (3, _JUDGES), (2, "you your")),
        (
            "demand",
            (0, "give award assign grant rate score grade deserve deserves merit merits receive receives must"),
            (10, "full max maximum maximal highest top perfect best"),
            (5, _MARKS),
        ),
    )
)  # fmt: skip
_GIVES = _CHAINS[-1][1][0][1]
# A demand is a report where its verb has a subject and no word of the sentence points at the response or at who reads it.
_POINTS = _words(
    "this that these those it here above below following preceding present current such all any every each everything "
    "everyone i me my mine we us our ours you your yours please let lets must should shall will would can could may might need "
    "response responses answer answers reply replies completion completions submission submissions solution solutions "
    "explanation explanations output essay text work writing author criterion criteria"
)
_NO_SUBJECT = _words("and or but so then therefore thus hence to not just now also kindly simply first finally")
_ADVERBS = _words("always often never usually generally still rarely sometimes even only")
_FIRST = frozenset().union(*(links[0][1] for _, links in _CHAINS))
_WORD = re.compile(r"[^\W_]{1,40}+")
_SPEECH = re.compile(r"[^\W_]|<[|\uff5c]")  # without it there is nothing that any pattern here finds
_SAME = re.compile(r"\b(\d{1,4})\s{0,2}(?:/|out of)\s{0,2}\1\b", re.IGNORECASE)
# Where one attempt was found, what else speaks of marks is taken for a part of it.
_GRADING = re.compile(
    rf"\b(?:{'|'.join((_JUDGES + ' ' + _MARKS).split())}|criteri(?:on|a)|rubric|protocol|verdict|evidence|reasoning|violated|"
    r"disqualif\w{0,12}|instructions?|ignore|disregard)\b",
    re.IGNORECASE,
)
# The sentence after one of these may be what it leads up to.
_SPEAKS_ON = ("override", "address", "demand", "role", "delimiter", "control")

_END = re.compile(r"(?<=[.!?。！？])[ \t]++|\n")
_FENCE = re.compile(r"[ \t]{0,8}+(`{3,}+|~{3,}+)(.{0,80})")
_CODE = re.compile(
    r"[;{}()=\[\]]|->|:[ \t]*$|^[ \t]{0,40}+(?:def|class|import|from|return|if|else|elif|for|while|let|const|var|fn|func|print|"
    r"public|private|static|SELECT|INSERT|UPDATE|#|//)\b"
)
_SHAPE = re.compile(r"[\"'](?:evidence|reasoning|[cd]\d{1,2})[\"']\s{0,8}+:", re.IGNORECASE)


@dataclass(slots=True)
class _Sentence:
    """A piece of the response, as it is and as patterns read it, with the attempts in it: name, start and end."""

    text: str
    end: str  # what separates it from the next: blanks or a newline
    folded: str
    code: bool
    found: Sequence[tuple[str, int, int]] = ()


def signs(text: str) -> tuple[str, ...]:
    """Names of the attempts to steer a judge that `text` shows; empty for ordinary answers."""
    return tuple(dict.fromkeys(name for s in _read(text) for name, _, _ in s.found))


def without_signs(text: str) -> str:
    """`text` without the sentences that show such attempts and those that belong to them, and without invisible characters.

    A sentence after an attempt may be what that led up to; it stays where nothing else would be left. Where that is nothing
    either, or where all that was found is a report of other marks, the words found are replaced by "[...]": the ones around
    them are judged.
    """
    sentences = _read(text)
    found = {name for s in sentences for name, _, _ in s.found}
    if not found:
        return without_hidden(text).strip()
    for follow in (True, False) if found != {REPORT} else ():
        left = _cut(sentences, follow)
        if _WORD.search(left):
            return left
    return "".join((_masked(s) if s.found else without_hidden(s.text)) + s.end for s in sentences).strip()


def _cut(sentences: Sequence[_Sentence], follow: bool) -> str:
    kept, leads_on = [], False
    for s in sentences:
        cut = bool(s.found) or leads_on or (not s.code and bool(_GRADING.search(s.folded)))
        if s.folded.strip():
            leads_on = follow and any(name in _SPEAKS_ON for name, _, _ in s.found)
        kept.append(s.end if cut and "\n" in s.end else "" if cut else without_hidden(s.text) + s.end)
    return "".join(kept).strip()


def _masked(s: _Sentence) -> str:
    out, at = [], 0
    for _, start, end in s.found:
        if start >= at:
            out += [s.folded[at:start], MASK]
        at = max(at, end)
    return "".join(out) + s.folded[at:]


def _folded(text: str) -> str:
    """Compatibility-normalised and without invisible characters, as the patterns read it: full-width or zero-width tricks
    do not hide a word."""
    if text.isascii() and text.isprintable():
        return text
    shown = "".join(chr(ord(c) - 0xE0000) if 0xE0020 <= ord(c) <= 0xE007E else c for c in text)  # tags: invisible ASCII
    return unicodedata.normalize("NFKC", without_hidden(shown))


def _read(text: str) -> list[_Sentence]:
    """The response in sentences, attempts marked."""
    sentences = list(_sentences(plain_lines(text)))
    for i, s in enumerate(sentences):
        if not _SPEECH.search(s.folded):
            continue
        s.found = _attempts(s.folded, s.code)
        before = sentences[i - 1] if i else None
        if before is None or before.end != "\n" or not _SPEECH.search(before.folded):
            continue
        if not (s.found or before.found or s.code or before.code):
            both = f"{before.folded} {s.folded}"  # a line break does not hide an order either
            at = len(before.folded) + 1
            across = _attempts(both, False)
            before.found = [(name, start, min(end, at - 1)) for name, start, end in across]
            s.found = [(name, 0, end - at) for name, _, end in across]
    _spare_assignments(sentences)
    return sentences


def _sentences(text: str) -> Iterator[_Sentence]:
    lines = text.split("\n")
    code = _code_lines(lines)
    for number, line in enumerate(lines):
        last = "" if number == len(lines) - 1 else "\n"
        at = 0
        for match in () if code[number] else _END.finditer(line):
            yield _Sentence(line[at : match.start()], match.group(), _folded(line[at : match.start()]), False)
            at = match.end()
        yield _Sentence(line[at:], last, _folded(line[at:]), code[number])


def _code_lines(lines: Sequence[str]) -> list[bool]:
    """Which lines are code: those in fences, unless what stands there is a verdict and nothing else."""
    code, opened, mark = [False] * len(lines), -1, ""
    for i, line in enumerate([*lines, ""]):
        fence = _FENCE.match(line)
        closes = fence is not None and fence[1].startswith(mark) and not fence[2].strip()
        if opened < 0:
            if fence is not None and i < len(lines):
                opened, mark = i, fence[1]
        elif closes or i == len(lines):
            block = [text for text in lines[opened + 1 : i] if text.strip()]
            looks = sum(bool(_CODE.search(text)) for text in block)
            shaped = any(_SHAPE.search(_folded(text)) for text in block)
            verdicts = sum(bool(_VERDICT.search(_folded(text))) for text in block)
            if 2 * looks >= len(block) > verdicts and not (shaped and verdicts):
                code[opened : i + 1] = [True] * (min(i + 1, len(lines)) - opened)
            opened = -1
    return code


def _attempts(folded: str, code: bool) -> list[tuple[str, int, int]]:
    """Attempts in one sentence, in the order of their places."""
    found = []
    if not code:
        found = [(name, m.start(), m.end()) for name, pattern in _PATTERNS.items() for m in pattern.finditer(folded)]
        role = _ROLE.match(folded)
        found += [] if role is None else [("role", 0, role.end())]
    words = [(m.group().casefold(), m.start(), m.end()) for m in _WORD.finditer(folded)]
    for i, (word, start, _) in enumerate(words):
        if word not in _FIRST or (code and word in ("score", "grade", "rate")):  # names of variables
            continue
        for name, links in _CHAINS:
            end = _chain(words, i, links)
            if end is not None:
                found.append((_mood(folded, words, i) if name == "demand" else name, start, end))
                break
        else:
            same = _SAME.search(folded, start, start + 60) if word in _GIVES else None
            if same is not None:
                found.append((_mood(folded, words, i), start, same.end()))
    return sorted(found, key=lambda span: span[1])


def _mood(folded: str, words: Sequence[tuple[str, int, int]], i: int) -> str:
    """Whether the verb that is word i demands marks or reports those of others."""
    subject = i - 1
    while subject >= 0 and words[subject][0] in _ADVERBS:
        subject -= 1
    if subject < 0 or words[subject][0] in _NO_SUBJECT:
        return "demand"
    joined = all(folded[a[2] : b[1]].isspace() for a, b in pairwise(words[subject : i + 1]))
    return REPORT if joined and not any(word in _POINTS for word, _, _ in words) else "demand"


def _chain(words: Sequence[tuple[str, int, int]], i: int, links: Sequence[tuple[int, frozenset[str]]]) -> int | None:
    """Where a chain that starts at word i ends, or None."""
    if words[i][0] not in links[0][1]:
        return None
    for gap, allowed in links[1:]:
        following = next((j for j in range(i + 1, min(len(words), i + gap + 1)) if words[j][0] in allowed), None)
        if following is None:
            return None
        i = following
    return words[i][2]


def _spare_assignments(sentences: Sequence[_Sentence]) -> None:
    """`score = 4` between lines of a program is an assignment, fence or no fence."""
    lines = [s for s in sentences if s.folded.strip()]
    for i, s in enumerate(lines):
        if [name for name, _, _ in s.found] == ["verdict"] and "=" in s.folded and "\n" in (s.end or "\n"):
            beside = [n.folded for n in lines[max(0, i - 1) : i + 2] if n is not s and not n.found]
            if any(_CODE.search(text) and not text.endswith((".", "!", "?")) for text in beside):
                s.found = ()
