"""The demonstration's tasks: right answers by an independent solver, a faithful tokenizer, disjoint splits, warm-up."""

import random

import pytest
import torch

pytest.importorskip("transformers")
from carerl_kernels.grpo import special_tokens, success_probability
from carerl_kernels.tasks import characters as tasks
from trainer_helpers import small_model


def solve(prompt):
    """Each answer from the rules in words, without the generator's code."""
    kind, body = prompt[0], prompt[1:-1]
    if kind == "s":
        return body[1] * int(body[0]) + body[2]
    chosen = sorted(body[1:])
    if body[0] == "v":
        chosen = chosen[::-1]
    return "".join(chosen) if kind == "c" else (chosen[-1])


@pytest.mark.parametrize("name", tasks.DOMAINS)
def test_every_answer_is_right_and_prompts_have_one_length(name):
    examples = tasks.GENERATORS[name]()
    assert len({e.prompt for e in examples}) == len(examples) > 500
    assert {len(e.prompt) for e in examples} == {6}
    for example in examples:
        assert example.answer == solve(example.prompt)
        assert len(example.answer) < tasks.MAX_NEW_TOKENS


def test_tokenizer_is_one_token_per_character_and_round_trips():
    tokenizer = tasks.character_tokenizer()
    for name in tasks.DOMAINS:
        for example in tasks.GENERATORS[name]()[::37]:
            text = example.prompt + example.answer
            ids = tokenizer(text)["input_ids"]
            assert len(ids) == len(text)
            assert tokenizer.decode(ids) == text
            assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode([*tokenizer("ab")["input_ids"], tokenizer.eos_token_id], skip_special_tokens=True) == "ab"


def test_splits_are_disjoint_and_differ_by_seed():
    for domain, other in zip(tasks.demo_domains(0), tasks.demo_domains(1), strict=True):
        held_out = {e.prompt for e in domain.eval_examples}
        assert len(held_out) == tasks.EVAL_EXAMPLES
        drawn = {e.prompt for e in domain.draw(random.Random(0), 2000)}
        assert not held_out & drawn
        assert not held_out & {e.prompt for e in domain.probe_examples}
        assert len(domain.probe_examples) == tasks.PROBE_EXAMPLES
        assert held_out != {e.prompt for e in other.eval_examples}


def test_exact_success_probability_is_the_frequency_of_success():
    from carerl_kernels.grpo import encode_prompts, sample

    tokenizer = tasks.character_tokenizer()
    model = small_model(tokenizer)
    domains = tasks.demo_domains(0)
    tasks.warm_up(model, tokenizer, domains, seed=0, steps=40, batch_per_domain=16)
    tokens = special_tokens(tokenizer, model)
    n = 2000
    for domain in domains:
        example = domain.eval_examples[0]
        exact = success_probability(model, tokenizer, [example], tokens, max_new_tokens=tasks.MAX_NEW_TOKENS).item()
        rollout = sample(
            model,
            encode_prompts(tokenizer, [example.prompt]),
            tokens,
            num_samples=n,
            max_new_tokens=tasks.MAX_NEW_TOKENS,
            seeds=[1],
        )
        texts = tokenizer.batch_decode(rollout.completions(), skip_special_tokens=True)
        rate = sum(domain.score(example, text) for text in texts) / n
        assert abs(rate - exact) < 4.5 * (exact * (1 - exact) / n) ** 0.5 + 1e-3


def test_warm_up_learns_a_little_of_everything_and_repeats_exactly():
    tokenizer = tasks.character_tokenizer()
    domains = tasks.demo_domains(0)
    first, again = tasks.tiny_model(tokenizer, 0), tasks.tiny_model(tokenizer, 0)
    losses = tasks.warm_up(first, tokenizer, domains, seed=0, steps=25, batch_per_domain=16)
    assert tasks.warm_up(again, tokenizer, domains, seed=0, steps=25, batch_per_domain=16) == losses
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert losses[-1] < 0.6 * losses[0]


def test_building_a_model_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tasks.tiny_model(tasks.character_tokenizer(), 0)
    assert torch.equal(torch.rand(3), expected)
