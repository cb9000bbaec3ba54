"""Sampling from an engine over real HTTP: same training, fresh and stale weights, resuming, clear errors."""

from __future__ import annotations

import json

import pytest
import torch
from carerl_kernels.grpo import GRPOConfig, GRPOTrainer, Stage
from carerl_kernels.grpo.endpoint import EndpointSampler, completion_seeds
from carerl_kernels.grpo.sampling import SamplerError

pytest.importorskip("transformers")
pytest.importorskip("httpx")
from carerl_kernels.grpo import sample, special_tokens
from carerl_kernels.tasks.characters import character_tokenizer, demo_domains
from completions_server import CompletionsServer
from trainer_helpers import small_model

SETTINGS = {
    "prompts_per_step": 3,
    "group_size": 3,
    "max_new_tokens": 4,
    "lr": 1e-3,
    "warmup_steps": 0,
    "decay": "constant",
    "old_logprobs": "sampler",
    "seed": 3,
    "progress": False,
    "plots": False,
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def tokenizer():
    return character_tokenizer()


def reward(example, text):
    return sum(map(ord, text)) % 7


def trainer(
    tokenizer, path, url=None, on_step=None, engine="vllm", sync_every=1, options=None, sampler=None, **changes
):
    model = small_model(tokenizer, 0)
    domain = demo_domains(0)[0]
    domain.eval_examples, domain.eval_mode, domain.reward = domain.eval_examples[:3], "sampled", reward
    if url is not None:
        settings = {"folder": path, "attempts": 2, "backoff": 0.01} | (options or {})
        tokens = special_tokens(tokenizer, model)
        sampler = EndpointSampler(url, "tiny", tokens, engine=engine, sync_every=sync_every, **settings)
    config = GRPOConfig(**(SETTINGS | changes))
    return GRPOTrainer(model, tokenizer, [domain], config, sampler=sampler, run_dir=path, on_step=on_step)


def server_of(tokenizer, **options):
    """An engine that starts with weights of its own."""
    return CompletionsServer(small_model(tokenizer, 99), tokenizer, **options)


def metrics(path):
    lines = [json.loads(text) for text in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_training_from_an_engine_equals_training_from_the_model(tokenizer, tmp_path, engine):
    """The engine's weights come through the disk, its completions and log-probabilities over HTTP."""
    by_itself = trainer(tokenizer, tmp_path / "model")
    if engine == "sglang":  # every completion has a seed of its own

        def singly(prompts, seeds, *, num_samples, **settings):
            asked = [prompt for prompt in prompts for _ in range(num_samples)]
            own = [s for seed in seeds for s in completion_seeds(seed, num_samples)]
            tokens = special_tokens(tokenizer, by_itself.model)
            return sample(by_itself.model, asked, tokens, num_samples=1, seeds=own, **settings)

        by_itself = trainer(tokenizer, tmp_path / "model", sampler=singly)
    by_itself.run([Stage("code", 3)])
    with server_of(tokenizer, engine=engine) as server:
        trainer(tokenizer, tmp_path / "engine", server.url, engine=engine).run([Stage("code", 3)])
    ours, theirs = metrics(tmp_path / "engine"), metrics(tmp_path / "model")
    assert [line.pop("staleness") for line in ours[1:]] == [0, 0, 0]
    for mine, other in zip(ours, theirs, strict=True):
        mine.pop("entropy", None), other.pop("entropy", None)  # estimated by -log p
        for key in mine:
            if isinstance(mine[key], float):
                assert mine[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5), key
            else:
                assert mine[key] == other[key], key
    assert len(server.loaded) == 4  # before the first evaluation, then after every step
    kept = sorted(p.name for p in (tmp_path / "engine" / "served").iterdir())
    assert kept == ["step-00000000", "step-00000003"]  # a checkpoint's, and the present ones


def test_stale_weights_are_counted_and_corrected_for(tokenizer, tmp_path):
    with server_of(tokenizer) as server:
        run = trainer(tokenizer, tmp_path, server.url, sync_every=3, lr=0.02)
        history = run.run([Stage("code", 5)])
    assert [line["staleness"] for line in history[1:]] == [0, 1, 2, 0, 1]
    gaps = [line["sampler_gap"] for line in history[1:]]
    assert max(gaps[0], gaps[3]) < 1e-4 < min(gaps[1], gaps[2])  # the ratio's denominator is the engine's
    assert server.count("/reset_prefix_cache") == len(server.loaded) == 3
    bodies = [body for path, body in server.requests if path == "/v1/completions"]
    assert all(b["return_token_ids"] and b["logprobs"] and isinstance(b["prompt"][0], int) for b in bodies)
    assert all(b["logit_bias"] == {"0": -100} and b["stop_token_ids"] == [1] for b in bodies)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_completions_of_a_prompt_differ(tokenizer, tmp_path, engine):
    """Also where a server gives one seed to all of a request."""
    model = small_model(tokenizer, 0)
    with server_of(tokenizer, engine=engine) as server:
        sampler = EndpointSampler(server.url, "tiny", special_tokens(tokenizer, model), engine=engine, folder=tmp_path)
        settings = {"num_samples": 4, "max_new_tokens": 6, "temperature": 1.0}
        rollout = sampler([[5, 6], [7]], [1, 2], **settings)
        rows = [tuple(ids) for ids in rollout.completions()]
        assert len(set(rows)) == len(rows) == 8
        assert [tuple(ids) for ids in sampler([[5, 6], [7]], [1, 2], **settings).completions()] == rows
        with pytest.raises(ValueError, match=r"top_p: expected 1 .* found top_p=0\.9 at temperature=0\.5"):
            sampler([[5]], [1], **(settings | {"top_p": 0.9, "temperature": 0.5}))


def test_forgetting_removes_what_was_written_alone(tokenizer, tmp_path):
    tokens = special_tokens(tokenizer, small_model(tokenizer, 0))
    sampler = EndpointSampler("http://127.0.0.1:9/v1", "tiny", tokens, folder=tmp_path)
    sampler.forget({3})  # nothing there
    kept = [tmp_path / "step-00000001", sampler.path(3), sampler.folder / "last-step-3", sampler.folder / "step-2"]
    gone = [sampler.path(1), sampler.folder / ".tmp-step-00000002"]
    for path in (*kept, *gone):
        path.mkdir(parents=True)
    sampler.forget({3})
    assert all(p.is_dir() for p in kept) and not any(p.exists() for p in gone)


class Killed(Exception):
    pass


def test_resuming_serves_again_what_was_served(tokenizer, tmp_path):
    """Interrupted between two pushes, with an engine that has other weights by then."""

    def kill(line):
        if line["step"] == 3:
            raise Killed

    settings = {"sync_every": 4, "checkpoint_every": 2, "lr": 0.02}
    with server_of(tokenizer) as server:
        trainer(tokenizer, tmp_path / "whole", server.url, **settings).run([Stage("code", 6)])
        with pytest.raises(Killed):
            trainer(tokenizer, tmp_path / "cut", server.url, on_step=kill, **settings).run([Stage("code", 6)])
    with server_of(tokenizer) as server:
        trainer(tokenizer, tmp_path / "cut", server.url, **settings).run([Stage("code", 6)], resume=True)
        assert server.loaded[0].name == "step-00000000"
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def altered(change):
    def alter(path, answer):
        if path.endswith("/completions"):
            for choice in answer["choices"]:
                change(choice)
        return answer

    return alter


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (altered(lambda c: c.pop("logprobs")), "returns no log-probabilities.*found 0"),
        (altered(lambda c: c.pop("token_ids")), "returns no token ids.*return_token_ids"),
        (
            altered(lambda c: c.update(finish_reason="stop", token_ids=[5], logprobs={"token_logprobs": [-1.0]})),
            "end tokens",
        ),
        (
            lambda path, answer: (404, {"error": "no such model"}) if "completions" in path else answer,
            "check url, model",
        ),
        (lambda path, answer: (500, {}) if "completions" in path else answer, "status 500, 2 times; start the engine"),
        (lambda path, answer: {"hello": 1} if "completions" in path else answer, "no completions in"),
        (lambda path, answer: (403, {}) if "rpc" in path else answer, "VLLM_SERVER_DEV_MODE=1"),
        (
            altered(lambda c: c.update(logprobs={"token_logprobs": [-9.0] * len(c["token_ids"])})),
            "serves other weights",
        ),
    ],
)
def test_what_training_cannot_use_is_named(tokenizer, tmp_path, alter, message):
    with server_of(tokenizer, alter=alter) as server, pytest.raises(SamplerError, match=message):
        trainer(tokenizer, tmp_path, server.url).run([Stage("code", 1)])


def test_an_engine_that_is_not_there_is_named(tokenizer, tmp_path):
    with pytest.raises(SamplerError, match=r"cannot give new weights to http://127.0.0.1:9.*start the engine"):
        trainer(tokenizer, tmp_path, "http://127.0.0.1:9/v1").run([Stage("code", 1)])
    with server_of(tokenizer, engine="sglang") as server, pytest.raises(SamplerError, match="is this vllm"):
        trainer(tokenizer, tmp_path / "other", server.url, engine="vllm").run([Stage("code", 1)])
    failing = lambda path, answer: {"success": False, "message": "shape"} if "update" in path else answer  # noqa: E731
    with server_of(tokenizer, engine="sglang", alter=failing) as server, pytest.raises(SamplerError, match="shape"):
        trainer(tokenizer, tmp_path / "refused", server.url, engine="sglang").run([Stage("code", 1)])
    with pytest.raises(ValueError, match="engine: expected one of vllm, sglang"):
        trainer(tokenizer, tmp_path, "http://127.0.0.1:9/v1", engine="ollama")
