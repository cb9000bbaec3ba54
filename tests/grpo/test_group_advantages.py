"""Group advantages: laws that hold for any rewards, and an independent oracle."""

import math
import statistics

import pytest
import torch
from carerl_kernels.grpo import informative_fraction
from hypothesis import given, settings
from hypothesis import strategies as st

groups_of_rewards = st.lists(
    st.lists(st.integers(-8, 8).map(lambda i: i / 4) | st.just(math.nan), min_size=1, max_size=6),
    min_size=1,
    max_size=5,
)
MODES = ("group", "domain", "none")
modes = st.sampled_from(MODES)
group_advantages = torch.ops.carerl.group_advantages


def flat(groups):
    """Rewards, groups numbered with gaps, and two domains in turn."""
    rewards = torch.tensor([r for g in groups for r in g], dtype=torch.float64)
    ids = torch.tensor([7 * i for i, g in enumerate(groups) for _ in g])
    return rewards, ids, ids // 7 % 2 + 40


def oracle(groups, mode):
    judged = [[r for r in g if not math.isnan(r)] for g in groups]
    differing = [len(set(g)) > 1 for g in judged]
    spread = []
    for i, g in enumerate(judged):
        own = [g] if mode == "group" else [x for j, x in enumerate(judged) if j % 2 == i % 2]
        own = [x for x in own if len(set(x)) > 1]
        freedom = sum(len(x) - 1 for x in own)
        squares = sum(statistics.variance(x) * (len(x) - 1) for x in own)
        spread.append(1.0 if mode == "none" else math.sqrt(squares / freedom) + 1e-6 if own else 1e-6)
    return [
        (r - statistics.mean(judged[i])) / spread[i] if differing[i] and not math.isnan(r) else 0.0
        for i, g in enumerate(groups)
        for r in g
    ]


@settings(max_examples=100, deadline=None)
@given(groups_of_rewards, modes)
def test_matches_the_definition(groups, mode):
    got = group_advantages(*flat(groups), mode)
    torch.testing.assert_close(got, torch.tensor(oracle(groups, mode)), rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(groups_of_rewards, modes, st.randoms(use_true_random=False))
def test_shift_permutation_and_scale(groups, mode, rng):
    rewards, ids, domains = flat(groups)
    base = group_advantages(rewards, ids, domains, mode)
    torch.testing.assert_close(group_advantages(rewards + 3 * ids, ids, domains, mode), base)
    order = torch.tensor(rng.sample(range(len(rewards)), len(rewards)))
    torch.testing.assert_close(group_advantages(rewards[order], ids[order], domains[order], mode), base[order])
    scaled = group_advantages(5 * rewards, ids, domains, mode)
    torch.testing.assert_close(scaled, 5 * base if mode == "none" else base, rtol=1e-4, atol=1e-5)
    for i in range(len(groups)):
        assert abs(base[ids == 7 * i].sum()) < 1e-4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e9 + 0.7, -2.0])
def test_unanimous_groups_get_exact_zeros(mode, value):
    rewards = torch.full((7,), value, dtype=torch.float64)  # the rounded mean of 7 x 0.1 is not 0.1
    assert (group_advantages(rewards, torch.zeros(7, dtype=torch.long), mode=mode) == 0).all()


def test_rounding_noise_is_not_inflated():
    rewards = torch.tensor([0.3, 0.1 + 0.2], dtype=torch.float64)
    assert group_advantages(rewards, torch.tensor([0, 0])).abs().max() < 1e-9


def test_groups_do_not_see_each_other():
    rewards = torch.tensor([0.0, 1.0, 5.0, 5.0], dtype=torch.float64)
    ids = torch.tensor([3, 3, 1, 1])
    alone = group_advantages(rewards[:2], ids[:2])
    assert torch.equal(group_advantages(rewards, ids)[:2], alone)
    assert informative_fraction(rewards, ids) == 0.5


def test_domains_get_equal_say_whatever_the_spread_of_their_rewards():
    draw = torch.Generator().manual_seed(0)
    rewards = torch.randn(64, dtype=torch.float64, generator=draw)
    ids, domains = torch.arange(64) // 8, torch.arange(64) // 32
    rewards[32:] *= 100
    a = group_advantages(rewards, ids, domains, "domain")
    assert abs(float(a[:32].square().mean() / a[32:].square().mean()) - 1) < 1e-4
    # Within a domain, differences between completions keep their proportions across prompts; "group" loses them.
    ratio = (a[0] - a[1]) / (a[8] - a[9])
    torch.testing.assert_close(ratio.double(), (rewards[0] - rewards[1]) / (rewards[8] - rewards[9]), rtol=1e-4, atol=0)
    one = group_advantages(rewards, ids, mode="domain")
    assert float(one[32:].square().mean() / one[:32].square().mean()) > 1000


@pytest.mark.parametrize(
    ("rewards", "ids", "more", "message"),
    [
        (torch.zeros(3), torch.zeros(2, dtype=torch.long), {}, r"group_ids \[3\].*found int64 \[2\]"),
        (torch.zeros(2), torch.zeros(2), {}, "group_ids .2. of dtype int64 or int32, found float32"),
        (torch.zeros(2).int(), torch.zeros(2).int(), {}, "floating-point rewards"),
        (torch.tensor([0.0, math.inf]), torch.zeros(2).int(), {}, "finite rewards, or NaN.*found inf at 1"),
        (torch.zeros(2), torch.zeros(2).int(), {"mode": "batch"}, "mode group, domain, none, found batch"),
        (torch.zeros(2), torch.zeros(2).int(), {"eps": -1.0}, "eps of at least 0, found -1.0"),
        (torch.zeros(2), torch.zeros(2).int(), {"domain_ids": torch.zeros(3).int()}, r"domain_ids \[2\].*\[3\]"),
    ],
)
def test_errors(rewards, ids, more, message):
    with pytest.raises(RuntimeError, match=message):
        group_advantages(rewards, ids, **more)


@pytest.mark.parametrize("mode", MODES)
def test_empty_batch_and_nothing_judged(mode):
    assert group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.long), mode=mode).shape == (0,)
    nothing = group_advantages(torch.full((3,), math.nan), torch.tensor([1, 1, 2]), mode=mode)
    assert torch.equal(nothing, torch.zeros(3))


def test_opcheck():
    rewards, ids, domains = flat([[0.0, 1.0, math.nan], [1.0, 1.0], [2.0, 0.5]])
    torch.library.opcheck(group_advantages.default, (rewards, ids, domains, "domain", 1e-6))
