"""The response is data, not instruction: quoting it, recognising attempts to speak to the judge, and controls on its form.

Three lines of defence, each useful where the one before it fails: the response cannot leave its quotation (`quoted`); what
looks like an attempt to steer the judge is found (`signs`), and such a response is worth no more than it is without the
passage (`without_signs`, used by the scorer); length and repetition are limited by rules no judge can be talked out of
(`Controls`).
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
import zlib

from pydantic import BaseModel, ConfigDict, Field

QUOTE_MARK = "| "

# Openings of control sequences in the chat templates at large; the first character gets replaced, which no tokenizer
# then takes for one of its special tokens.
_CONTROL = re.compile(
    r"<(?=\|)|<(?=/?s>)|<(?=/?(?:start|end)_of_turn>)|<(?=<SYS>>|</SYS>>)|<(?=｜)|\[(?=/?INST\])|\[(?=/?SYSTEM_PROMPT\])",
    re.IGNORECASE,
)
_LOOKALIKE = {"<": "‹", "[": "［"}

_INJECTION = {
    "verdict": re.compile(
        r"""["'“]?\b(?:score|rating|grade|reward|violated)\b["'”]?\s*[:=]\s*["']?(?:\d|true|false)""", re.IGNORECASE
    ),
    "override": re.compile(
        r"\b(?:ignore|disregard|forget|override)\b[^.\n]{0,40}\b(?:previous|prior|above|earlier|preceding|all|other|your|the)\b"
        r"[^.\n]{0,40}\b(?:instructions?|prompts?|rules?|criteri\w+|protocols?|rubrics?|directions?)\b",
        re.IGNORECASE,
    ),
    "address": re.compile(
        r"\b(?:dear|hey|hello|attention|note\s+(?:to|for)|message\s+(?:to|for)|as)\b[^.\n]{0,20}"
        r"\b(?:judges?|graders?|evaluators?|reviewers?|scorers?|raters?|assessors?)\b",
        re.IGNORECASE,
    ),
    "demand": re.compile(
        r"\b(?:give|award|assign|grant|rate|score|grade|deserves?|merits?|receives?|must\s+(?:be|get))\b[^.\n]{0,50}"
        r"(?:\b(?:full|max(?:imum|imal)?|highest|top|perfect|best)\b[^.\n]{0,25}"
        r"\b(?:scores?|marks?|points?|ratings?|levels?|grades?|credit)\b|\b(\d+)\s*(?:/|out\s+of)\s*\1\b)",
        re.IGNORECASE,
    ),
    "role": re.compile(r"^[ \t#*]*(?:system|assistant|judge|grader|verdict)[ \t*]*:", re.IGNORECASE | re.MULTILINE),
    "delimiter": re.compile(
        r"(?:<<<|>>>|={5,}|-{8,})\s*(?:end|begin|start)?\s*(?:of\s+)?(?:response|answer|protocol|prompt|data)",
        re.IGNORECASE,
    ),
}


def quoted(text: str, label: str) -> str:
    """`text` between delimiters that it cannot imitate, every line marked.

    The delimiters carry a hash of the text, so a text that contains its own closing delimiter would have to contain
    its own hash; and every line starts with a mark, so none can pass for one of ours. Control sequences of chat
    templates and invisible characters are made visible.

    Args:
        text: From the policy or a data set.
        label: What it is, in capitals.
    """
    key = hashlib.sha256(f"{label}\0{text}".encode(errors="surrogatepass")).hexdigest()[:16]
    lines = "\n".join(QUOTE_MARK + line for line in visible(text).split("\n"))
    return f"<<<{label} {key}>>>\n{lines}\n<<<END {label} {key}>>>"


def visible(text: str) -> str:
    """Line ends as newlines; control, format and unassigned characters as escapes; chat control sequences broken."""
    text = re.sub(r"\r\n?|[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]", "\n", text)
    out = []
    for character in text:
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn"):
            out.append(character)
        else:
            out.append(f"\\u{{{ord(character):x}}}")
    return _CONTROL.sub(lambda m: _LOOKALIKE[m.group()], "".join(out))


def signs(text: str) -> tuple[str, ...]:
    """Names of the attempts to steer a judge that `text` shows; empty for ordinary answers."""
    return tuple(dict.fromkeys(name for name, _, _ in _spans(text)))


def without_signs(text: str) -> str:
    """`text` without the lines that show such attempts, and without invisible characters."""
    folded = _folded(text)
    drop: set[int] = set()
    for _, start, end in _spans(text):
        drop.update(range(folded.count("\n", 0, start), folded.count("\n", 0, end) + 1))
    return "\n".join(line for i, line in enumerate(folded.split("\n")) if i not in drop).strip()


def _folded(text: str) -> str:
    """Compatibility-normalised and without invisible characters, as the patterns read it: full-width or zero-width tricks
    do not hide a word."""
    text = re.sub(r"\r\n?|[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]", "\n", text)
    plain = []
    for character in text:
        code = ord(character)
        if 0xE0020 <= code <= 0xE007E:
            plain.append(chr(code - 0xE0000))  # tag characters: invisible ASCII
        elif character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn"):
            plain.append(character)
    return unicodedata.normalize("NFKC", "".join(plain))


def _spans(text: str) -> list[tuple[str, int, int]]:
    folded = _folded(text)
    found = [(name, m.start(), m.end()) for name, pattern in _INJECTION.items() for m in pattern.finditer(folded)]
    found += [("control", m.start(), m.end()) for m in _CONTROL.finditer(folded)]
    return sorted(found, key=lambda span: span[1])


class Controls(BaseModel):
    """Limits on the form of a response, applied outside the judge.

    Args:
        max_chars: A longer response is worth 0 and is not judged: length is the policy's own doing.
        free_words: Up to so many words cost nothing; None: no length control.
        limit_words: From so many words on the reward is 0; in between it falls linearly.
        free_repetition: Share of repeated text (see `repetition`) that costs nothing; above it the reward falls linearly
            and reaches 0 where everything is repetition.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_chars: int = Field(default=32_000, ge=1)
    free_words: int | None = Field(default=None, ge=0)
    limit_words: int | None = Field(default=None, ge=1)
    free_repetition: float = Field(default=0.5, ge=0, lt=1)

    def model_post_init(self, context: object) -> None:
        if (self.free_words is None) != (self.limit_words is None) or (
            self.free_words is not None and self.limit_words is not None and self.free_words >= self.limit_words
        ):
            raise ValueError(
                f"expected free_words < limit_words or neither, found {self.free_words}, {self.limit_words}"
            )

    def refusal(self, response: str) -> str | None:
        """Why a response is worth 0 without being judged, or None."""
        if not response.strip():
            return "empty"
        if len(response) > self.max_chars:
            return f"longer than {self.max_chars} characters"
        return None

    def factor(self, response: str) -> float:
        """What the judged value is multiplied by, in [0, 1]."""
        factor = 1.0
        if self.free_words is not None and self.limit_words is not None:
            over = (len(response.split()) - self.free_words) / (self.limit_words - self.free_words)
            factor *= min(1.0, max(0.0, 1.0 - over))
        repeated = repetition(response)
        if repeated > self.free_repetition:
            factor *= (1.0 - repeated) / (1.0 - self.free_repetition)
        return factor


def repetition(text: str, words: int = 6, least: int = 40) -> float:
    """Share of text that repeats itself, in [0, 1].

    The larger of two measures: the share of `words`-grams that occurred before, and how far the text compresses beyond
    what ordinary prose does (which also sees repetition inside one endless word). 0 for texts under `least` words and
    under 10 * `least` characters: short answers repeat little worth punishing.
    """
    tokens = text.casefold().split()
    shares = [0.0]
    if len(tokens) >= least:
        grams = [tuple(tokens[i : i + words]) for i in range(len(tokens) - words + 1)]
        shares.append(1.0 - len(set(grams)) / len(grams))
    if len(text) >= 10 * least:
        data = text.encode(errors="surrogatepass")
        ratio = len(zlib.compress(data, 9)) / len(data)  # prose .35-.5, tables and code .15-.35
        shares.append(min(1.0, max(0.0, 1.0 - ratio / 0.15)))
    return max(shares)
