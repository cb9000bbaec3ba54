"""`carerl score`: rewards for a file of prompts and responses, one JSON object a line. Stops and resumes anywhere.

Every finished row goes at once to OUTPUT.partial; when all are done, OUTPUT is written in the order of the input and the partial
file goes. A row is known by what decides its reward (prompt, response, answer, settings), so a second run asks only for what is
new or could not be judged, also when rows were added, removed or moved.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._files import write_bytes_atomically
from .._json import parse_json
from .._rows import is_text_or_chat, read_rows
from ..task import Example, checked_rewards
from .pa_grm import Item, Score, Scorer, judge_noise
from .prompts import completion_text
from .reasoning import StripReasoning


class RowScorer:
    """What scores rows; `settings` is everything besides the row that decides a reward."""

    settings: dict[str, Any]

    def check(self, row: Mapping[str, Any]) -> None:
        """Refuses (ValueError) a row that cannot be scored, before anything is."""

    def stream(self, rows: Sequence[Mapping[str, Any]]) -> AsyncIterator[tuple[int, dict[str, Any]]]:
        """Results as they are ready, each with its row's number."""
        raise NotImplementedError

    def summary(self) -> list[str]:
        """What is told at the end."""
        return []


class JudgeRows(RowScorer):
    """Rows scored by a language model.

    Args:
        scorer: One whose `calibration` is not "group", which needs all rollouts of a prompt at once.
        trace: Whether results carry protocol and verdict.
    """

    def __init__(self, scorer: Scorer, trace: bool = True) -> None:
        if scorer.calibration == "group":
            raise ValueError("carerl score: expected calibration scale or anchors; group statistics belong to training")
        self.scorer, self.trace = scorer, trace
        self.scores: list[Score] = []
        self.settings: dict[str, Any] = {
            "judge": scorer.judge.backend.model,
            "writer": scorer.builder.backend.model,
            "limits": scorer.judge.limits.model_dump(mode="json"),
            "controls": scorer.controls.model_dump(mode="json"),
            "calibration": scorer.calibration,
            "on_signs": scorer.on_signs,
            "rejudge": scorer.rejudge,
            "strip_reasoning": scorer.strip_reasoning,
        }

    async def stream(self, rows: Sequence[Mapping[str, Any]]) -> AsyncIterator[tuple[int, dict[str, Any]]]:
        items = (Item(r["prompt"], completion_text(r["response"]), _answer(r)) for r in rows)
        async for number, score in self.scorer.stream(items):
            self.scores.append(score)
            yield number, score.as_dict(self.trace)

    def summary(self) -> list[str]:
        lines = [self.scorer.usage()]
        steered = sum(bool(s.signs) for s in self.scores)
        if steered:
            lines.append(f"{steered} responses show attempts to steer the judge")
        noise = judge_noise(self.scores)
        if noise is not None:
            share = "" if noise.share is None else f", {noise.share:.0%} of the variance"
            lines.append(
                f"{noise.n} judged twice: noise {noise.noise:.3f}{share}, effect of the criteria's order {noise.bias:+.3f}"
            )
        return lines


class VerifierRows(RowScorer):
    """Rows scored by a verifier, several at once in threads; the scores keep what it does with reasoning traces."""

    def __init__(
        self,
        name: str,
        reward: Callable[[Example, str], float | None],
        threads: int = 4,
        strip_reasoning: StripReasoning = True,
    ) -> None:
        self.settings: dict[str, Any] = {"verifier": name, "strip_reasoning": strip_reasoning}
        self.name, self.reward, self._threads = name, reward, threads

    def check(self, row: Mapping[str, Any]) -> None:
        """As the verifier's own `check`, if it has one."""
        getattr(self.reward, "check", lambda example: None)(self._example(row))

    @staticmethod
    def _example(row: Mapping[str, Any]) -> Example:
        return Example(row["prompt"], _answer(row), row)

    async def stream(self, rows: Sequence[Mapping[str, Any]]) -> AsyncIterator[tuple[int, dict[str, Any]]]:
        loop = asyncio.get_running_loop()

        def one(number: int) -> tuple[int, dict[str, Any]]:
            row = rows[number]
            answer = completion_text(row["response"])
            return number, {"reward": checked_rewards(self.name, self.reward, [self._example(row)], [answer])[0]}

        with ThreadPoolExecutor(self._threads) as pool:
            waiting = [loop.run_in_executor(pool, one, i) for i in range(len(rows))]
            try:
                for ready in asyncio.as_completed(waiting):
                    yield await ready
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def _answer(row: Mapping[str, Any]) -> str | None:
    answer = row.get("answer")
    return None if answer is None else str(answer)


