"""Composition: laws of the normalisers, gates, what memory is worth, who dominates."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from carerl_kernels.grpo import Domain, Example, RewardError
from carerl_kernels.rewards.compose import (
    Component,
    Composition,
    Running,
    attribution,
    domination,
    rank_in_group,
)
from carerl_kernels.task import group_numbers
from hypothesis import given
from hypothesis import strategies as st

group_advantages = torch.ops.carerl.group_advantages
rows = st.lists(st.tuples(st.integers(0, 2), st.integers(-5, 5), st.booleans()), min_size=1, max_size=14)


def tensors(rows):
    group = torch.tensor([r[0] for r in rows])
    value = torch.tensor([float(r[1]) for r in rows], dtype=torch.float64)
    return value, group, torch.tensor([r[2] for r in rows])


def normalized(mode, values, groups, judged=None, **settings):
    component = Component("x", lambda e, t: 0.0, normalize=mode, **settings)
    judged = torch.ones(len(values), dtype=torch.bool) if judged is None else judged
    return Composition([component]).compose({"x": values}, groups, judged).total


# --------------------------------------------------------------------------------------------------------- normalisers


@given(rows)
def test_ranks_by_hand(rows):
    value, group, judged = tensors(rows)
    got = rank_in_group(value, group, judged)
    for i, (g, v, known) in enumerate(rows):
        others = [w for j, (h, w, k) in enumerate(rows) if h == g and k and j != i]
        expected = sum((v > w) - (v < w) for w in others) / len(others) if known and others else 0.0
        assert got[i] == pytest.approx(expected)


@pytest.mark.parametrize("mode", ["group", "rank"])
@given(rows, st.integers(1, 9), st.integers(-9, 9))
def test_group_normalisers_do_not_see_scale_shift_or_order(mode, rows, scale, shift):
    value, group, judged = tensors(rows)
    base = normalized(mode, value, group, judged)
    torch.testing.assert_close(normalized(mode, scale * value + shift, group, judged), base, atol=1e-5, rtol=1e-5)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(len(rows)))
    torch.testing.assert_close(normalized(mode, value[order], group[order], judged[order]), base[order])
    assert (base[~judged] == 0).all()
    for g in group.unique():
        assert abs(float(base[group == g].sum())) < 1e-5
    monotone = value.sign() * value.square()
    if mode == "rank":
        assert torch.equal(normalized(mode, monotone, group, judged), base)


def test_running_statistics_converge_to_the_streams_and_resume_exactly():
    draws = torch.Generator().manual_seed(0)
    running, batches = Running(0.9), [3 + 2 * torch.randn(64, generator=draws) for _ in range(200)]
    for b in batches[:150]:
        running.update(b)
    copy = Running(0.9)
    copy.load_state_dict(running.state_dict())
    for b in batches[150:]:
        running.update(b), copy.update(b)
    assert copy.state_dict() == running.state_dict()
    assert running.mean == pytest.approx(3, abs=0.2) and running.std == pytest.approx(2, abs=0.2)
    torch.testing.assert_close(running.normalize(batches[0]), (batches[0].double() - running.mean) / running.std)


def test_running_statistics_are_right_from_the_first_batch_and_never_divide_by_nothing():
    running = Running()
    assert (running.normalize(torch.tensor([1.0, 2.0])) == 0).all()
    running.update(torch.tensor([1.0, 3.0]))
    assert (running.mean, running.std) == (pytest.approx(2), pytest.approx(1))
    running.update(torch.tensor([]))
    assert running.mean == pytest.approx(2)
    same = Running()
    for _ in range(5):
        same.update(torch.full((4,), 1e6))
    assert (same.normalize(torch.full((4,), 1e6)) == 0).all()
    with pytest.raises(ValueError, match=r"decay in \(0, 1\)"):
        Running(1.0)


# --------------------------------------------------------------------------------------------------------- composition


def test_a_loud_component_does_not_drown_a_quiet_one():
    """The point of it all: summed raw, a component a thousand times as wide decides alone; decoupled, both count."""
    draws = np.random.default_rng(0)
    groups = torch.arange(8).repeat_interleave(8)
    quiet = torch.tensor(draws.integers(0, 2, 64), dtype=torch.float64)
    loud = torch.tensor(1000 * draws.standard_normal(64))
    both = {"quiet": quiet, "loud": loud}
    judged = torch.ones(64, dtype=torch.bool)

    def share(mode):
        parts = [Component(n, lambda e, t: 0.0, normalize=mode) for n in both]
        return attribution(Composition(parts).compose(both, groups, judged))

    assert share("none")["loud"] > 0.99
    for mode in ("group", "rank"):
        assert 0.3 < share(mode)["loud"] < 0.7


def test_decoupled_normalisation_keeps_apart_what_the_sum_confuses():
    """GDPO's example: (1, 0) and (0, 1) of unlike rewards, beside (1, 1): normalised after summing, the first two are the
    same; normalised before, the rarer success is worth more."""
    groups = torch.zeros(6, dtype=torch.long)
    rare = torch.tensor([1.0, 0, 0, 0, 0, 0])
    common = torch.tensor([0.0, 1, 1, 1, 0, 0])
    summed = group_advantages(rare + common, groups)
    assert summed[0] == summed[1]
    composition = Composition([Component(n, lambda e, t: 0.0) for n in ("rare", "common")])
    total = composition.compose({"rare": rare, "common": common}, groups, torch.ones(6, dtype=torch.bool)).total
    assert total[0] > total[1]
    torch.testing.assert_close(total.float(), group_advantages(rare, groups) + group_advantages(common, groups))


@given(rows, st.floats(0.1, 5))
def test_parts_sum_to_the_total_and_attribution_to_one(rows, weight):
    value, group, judged = tensors(rows)
    other = value.square() - 3
    components = [
        Component("a", lambda e, t: 0.0, weight=weight),
        Component("b", lambda e, t: 0.0, weight=-1.0, normalize="rank"),
        Component("c", lambda e, t: 0.0, normalize="none", gate="a", gate_at=1.0),
    ]
    composed = Composition(components).compose({"a": value, "b": other, "c": other}, group, judged)
    torch.testing.assert_close(sum(composed.parts.values()), composed.total)
    assert (composed.total[~judged] == 0).all()
    shares = attribution(composed)
    assert sum(shares.values()) == pytest.approx(1, abs=1e-6) or all(s == 0 for s in shares.values())


@given(rows)
def test_a_gated_component_compares_success_with_success(rows):
    value, group, success = tensors(rows)
    composition = Composition(
        [
            Component("success", lambda e, t: 0.0, normalize="none"),
            Component("memory", lambda e, t: 0.0, gate="success"),
        ]
    )
    judged = torch.ones(len(rows), dtype=torch.bool)
    part = composition.compose({"success": success.double(), "memory": value}, group, judged).parts["memory"]
    assert (part[~success] == 0).all()
    torch.testing.assert_close(part[success].float(), group_advantages(value[success], group[success]))


def values_of(table):
    return lambda example, text: table[text]


def test_a_composition_is_a_domains_reward():
    quality = {"good": 1.0, "fair": 0.5, "bad": 0.0, "odd": None}
    composition = Composition(
        [
            Component("quality", values_of(quality), weight=3.0),
            Component("length", lambda e, t: float(len(t)), normalize="none", weight=0.01),
        ]
    )
    domain = Domain("d", lambda rng, n: [], composition)
    one, two = Example("one"), Example("two")
    got = domain.score_batch([one, one, two, two, one], ["good", "bad", "fair", "fair", "odd"])
    z = 1 / math.sqrt(2)
    assert got[:2] == [pytest.approx(3 * z + 0.04, abs=1e-4), pytest.approx(-3 * z + 0.03, abs=1e-4)]
    assert got[2] == got[3] == pytest.approx(0.04) and got[4] is None  # a group that agrees; a part that failed
    assert composition.last.parts["length"].tolist()[:2] == [0.04, 0.03]
    raw = domain.score_batch([one, one], ["good", "odd"], training=False)
    assert raw == [pytest.approx((3 * 1 + 0.01 * 4) / 3.01), None]


def test_running_components_learn_in_training_only():
    composition = Composition([Component("x", lambda e, t: float(t), normalize="running")])
    domain = Domain("d", lambda rng, n: [], composition)
    domain.score_batch([Example("a")] * 4, list("1234"))
    state = composition.state_dict()
    assert domain.score_batch([Example("a")], ["9"], training=False) == [9.0] and composition.state_dict() == state
    other = Composition([Component("x", lambda e, t: float(t), normalize="running")])
    other.load_state_dict(state)
    batch = [Example("b")] * 2, ["1", "8"]
    assert other.score_batch(*batch) == composition.score_batch(*batch)


def test_rewards_inside_a_composition_are_checked():
    with pytest.raises(RewardError, match="domain 'x': expected a finite number"):
        Composition([Component("x", lambda e, t: math.nan)]).score_batch([Example("a")], ["t"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Composition([]), "distinct names"),
        (lambda: Composition([Component("a", len), Component("a", len)]), "distinct names"),
        (lambda: Composition([Component("a", len, gate="a")]), "the gate of 'a' among the others"),
        (lambda: Composition([Component("a", len, gate="b")]), "found 'b'"),
        (lambda: Component("a", len, normalize="batch"), "none, group, rank, running, found 'batch'"),
        (lambda: Component("a", len, weight=math.inf), "a finite weight"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ----------------------------------------------------------------------------------------------------------- domination


def test_the_domain_with_the_widest_rewards_is_named():
    draws = torch.Generator().manual_seed(1)
    groups = torch.arange(32).repeat_interleave(8)
    names = ["math"] * 128 + ["chat"] * 128
    rewards = torch.cat([torch.randn(128, generator=draws), 0.1 * torch.randn(128, generator=draws)])
    plain = domination(group_advantages(rewards, groups, mode="none"), names)
    assert plain.domains[0].name == "math" and plain.domains[0].dominates and plain.domains[0].energy > 0.95
    assert plain.effective < 1.2 and "math" in str(plain) and "dominates" in str(plain)
    fair = domination(group_advantages(rewards, groups), names)
    assert not any(d.dominates for d in fair.domains) and fair.effective > 1.98


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(-3, 3)), min_size=1, max_size=20))
def test_shares_sum_to_one(rows):
    advantages = torch.tensor([a for _, a in rows], dtype=torch.float64)
    report = domination(advantages, [d for d, _ in rows])
    assert sum(d.samples for d in report.domains) == pytest.approx(1)
    assert sum(d.energy for d in report.domains) == pytest.approx(float((advantages != 0).any()))  # however small
    assert 0.999 <= report.effective <= len(report.domains) + 1e-6
    if len(report.domains) == 1:
        assert not report.domains[0].dominates


def test_long_completions_weigh_more_where_the_loss_weighs_tokens():
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    report = domination(advantages, ["a", "a", "b", "b"], weights=torch.tensor([3.0, 3, 1, 1]))
    assert report.domains[0].name == "a" and report.domains[0].energy == pytest.approx(0.9)
    with pytest.raises(ValueError, match="expected B >= 1 advantages"):
        domination(advantages, ["a"])


def test_energy_is_the_share_of_the_real_squared_gradient():
    """On a softmax policy with independent prompts the shares are those of the gradient itself, to sampling error."""
    draws = torch.Generator().manual_seed(0)
    logits = torch.zeros(200, 6, requires_grad=True)  # one prompt a row; 8 completions each
    actions = torch.randint(0, 6, (200, 8), generator=draws)
    rewards = torch.randn(200, 8, generator=draws) * torch.tensor([2.0] * 100 + [1.0] * 100)[:, None]
    groups = torch.arange(200).repeat_interleave(8)
    advantages = group_advantages(rewards.flatten(), groups, mode="none")
    logp = torch.log_softmax(logits, -1).gather(1, actions)
    (logp.flatten() * advantages).sum().backward()
    squared = logits.grad.square().sum(1)
    share = float(squared[:100].sum() / squared.sum())
    report = domination(advantages, ["wide"] * 800 + ["narrow"] * 800)
    assert report.domains[0].energy == pytest.approx(share, abs=0.04)


# ----------------------------------------------------------------------------------------------------- information gain


def memory_model():
    pytest.importorskip("transformers")
    from carerl_kernels.tasks.characters import character_tokenizer, tiny_model

    tokenizer = character_tokenizer()
    return tiny_model(tokenizer, 0), tokenizer


def test_information_gain_is_the_difference_of_mean_log_probabilities():
    from carerl_kernels.rewards.information import InformationGain

    model, tokenizer = memory_model()
    gain = InformationGain(model, tokenizer, prompt=lambda e, m: e.prompt if m is None else m + e.prompt, batch_size=3)
    examples = [Example("c^dba>", "abd"), Example("m^37>", "7")]
    memories = ["abd", "ccc", "7", "s3b"]
    owners = [0, 0, 1, 1]
    got = gain.score_batch([examples[i] for i in owners], memories)

    def by_hand(prompt, answer):
        ids = tokenizer(prompt)["input_ids"]
        out = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model.eval()(torch.tensor([ids + out])).logits[0].double()
        logits[:, tokenizer.pad_token_id] = -torch.inf  # never written, as in sampling
        logp = torch.log_softmax(logits, -1)
        return sum(float(logp[len(ids) - 1 + j, t]) for j, t in enumerate(out)) / len(out)

    for i, memory, value in zip(owners, memories, got, strict=True):
        e = examples[i]
        assert value == pytest.approx(by_hand(memory + e.prompt, e.answer) - by_hand(e.prompt, e.answer), abs=1e-4)
    assert gain(examples[0], "abd") == pytest.approx(got[0], abs=1e-5)
    assert model.training is False
    tight = InformationGain(model, tokenizer, max_gain=1e-9, prompt=gain.prompt)
    assert abs(tight(examples[0], "abd")) == pytest.approx(1e-9)
    with pytest.raises(ValueError, match="expected an answer"):
        gain(Example("c^dba>"), "abd")


def test_a_memory_that_holds_the_answer_is_worth_more_to_a_model_that_reads_it():
    """A model trained to copy from its memory: the gain ranks memories by how much of the answer they hold."""
    from carerl_kernels.grpo import answer_loss
    from carerl_kernels.rewards.information import InformationGain

    model, tokenizer = memory_model()
    draws = random.Random(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    from carerl_kernels.grpo import special_tokens

    tokens = special_tokens(tokenizer, model)
    for _ in range(150):
        words = ["".join(draws.choices("abcdefgh", k=2)) for _ in range(32)]
        batch = [Example(f"{w}>" if draws.random() < 0.7 else ">", w) for w in words]
        optimizer.zero_grad()
        answer_loss(model, tokenizer, batch, tokens).backward()
        optimizer.step()
    gain = InformationGain(model, tokenizer, prompt=lambda e, m: (m or "") + e.prompt)
    right, half, wrong = (
        sum(gain.score_batch([Example(">", w) for w in ("ab", "cd", "hf")], memories))
        for memories in (["ab", "cd", "hf"], ["ah", "ca", "hb"], ["gh", "ba", "dc"])
    )
    assert right > half > wrong and right > 0 > wrong


def test_the_default_prompt_puts_the_memory_before_the_question():
    from carerl_kernels.rewards.information import plain_prompt

    example = Example("long text", "a", {"question": "Who?"})
    assert plain_prompt(example, None) == "Who?" and plain_prompt(example, "notes") == "notes\n\nWho?"
    chat = Example(({"role": "user", "content": "Who?"},), "a")
    assert plain_prompt(chat, "notes")[0] == {"role": "system", "content": "notes"}
    assert plain_prompt(chat, None) == chat.prompt


# ------------------------------------------------------------------------------------- groups, outliers, large and close


def lengths(example, text):
    return float(len(text))


def test_groups_are_those_of_prompts_or_of_the_trainer():
    """By value: a trainer that makes a new Example for every sample, with something of the sample in it, gets the same."""
    composition = Composition([Component("length", lengths)])
    texts = ["a", "aaa", "b", "bbbbb"]
    shared = [Example("p", "x"), Example("q", "x")]
    expected = composition.score_batch([shared[0], shared[0], shared[1], shared[1]], texts)
    single = [Example(p, "x", {"completion_ids": [i]}) for i, p in enumerate("ppqq")]
    assert composition.score_batch(single, texts) == expected and expected[0] == -expected[1] < 0
    chats = [Example(({"role": "user", "content": p},)) for p in "ppqq"]
    assert composition.score_batch(chats, texts) == expected
    assert group_numbers(single) == [0, 0, 2, 2] and group_numbers(chats) == [0, 0, 2, 2]
    assert group_numbers([Example("p", "x"), Example("p", "y"), Example("p")]) == [0, 1, 2]
    named = [Example("p", group=g) for g in (7, 7, 8, 8)]
    assert group_numbers(named) == [0, 0, 2, 2] and composition.score_batch(named, texts) == expected
    assert group_numbers([Example("a", group=1), Example("b", group=1)]) == [0, 0]


@pytest.mark.parametrize("normalize", ["none", "group", "rank", "running"])
def test_who_compares_says_so(normalize):
    class Compares:
        compares = True

        def score_batch(self, examples, completions):
            return [0.0] * len(completions)

    assert Composition([Component("x", lengths, normalize=normalize)]).compares == (normalize in ("group", "rank"))
    assert Composition([Component("x", Compares(), normalize="none")]).compares


@pytest.mark.parametrize("outlier", [1e9, -1e9, 1e200, -1e300])
@pytest.mark.parametrize("when", [0, 1, 30])
def test_one_outlier_does_not_spoil_running_statistics(outlier, when):
    draws = torch.Generator().manual_seed(0)
    running, batches = Running(), [5 + torch.randn(32, generator=draws, dtype=torch.float64) for _ in range(60)]
    batches[when][3] = outlier
    for batch in batches:
        running.update(batch)
    assert running.mean == pytest.approx(5, abs=1) and 0.8 < running.std < 2.5
    assert running.normalize(torch.tensor([outlier])).abs() == Running.LIMIT
    assert float(running.normalize(batches[-1]).std()) == pytest.approx(1, abs=0.6)


def test_an_outlier_before_there_was_a_scale_is_forgotten():
    """Rare successes: nearly all values are equal, so that nothing says that 1e9 is far away."""
    running = Running()
    running.update(torch.tensor([0.0] * 31 + [1e9]))
    assert running.std > 1e6
    for _ in range(Running.STRANGE):
        running.update(torch.tensor([0.0] * 31 + [1.0]))
        running.update(torch.zeros(32))  # nothing to learn from
    assert running.std < 1
    copy = Running()
    copy.load_state_dict(running.state_dict())
    assert copy.state_dict() == running.state_dict()


def test_a_scale_that_changes_is_followed():
    draws = torch.Generator().manual_seed(0)
    running = Running()
    for size in (1.0, 1000.0, 1.0):
        for _ in range(700 if size == 1 else 80):
            running.update(size * torch.randn(64, generator=draws, dtype=torch.float64))
        assert 0.5 * size < running.std < 3 * size


@pytest.mark.parametrize("spread", [1e-250, 1e-7, 1.0, 1e200])
@pytest.mark.parametrize("mode", ["group", "running"])
def test_no_spread_is_too_small_or_too_large(spread, mode):
    values = spread * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    got = normalized(mode, values, torch.zeros(4, dtype=torch.long))
    expected = normalized(mode, values / spread, torch.zeros(4, dtype=torch.long))
    assert got[0] < -0.5
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["group", "running", "rank"])
def test_values_that_differ_by_rounding_are_equal(mode):
    values = torch.tensor([0.1 + 0.2, 0.3, 0.3], dtype=torch.float64)
    got = normalized(mode, values, torch.zeros(3, dtype=torch.long))
    assert (got == 0).all() or mode == "rank"
    large = torch.tensor([1e300, -1e300, 1e308], dtype=torch.float64)
    assert normalized(mode, large, torch.zeros(3, dtype=torch.long)).isfinite().all()


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
def test_whatever_the_values_nothing_becomes_nan(values):
    v, groups = torch.tensor(values, dtype=torch.float64), torch.zeros(len(values), dtype=torch.long)
    judged = torch.ones(len(values), dtype=torch.bool)
    for mode in ("group", "running", "rank"):
        composed = Composition([Component("x", lengths, normalize=mode)]).compose({"x": v}, groups, judged)
        assert composed.total.isfinite().all() and math.isfinite(attribution(composed)["x"])
    names = ["ab"[i % 2] for i in range(len(values))]
    report = domination(v, names)
    assert "nan" not in str(report) and sum(d.energy for d in report.domains) == pytest.approx(float(v.any()), abs=1e-6)


def test_domination_prints_no_nan():
    for advantages in ([1e200, -1e200, 1.0], [math.nan, 1.0, -1.0], [math.nan] * 3, [5e-324, 0.0, 0.0], [0.0] * 3):
        text = str(domination(torch.tensor(advantages, dtype=torch.float64), list("aab")))
        assert "nan" not in text and "inf" not in text


@pytest.mark.parametrize(
    "value", [10**400, -(1 << 20_000), math.inf, "x", [1]], ids=["large", "larger", "inf", "text", "list"]
)
def test_a_reward_that_no_float_holds_is_named(value):
    with pytest.raises(RewardError, match="expected a finite number") as error:
        Domain("d", lambda rng, n: [], lambda e, t: value).score(Example("p"), "t" * 5000)
    assert len(str(error.value)) < 700
