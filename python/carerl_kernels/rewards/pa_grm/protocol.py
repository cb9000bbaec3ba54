"""Evaluation protocols: what a good answer to one prompt must do, and the JSON schemas of protocol and verdict."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Limits(BaseModel):
    """How large protocols and verdicts may get.

    Args:
        scale: Highest level; levels are 0..scale, one digit each so that one token decides. The same for all prompts.
        criteria: Fewest and most.
        disqualifiers: Most.
        text: Characters of a description.
        quote: Characters of a quotation or a piece of reasoning in a verdict.
        examples: Whether protocols carry a poor and a good example answer, for calibration by anchors.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: int = Field(default=4, ge=1, le=9)
    criteria: tuple[int, int] = (2, 6)
    disqualifiers: int = Field(default=3, ge=0)
    text: int = Field(default=300, ge=10)
    quote: int = Field(default=400, ge=10)
    examples: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Limits:
        if not 1 <= self.criteria[0] <= self.criteria[1]:
            raise ValueError(f"expected 1 <= fewest <= most criteria, found {self.criteria}")
        return self


class Criterion(BaseModel):
    """One thing to look at.

    Args:
        requirement: What the answer must do.
        weight: 1 (nice to have) to 5 (essential).
        anchors: What an answer of each level looks like, level 0 first.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    requirement: str = Field(min_length=1)
    weight: int = Field(ge=1, le=5)
    anchors: tuple[str, ...] = Field(min_length=2, max_length=10)


class Protocol(BaseModel):
    """How answers to one prompt are judged.

    Args:
        task: What a good answer must do, in a sentence or two.
        criteria: Each judged on levels 0..scale.
        disqualifiers: What makes an answer worthless, whatever else it does.
        poor_answer, good_answer: Examples at either end, for calibration.

    Raises:
        pydantic.ValidationError: Names what is missing or out of range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str = Field(min_length=1)
    criteria: tuple[Criterion, ...] = Field(min_length=1)
    disqualifiers: tuple[str, ...] = ()
    poor_answer: str | None = None
    good_answer: str | None = None

    @model_validator(mode="after")
    def _one_scale(self) -> Protocol:
        counts = {len(c.anchors) for c in self.criteria}
        if len(counts) != 1:
            raise ValueError(f"expected as many anchors in every criterion, found {sorted(counts)}")
        return self

    @property
    def scale(self) -> int:
        """The highest level."""
        return len(self.criteria[0].anchors) - 1

    @property
    def digest(self) -> str:
        """Names the protocol in traces and cache keys."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    def parts(self, reverse: bool = False) -> list[tuple[str, Criterion | str]]:
        """Criteria c1, c2, ... and disqualifiers d1, d2, ... by the key they have in a verdict; `reverse` turns the order."""
        criteria: list[tuple[str, Criterion | str]] = [(f"c{i}", c) for i, c in enumerate(self.criteria, 1)]
        out: list[tuple[str, Criterion | str]] = [(f"d{i}", d) for i, d in enumerate(self.disqualifiers, 1)]
        return (criteria[::-1] if reverse else criteria) + (out[::-1] if reverse else out)

    def render(self, reverse: bool = False, limits: Limits | None = None) -> str:
        """As the judge reads it: a line for every field, cut at `limits.text`, whatever a writer put into it."""
        most = (limits or Limits()).text

        def line(text: str) -> str:
            words = " ".join(text[: 2 * most].split())
            return words if len(words) <= most else words[: most - 3] + "..."

        lines = [f"Task: {line(self.task)}", f"Levels: 0 to {self.scale}.", ""]
        for key, part in self.parts(reverse):
            if isinstance(part, str):
                lines.append(f"{key} (disqualifier): {line(part)}")
            else:
                lines.append(f"{key} (weight {part.weight}): {line(part.requirement)}")
                lines += [f"  level {level}: {line(anchor)}" for level, anchor in enumerate(part.anchors)]
        return "\n".join(lines)


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


def protocol_schema(limits: Limits) -> dict[str, Any]:
    """What a protocol-writing model has to answer."""
    text = {"type": "string", "minLength": 1, "maxLength": limits.text}
    anchors = {"type": "array", "items": text, "minItems": limits.scale + 1, "maxItems": limits.scale + 1}
    weight = {"type": "integer", "enum": [1, 2, 3, 4, 5]}
    criterion = _object({"requirement": text, "weight": weight, "anchors": anchors})
    properties: dict[str, Any] = {
        "task": text,
        "criteria": {
            "type": "array",
            "items": criterion,
            "minItems": limits.criteria[0],
            "maxItems": limits.criteria[1],
        },
        "disqualifiers": {"type": "array", "items": text, "maxItems": limits.disqualifiers},
    }
    if limits.examples:
        answer = {"type": "string", "minLength": 1, "maxLength": 4 * limits.text}
        properties |= {"poor_answer": answer, "good_answer": answer}
    return _object(properties)


def verdict_schema(protocol: Protocol, limits: Limits, reverse: bool = False) -> dict[str, Any]:
    """What a judge has to answer: evidence and reasoning come before each number, in the protocol's order."""
    text = {"type": "string", "maxLength": limits.quote}
    score: dict[str, Any] = {"type": "integer", "enum": list(range(protocol.scale + 1))}
    properties = {}
    for key, part in protocol.parts(reverse):
        last = {"violated": {"type": "boolean"}} if isinstance(part, str) else {"score": score}
        properties[key] = _object({"evidence": text, "reasoning": text, **last})
    return _object(properties)
