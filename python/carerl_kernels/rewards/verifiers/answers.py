"""Which answer a completion commits itself to, and answers that are words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from .numbers import plain

CLAUSE = 400  # characters of a sentence that gives an answer
END = 1600  # characters at the end of a text in which an answer is looked for that nothing announces
LONGEST = 4000  # characters of a boxed or tagged answer

_STATED = re.compile(
    r"\b(?:answer|result|solution)s?(?: {1,4}(?:to|of|for|here|then)\b[^.\n:=]{0,80}?)?"
    r"[*_ ]{0,4}(?: is\b| are\b| was\b| equals\b|:|=)[*_:]{0,4}",
    re.IGNORECASE,
)
_CONCLUDED = re.compile(
    r"\b(?:therefore|thus|hence|so|consequently|in conclusion|we (?:get|find|have|obtain))\b", re.IGNORECASE
)
_TAKEN_BACK = re.compile(
    r"\b(?:wait|actually|wrong|mistaken?|incorrect|correction|instead|sorry|oops|misses|missed|however|recheck|re-check)\b",
    re.IGNORECASE,
)
_END_OF_CLAUSE = re.compile(r"\n|\.(?=\s{1,8}[A-Z\\]|\s{0,8}$)|(?<!\d)\.(?=\s)")
_MATH = re.compile(r"\d|\\[a-zA-Z]|[=^√π∞]|\b[b-hj-zB-HJ-Z]\b|\b(?:pi|infinity|zero|one|two)\b")
_JOIN = re.compile(
    r"[\s$*_\\)\]]{0,20}(?:[,;&]|and\b|or\b|\\text\{ ?(?:and|or) ?\}){1,2}(?:[\s,]{0,4}(?:and|or)\b)?[\s$*_\\(\[]{0,20}"
    r"(?:[A-Za-z](?:_\{?\w{1,4}\}?)?\s{0,4}=\s{0,4})?[\s$]{0,4}"
)
_TOKEN = re.compile(r"\s?(-?\d{1,40}(?:\.\d{1,40})?|[A-Za-z])")
_COPULA = re.compile(r"\b(?:is|are|was|were|be|equals)\b|[:=]")
_AFTER_WORDS = re.compile(r"[,;](?!\d)|\(|\b(?:because|since|as|which|and|but)\b")
_LOOKS = re.compile(r"[$*_`\"'“”‘’{}\\]")
_CHOICE = re.compile(r"(?:option|choice)? ?[(\[]?([A-Za-z])(?:[)\]]|[.:)](?:\s.*)?|)", re.DOTALL)

_MATHEMATICAL = frozenset(
    """sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp sqrt frac pi inf infty infinity max min mod gcd
    lcm det dim ker lim alpha beta gamma delta epsilon theta lambda mu nu rho sigma tau phi chi psi omega and or in if for all nan
    binom choose cdot times left right cup cap emptyset""".split()  # noqa: SIM905
)
_SHORT_WORDS = frozenset("no on up in at by to us me he we it is as am an or so do go if my of ok hi id".split())  # noqa: SIM905
_VERDICTS = frozenset({"yes", "no", "true", "false"})


@dataclass(frozen=True)
class Answer:
    """What a completion gives as its answer.

    Attributes:
        kind: "whole": the answer and nothing else (boxed, tagged). "clause": what follows "the answer is" and the like, in
            which the answer comes first. "end": the end of a text that announces nothing.
    """

    text: str
    kind: Literal["whole", "clause", "end"]


def committed_answer(text: str, *, words: bool = False) -> Answer:
    """The last answer that a text commits itself to.

    Boxes, answer tags, a last line of ####, and statements such as "the answer is 5" commit. Boxes with nothing but commas,
    "and" or "or" between them are one answer. What follows "therefore" and the like counts where there is none of these, or
    where the text takes back what it said. Takes time linear in the text.

    Args:
        text: A completion without reasoning.
        words: Whether the right answer is words; a statement behind a box is then believed only if the box is taken back,
            as in "the answer is correct".
    """
    marked = [found for found in (_tagged(text), _boxed(text), _hashes(text)) if found is not None]
    end, answer = max(marked, key=lambda found: found[0]) if marked else (0, None)
    stated = _last(_STATED, text, end)
    if stated is not None:
        mathematical = _MATH.search(stated[1].text) is not None
        if answer is None or (mathematical and not words) or (words and _TAKEN_BACK.search(text, end, stated[0])):
            end, answer = stated
    concluded = _last(_CONCLUDED, text, end)
    if concluded is not None:
        mathematical = _MATH.search(concluded[1].text) is not None
        if (answer is None or _TAKEN_BACK.search(text, end, concluded[0])) and (words or mathematical):
            end, answer = concluded
    return answer or Answer(text[-END:].strip(), "end")


def tagged_answer(text: str) -> str | None:
    """What stands between the last </answer> and the <answer> before it; None without them."""
    end = text.rfind("</answer>")
    begin = text.rfind("<answer>", 0, max(end, 0))
    return None if begin < 0 else text[begin + 8 : end].strip()


def _tagged(text: str) -> tuple[int, Answer] | None:
    """The last tagged answer and where it ends; a tag may be left open where generation stops at the closing one."""
    begin, end = text.rfind("<answer>"), text.rfind("</answer>")
    if begin < 0:
        return None
    inner = tagged_answer(text) if begin < end else text[begin + 8 :].strip()
    if not inner:
        return None
    boxed = _boxed(inner)
    return max(begin + 8, end if begin < end else len(text)), boxed[1] if boxed else Answer(inner[:LONGEST], "whole")


def _hashes(text: str) -> tuple[int, Answer] | None:
    last = text.rstrip()[-CLAUSE:].rpartition("\n")[2]
    return (len(text), Answer(last[4:].strip(), "whole")) if last.startswith("####") and last[4:].strip() else None


def _boxed(text: str) -> tuple[int, Answer] | None:
    """The contents of the last box, or of the last boxes joined by commas or words, and where they end."""
    found: list[tuple[int, int, str]] = []
    position = len(text)
    for _ in range(32):
        start = max(text.rfind("\\boxed", 0, position), text.rfind("\\fbox", 0, position))
        if start < 0:
            break
        position = start
        content = _braced(text, start + (6 if text.startswith("\\boxed", start) else 5))
        if content is None:  # cut off
            continue
        if found and not _JOIN.fullmatch(text[content[1] : found[-1][0]][:200]):
            break
        found.append((start, content[1], content[0]))
    if not found:
        return None
    return found[0][1], Answer(", ".join(content for _, _, content in reversed(found)), "whole")


def _braced(text: str, start: int) -> tuple[str, int] | None:
    """What is between the braces that begin at `start`, or the token there, and where it ends; None if they do not close."""
    while text[start : start + 1] == " ":
        start += 1
    if text[start : start + 1] != "{":
        token = _TOKEN.match(text, start)
        return None if token is None else (token[1], token.end())
    depth, escaped = 0, False
    for i in range(start, min(len(text), start + LONGEST)):
        if escaped:
            escaped = False
        elif text[i] == "\\":
            escaped = True
        elif text[i] in "{}":
            depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return text[start + 1 : i].strip(), i + 1
    return None


def _last(mark: re.Pattern[str], text: str, start: int) -> tuple[int, Answer] | None:
    """The clause behind the last mark that has one, and where it ends."""
    for found in reversed(list(mark.finditer(text, start))[-64:]):
        behind = text[found.end() : found.end() + 2 * CLAUSE]
        begin = len(behind) - len(behind.lstrip(" \t\n\r:*_,"))
        end = _END_OF_CLAUSE.search(behind, begin)
        clause = behind[begin : min(end.start() if end else len(behind), begin + CLAUSE)].strip()
        if clause:
            return found.end() + begin + len(clause), Answer(clause, "clause")
    return None


def is_words(gold: str) -> bool:
    """Whether a right answer is words, not mathematics: "Paris", "no solution", "(B)"; "ab" and "xyz" are products."""
    text = plain(gold).strip()
    bare = _LOOKS.sub("", text).strip()
    if re.fullmatch(r"\(?[A-Z]\)?\.?", bare):
        return True
    if not bare or re.search(r"[=+*/^_<>|\\]", text.replace("\\text", "").strip("$*_ ")):
        return False
    found = [w.casefold() for w in re.findall(r"[^\W\d_]{1,100}", bare)]
    words = [w for w in found if w not in _MATHEMATICAL]
    long = [w for w in words if (len(w) > 2 and (re.search(r"[aeiou]", w) or not w.isascii())) or not w.isascii()]
    return bool(long) or (len(found) == 1 and found[0] in _SHORT_WORDS) or "\\text{" in gold


def same_words(gold: str, answer: Answer) -> bool:
    """Whether an answer is these words, whatever their looks, case, articles and full stops."""
    wanted = _bare(gold)
    choice = _CHOICE.fullmatch(wanted)
    for candidate in _candidates(answer, wanted):
        found = _bare(candidate)
        if found == wanted:
            return True
        if choice is not None and (given := _CHOICE.fullmatch(found)) is not None and given[1] == choice[1]:
            return True
    return False


def beginnings(answer: Answer) -> list[str]:
    """What of an answer may be the answer itself: all of it; of a clause also what stands before a comma or "because"."""
    if answer.kind == "whole":
        return [answer.text]
    text = answer.text if answer.kind == "clause" else answer.text.rpartition("\n")[2]
    behind = _COPULA.split(text)[-1]
    return [answer.text, *(_AFTER_WORDS.split(part, maxsplit=1)[0] for part in (text, behind))]


def _candidates(answer: Answer, wanted: str) -> list[str]:
    text = answer.text
    if answer.kind == "whole":
        return [text, _COPULA.split(text)[-1]] if "=" in text or ":" in text else [text]
    if answer.kind == "clause":
        return beginnings(answer)
    line = text.rpartition("\n")[2]
    sentence = re.split(r"(?<=[.!?])\s", line.strip())[-1]
    out = [text, line, sentence, _COPULA.split(sentence)[-1]]
    if wanted in _VERDICTS:
        out.append(re.split(r"[,.;:!\s]", text.lstrip("*_ "), maxsplit=1)[0])
    return out


def _bare(text: str) -> str:
    words = _LOOKS.sub("", plain(text)).strip().rstrip(".,;:!?").casefold().split()
    if len(words) > 1 and words[0] in ("the", "a", "an"):
        words = words[1:]
    return " ".join(words)
