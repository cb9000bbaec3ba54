"""The response is data, not instruction: quoting it, and controls on its form.

Three lines of defence, each useful where the one before it fails: the response cannot leave its quotation (`quoted`); what
looks like an attempt to steer the judge is found (`signs`), and such a response is worth no more than it is without the
passage; length and repetition are limited by rules no judge can be talked out of (`Controls`).
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
import zlib

from pydantic import BaseModel, ConfigDict, Field

QUOTE_MARK = "| "

# Tokens of the chat templates at large. The first character gets replaced, which no tokenizer then takes for one of its special
# tokens: ChatML, Llama 3 and 4, Phi, Command R, Harmony, GLM and Granite write <|name|>, DeepSeek the same with a wide bar,
# EXAONE [|name|], MiniMax ]~b]; Llama 2 and Mistral [NAME] and <s>; Gemma <start_of_turn> and <|turn>; others their own.
_ROLES = r"system|user|assistant|human|model|observation|developer|tool|bot"
_ANGLED = (
    r"/?(?:s|bos|eos|pad|unk|mask|cls|sep|sop|eop|eo[adhmt]|eot_id|think|thinking|reasoning|analysis|image|audio|video|"
    rf"{_ROLES}|tools?_?[a-z]{{1,12}}|function_?[a-z]{{0,12}}|(?:start|end|begin|beginning)_?of_?[a-z_]{{1,24}}|endoftext|"
    r"[a-z_]{1,24}_token|[a-z]{1,12}_soft_token|reserved_?[a-z0-9_]{1,24}|unused_?[0-9]{1,6}|extra_id_[0-9]{1,6}|"
    r"special_[0-9]{1,6}|fim_[a-z]{1,12}|seed:[a-z_]{1,40}|mask:[0-9]{1,6}|[a-z]{1,12}\|)"
)
_SQUARE = (
    r"/?(?:INST|SYS|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOLS?_[A-Z]{1,12}|THINK|MODEL_SETTINGS|PREFIX|SUFFIX|MIDDLE|ARGS|CALL_ID|"
    r"IMG(?:_[A-Z]{1,8})?|(?:BEGIN_)?AUDIO|CONTROL_?[0-9]{1,4}|UNUSED_TOKEN_[0-9]{1,6}|@?BOS@?|@?EOS@?|PAD|UNK|CLS|SEP|[gs]?MASK)"
)
CONTROL = re.compile(
    rf"<(?=[|\uff5c])|<(?={_ANGLED}>)|<(?=</?SYS>>)|\[(?=\||{_SQUARE}\])|\](?=~[a-z!]{{1,8}}[\[\]])|\[(?=e~\[)",
    re.IGNORECASE,
)
_LOOKALIKE = {"<": "‹", "[": "［", "]": "］"}
_LINE_END = re.compile(r"\r\n?|[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
_UNUSUAL = re.compile(r"[^\n\t\x20-\x7e]")  # what needs a look


def quoted(text: str, label: str) -> str:
    """`text` between delimiters that it cannot imitate, every line marked.

    The delimiters carry a hash of the text, so a text that contains its own closing delimiter would have to contain
    its own hash; and every line starts with a mark, so none can pass for one of ours. Control sequences of chat
    templates and invisible characters are made visible.

    Args:
        text: A text from the policy, a data set or the writer of a protocol.
        label: What it is, in capitals.
    """
    key = hashlib.sha256(f"{label}\0{text}".encode(errors="surrogatepass")).hexdigest()[:16]
    lines = "\n".join(QUOTE_MARK + line for line in visible(text).split("\n"))
    return f"<<<{label} {key}>>>\n{lines}\n<<<END {label} {key}>>>"


def visible(text: str) -> str:
    """Line ends as newlines; control, format and unassigned characters as escapes; chat control sequences broken."""
    text = _UNUSUAL.sub(lambda m: f"\\u{{{ord(m.group()):x}}}" if _hidden(m.group()) else m.group(), plain_lines(text))
    return CONTROL.sub(lambda m: _LOOKALIKE[m.group()], text)


def without_hidden(text: str) -> str:
    """`text` without invisible characters; line ends as newlines."""
    return _UNUSUAL.sub(lambda m: "" if _hidden(m.group()) else m.group(), plain_lines(text))


def plain_lines(text: str) -> str:
    """`text` with every line end that a reader may see as a newline."""
    return _LINE_END.sub("\n", text)


@functools.lru_cache(maxsize=65536)
def _hidden(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn")


class Controls(BaseModel):
    """Limits on the form of a response, applied outside the judge.

    Args:
        max_chars: A response that is longer, as the judge would see it (invisible characters take up to nine), is worth 0 and
            is not judged: length is the policy's own doing.
        free_words: Up to so many words cost nothing; None: no length control.
        limit_words: The number of words from which on the reward is 0; in between it falls linearly.
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
        if len(response) <= self.max_chars and not without_hidden(response).strip():
            return "empty"
        if len(response) > self.max_chars or len(visible(response)) > self.max_chars:
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
