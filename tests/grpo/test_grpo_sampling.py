"""Sampling: what is sampled is what is scored, for several architectures and prompts of uneven length."""

import warnings

import pytest
import torch
from carerl_kernels._wrapped import forward_accepts
from carerl_kernels.grpo import SpecialTokens, completion_logprobs, nucleus, sample

transformers = pytest.importorskip("transformers")

V = 23
TOKENS = SpecialTokens(pad=0, eos=(1, 2), banned=(0,))
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [5, 5]]
COMMON = {"vocab_size": V, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
ARCHITECTURES = {
    "qwen3": lambda: transformers.Qwen3Config(
        **COMMON, **SMALL, num_key_value_heads=2, head_dim=8, initializer_range=0.3
    ),
    "llama": lambda: transformers.LlamaConfig(**COMMON, **SMALL, num_key_value_heads=4, initializer_range=0.3),
    "gemma2_sliding": lambda: transformers.Gemma2Config(
        **COMMON, **SMALL, num_key_value_heads=2, head_dim=8, sliding_window=4, initializer_range=0.3
    ),
    "gpt2_absolute": lambda: transformers.GPT2Config(
        **COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
    ),
}


@pytest.fixture(params=sorted(ARCHITECTURES))
def model(request):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[request.param]()).eval()


@pytest.fixture
def qwen():
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(ARCHITECTURES["qwen3"]())


def draw(model, seed=0, **changes):
    arguments = {"num_samples": 3, "max_new_tokens": 9, "seeds": range(seed, seed + len(PROMPTS))} | changes
    return sample(model, PROMPTS, TOKENS, **arguments)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_equal_teacher_forced_ones(model, temperature):
    rollout = draw(model, temperature=temperature)
    length = rollout.completion_ids.shape[1]
    logp = completion_logprobs(
        model, rollout.input_ids, rollout.attention_mask, length, temperature=temperature, banned=TOKENS.banned
    )
    on = rollout.completion_mask.bool()
    torch.testing.assert_close(rollout.logps[on], logp.detach()[on], rtol=1e-4, atol=2e-5)
    assert (rollout.logps[~on] == 0).all()


def test_cached_steps_equal_plain_forwards_without_padding(model):
    """Every row alone, unpadded, uncached, in float64 arithmetic of the same weights."""
    rollout = draw(model)
    double = model.double()
    for i, completion in enumerate(rollout.completions()):
        ids = PROMPTS[i // 3] + completion
        with torch.no_grad():
            logits = double(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        logits[:, 0] = -torch.inf
        expected = logits.log_softmax(-1)[range(len(ids) - len(completion) - 1, len(ids) - 1), completion]
        torch.testing.assert_close(rollout.logps[i, : len(completion)].double(), expected, rtol=1e-4, atol=2e-5)


def test_adapters_are_told_positions_and_which_logits_to_keep(model):
    """Their forward takes anything and passes it on. Each row alone, unpadded, is what they are compared with."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    for wrapped in (adapted, torch.compile(adapted)):
        for name in ("position_ids", "logits_to_keep", "use_cache"):
            assert forward_accepts(wrapped, name) == forward_accepts(model, name)
    widths = set()
    model.get_output_embeddings().register_forward_hook(lambda layer, inputs, output: widths.add(inputs[0].shape[1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # names that transformers is about to drop
        rollout = draw(adapted.eval())
    length = rollout.completion_ids.shape[1]
    with torch.no_grad():
        logp = completion_logprobs(adapted, rollout.input_ids, rollout.attention_mask, length, banned=TOKENS.banned)
    assert widths == {1, length + 1}
    for i, completion in enumerate(rollout.completions()):
        ids = torch.tensor([PROMPTS[i // 3] + completion])
        with torch.no_grad():
            alone = completion_logprobs(adapted, ids, torch.ones_like(ids), len(completion), banned=TOKENS.banned)[0]
        for found in (rollout.logps, logp):
            torch.testing.assert_close(found[i, : len(completion)], alone, rtol=1e-4, atol=5e-5)


def test_completions_end_at_eos_or_limit_and_never_hold_padding(qwen):
    rollout = draw(qwen, num_samples=40)
    seen = set()
    for ids in rollout.completions():
        assert 0 not in ids
        assert not {1, 2} & set(ids[:-1])
        assert ids[-1] in (1, 2) or len(ids) == 9
        seen.add(ids[-1] in (1, 2))
    assert seen == {True, False}
    assert (rollout.completion_ids[rollout.completion_mask == 0] == 0).all()


def test_same_seed_same_tokens_other_seed_others(qwen):
    first, again, other = draw(qwen), draw(qwen), draw(qwen, seed=1)
    assert torch.equal(first.completion_ids, again.completion_ids)
    assert torch.equal(first.logps, again.logps)
    assert first.completions() != other.completions()


def test_frequencies_follow_the_model(qwen):
    """One token from one prompt: chi-square against the model's own distribution."""
    n = 20000
    rollout = sample(qwen, [[5, 6]], TOKENS, num_samples=n, max_new_tokens=1, seeds=[0])
    with torch.no_grad():
        logits = qwen(input_ids=torch.tensor([[5, 6]])).logits[0, -1].double()
    logits[0] = -torch.inf
    expected = logits.softmax(-1) * n
    observed = torch.bincount(rollout.completion_ids[:, 0], minlength=V).double()
    assert observed[0] == 0
    keep = expected > 5
    chi2 = ((observed - expected)[keep] ** 2 / expected[keep]).sum().item()
    assert chi2 < keep.sum().item() + 5 * (2 * keep.sum().item()) ** 0.5
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1).masked_fill(logits == -torch.inf, 0)).sum()
    assert rollout.entropy[0, 0].item() == pytest.approx(entropy.item(), abs=1e-5)


