"""What of a completion is its answer: reasoning traces and the special tokens that decoding left are taken away first."""

from __future__ import annotations

import re
from typing import Literal

StripReasoning = bool | Literal["opened"]

# Opening and closing of a reasoning trace as models write them; names in angle brackets may be of any case.
_NAMES = "think|thinking|thought|thoughts|reasoning|reason|reflection|scratchpad|analysis|seed:think"
_OPEN = rf"<(?:{_NAMES})>|\[THINK\]|◁think▷|<\|begin_of_thought\|>|<\|START_THINKING\|>|<\|inner_prefix\|>|<unused94>"
_CLOSE = rf"</(?:{_NAMES})>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|<\|END_THINKING\|>|<\|inner_suffix\|>|<unused95>"
_QUOTES = {"'", '"', "`"}
_TAG = re.compile(rf"(?P<open>{_OPEN})|(?P<close>{_CLOSE})", re.IGNORECASE)

# Harmony and its relatives write channels: what is said to the user is in "final".
_CHANNEL = re.compile(r"<\|channel\|>\s{0,8}(\w{1,32})[^<\n]{0,64}<\|message\|>")

_SPECIAL = re.compile(
    r"\s{0,64}(?:(?:<\|(?:im_start|start_header_id|start|start_of_role)\|>|<start_of_turn>)(?:system|user|assistant|model|tool)\b"
    r"|<\|[A-Za-z0-9_./:-]{1,48}\|>|<｜[^｜<>\n]{1,48}｜>|</s>|<s>|<eos>|<bos>|<pad>|\[PAD\]|<unk>"
    r"|<(?:start|end)_of_turn>|<end_of_utterance>|\[/?INST\]|\[(?:BOS|EOS|SEP|CLS)\])"
)
_STARTS_TRACE = re.compile(rf"{_OPEN}|<\|channel\|>", re.IGNORECASE)


def strip_special_tokens(text: str) -> str:
    """`text` without the special tokens of chat templates at its ends (`...<|im_end|>`, `</s>`, `<｜end▁of▁sentence｜>`).

    Some trainers decode with special tokens. Those inside the text stay: they were written there. The name of a role belongs
    to the token that opens its turn.
    """
    start = 0
    while (found := _SPECIAL.match(text, start)) and not _STARTS_TRACE.match(found[0].strip()):
        start = found.end()
    end = len(text)
    for _ in range(64):  # more of them are no accident of decoding
        stripped = len(text[start:end].rstrip()) + start
        found = next(
            (m for m in _SPECIAL.finditer(text, max(start, stripped - 120), stripped) if m.end() == stripped), None
        )
        if found is None or _TAG.fullmatch(found[0].strip()):
            break
        end = found.start()
    return text if (start, end) == (0, len(text)) else text[start:end]


def strip_reasoning(text: str, mode: StripReasoning = True) -> str | None:
    """What `text` says after its reasoning; None where the reasoning never ends, so that there is no answer to grade.

    A trace is what stands between tags such as <think> and </think>, if the opening one begins the text or a line; a trace
    in a trace belongs to it. A closing tag whose opening one is missing closes a trace that the prompt opened, unless it
    stands in quotes, as in a program that removes such tags. Of channels ("analysis", "final") the last final one is the
    answer. Takes time linear in the text.

    Args:
        mode: True: as said. False: `text` as it is. "opened": the prompt's template ends with an opening tag, so that a
            text without a closing one is an unfinished trace.
    """
    if mode is False:
        return text
    channels = list(_CHANNEL.finditer(text))
    if channels:
        final = next((m for m in reversed(channels) if m[1] == "final"), None)
        if final is None:
            return None
        after = next((m.start() for m in channels if m.start() > final.start()), len(text))
        return re.split(r"<\|(?:end|return|call|start)\|>", text[final.end() : after], maxsplit=1)[0]
    kept: list[str] = []
    depth, position = (1 if mode == "opened" else 0), 0
    opened = mode == "opened"  # whether there has been a trace, or a tag that is part of the text
    for tag in _TAG.finditer(text):
        if tag["open"]:
            if depth:
                depth += 1
            elif _begins_line(text, tag.start()):
                kept.append(text[position : tag.start()])
                depth = 1
            opened = True
        elif depth:
            depth -= 1
            position = tag.end()
        elif not opened and not _QUOTES & {text[tag.start() - 1 : tag.start()], text[tag.end() : tag.end() + 1]}:
            kept, position, opened = [], tag.end(), True  # all before it was the trace
    if depth:
        return None
    return "".join([*kept, text[position:]]) if position else text


def graded_text(completion: str, mode: StripReasoning = True) -> str | None:
    """What a verifier grades: without special tokens at the ends and without reasoning; None for an unfinished trace."""
    return strip_reasoning(strip_special_tokens(completion), mode)


def _begins_line(text: str, position: int) -> bool:
    before = text[max(0, position - 64) : position].rsplit("\n", 1)[-1]
    return not before.strip() and (position <= 64 or "\n" in text[position - 64 : position])
