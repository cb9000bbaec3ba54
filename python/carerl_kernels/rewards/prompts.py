"""Prompts as text, whichever form a trainer hands them over in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Prompt = str | Sequence[Mapping[str, Any]]


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one text: chat messages as "role: content" paragraphs, a single user message as its content."""
    if isinstance(prompt, str):
        return prompt
    messages = [(str(m.get("role", "user")), content_text(m.get("content"))) for m in prompt]
    if len(messages) == 1 and messages[0][0] == "user":
        return messages[0][1]
    return "\n\n".join(f"{role}: {content}" for role, content in messages)


def completion_text(completion: Prompt) -> str:
    """A completion as text: of messages, the assistant's contents."""
    if isinstance(completion, str):
        return completion
    return "\n\n".join(content_text(m.get("content")) for m in completion if m.get("role", "assistant") == "assistant")


def content_text(content: Any) -> str:
    """A message's content; of content in parts, the texts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
