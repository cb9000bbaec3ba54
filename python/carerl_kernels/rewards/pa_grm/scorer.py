"""From a prompt and a response to a reward in [0, 1], or None."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch

from ..._errors import one_of
from ..._loop import run_sync
from ...task import Example, group_numbers
from ..log import LOGGER
from ..normalize import standardized
from ..prompts import Prompt, prompt_text
from ..reasoning import StripReasoning, graded_text
from .backend import Backend, BackendError, BackendRefusedError
from .builder import ProtocolBuilder
from .cache import Cache
from .judge import Judge, Verdict
from .protocol import Limits, Protocol
from .signs import REPORT, signs, without_signs
from .untrusted import Controls

Calibration = Literal["scale", "anchors", "group"]
OnSigns = Literal["lower", "zero", "note"]
_Judging = Callable[..., Awaitable[Verdict]]  # `Judge.judge` of one prompt and protocol


class Item(NamedTuple):
    """What is scored: a prompt, the policy's response, and a right answer where there is one."""

    prompt: Prompt
    response: str
    reference: str | None = None


@dataclass(frozen=True)
class Score:
    """A response's reward and how it came about.

    Attributes:
        reward: The reward in [0, 1]; None: could not be judged, to be left out of every statistic.
        reason: Why it is None, or 0 without a judge.
        value: The judge's number on the protocol's scale, in [0, 1].
        signs: Attempts to steer the judge that were found.
        again: A second, independent verdict's number (criteria in reverse order), for the share that is judged twice.
    """

    reward: float | None
    reason: str | None = None
    value: float | None = None
    factor: float = 1.0
    signs: tuple[str, ...] = ()
    again: float | None = None
    verdict: Verdict | None = None
    protocol: Protocol | None = None

    def as_dict(self, trace: bool = True) -> dict[str, Any]:
        """For records; without `trace`, the numbers only."""
        data = asdict(self)  # leaves the protocol, a model of pydantic's, as it is
        verdict, protocol = data.pop("verdict"), data.pop("protocol")
        traced = {"verdict": verdict, "protocol": protocol and protocol.model_dump(mode="json")}
        return data | traced if trace else data


