"""Rewards in the reference trainer: None is excluded from its group, batch rewards see a whole batch, their state resumes."""

from __future__ import annotations

import json
import random

import pytest
import torch
from carerl_kernels.grpo import (
    Domain,
    Example,
    GRPOConfig,
    GRPOTrainer,
    RewardError,
    Stage,
    evaluate,
    special_tokens,
)

pytest.importorskip("transformers")
from carerl_kernels.tasks.characters import GENERATORS, character_tokenizer, tiny_model

EXAMPLES = GENERATORS["code"]()


def domain(reward, **changes):
    return Domain("code", lambda rng, n: rng.sample(EXAMPLES, n), reward, **changes)


def trainer(reward, path=None, on_step=None, **changes):
    tokenizer = character_tokenizer()
    settings = {
        "prompts_per_step": 2,
        "group_size": 4,
        "max_new_tokens": 4,
        "lr": 1e-3,
        "progress": False,
        "plots": False,
        "checkpoint_every": 1,
    }
    one = domain(reward, eval_examples=EXAMPLES[:3])
    config = GRPOConfig(**(settings | changes))
    return GRPOTrainer(tiny_model(tokenizer, 0), tokenizer, [one], config, run_dir=path, on_step=on_step)


class Sometimes:
    """Judges by length; every third completion cannot be judged. Records what it was asked."""

    def __init__(self):
        self.calls, self.count = [], 0

    def score_batch(self, examples, completions):
        self.calls.append((list(examples), list(completions)))
        values = []
        for text in completions:
            self.count += 1
            values.append(None if self.count % 3 == 0 else len(text) + 0.01 * self.count)
        return values


def test_none_is_excluded_from_group_statistics_and_metrics():
    reward = Sometimes()
    run = trainer(reward, eval_every=0)
    batches = []
    from carerl_kernels.grpo import learner

    rollout = learner.rollout

    def watched(*arguments, **keywords):
        batches.append(rollout(*arguments, **keywords))
        return batches[-1]

    learner.rollout = watched
    try:
        history = run.run([Stage("code", 2)])
    finally:
        learner.rollout = rollout
    batch, line = batches[0], history[1]
    assert line["excluded"] == 1 - float(batch.judged.double().mean()) > 0.2
    examples, texts = reward.calls[1]
    assert texts == batch.texts and len(examples) == 8
    assert examples[0] is examples[3] and examples[0] is not examples[4]
    assert (batch.advantages[~batch.judged] == 0).all() and batch.rewards[~batch.judged].isnan().all()
    for g in (0, 1):
        rows = batch.judged & (batch.group_ids == g)
        expected = torch.ops.carerl.group_advantages(batch.rewards[rows], batch.group_ids[rows])
        assert torch.equal(batch.advantages[rows], expected)
        assert abs(float(batch.advantages[rows].sum())) < 1e-5
    assert line["reward"] == pytest.approx(float(batch.rewards[batch.judged].mean()))
    assert line["rewards"] == {"code": pytest.approx(line["reward"])}


def test_a_plain_function_may_return_none_too():
    draws = random.Random(0)
    history = trainer(lambda example, text: draws.choice([None, 0.0, 1.0])).run([Stage("code", 3)])
    assert any(0 < line["excluded"] < 1 for line in history[1:])


def test_when_nothing_can_be_judged_training_stops_instead_of_drifting():
    run = trainer(lambda example, text: None)
    run.domains["code"].eval_examples = ()
    with pytest.raises(RewardError, match=r"None for all of them \(domains code\).*resume the run"):
        run.run([Stage("code", 1)])


def test_evaluation_leaves_out_what_could_not_be_judged():
    tokenizer = character_tokenizer()
    model = tiny_model(tokenizer, 0)
    values = iter([1.0, None, 0.0, None])
    settings = {"max_new_tokens": 2}
    tokens = special_tokens(tokenizer, model)
    one = domain(lambda example, text: next(values), eval_examples=EXAMPLES[:4])
    assert evaluate(model, tokenizer, one, tokens, **settings) == 0.5
    one.reward = lambda example, text: None
    with pytest.raises(RewardError, match="could be judged"):
        evaluate(model, tokenizer, one, tokens, **settings)


class Counting:
    """A reward with a state: the n-th call pays differently."""

    def __init__(self):
        self.n = 0

    def score_batch(self, examples, completions):
        self.n += 1
        return [(self.n * 7 + len(text) * i) % 5 for i, text in enumerate(completions)]

    def evaluate_batch(self, examples, completions):
        return [0.25] * len(completions)

    def state_dict(self):
        return {"n": self.n}

    def load_state_dict(self, state):
        self.n = state["n"]


class Killed(Exception):
    pass


def test_a_rewards_state_resumes_and_evaluation_does_not_touch_it(tmp_path):
    def kill(line):
        if line["step"] == 2:
            raise Killed

    whole = trainer(Counting(), tmp_path / "whole", eval_every=1)
    whole.run([Stage("code", 4)])
    assert whole.domains["code"].reward.n == 4
    with pytest.raises(Killed):
        trainer(Counting(), tmp_path / "cut", on_step=kill, eval_every=1).run([Stage("code", 4)])
    resumed = trainer(Counting(), tmp_path / "cut", eval_every=1)
    resumed.run([Stage("code", 4)], resume=True)
    assert resumed.domains["code"].reward.n == 4
    a, b = (
        [json.loads(t) | {"seconds": 0} for t in (tmp_path / d / "metrics.jsonl").read_text().splitlines()]
        for d in ("whole", "cut")
    )
    assert a == b and a[1]["eval"] == {"code": 0.25}


def test_a_batch_reward_of_the_wrong_length_is_refused():
    class Short:
        def score_batch(self, examples, completions):
            return [1.0]

    with pytest.raises(RewardError, match="expected 2 rewards from score_batch, found 1"):
        domain(Short()).score_batch([Example("a"), Example("b")], ["", ""])
