"""Group advantages: laws that hold for any rewards, and an independent oracle."""

import statistics

import pytest
import torch
from carerl_kernels.grpo import group_advantages, informative_fraction
from hypothesis import given, settings
from hypothesis import strategies as st

groups_of_rewards = st.lists(
    st.lists(st.integers(-8, 8).map(lambda i: i / 4), min_size=1, max_size=6), min_size=1, max_size=5
)


def flat(groups):
    rewards = torch.tensor([r for g in groups for r in g], dtype=torch.float64)
    return rewards, torch.tensor([7 * i for i, g in enumerate(groups) for _ in g])


@settings(max_examples=60, deadline=None)
@given(groups_of_rewards, st.booleans())
def test_matches_the_definition(groups, std):
    expected = []
    for g in groups:
        scale = statistics.stdev(g) + 1e-6 if std and len(g) > 1 else 1.0
        expected += [0.0 if len(set(g)) == 1 else (r - statistics.mean(g)) / scale for r in g]
    got = group_advantages(*flat(groups), normalize_std=std)
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(groups_of_rewards, st.booleans(), st.randoms(use_true_random=False))
def test_shift_permutation_and_scale(groups, std, rng):
    rewards, ids = flat(groups)
    base = group_advantages(rewards, ids, normalize_std=std)
    torch.testing.assert_close(group_advantages(rewards + 3 * ids, ids, normalize_std=std), base)
    order = torch.tensor(rng.sample(range(len(rewards)), len(rewards)))
    torch.testing.assert_close(group_advantages(rewards[order], ids[order], normalize_std=std), base[order])
    scaled = group_advantages(5 * rewards, ids, normalize_std=std)
    torch.testing.assert_close(scaled, base if std else 5 * base, rtol=1e-4, atol=1e-5)
    for i in range(len(groups)):
        assert abs(base[ids == 7 * i].sum()) < 1e-4


@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e9 + 0.7, -2.0])
def test_unanimous_groups_get_exact_zeros(std, value):
    rewards = torch.full((7,), value, dtype=torch.float64)  # the rounded mean of 7 x 0.1 is not 0.1
    assert (group_advantages(rewards, torch.zeros(7, dtype=torch.long), normalize_std=std) == 0).all()


def test_rounding_noise_is_not_inflated():
    rewards = torch.tensor([0.3, 0.1 + 0.2], dtype=torch.float64)
    assert group_advantages(rewards, torch.tensor([0, 0])).abs().max() < 1e-9


def test_groups_do_not_see_each_other():
    rewards = torch.tensor([0.0, 1.0, 5.0, 5.0], dtype=torch.float64)
    ids = torch.tensor([3, 3, 1, 1])
    alone = group_advantages(rewards[:2], ids[:2])
    assert torch.equal(group_advantages(rewards, ids)[:2], alone)
    assert informative_fraction(rewards, ids) == 0.5


@pytest.mark.parametrize(
    ("rewards", "ids", "message"),
    [
        (torch.zeros(3), torch.zeros(2, dtype=torch.long), "found \\(3,\\) and \\(2,\\)"),
        (torch.zeros(2), torch.zeros(2), "expected integer group_ids"),
        (torch.tensor([0.0, float("nan")]), torch.zeros(2, dtype=torch.long), "expected finite rewards"),
    ],
)
def test_errors(rewards, ids, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, ids)


def test_empty_batch():
    assert group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)