class Scorer:
    """Protocol-aware generative reward: a reward function that a language model computes.

    One protocol is written per prompt (and reference) and shared by all its responses; verdicts are kept on disk with a
    `cache` path, so a resumed run asks for none again. Whatever fails, the reward is None, never an invented number.

    As a `Domain`'s reward it is called once per batch, with up to the backend's limit of calls in flight.

    Args:
        judge: Backend of the judge.
        writer: Backend of the protocols; by default the judge's.
        cache: File for protocols and verdicts, or a `Cache`; None: in memory.
        limits: Scale and sizes of protocols.
        controls: Limits on the form of responses.
        calibration: What makes rewards comparable. "scale": the fixed scale 0..1. "anchors": that scale mapped per
            protocol so that its poor example answer is 0 and its good one 1, as this judge sees them. "group": the place
            in the prompt's own group, Phi((v - mean) / std); only for `score_all` and batches, which see groups.
        on_signs: A response that tries to steer its judge is worth, "lower": no more than it is without the sentences that
            do (one more call); "zero": nothing; "note": what the judge says, the attempt being recorded only. One that merely
            reports marks of others is judged again without these words, except with "note".
        strip_reasoning: Judges what a response says after its reasoning; one whose reasoning never ends is worth 0. See
            `rewards.reasoning.strip_reasoning`.
        rejudge: Share of the responses, chosen by a hash, that get a second independent verdict (`Score.again`).
        judge_options, builder_options: Passed on to `Judge` and `ProtocolBuilder`.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        judge: Backend,
        *,
        writer: Backend | None = None,
        cache: Cache | str | None = None,
        limits: Limits | None = None,
        controls: Controls | None = None,
        calibration: Calibration = "scale",
        on_signs: OnSigns = "lower",
        rejudge: float = 0.0,
        strip_reasoning: StripReasoning = True,
        judge_options: dict[str, Any] | None = None,
        builder_options: dict[str, Any] | None = None,
    ) -> None:
        if not 0 <= rejudge <= 1:
            raise ValueError(f"Scorer: expected rejudge in [0, 1], found {rejudge}")
        one_of("Scorer: calibration", calibration, get_args(Calibration))
        one_of("Scorer: on_signs", on_signs, get_args(OnSigns))
        self.cache = cache if isinstance(cache, Cache) else Cache(cache)
        limits = limits or Limits()
        if calibration == "anchors" and not limits.examples:
            limits = limits.model_copy(update={"examples": True})
        self.judge = Judge(judge, self.cache, limits, **(judge_options or {}))
        self.builder = ProtocolBuilder(writer or judge, self.cache, limits, **(builder_options or {}))
        self.controls = controls or Controls()
        self.calibration, self.on_signs, self.rejudge = calibration, on_signs, rejudge
        self.strip_reasoning: StripReasoning = strip_reasoning
        self.__name__ = "pa_grm"  # trainers name reward functions in their logs

    # ---- one response

    async def score(self, prompt: Prompt, response: str, reference: str | None = None) -> Score:
        """The score of one response; "group" calibration does not apply to it.

        Raises:
            BackendRefusedError: The backend will refuse every request: stop and repair.
        """
        answer = graded_text(response, self.strip_reasoning)
        if answer is None:
            return Score(0.0, "its reasoning never ends")
        refusal = self.controls.refusal(answer)
        if refusal is not None:
            return Score(0.0, refusal)
        found = signs(answer)
        if self.on_signs == "zero" and set(found) - {REPORT}:
            return Score(0.0, "tries to steer the judge", signs=found)
        protocol: Protocol | None = None
        try:
            protocol = await self.builder.build(prompt, reference)
            judge = partial(self.judge.judge, prompt, protocol=protocol, reference=reference)
            verdict, again = await asyncio.gather(judge(answer), self._again(judge, prompt, answer))
            if found and self.on_signs != "note":
                verdict = min(verdict, await judge(without_signs(answer)), key=lambda v: v.value)
            reward = verdict.value
            if self.calibration == "anchors":
                reward = await self._on_anchors(judge, reward, protocol)
        except BackendRefusedError:
            raise
        except BackendError as error:
            LOGGER.info("not judged: %s", error)
            return Score(None, str(error), signs=found, protocol=protocol)
        factor = self.controls.factor(answer)
        return Score(reward * factor, None, verdict.value, factor, found, again, verdict, protocol)

    async def _again(self, judge: _Judging, prompt: Prompt, response: str) -> float | None:
        """The value of a second verdict for the chosen share; None for the others and where it fails."""
        draw = hashlib.sha256(f"{prompt_text(prompt)}\0{response}".encode(errors="surrogatepass")).digest()
        if int.from_bytes(draw[:8], "big") >= self.rejudge * 2**64:
            return None
        try:
            return (await judge(response, reverse=True, repeat=1)).value
        except BackendRefusedError:
            raise
        except BackendError:
            return None

    async def _on_anchors(self, judge: _Judging, value: float, protocol: Protocol) -> float:
        """The value on a scale from the poor to the good example, as this judge scores them under this protocol.

        A judge that does not tell the two apart by a tenth of the scale cannot be calibrated by them.
        """
        assert protocol.poor_answer is not None and protocol.good_answer is not None
        anchors = await asyncio.gather(judge(protocol.poor_answer), judge(protocol.good_answer))
        poor, good = (anchor.value for anchor in anchors)
        if good - poor < 0.1:
            raise BackendError(
                f"the judge scores the protocol's good example {good:.2f} and its poor one {poor:.2f}: no anchors"
            )
        return min(1.0, max(0.0, (value - poor) / (good - poor)))

    # ---- many responses

    async def stream(
        self, items: Iterable[Item | tuple[Any, ...]], window: int = 256
    ) -> AsyncIterator[tuple[int, Score]]:
        """Scores as they are ready, each with its item's number; at most `window` items are worked on at once.

        Raises:
            BackendRefusedError: As `score`; what is ready comes first, what is under way is given up.
        """
        numbered = enumerate(items)
        working: set[asyncio.Task[tuple[int, Score]]] = set()

        async def one(number: int, item: Item | tuple[Any, ...]) -> tuple[int, Score]:
            return number, await self.score(*item)

        try:
            while True:
                for number, item in numbered:
                    working.add(asyncio.ensure_future(one(number, item)))
                    if len(working) >= window:
                        break
                if not working:
                    return
                done, working = await asyncio.wait(working, return_when=asyncio.FIRST_COMPLETED)
                refused = None
                for task in done:
                    refused = task.exception() or refused
                    if task.exception() is None:
                        yield task.result()
                if refused is not None:  # after what else is ready: it was paid for
                    raise refused
        finally:
            for task in working:
                task.cancel()

    async def score_all(
        self, items: Sequence[Item | tuple[Any, ...]], groups: Sequence[object] | None = None
    ) -> list[Score]:
        """Scores in the order of the items.

        Args:
            items: Any number.
            groups: Names, one per item, of what "group" calibration compares; None: items of one prompt and reference.

        Raises:
            BackendRefusedError: As `score`.
        """
        scores = {number: score async for number, score in self.stream(items)}
        out = [scores[number] for number in range(len(items))]
        if self.calibration == "group":
            out = by_group(out, groups or [(prompt_text(i[0]), i[2] if len(i) > 2 else None) for i in items])
        LOGGER.info("%d scored: %s", len(out), self.usage())
        excluded = [s.reason for s in out if s.reward is None]
        if excluded:
            LOGGER.warning("%d of %d could not be judged; the first: %s", len(excluded), len(out), excluded[0])
        return out

    def usage(self) -> str:
        """Calls, tokens and cost so far, of the judge and the protocol writer."""
        judge, writer = self.judge.backend, self.builder.backend
        return str(judge.meter) if writer is judge else f"judge {judge.meter}; protocols {writer.meter}"

    # ---- as a reward function

    @property
    def compares(self) -> bool:
        """Whether rewards come from comparing the completions of a prompt."""
        return self.calibration == "group"

    def score_batch(self, examples: Sequence[Example], completions: Sequence[str]) -> list[float | None]:
        """Rewards of a trainer's batch; an example's `answer` is the reference.

        Raises:
            BackendRefusedError: The backend refuses whatever it is asked. All else that a server does wrong is a None.
            OSError: The cache's file cannot be read or written.
        """
        items = [Item(e.prompt, text, e.answer) for e, text in zip(examples, completions, strict=True)]
        return [s.reward for s in run_sync(self.score_all(items, groups=group_numbers(examples)))]

    def __call__(self, example: Example, completion: str) -> float | None:
        """The reward of one completion."""
        return self.score_batch([example], [completion])[0]


def by_group(scores: Sequence[Score], groups: Sequence[object]) -> list[Score]:
    """Scores whose reward is the place among their group's: Phi((reward - mean) / std), 1/2 in a group without spread."""
    numbers = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    judged = torch.tensor([score.reward is not None for score in scores], dtype=torch.bool)
    rewards = torch.tensor([score.reward or 0.0 for score in scores], dtype=torch.float64)
    z = standardized(rewards, torch.tensor([numbers[group] for group in groups], dtype=torch.long), judged)
    places = torch.special.ndtr(z).tolist()
    return [s if s.reward is None else replace(s, reward=place) for s, place in zip(scores, places, strict=True)]