def test_greedy_takes_the_likeliest_and_mode_is_restored(qwen):
    qwen.train()
    rollout = draw(qwen, temperature=0, num_samples=2)
    assert qwen.training
    assert torch.equal(rollout.completion_ids[0::2], rollout.completion_ids[1::2])
    assert rollout.completions() == draw(qwen, temperature=0, num_samples=2, seed=5).completions()


def test_nucleus_is_the_smallest_set_reaching_the_mass():
    logp = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5], [0.25, 0.25, 0.25, 0.25]]).log()
    assert torch.isfinite(nucleus(logp, 0.79)).tolist()[:2] == [[True, True, False, False], [False, False, True, True]]
    assert torch.isfinite(nucleus(logp, 0.01)).sum(1).tolist() == [1, 1, 1]  # never empty
    assert nucleus(logp, 1.0) is logp


def test_select_trims_common_padding_only(qwen):
    rollout = draw(qwen)
    rows = torch.tensor([3, 4])  # the one-token prompt
    part = rollout.select(rows)
    assert part.prompt_ids.shape[1] == 1
    assert part.prompt_ids[:, 0].tolist() == [8, 8]
    assert part.completions() == [rollout.completions()[3], rollout.completions()[4]]
    assert part.completion_ids.shape[1] == max(len(c) for c in part.completions())


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([], {}, "one or more prompts"),
        ([[5], []], {}, "at least one token"),
        ([[5]], {"temperature": -1.0}, "temperature >= 0"),
        ([[5]], {"top_p": 0.0}, "0 < top_p <= 1"),
    ],
)
def test_errors(qwen, prompts, changes, message):
    with pytest.raises(ValueError, match=message):
        sample(qwen, prompts, TOKENS, **({"max_new_tokens": 2} | changes))


def test_diverged_model_is_named(qwen):
    with torch.no_grad():
        next(qwen.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="diverged"):
        draw(qwen)


def test_prompts_as_text_and_as_chat_keep_their_order():
    from carerl_kernels.grpo import encode_prompts
    from carerl_kernels.tasks.characters import character_tokenizer

    tokenizer = character_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    rows = encode_prompts(tokenizer, ["abc", ({"role": "user", "content": "de"},), "f"])
    assert [tokenizer.decode(ids) for ids in rows] == ["abc", "de>", "f"]
    with pytest.raises(ValueError, match="the tokenizer made none of prompt"):
        encode_prompts(tokenizer, ["a", ""])
