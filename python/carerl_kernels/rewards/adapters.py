"""One reward, many trainers: any reward of this package as a reward function of TRL, verl, OpenRLHF, slime and verifiers.

None means "could not be judged". TRL leaves such completions out; the other trainers have no word for it, so their adapters want
to be told what to return (`excluded=`) and raise otherwise: a made-up number would be a quiet lie. A reward that compares the
completions of a prompt (`compares`) is refused where a trainer hands them over one by one: each would earn 0 for ever.

Every adapter takes `strip_reasoning`: what is judged is then the answer after a reasoning trace (`<think>...</think>`), and an
empty answer where the trace never ends. "opened": the prompt's template ends with the opening tag.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from .._json import plain
from .handed_over import Reward, Row, as_number, examples_of, judged, name_of
from .prompts import Prompt, completion_text
from .reasoning import StripReasoning, strip_special_tokens

# ----------------------------------------------------------------------------------------------------------------- TRL


# Beside the data set's columns.
TRLS_OWN = ("completion_ids", "environments", "trainer_state", "log_extra", "log_metric")


def trl_reward(
    reward: Reward,
    *,
    answer: str = "answer",
    name: str | None = None,
    asynchronous: bool = False,
    strip_reasoning: StripReasoning = False,
) -> Callable[..., Any]:
    """A reward function for TRL's GRPOTrainer (`reward_funcs=[...]`): f(prompts, completions, **columns) -> list.

    A process scores the completions it generated. A reward that compares needs a prompt's completions in one process.

    Args:
        answer: Data set column with the right answer; every column is in `example.info`.
        name: The name of the reward in TRL's logs.
        asynchronous: An `async def`, which TRL runs beside other asynchronous rewards.

    Raises (when called):
        RewardError: A reward that compares sees single completions.
    """

    def judge(prompts: Sequence[Prompt], completions: Sequence[Prompt], **columns: Any) -> list[float | None]:
        columns = {k: plain(v) for k, v in columns.items() if k not in TRLS_OWN}
        rows = {k: v for k, v in columns.items() if isinstance(v, list) and len(v) == len(prompts)}
        examples = examples_of(
            (p, rows[answer][i] if answer in rows else None, {k: v[i] for k, v in rows.items()}, None)
            for i, p in enumerate(prompts)
        )
        return judged(reward, examples, [completion_text(c) for c in completions], "TRL", strip_reasoning)

    async def concurrent(*batch: Sequence[Prompt], **columns: Any) -> list[float | None]:
        return await asyncio.to_thread(judge, *batch, **columns)

    function: Callable[..., Any] = concurrent if asynchronous else judge
    function.__name__ = name or name_of(reward)
    function.verifies = getattr(reward, "verifies", False)  # type: ignore[attr-defined]
    return function


# ---------------------------------------------------------------------------------------------------------------- verl


def verl_compute_score(
    rewards: Reward | Mapping[str, Reward], *, excluded: float | None = None, strip_reasoning: StripReasoning = False
) -> Callable[..., Any]:
    """verl's `custom_reward_function`: compute_score(data_source, solution_str, ground_truth, extra_info) -> {"score": ...},
    or with reward_manager=batch compute_score(data_sources, solution_strs, ground_truths, extra_infos) -> [score, ...].

    The prompt is taken from `extra_info["question"]` or `["prompt"]`; verifiers that need none do without. Rows of one
    `extra_info["index"]` are one group, where there is such a number.

    Args:
        rewards: One, or one per data source.
        excluded: Score of what could not be judged; "judged" says which those are.

    Raises (when called):
        RewardError: A reward that compares is called for one completion.
    """

    def row(source: str, ground_truth: Any, extra_info: Mapping[str, Any] | None) -> Row:
        truth = plain(ground_truth)
        info = plain(dict(extra_info or {})) | {"data_source": source, "ground_truth": truth}
        index = info.get("index")
        group = None if index is None else (source, str(index))
        return info.get("question") or info.get("prompt") or source, truth, info, group

    def compute_score(
        data_source: str | None = None,
        solution_str: str | None = None,
        ground_truth: Any = None,
        extra_info: Mapping[str, Any] | None = None,
        *,
        data_sources: Sequence[str | None] | None = None,
        solution_strs: Sequence[str] | None = None,
        ground_truths: Sequence[Any] | None = None,
        extra_infos: Sequence[Mapping[str, Any] | None] | None = None,
        **_: Any,
    ) -> dict[str, float] | list[float]:
        single = data_sources is None or solution_strs is None
        if data_sources is None or solution_strs is None:
            data_sources, solution_strs = [data_source], [str(solution_str)]
            ground_truths, extra_infos = [ground_truth], [extra_info]
        texts, sources = list(solution_strs), [str(source) for source in data_sources]
        truths = [None] * len(texts) if ground_truths is None else ground_truths
        infos = [None] * len(texts) if extra_infos is None else extra_infos
        examples = examples_of(row(*given) for given in zip(sources, truths, infos, strict=True))
        values: list[float | None] = [None] * len(texts)
        for source in dict.fromkeys(sources):
            if isinstance(rewards, Mapping) and source not in rewards:
                raise ValueError(f"compute_score: expected data_source one of {sorted(rewards)}, found {source!r}")
            reward = rewards[source] if isinstance(rewards, Mapping) else rewards
            rows = [i for i, of in enumerate(sources) if of == source]
            own = [examples[i] for i in rows], [texts[i] for i in rows]
            for i, value in zip(rows, judged(reward, *own, "verl", strip_reasoning), strict=True):
                values[i] = value
        numbers = [as_number(value, excluded, "verl") for value in values]
        return {"score": numbers[0], "judged": float(values[0] is not None)} if single else numbers

    return compute_score


# ------------------------------------------------------------------------------------------------------------ OpenRLHF


def openrlhf_reward_func(
    reward: Reward, *, excluded: float | None = None, strip_reasoning: StripReasoning = False
) -> Callable[..., dict[str, Any]]:
    """OpenRLHF's `--remote_rm_url file.py`: reward_func(queries, prompts, labels) -> {"rewards", "scores", "extra_logs"}.

    A query is the prompt and the response in one text, a label the answer. It decodes with special tokens; those at the ends of
    a response (`<|im_end|>`) are taken off.
    """

    def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **_: Any) -> dict[str, Any]:
        import torch

        labels = plain(labels)
        known = list(labels) if labels else [None] * len(queries)
        if not len(queries) == len(prompts) == len(known):
            raise ValueError(
                f"expected as many queries, prompts and labels, found {len(queries)}, {len(prompts)}, {len(known)}"
            )
        # a tokenizer's round trip may change the prompt's text at its edges; then there is no telling where it ends
        for query, prompt in zip(queries, prompts, strict=True):
            if not query.startswith(prompt):
                raise ValueError(f"expected a query to start with its prompt, found {query[:80]!r} for {prompt[:80]!r}")
        examples = examples_of((p, label, {"label": label}, None) for p, label in zip(prompts, known, strict=True))
        responses = [strip_special_tokens(q[len(p) :]) for q, p in zip(queries, prompts, strict=True)]
        values = judged(reward, examples, responses, "OpenRLHF", strip_reasoning)
        numbers = torch.tensor([as_number(v, excluded, "OpenRLHF") for v in values], dtype=torch.float32)
        there = torch.tensor([float(v is not None) for v in values])
        return {"rewards": numbers, "scores": numbers.clamp(0, 1), "extra_logs": {"judged": there}}

    return reward_func


# --------------------------------------------------------------------------------------------------------------- slime


def slime_custom_rm(
    reward: Reward, *, excluded: float | None = None, strip_reasoning: StripReasoning = False
) -> Callable[..., Awaitable[Any]]:
    """slime's `--custom-rm-path`: async f(args, sample or samples) -> float, or a list of them with `--group-rm`.

    Special tokens at the ends of a response, which it decodes too, are taken off. Samples of one `group_index` are a group.
    """

    async def custom_rm(args: Any, sample: Any, **_: Any) -> Any:
        many = isinstance(sample, (list, tuple))
        samples = list(sample) if many else [sample]
        examples = examples_of(
            (s.prompt, s.label, dict(getattr(s, "metadata", None) or {}), getattr(s, "group_index", None))
            for s in samples
        )
        texts = [strip_special_tokens(s.response) for s in samples]
        values = await asyncio.to_thread(judged, reward, examples, texts, "slime", strip_reasoning)
        numbers = [as_number(v, excluded, "slime") for v in values]
        return numbers if many else numbers[0]

    return custom_rm


# ----------------------------------------------------------------------------------------------------------- verifiers


def verifiers_reward(
    reward: Reward,
    *,
    excluded: float | None = None,
    name: str | None = None,
    strip_reasoning: StripReasoning = False,
) -> Callable[..., Awaitable[Any]]:
    """A reward function for a `verifiers` Rubric: f(prompt, completion, answer, info) -> float. Of a reward that compares it is
    a group function, f(prompts, completions, answers, infos) -> list of them, which the rubric knows by these names.

    A rubric logs what a reward function raises and scores 0; with `excluded` nothing that could not be judged is raised.
    """

    async def single(
        prompt: Prompt, completion: Prompt, answer: Any = None, info: Mapping[str, Any] | None = None, **_: Any
    ) -> float:
        return (await group([prompt], [completion], [answer], [info]))[0]

    async def group(
        prompts: Sequence[Prompt] | None = None,
        completions: Sequence[Prompt] | None = None,
        answers: Sequence[Any] | None = None,
        infos: Sequence[Mapping[str, Any] | None] | None = None,
        **given: Any,
    ) -> list[float]:
        if prompts is None or completions is None:  # called as for a single one
            prompts, completions = [given.get("prompt", "?")], [given.get("completion", "")]
        answers, infos = answers or [None] * len(prompts), infos or [None] * len(prompts)
        examples = examples_of((p, a, dict(i or {}), None) for p, a, i in zip(prompts, answers, infos, strict=True))
        texts = [completion_text(c) for c in completions]
        values = await asyncio.to_thread(judged, reward, examples, texts, "verifiers", strip_reasoning)
        return [as_number(v, excluded, "verifiers") for v in values]

    function: Callable[..., Awaitable[Any]] = group if getattr(reward, "compares", False) else single
    function.__name__ = name or name_of(reward)
    return function
