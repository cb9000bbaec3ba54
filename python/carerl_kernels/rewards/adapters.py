"""One reward, many trainers: any reward of this package as a reward function of TRL, verl, OpenRLHF, slime and verifiers.

A reward here is `f(example, completion) -> float | None` or has `score_batch(examples, completions)`: a `Scorer`, a verifier, a
`Composition`. None means "could not be judged". TRL leaves such completions out; the other trainers have no word for it, so
their adapters want to be told what to return (`excluded=`) and raise otherwise: a made-up number would be a quiet lie.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ..grpo.domain import BatchReward, Domain, Example, RewardError
from .prompts import Prompt, completion_text

Reward = Callable[[Example, str], "float | None"] | BatchReward


def _judge(reward: Reward, examples: Sequence[Example], completions: Sequence[str]) -> list[float | None]:
    """Checked rewards: finite numbers or None."""
    return Domain(_name(reward), lambda rng, n: [], reward).score_batch(examples, completions)


def _name(reward: Reward) -> str:
    return str(getattr(reward, "__name__", type(reward).__name__)).replace("/", ".").replace("+", ".")


def _number(value: float | None, excluded: float | None, trainer: str) -> float:
    if value is not None:
        return value
    if excluded is None:
        raise RewardError(
            f"a completion could not be judged, and {trainer} cannot leave it out; pass excluded= the number it shall get"
        )
    return excluded


def _example(prompt: Any, answer: Any = None, info: Mapping[str, Any] | None = None) -> Example:
    text = prompt if isinstance(prompt, str) else tuple(dict(m) for m in prompt)
    return Example(text, None if answer is None else str(answer), info or {})


class _Groups:
    """The same Example object for equal prompts, answers and columns: that is how batch rewards see groups."""

    def __init__(self) -> None:
        self._seen: dict[str, Example] = {}

    def __call__(self, prompt: Any, answer: Any, info: Mapping[str, Any]) -> Example:
        key = json.dumps([prompt, answer, info], sort_keys=True, default=repr)
        if key not in self._seen:
            self._seen[key] = _example(prompt, answer, info)
        return self._seen[key]


# ----------------------------------------------------------------------------------------------------------------- TRL


def trl_reward(
    reward: Reward, *, answer: str = "answer", name: str | None = None, asynchronous: bool = False
) -> Callable[..., Any]:
    """A reward function for TRL's GRPOTrainer (`reward_funcs=[...]`): f(prompts, completions, **columns) -> list.

    Args:
        reward: Any.
        answer: Data set column with the right answer; every column is in `example.info`.
        name: In TRL's logs.
        asynchronous: An `async def`, which TRL runs beside other asynchronous rewards.
    """

    def judge(
        prompts: Sequence[Prompt], completions: Sequence[Prompt], columns: Mapping[str, Any]
    ) -> list[float | None]:
        example = _Groups()
        rows = {k: v for k, v in columns.items() if isinstance(v, (list, tuple)) and len(v) == len(prompts)}
        examples = [
            example(p, rows[answer][i] if answer in rows else None, {k: v[i] for k, v in rows.items()})
            for i, p in enumerate(prompts)
        ]
        return _judge(reward, examples, [completion_text(c) for c in completions])

    def sync(prompts: Sequence[Prompt], completions: Sequence[Prompt], **columns: Any) -> list[float | None]:
        return judge(prompts, completions, columns)

    async def concurrent(
        prompts: Sequence[Prompt], completions: Sequence[Prompt], **columns: Any
    ) -> list[float | None]:
        return await asyncio.to_thread(judge, prompts, completions, columns)

    function: Callable[..., Any] = concurrent if asynchronous else sync
    function.__name__ = name or _name(reward)
    return function


# ---------------------------------------------------------------------------------------------------------------- verl


def verl_compute_score(
    rewards: Reward | Mapping[str, Reward], *, excluded: float | None = None
) -> Callable[..., dict[str, float]]:
    """verl's `custom_reward_function`: compute_score(data_source, solution_str, ground_truth, extra_info) -> {"score": ...}.

    The prompt is taken from `extra_info["question"]` or `["prompt"]`; verifiers that need none do without.

    Args:
        rewards: One, or one per data source.
        excluded: Score of what could not be judged; "judged" says which those are.
    """

    def compute_score(
        data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None, **_: Any
    ) -> dict[str, float]:
        if isinstance(rewards, Mapping) and data_source not in rewards:
            raise ValueError(f"compute_score: expected data_source one of {sorted(rewards)}, found {data_source!r}")
        reward = rewards[data_source] if isinstance(rewards, Mapping) else rewards
        info = dict(extra_info or {}) | {"data_source": data_source, "ground_truth": ground_truth}
        prompt = info.get("question") or info.get("prompt") or data_source
        answer = ground_truth if isinstance(ground_truth, (str, int, float)) else None
        value = _judge(reward, [_example(prompt, answer, info)], [solution_str])[0]
        return {"score": _number(value, excluded, "verl"), "judged": float(value is not None)}

    return compute_score


# ------------------------------------------------------------------------------------------------------------ OpenRLHF


def openrlhf_reward_func(reward: Reward, *, excluded: float | None = None) -> Callable[..., dict[str, Any]]:
    """OpenRLHF's `--remote_rm_url file.py`: reward_func(queries, prompts, labels) -> {"rewards", "scores", "extra_logs"}.

    Args:
        reward: Any; a query is the prompt and the response in one text, a label the answer.
        excluded: Reward of what could not be judged.
    """

    def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **_: Any) -> dict[str, Any]:
        import torch

        values = _from_queries(reward, queries, prompts, labels)
        numbers = torch.tensor([_number(v, excluded, "OpenRLHF") for v in values], dtype=torch.float32)
        judged = torch.tensor([float(v is not None) for v in values])
        return {"rewards": numbers, "scores": numbers.clamp(0, 1), "extra_logs": {"judged": judged}}

    return reward_func


def _from_queries(
    reward: Reward, queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any] | None
) -> list[float | None]:
    known = list(labels) if labels else [None] * len(queries)
    if not len(queries) == len(prompts) == len(known):
        raise ValueError(
            f"expected as many queries, prompts and labels, found {len(queries)}, {len(prompts)}, {len(known)}"
        )
    example = _Groups()
    examples = [example(p, label, {"label": label}) for p, label in zip(prompts, known, strict=True)]
    # a tokenizer's round trip may change the prompt's text at its edges; then there is no telling where it ends
    for query, prompt in zip(queries, prompts, strict=True):
        if not query.startswith(prompt):
            raise ValueError(f"expected a query to start with its prompt, found {query[:80]!r} for {prompt[:80]!r}")
    return _judge(reward, examples, [q[len(p) :] for q, p in zip(queries, prompts, strict=True)])


def openrlhf_server(
    reward: Reward, host: str = "127.0.0.1", port: int = 5000, *, excluded: float | None = None
) -> ThreadingHTTPServer:
    """OpenRLHF's remote reward model: POST {"query", "prompts", "labels"} -> {"rewards", "scores", "extra_logs"}.

    Call `serve_forever()` on what comes back. Errors are answered with status 400 or 500 and their message.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                job = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
                values = _from_queries(reward, job["query"], job["prompts"], job.get("labels"))
                numbers = [_number(v, excluded, "OpenRLHF") for v in values]
                logs = {"judged": [float(v is not None) for v in values]}
                scores = [min(1.0, max(0.0, n)) for n in numbers]
                self._answer(200, {"rewards": numbers, "scores": scores, "extra_logs": logs})
            except (ValueError, KeyError, TypeError) as error:
                self._answer(400, {"error": f"{type(error).__name__}: {error}"})
            except Exception as error:
                self._answer(500, {"error": f"{type(error).__name__}: {error}"})

        def _answer(self, status: int, body: Mapping[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """The trainer has its own log."""

    return ThreadingHTTPServer((host, port), Handler)


# --------------------------------------------------------------------------------------------------------------- slime


def slime_custom_rm(reward: Reward, *, excluded: float | None = None) -> Callable[..., Awaitable[Any]]:
    """slime's `--custom-rm-path`: async f(args, sample or samples) -> float, or a list of them with `--group-rm`."""

    async def custom_rm(args: Any, sample: Any, **_: Any) -> Any:
        many = isinstance(sample, (list, tuple))
        samples = list(sample) if many else [sample]
        example = _Groups()
        examples = [example(s.prompt, s.label, dict(getattr(s, "metadata", None) or {})) for s in samples]
        values = await asyncio.to_thread(_judge, reward, examples, [s.response for s in samples])
        numbers = [_number(v, excluded, "slime") for v in values]
        return numbers if many else numbers[0]

    return custom_rm


# ----------------------------------------------------------------------------------------------------------- verifiers


def verifiers_reward(
    reward: Reward, *, excluded: float | None = None, name: str | None = None
) -> Callable[..., Awaitable[float]]:
    """A reward function for a `verifiers` Rubric: f(prompt, completion, answer, info) -> float."""

    async def function(
        prompt: Prompt, completion: Prompt, answer: Any = None, info: Mapping[str, Any] | None = None, **_: Any
    ) -> float:
        example = _example(prompt, answer, dict(info or {}))
        values = await asyncio.to_thread(_judge, reward, [example], [completion_text(completion)])
        return _number(values[0], excluded, "verifiers")

    function.__name__ = name or _name(reward)
    return function
