"""One reward as a reward function of five trainers. TRL's own trainer calls it; the others' calls are made as documented."""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
import torch
from carerl_kernels.grpo import RewardError
from carerl_kernels.rewards.adapters import (
    openrlhf_reward_func,
    openrlhf_server,
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
    from carerl_kernels.demo.tasks import character_tokenizer, code_examples, tiny_model

    tokenizer = character_tokenizer()
    tokenizer.padding_side = "left"
    rows = code_examples()[:4]
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


def test_openrlhf_server():
    with openrlhf_server(length, port=0, excluded=0.0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/get_reward"

        def post(body):
            request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
            with urllib.request.urlopen(request) as response:
                return json.loads(response.read())

        got = post({"query": ["ab", "a?"], "prompts": ["a", "a"], "labels": ["b", "b"]})
        assert got == {"rewards": [pytest.approx(1.1), 0.0], "scores": [1.0, 0.0], "extra_logs": {"judged": [1.0, 0.0]}}
        assert post({"query": ["ab"], "prompts": ["a"]})["rewards"] == [pytest.approx(0.1)]
        for body in ({"query": ["ab"]}, {"query": ["x"], "prompts": ["a"]}, []):
            with pytest.raises(urllib.error.HTTPError) as error:
                post(body)
            assert error.value.code == 400 and "error" in json.loads(error.value.read())
        server.shutdown()


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
