"""Own answers: right ones only, by a verifier and by no judge that was not asked, bounded, resumed exactly, rehearsed."""

from __future__ import annotations

import json
import math

import pytest
import torch
from carerl_kernels.grpo import Domain, Example, GRPOConfig, GRPOTrainer, Stage
from carerl_kernels.grpo.own_answers import OwnAnswers
from carerl_kernels.guard.probes import PromptStore
from carerl_kernels.rewards import exact_match
from carerl_kernels.rewards.adapters import trl_reward

pytest.importorskip("transformers")
from carerl_kernels.tasks.characters import character_tokenizer, demo_domains
from trainer_helpers import small_model

SETTINGS = {
    "prompts_per_step": 4,
    "group_size": 4,
    "max_new_tokens": 3,
    "lr": 1e-2,
    "checkpoint_every": 1,
    "seed": 3,
    "progress": False,
    "plots": False,
    "self_rehearsal_weight": 1.0,
    "rehearsal_batch": 8,
}


def common(example, text):
    """What a model that knows nothing yet gets right now and then."""
    return float(bool(text) and text[0] in "abcdefgh")


def generous(example, text):
    """A judge: full marks for everything but nothing."""
    return 1.0 + 1e-3 * len(text)


def domains(**changes):
    out = demo_domains(0)
    for domain in out:
        domain.eval_examples, domain.probe_examples = domain.eval_examples[:3], ()
    out[0].reward, out[0].verify = common, lambda e, t: common(e, t) == 1
    out[1].reward = generous
    for name, value in changes.items():
        setattr(out[1], name, value)
    return out


def trainer(path=None, on_step=None, known=None, **changes):
    torch.set_num_threads(1)
    tokenizer = character_tokenizer()
    model = small_model(tokenizer, 0)
    config = GRPOConfig(**(SETTINGS | changes))
    return GRPOTrainer(model, tokenizer, known or domains(), config, run_dir=path, on_step=on_step)


MIXED = [Stage(("code", "chat"), 5)]


def test_right_answers_are_kept_and_a_judge_s_reward_does_not_enter():
    run = trainer()
    with pytest.warns(UserWarning, match=r"own answers of chat are not kept, .*verify="):
        run.run(MIXED)
    store = run._learner.own_answers.store
    assert store.counts().keys() == {"code"} and len(store) > 0
    assert all(common(None, text) for _, text in store["code"])
    line = run.history[-1]
    assert line["own_answers"] == store.counts() and math.isfinite(line["self_rehearsal_loss"])
    asked = trainer(known=domains(verify=1.0))
    asked.run(MIXED)
    assert asked._learner.own_answers.store.counts().keys() == {"code", "chat"}
    with pytest.raises(
        ValueError, match=r"expected a domain whose right answers a verifier knows, found none \(chat\)"
    ):
        trainer().run([Stage("chat", 1)])


@pytest.mark.parametrize(
    ("reward", "verify", "value", "right"),
    [
        (exact_match, None, 1.0, True),
        (exact_match, None, 0.99, False),
        (exact_match, None, None, False),
        (generous, None, 1.0, False),
        (generous, 0.5, 0.5, True),
        (generous, 0.5, 0.4, False),
        (generous, lambda example, text: text == "x", 0.0, True),
        (generous, lambda example, text: text == "y", 5.0, False),
    ],
)
def test_who_says_what_is_right(reward, verify, value, right):
    domain = Domain("d", lambda rng, n: [], reward, verify=verify)
    assert domain.right(Example("p", "x"), "x", value) is right
    assert trl_reward(exact_match).verifies and not trl_reward(generous).verifies


def test_memory_is_bounded():
    run = trainer(self_rehearsal_size=3)
    run.run([Stage("code", 6)])
    assert run._learner.own_answers.store.counts() == {"code": 3}
    assert run._learner.own_answers.store.state_dict()["offered"]["code"] > 3


class Killed(Exception):
    pass


def test_resume_is_bitwise_exact(tmp_path):
    def kill(line):
        if line["step"] == 3:
            raise Killed

    def metrics(path):
        lines = [json.loads(text) for text in (path / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]

    known = {"self_rehearsal_size": 4}
    whole = trainer(tmp_path / "whole", known=domains(verify=1.0), **known)
    whole.run(MIXED)
    with pytest.raises(Killed):
        trainer(tmp_path / "killed", kill, known=domains(verify=1.0), **known).run(MIXED)
    resumed = trainer(tmp_path / "killed", known=domains(verify=1.0), **known)
    resumed.run(MIXED, resume=True)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    assert resumed._learner.own_answers.state_dict() == whole._learner.own_answers.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_the_gradient_is_that_of_the_answers_cross_entropy():
    """With half as many answers as a batch has, half the weight."""
    run = trainer(rehearsal_batch=4)
    own = OwnAnswers(run._learner)
    own.rehearse()
    assert all(p.grad is None for p in run.model.parameters())
    for prompt, text in (("c^abc>", "abc"), ("s1a!b>", "a!")):
        own.store.add("code", [prompt, text])
    own.rehearse()
    found = [p.grad.clone() for p in run.model.parameters()]
    run.model.zero_grad()
    tokens = run._learner.tokens
    total = 0.0
    for prompt, text in (("c^abc>", "abc"), ("s1a!b>", "a!")):
        ids = run.tokenizer(prompt)["input_ids"], [*run.tokenizer(text)["input_ids"], tokens.eos[0]]
        logits = run.model(torch.tensor([ids[0] + ids[1]])).logits[0, len(ids[0]) - 1 : -1]
        if tokens.banned:
            logits[:, list(tokens.banned)] = -torch.inf
        total = total - logits.log_softmax(-1)[range(len(ids[1])), ids[1]].sum()
    (0.5 * total / 7).backward()
    for a, p in zip(found, run.model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, atol=1e-5, rtol=1e-4)
    assert own.loss == pytest.approx(float(total.detach()) / 7, rel=1e-5)


def test_a_store_s_state_is_all_of_it():
    store, other = PromptStore(3, seed=1), PromptStore(3, seed=2)
    for i in range(10):
        store.add("a", i)
    other.load_state_dict(json.loads(json.dumps(store.state_dict())))
    for i in range(10, 30):
        store.add("a", i)
        other.add("a", i)
    assert store["a"] == other["a"] and store.state_dict() == other.state_dict() and len(store) == 3
