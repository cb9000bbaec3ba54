"""One reward as a reward function of five trainers. TRL's own trainer calls it; the others' calls are made as documented."""

from __future__ import annotations

import asyncio
import inspect
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from carerl_kernels.grpo import RewardError
from carerl_kernels.rewards.adapters import (
    openrlhf_reward_func,
    slime_custom_rm,
    trl_reward,
    verifiers_reward,
    verl_compute_score,
)
from carerl_kernels.rewards.compose import Component, Composition


def length(example, completion):
    """Judges by length and the answer's presence; cannot judge "?"."""
    if completion == "?":
        return None
    return len(completion) / 10 + (example.answer is not None and example.answer in completion)


class Groups:
    """Shows what a batch reward sees."""

    def __init__(self):
        self.calls = []

    def score_batch(self, examples, completions):
        self.calls.append((list(examples), list(completions)))
        return [0.5] * len(completions)


# ----------------------------------------------------------------------------------------------------------------- TRL


def chat(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("conversational", [False, True])
def test_trl(asynchronous, conversational):
    function = trl_reward(length, answer="solution", asynchronous=asynchronous)
    assert inspect.iscoroutinefunction(function) is asynchronous and function.__name__ == "length"
    prompts = [[{"role": "user", "content": p}] for p in "aab"] if conversational else list("aab")
    completions = [chat(c) if conversational else c for c in ("x", "?", "yes x")]
    got = function(
        prompts=prompts,
        completions=completions,
        completion_ids=[[1], [2], [3]],
        solution=["x", "x", "no"],
        trainer_state=object(),
        log_extra=print,
    )
    got = asyncio.run(got) if asynchronous else got
    assert got == [pytest.approx(1.1), None, pytest.approx(0.5)]


def test_trl_columns_reach_the_reward_and_equal_prompts_are_one_group():
    seen = Groups()
    trl_reward(seen, name="mine")(
        prompts=["a", "a", "b"], completions=["1", "2", "3"], answer=["x", "x", "y"], level=[1, 1, 2]
    )
    examples, completions = seen.calls[0]
    assert examples[0] is examples[1] is not examples[2] and completions == ["1", "2", "3"]
    assert examples[2].answer == "y" and examples[2].info["level"] == 2
    assert trl_reward(seen, name="mine").__name__ == "mine"
    composed = Composition([Component("length", length)])
    got = trl_reward(composed)(prompts=["a", "a"], completions=["x", "xxx"])
    assert got[0] == -got[1] < 0


def test_trl_calls_it(tmp_path):
    """GRPOTrainer with a real, tiny model: rewards reach its log, None is left out."""
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'carerl-kernels[trl]'")
    datasets = pytest.importorskip("datasets")
    from carerl_kernels.tasks.characters import GENERATORS, character_tokenizer, tiny_model

    tokenizer = character_tokenizer()
    tokenizer.padding_side = "left"
    rows = GENERATORS["code"]()[:4]
    data = datasets.Dataset.from_list([{"prompt": e.prompt, "answer": e.answer} for e in rows])
    seen = []

    def reward(example, completion):
        assert example.answer == next(e.answer for e in rows if e.prompt == example.prompt)
        seen.append(completion)
        return None if len(seen) % 4 == 0 else float(len(seen) % 3)

    config = trl.GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=4,
        max_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    for function in (trl_reward(reward, name="plain"), trl_reward(reward, name="concurrent", asynchronous=True)):
        seen.clear()
        trainer = trl.GRPOTrainer(
            model=tiny_model(tokenizer, 0),
            reward_funcs=[function],
            args=config,
            train_dataset=data,
            processing_class=tokenizer,
        )
        trainer.train()
        assert len(seen) == 8
        logged = [line[f"rewards/{function.__name__}/mean"] for line in trainer.state.log_history if "loss" in line]
        assert logged == [pytest.approx((1 + 2 + 0) / 3), pytest.approx((2 + 0 + 1) / 3)]  # without the None ones


# ------------------------------------------------------------------------------------------------------- the other four


def test_verl():
    compute_score = verl_compute_score({"gsm8k": length, "chat": lambda e, c: float(e.prompt == "Why?")})
    assert compute_score("gsm8k", "xx", "x", {"split": "train"}) == {"score": pytest.approx(1.2), "judged": 1.0}
    got = compute_score(
        data_source="chat", solution_str="s", ground_truth=None, extra_info={"question": "Why?"}, step=3
    )
    assert got["score"] == 1.0
    with pytest.raises(ValueError, match=r"data_source one of \['chat', 'gsm8k'\], found 'code'"):
        compute_score("code", "", "")
    with pytest.raises(RewardError, match="verl cannot leave it out; pass excluded="):
        compute_score("gsm8k", "?", "x")
    assert verl_compute_score(length, excluded=0.25)("any", "?", "x") == {"score": 0.25, "judged": 0.0}
    assert list(inspect.signature(compute_score).parameters)[:4] == [
        "data_source",
        "solution_str",
        "ground_truth",
        "extra_info",
    ]


def test_openrlhf():
    function = openrlhf_reward_func(length, excluded=-1.0)
    got = function(queries=["ab", "a?", "axxxx"], prompts=["a", "a", "a"], labels=["b", "b", "b"], step=1)
    torch.testing.assert_close(got["rewards"], torch.tensor([1.1, -1.0, 0.4]))
    torch.testing.assert_close(got["scores"], torch.tensor([1.0, 0.0, 0.4]))
    assert got["extra_logs"]["judged"].tolist() == [1, 0, 1]
    with pytest.raises(RewardError, match="OpenRLHF cannot leave it out"):
        openrlhf_reward_func(length)(["a?"], ["a"], ["b"])
    with pytest.raises(ValueError, match="a query to start with its prompt"):
        function(["xy"], ["a"], ["b"])
    with pytest.raises(ValueError, match="as many queries, prompts and labels, found 1, 2, 1"):
        function(["ab"], ["a", "a"], ["b"])


def sample(response, label="b"):
    return SimpleNamespace(prompt="a", response=response, label=label, metadata={"level": 1})


def test_slime():
    custom_rm = slime_custom_rm(length)
    assert inspect.iscoroutinefunction(custom_rm)
    assert asyncio.run(custom_rm(SimpleNamespace(), sample("b"))) == pytest.approx(1.1)
    assert asyncio.run(custom_rm(SimpleNamespace(), [sample("b"), sample("xx")], evaluation=True)) == [
        pytest.approx(1.1),
        0.2,
    ]
    with pytest.raises(RewardError, match="slime cannot leave it out"):
        asyncio.run(custom_rm(None, sample("?")))
    seen = Groups()
    asyncio.run(slime_custom_rm(seen)(None, [sample("b"), sample("c"), sample("d", label="e")]))
    examples = seen.calls[0][0]
    assert examples[0] is examples[1] is not examples[2] and examples[0].info == {"level": 1}


def test_verifiers():
    function = verifiers_reward(length, name="quality")
    assert function.__name__ == "quality" and inspect.iscoroutinefunction(function)
    prompt = [{"role": "user", "content": "a"}]
    assert asyncio.run(
        function(prompt=prompt, completion=chat("b"), answer="b", info={"k": 1}, state={})
    ) == pytest.approx(1.1)
    assert asyncio.run(function(prompt="a", completion="bb")) == pytest.approx(0.2)
    with pytest.raises(RewardError, match="verifiers cannot leave it out"):
        asyncio.run(function(prompt=prompt, completion=chat("?")))
    assert asyncio.run(verifiers_reward(length, excluded=0.5)(prompt="a", completion="?")) == 0.5


# ------------------------------------------------------------------------------------------- rewards that compare


def plain_length(example, completion):
    return float(len(completion))


COMPARES = Composition([Component("length", plain_length)])


def test_trl_groups_survive_what_belongs_to_single_samples():
    """TRL hands over token ids and environments per completion; groups are those of the prompts all the same."""
    got = trl_reward(COMPARES)(
        prompts=["a", "a", "b", "b"],
        completions=["x", "xxx", "y", "yyyyy"],
        completion_ids=[[1], [2, 3], [4], [5]],
        environments=[object() for _ in range(4)],
        seed=[1, 2, 3, 4],  # a column that differs by row
        trainer_state=object(),
    )
    z = 2**-0.5
    assert got == [pytest.approx(v) for v in (-z, z, -z, z)]
    with pytest.raises(RewardError, match=r"TRL hands over one of each.*per_device_train_batch_size"):
        trl_reward(COMPARES)(prompts=["a", "b"], completions=["x", "y"])


@pytest.mark.parametrize("normalize", ["group", "rank"])
def test_trl_trains_on_a_composition(tmp_path, normalize):
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'carerl-kernels[trl]'")
    datasets = pytest.importorskip("datasets")
    from carerl_kernels.tasks.characters import GENERATORS, character_tokenizer, tiny_model

    tokenizer = character_tokenizer()
    tokenizer.padding_side = "left"
    rows = [{"prompt": e.prompt, "answer": e.answer} for e in GENERATORS["math"]()[:8]]
    config = trl.GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=6,
        max_steps=1,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = trl.GRPOTrainer(
        model=tiny_model(tokenizer, 0),
        reward_funcs=[trl_reward(Composition([Component("length", plain_length, normalize=normalize)]))],
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["reward"] == pytest.approx(0, abs=1e-6) and logged["reward_std"] > 0.3 and logged["grad_norm"] > 0


def test_verl_scores_batches_and_refuses_single_completions():
    compute_score = verl_compute_score({"a": COMPARES, "b": length})
    with pytest.raises(RewardError, match=r"verl hands over one of each.*reward_manager=batch"):
        compute_score("a", "x", "4", {"question": "2+2?"})
    got = compute_score(
        data_sources=np.array(["a", "b", "a", "b"]),
        solution_strs=["x", "xx", "yyy", "x"],
        ground_truths=[np.int64(4), "x", np.int64(4), "no"],
        extra_infos=np.array([{"index": 5, "split": "train"}, None, {"index": np.int64(5)}, None], dtype=object),
    )
    z = 2**-0.5
    assert got == [pytest.approx(-z), pytest.approx(1.2), pytest.approx(z), pytest.approx(0.1)]
    with pytest.raises(RewardError, match="verl cannot leave it out"):
        compute_score(data_sources=["b"], solution_strs=["?"])


@pytest.mark.parametrize(
    ("truth", "answer"),
    [
        (np.int64(4), "4"),
        (np.float64(0.5), "0.5"),
        (np.str_("x"), "x"),
        (np.array(["x"], dtype=object), "x"),
        (np.array(4), "4"),
        (torch.tensor(4), "4"),
        (["x"], "x"),
        (np.array([1, 2]), None),
        ({"tests": np.array([1])}, None),
        (None, None),
        (True, "True"),
    ],
    ids=repr,
)
def test_golds_of_numpy_are_answers(truth, answer):
    """As parquet files hold them; also the prompt."""
    seen = Groups()
    messages = np.array([{"role": "user", "content": "2+2?"}], dtype=object)
    verl_compute_score(seen)("d", "4", truth, {"prompt": messages, "tags": np.array([1, 2])})
    (example,) = seen.calls[0][0]
    assert example.answer == answer and example.prompt == ({"role": "user", "content": "2+2?"},)
    assert json.dumps(dict(example.info))
    trl_reward(seen)(prompts=["p"], completions=["c"], answer=np.array([truth, None], dtype=object)[:1])
    assert seen.calls[1][0][0].answer == answer


def test_openrlhf_compares_and_takes_special_tokens_off():
    from carerl_kernels.rewards import exact_match

    function = openrlhf_reward_func(exact_match)
    got = function(["2+2=4<|im_end|>", "2+2=4</s>", "2+2=4<|im_end|>\n<|endoftext|>", "2+2=5"], ["2+2="] * 4, ["4"] * 4)
    assert got["rewards"].tolist() == [1.0, 1.0, 1.0, 0.0]
    got = openrlhf_reward_func(COMPARES)(["ax", "axxx"], ["a", "a"], [np.int64(4)] * 2)
    assert got["rewards"].tolist() == [pytest.approx(-(2**-0.5)), pytest.approx(2**-0.5)]
    with pytest.raises(RewardError, match=r"OpenRLHF hands over one of each.*micro_rollout_batch_size"):
        openrlhf_reward_func(COMPARES)(["ax", "by"], ["a", "b"], ["", ""])


def test_slime_compares_groups_and_refuses_single_samples():
    custom_rm = slime_custom_rm(COMPARES)
    with pytest.raises(RewardError, match=r"slime hands over one of each.*--group-rm"):
        asyncio.run(custom_rm(None, sample("b")))
    group = [sample("b<|im_end|>"), sample("bbb")]
    expected = [pytest.approx(-(2**-0.5)), pytest.approx(2**-0.5)]
    assert asyncio.run(custom_rm(None, group)) == expected
    for i, s in enumerate(group):
        s.metadata = {"rollout": i}  # of a sample
        s.group_index = 3
    assert asyncio.run(custom_rm(None, group)) == expected
    for i, s in enumerate(group):
        s.group_index = i  # the same prompt drawn twice
    with pytest.raises(RewardError):
        asyncio.run(custom_rm(None, group))


def test_verifiers_gets_a_group_function():
    function = verifiers_reward(COMPARES)
    assert {"prompts", "completions", "answers", "infos"} <= set(inspect.signature(function).parameters)
    prompt = [{"role": "user", "content": "a"}]
    got = asyncio.run(
        function(
            prompts=[prompt] * 2, completions=[chat("b"), chat("bbb")], answers=["", ""], infos=[{}, {}], states=[1, 2]
        )
    )
    assert got == [pytest.approx(-(2**-0.5)), pytest.approx(2**-0.5)]
    with pytest.raises(RewardError, match=r"verifiers hands over one of each.*score_group"):
        asyncio.run(function(prompt=prompt, completion=chat("b"), answer="b", info={}))


@pytest.mark.parametrize("strip", [False, True, "opened"])
def test_reasoning_is_left_out_where_it_is_asked_for(strip):
    seen = Groups()
    text, unfinished = "<think>so</think>4", "<think>so \\boxed{4}"
    if strip == "opened":
        text, unfinished = text.removeprefix("<think>"), unfinished.removeprefix("<think>")
    for call in (
        lambda t: trl_reward(seen, strip_reasoning=strip)(prompts=["p"], completions=[t]),
        lambda t: verl_compute_score(seen, strip_reasoning=strip)("d", t, "4"),
        lambda t: openrlhf_reward_func(seen, strip_reasoning=strip)([f"p{t}"], ["p"], ["4"]),
        lambda t: asyncio.run(slime_custom_rm(seen, strip_reasoning=strip)(None, sample(t))),
        lambda t: asyncio.run(verifiers_reward(seen, strip_reasoning=strip)(prompt="p", completion=t)),
    ):
        seen.calls.clear()
        call(text), call(unfinished)
        assert [c for _, (c,) in seen.calls] == ([text, unfinished] if strip is False else ["4", ""])
