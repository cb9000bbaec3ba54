"""The simplest verifier."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...grpo.domain import Example


def exact_match(example: Example, completion: str) -> float:
    """1 if the completion is the answer, up to surrounding whitespace, else 0.

    Raises:
        ValueError: The example has no answer to compare with.
    """
    if example.answer is None:
        raise ValueError(f"exact_match: expected an example with an answer, {example.prompt!r} has none")
    return float(completion.strip() == example.answer.strip())