@dataclass(frozen=True)
class Report:
    """What `score_file` did.

    Attributes:
        rows: Rows of the input.
        asked: Different rows that this run scored; earlier runs had scored the others.
        excluded: Numbers of rows without a reward, by reason.
        mean: Mean reward of the rows that have one.
    """

    rows: int
    asked: int
    excluded: Mapping[str, int]
    mean: float


def read_responses(path: Path, check: Callable[[dict[str, Any]], object] | None = None) -> list[dict[str, Any]]:
    """The rows of an input file: prompt, and response or completion."""

    def look(row: dict[str, Any]) -> None:
        if "response" not in row and "completion" in row:
            row["response"] = row["completion"]
        if not is_text_or_chat(row.get("response")):
            raise ValueError(f'expected "response" as text or chat messages, found {str(row.get("response"))[:60]!r}')
        if check is not None:
            check(row)

    return list(read_rows(path, ("prompt",), look))


def row_key(row: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Names a row by what decides its reward. A judge sees prompt, response and answer; a verifier may read any field."""
    seen = {k: v for k, v in row.items() if k not in ("reward", "judgement")}
    if "judge" in settings:
        seen = {k: row.get(k) for k in ("prompt", "response", "answer")}
    text = json.dumps([seen, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def score_file(
    source: Path, target: Path, scorer: RowScorer, progress: Callable[[int, int, dict[str, Any]], None] | None = None
) -> Report:
    """Scores every row of `source` into `target`, continuing what an earlier run left.

    Args:
        source: JSON lines with "prompt", "response" and, where there is one, "answer".
        target: The same rows in the same order with "reward" (a number or null) and "judgement".
        scorer: A judge or a verifier.
        progress: Called with (done, total, result) for every row scored now.

    Raises:
        ValueError: A bad input line, before anything is asked.
        BackendRefusedError: The judge refuses every request; what is done is kept.
        OSError: A file cannot be read or written.
    """
    rows = read_responses(source, scorer.check)
    keys = [row_key(row, scorer.settings) for row in rows]
    partial = target.with_name(target.name + ".partial")
    known = _known(target, partial, set(keys))
    wanted = list(dict.fromkeys(k for k in keys if k not in known))
    first = {k: i for i, k in reversed(list(enumerate(keys)))}

    async def work() -> None:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "ab") as file:
            if file.tell() and not partial.read_bytes().endswith(b"\n"):
                file.write(b"\n")  # after a line that was cut short
            done = 0
            async for number, result in scorer.stream([rows[first[k]] for k in wanted]):
                known[wanted[number]] = result
                file.write(json.dumps(_as_written(wanted[number], result)).encode() + b"\n")
                file.flush()  # a killed run loses nothing it was paid for
                done += 1
                if progress is not None:
                    progress(done, len(wanted), result)
            os.fsync(file.fileno())

    if wanted:
        asyncio.run(work())
    lines = [json.dumps(row | _as_written(key, known[key])) + "\n" for row, key in zip(rows, keys, strict=True)]
    write_bytes_atomically(target, "".join(lines).encode())
    partial.unlink(missing_ok=True)
    excluded = Counter(str(known[k].get("reason")) for k in keys if known[k]["reward"] is None)
    judged = [known[k]["reward"] for k in keys if known[k]["reward"] is not None]
    return Report(len(rows), len(wanted), excluded, sum(judged) / len(judged) if judged else math.nan)


def _as_written(key: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """A result as both files have it: the reward by itself, all else with the row's key under "judgement"."""
    rest = {name: value for name, value in result.items() if name != "reward"}
    return {"reward": result["reward"], "judgement": {"key": key} | rest}


def _known(target: Path, partial: Path, wanted: set[str]) -> dict[str, dict[str, Any]]:
    """Results of earlier runs by key, without those that have no reward: they are asked for again."""
    known: dict[str, dict[str, Any]] = {}
    for path in (target, partial):
        if not path.exists():
            continue
        for line in path.read_bytes().splitlines():
            try:
                entry = parse_json(line)
                judgement = dict(entry["judgement"])
                key, result = judgement.pop("key"), {"reward": entry["reward"]} | judgement
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # the last line of a run that was killed, or a file that is not ours
            if key in wanted and result["reward"] is not None:
                known[key] = result
    return known
