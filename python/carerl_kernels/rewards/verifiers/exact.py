"""The simplest verifier."""

from __future__ import annotations

from ...task import Example
from ..reasoning import StripReasoning, graded_text


def exact_match(example: Example, completion: str, *, strip_reasoning: StripReasoning = True) -> float:
    """1 if the completion is the answer, up to surrounding whitespace and special tokens that decoding left at its ends, else 0.

    Args:
        strip_reasoning: See `rewards.reasoning.strip_reasoning`; an unfinished trace is worth 0.

    Raises:
        ValueError: The example has no answer to compare with.
    """
    if example.answer is None:
        raise ValueError(f"exact_match: expected an example with an answer, {example.prompt!r} has none")
    right = example.answer.strip()
    if completion.strip() == right:
        return 1.0
    text = graded_text(completion, strip_reasoning)
    return float(text is not None and text.strip() == right)


exact_match.verifies = True  # type: ignore[attr-defined]
