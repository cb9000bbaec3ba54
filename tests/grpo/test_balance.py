"""Balance of mixed batches: equal effective groups, equal norms, a controller that does not swing; exact resume; the warning."""

from __future__ import annotations

import itertools
import logging
import math
import random

import numpy as np
import pytest
import torch
from carerl_kernels.grpo.balance import EqualNorms, domination_of, step_shares, weighted
from carerl_kernels.monitor import Controller, DriftMonitor
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")
from carerl_kernels.grpo import GRPOConfig, GRPOTrainer, Stage
from carerl_kernels.grpo.rollout import agree
from carerl_kernels.grpo.sampling import joined
from carerl_kernels.guard.editors import PCGrad
from carerl_kernels.tasks.characters import character_tokenizer, warm_up
from trainer_helpers import BASE, Killed, kill_at, left_at, metrics, small_domains, small_model

NAMES = ("code", "chat", "math")


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR, "carerl_kernels.monitor")
    torch.set_num_threads(1)


# ---------------------------------------------------------------------------------------------------------------- shares


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.floats(-1e3, 1e3)), min_size=1), st.floats(0.1, 10))
def test_shares_of_the_step_add_up_and_know_no_scale(rows, scale):
    names, advantages = [n for n, _ in rows], torch.tensor([a for _, a in rows], dtype=torch.float64)
    shares = step_shares(names, advantages)
    assert sum(shares.values()) == pytest.approx(1 if advantages.square().sum() > 0 else 0)
    assert step_shares(names, scale * advantages) == pytest.approx(shares)
    assert set(shares) == set(names)
    assert 0 <= domination_of(shares) <= len(shares) + 1e-9


def test_domination_is_one_where_all_have_the_same_and_their_number_where_one_has_all():
    assert domination_of({"a": 0.5, "b": 0.5}) == 1
    assert domination_of({"a": 1.0, "b": 0.0, "c": 0.0}) == 3
    assert domination_of(step_shares(["a", "b"], torch.tensor([math.nan, 2.0]))) == 2


# ----------------------------------------------------------------------------------------------------------- equal norms


@given(st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=5))
def test_equal_norms_are_equal_within_limits_and_keep_the_sum(squares):
    norms, names = EqualNorms(limit=1e6), [str(i) for i in range(len(squares))]
    assert norms.weights(names) == dict.fromkeys(names, 1.0)  # nothing known yet
    for _ in range(3):
        norms.see(dict(zip(names, squares, strict=True)))
    after = [w * w * s for w, s in zip(norms.weights(names).values(), squares, strict=True)]
    assert after == pytest.approx([sum(squares) / len(squares)] * len(squares))
    norms.limit = 2.0
    assert all(0.5 <= w <= 2.0 for w in norms.weights(names).values())


def test_equal_norms_of_what_is_nothing_or_not_finite():
    norms = EqualNorms(limit=4.0)
    norms.see({"a": 0.0, "b": 0.0})
    assert norms.weights(["a", "b"]) == {"a": 1.0, "b": 1.0}
    norms.see({"a": 1.0, "b": math.nan})
    assert norms.weights(["a", "b"])["b"] == 4.0
    other = EqualNorms(limit=4.0)
    other.load_state_dict(norms.state_dict())
    assert other.weights(["a", "b"]) == norms.weights(["a", "b"])


def test_weights_are_those_of_the_domain():
    found = weighted(torch.tensor([1.0, -2.0, 3.0]), ["a", "b", "c"], {"a": 2.0, "b": 0.5})
    assert found.tolist() == [2.0, -1.0, 3.0]


# ------------------------------------------------------------------------------------------------------------ controller


def simulated(controller, *, looks=60, n=512, samples=4, harm=0.03, seed=0, half_life=6.0):
    """A mixed run in which one domain erodes by what the others have of the batch, and learns by what it has itself.

    From the tenth evaluation on "code" loses `harm` per evaluation times the others' share of the batch over two thirds, and
    regains a share of its distance to its ceiling, times its own share. The monitor sees sampled scores of held-out examples.
    """
    rng = np.random.default_rng(seed)
    monitor = DriftMonitor(NAMES, baseline="best", planned=looks, controller=controller)
    skill = {name: rng.beta(0.75, 0.5, n) for name in NAMES}
    ceiling = {name: float(s.mean()) for name, s in skill.items()}
    level, factors, levels = dict(ceiling), [], []
    for look in range(looks):
        total = sum(controller.factors.values())
        share = {name: controller.factors[name] / total for name in NAMES}
        if look >= 10:
            level["code"] -= harm * (1 - share["code"]) * 1.5
        for name in NAMES:
            level[name] += (ceiling[name] - level[name]) * (1 - 0.5 ** (3 * share[name] / half_life))
        scores = {n: rng.binomial(samples, (s * level[n] / ceiling[n]).clip(0, 1)) / samples for n, s in skill.items()}
        monitor.step(look, scores=scores)
        factors.append(dict(controller.factors))
        levels.append(level["code"])
    return factors, levels, ceiling["code"]


def turns(values):
    """How often a curve changes its direction."""
    steps = [b - a for a, b in itertools.pairwise(values) if abs(b - a) > 1e-9]
    return sum(a * b < 0 for a, b in itertools.pairwise(steps))


@pytest.mark.parametrize("seed", range(4))
def test_a_domain_that_erodes_is_helped_and_nothing_swings(seed):
    controller = Controller(NAMES)
    factors, levels, ceiling = simulated(controller, seed=seed)
    alone, without, _ = simulated(Controller(NAMES, raise_at=0.999), seed=seed)
    assert all(f == dict.fromkeys(NAMES, 1.0) for f in alone)
    assert ceiling - min(levels) < 0.8 * (ceiling - min(without))  # the dip is smaller
    assert levels[-1] > without[-1] + 0.02
    code = [f["code"] for f in factors]
    assert max(code) > 1.5
    for before, after in itertools.pairwise(factors):
        for name in NAMES:
            assert 1.0 <= after[name] <= controller.limit
            assert after[name] / before[name] <= controller.rise + 1e-9
            assert before[name] / after[name] <= controller.fall + 1e-9
    late = code[30:]
    assert max(late) / min(late) < 1.8  # settled, not swinging between its bounds
    assert max(levels[30:]) - min(levels[30:]) < 0.05
    for name in ("chat", "math"):
        assert max(f[name] for f in factors) <= 1.5  # noise moves nobody far


@pytest.mark.parametrize("gain", [5.0, 20.0, 1000.0])
def test_bounds_are_kept_whatever_the_gain(gain):
    factors, _, _ = simulated(Controller(NAMES, gain=gain, limit=3.0, rise=10.0, fall=10.0), harm=0.2)
    assert all(1.0 <= f[name] <= 3.0 for f in factors for name in NAMES)
    assert max(f["code"] for f in factors) > 2


def test_without_drift_nothing_moves():
    controller = Controller(NAMES)
    factors, _, _ = simulated(controller, harm=0.0, n=2048)
    assert max(max(f.values()) for f in factors) < 1.2


def test_hysteresis_one_way_up_one_way_down():
    """A drop that comes and goes once: the factor rises, stays while in between, and falls slowly; it turns once."""
    controller = Controller(NAMES, errors=0.0, raise_at=0.02, release_at=0.005)
    drops = [0.0, 0.01, 0.015, 0.03, 0.06, 0.06, 0.03, 0.019, 0.01, 0.006, 0.004, 0.0, 0.01, 0.019, 0.0, 0.0]
    found = []
    for step, drop in enumerate(drops):
        controller.update(step, {"code": {"drop": drop, "error": 0.0}})
        found.append(controller.factors["code"])
    assert found[:3] == [1.0, 1.0, 1.0]  # below raise_at nothing happens
    assert found[4] > found[3] > 1 and turns(found) == 1
    assert found[13] < found[9]  # let go: a drop below raise_at does not bring it back
    assert controller.factors["chat"] == 1.0


def test_decisions_say_what_they_rest_on(caplog):
    caplog.set_level(logging.INFO, "carerl_kernels.monitor")
    controller = Controller(NAMES, by="weight")
    (decision,) = controller.update(7, {"code": {"drop": 0.5, "error": 0.1}, "chat": {"score": 1.0}}, span=10.0)
    assert (decision.domain, decision.step, decision.drop, decision.error) == ("code", 7, 0.05, 0.01)
    assert "weight of code, 5.0 ± 1.0 points below its baseline at step 7: factor 1.00 -> 1.50" in caplog.text
    assert controller.record([decision])["factor"]["code"] == pytest.approx(1.5)
    weights = controller.weights(NAMES)
    assert sum(weights.values()) == pytest.approx(3) and weights["code"] == pytest.approx(1.5 * weights["chat"])


def test_a_controller_goes_on_exactly_and_not_under_other_settings():
    whole = Controller(NAMES)
    rng = random.Random(0)
    found = [{n: {"drop": rng.uniform(-0.05, 0.1), "error": 0.01} for n in NAMES} for _ in range(20)]
    for i, f in enumerate(found):
        if i == 11:
            other = Controller(NAMES)
            other.load_state_dict(whole.state_dict())
        whole.update(i, f)
        if i >= 11:
            other.update(i, f)
    assert other.factors == whole.factors and max(whole.factors.values()) > 1
    with pytest.raises(ValueError, match="expected the settings as saved"):
        Controller(NAMES, gain=3.0).load_state_dict(whole.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 1.0}, "limit"),
        ({"raise_at": 0.01, "release_at": 0.02}, "raise_at"),
        ({"by": "prompts"}, "by"),
        ({"rise": 1.0}, "rise"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Controller(NAMES, **options)
    with pytest.raises(ValueError, match="controller: expected domains out of a"):
        DriftMonitor(["a"], controller=Controller(["a", "b"]))


# ------------------------------------------------------------------------------------------------------------ the trainer

MIXED = [Stage(NAMES, 6)]


def trainer(path, *, monitor=None, editor=None, on_step=None, rewards=None, **changes):
    random.seed(0)
    tokenizer = character_tokenizer()
    model, domains = small_model(tokenizer, 0), small_domains()
    for domain in domains:
        if rewards and domain.name in rewards:
            domain.reward = rewards[domain.name]
    watch = None if monitor is None else monitor(model)
    config = GRPOConfig(**(BASE | {"prompts_per_step": 6, "eval_every": 1} | changes))
    options = {"monitor": watch, "editor": editor, "run_dir": path, "on_step": on_step}
    return GRPOTrainer(model, tokenizer, domains, config, **options)


def controlled(by):
    """A controller that acts on everything it sees, so that a short run shows it: code is far below its baseline."""
    baseline = {"code": 1.0, "chat": 0.1, "math": 0.0}
    return lambda model: DriftMonitor(
        NAMES, baseline=baseline, controller=Controller(NAMES, by=by, errors=0.0), score_range=(0.0, 1.1)
    )


def test_groups_that_agree_are_drawn_anew_and_shares_hold(tmp_path):
    """A reward that half of the prompts give to every completion: after redraws, whatever can be learned from is there."""
    half = lambda example, text: random.random() if ord(example.prompt[2]) % 2 else 1.0  # noqa: E731
    seen = []
    for balance in (None, "shares"):
        run = trainer(None, balance=balance, balance_redraws=4, rewards={"code": half}, prompts_per_step=12)
        run.run([Stage(("code", "math"), 4)])
        lines = [line for line in run.history if line["step"]]
        seen.append(lines)
        informative = [line["informative"] for line in lines]
        assert (min(informative) > 0.95) if balance else (max(informative) < 0.95)
        assert all("redrawn" in line for line in lines) == (balance is not None)
    plain, balanced = seen
    assert plain[0]["rewards"] == balanced[0]["rewards"]  # of the first draw
    assert plain[0]["agreed"] == balanced[0]["agreed"] and plain[0]["agreed"]["code"] > 0
    assert balanced[0]["redrawn"]["code"] >= 6 * plain[0]["agreed"]["code"] > 0 == balanced[0]["redrawn"]["math"]
    assert all(line["batch_share"]["code"] == 0.5 for line in balanced)


def test_redraws_are_bounded_and_groups_that_never_differ_stay():
    asked = []
    never = lambda example, text: asked.append(text) or 0.0  # noqa: E731
    run = trainer(None, balance="shares", balance_redraws=3, rewards={"code": never})
    run.run([Stage(("code", "math"), 1)])
    line = run.history[-1]
    assert line["redrawn"]["code"] == 3 * 3 and len(asked) == 4 * 3 * BASE["group_size"]
    assert line["agreed"]["code"] == 1.0 and line["step_share"]["code"] == 0.0 and line["domination"] == 2.0


def test_without_redraws_the_batch_is_that_of_no_balance():
    """Nothing agrees with the noisy rewards: bitwise the same run."""
    runs = []
    for balance in (None, "shares"):
        runs.append(trainer(None, balance=balance))
        runs[-1].run(MIXED)
    one, other = runs
    for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_rollouts_of_several_rounds_are_padded_alike():
    from carerl_kernels.grpo import Rollout

    def part(width, length, value):
        ids, mask = torch.full((2, width), value), torch.ones(2, width, dtype=torch.long)
        tail = torch.full((2, length), value)
        return Rollout(ids, mask, tail, torch.ones_like(tail), torch.rand(2, length), torch.rand(2, length))

    both = joined([part(3, 2, 5), part(1, 4, 7)], pad=0)
    assert both.prompt_ids.tolist() == [[5, 5, 5]] * 2 + [[0, 0, 7]] * 2
    assert both.completion_ids.tolist() == [[5, 5, 0, 0]] * 2 + [[7, 7, 7, 7]] * 2
    assert both.prompt_mask.sum().item() == 8 and both.completion_mask.sum().item() == 12
    assert agree([1.0, None, 1.0]) and agree([None, None]) and not agree([1.0, 0.0])


@pytest.mark.parametrize("editor", [None, PCGrad])
def test_loud_rewards_get_the_same_share_as_others(editor):
    """Rewards ten times as large, undivided: without balance one domain has the step, with it all have about a third."""
    loud = lambda example, text: 10 * random.random()  # noqa: E731
    soft = lambda example, text: random.random()  # noqa: E731
    rewards = {"code": soft, "chat": loud, "math": soft}
    for balance in (None, "gradient"):
        run = trainer(
            None, balance=balance, advantages="none", rewards=rewards, editor=editor and editor(), prompts_per_step=12
        )
        run.run([Stage(NAMES, 8)])
        late = [line["step_share"]["chat"] for line in run.history[-4:]]
        mean = sum(late) / len(late)
        assert mean < 0.75 if balance else mean > 0.9
        if balance:
            weight = run.history[-1]["weight"]
            assert weight["chat"] < 1 < min(weight["code"], weight["math"])


def test_the_loud_one_is_named_once_a_stage(caplog):
    caplog.set_level(logging.WARNING, "carerl_kernels.grpo")
    loud = lambda example, text: 10 * random.random()  # noqa: E731
    run = trainer(None, advantages="none", rewards={"chat": loud}, eval_every=0)
    run.run([Stage(NAMES, 25), Stage(("code", "chat"), 12), Stage("math", 2)])
    told = [r.getMessage() for r in caplog.records if "step budget" in r.getMessage()]
    assert [t.split(":")[0] for t in told] == ["stage code+chat+math", "stage code+chat"]
    assert "chat has" in told[0] and "balance='gradient'" in told[0]
    caplog.clear()
    same = lambda example, text: random.random()  # noqa: E731
    trainer(None, rewards=dict.fromkeys(NAMES, same), prompts_per_step=12, eval_every=0).run([Stage(NAMES, 15)])
    assert not [r for r in caplog.records if "step budget" in r.getMessage()]


def test_a_controller_moves_prompts_towards_whoever_is_below(tmp_path):
    run = trainer(tmp_path / "run", monitor=controlled("share"), balance="controller", prompts_per_step=12)
    run.run([Stage(NAMES, 8)])
    lines = metrics(tmp_path / "run")
    factors = [line["monitor"]["balance"]["factor"] for line in lines]
    assert factors[-1]["code"] > 3 and factors[-1]["math"] == 1
    assert lines[0]["monitor"]["balance"]["decisions"][0]["domain"] == "code"
    share = {n: sum(line["batch_share"].get(n, 0.0) for line in lines[-4:]) / 4 for n in NAMES}
    assert (
        share["code"] == pytest.approx(factors[-1]["code"] / sum(factors[-1].values()), abs=0.1) and share["math"] > 0
    )


def test_a_controller_weighs_where_it_may_not_choose(tmp_path):
    run = trainer(tmp_path / "run", monitor=controlled("weight"), balance="controller")
    run.run(MIXED)
    lines = metrics(tmp_path / "run")[1:]
    for before, line in itertools.pairwise(lines):
        factors = before["monitor"]["balance"]["factor"]
        mean = sum(factors.values()) / 3
        assert line["weight"] == pytest.approx({n: f / mean for n, f in factors.items()})
        assert all(share == pytest.approx(1 / 3) for share in line["batch_share"].values())
    assert lines[-1]["weight"]["code"] > 1.5 * lines[-1]["weight"]["math"]


BALANCES = {
    "shares": {"balance": "shares"},
    "gradient": {"balance": "gradient", "loss": "dr_grpo"},
    "gradient, edited": {"balance": "gradient", "editor": PCGrad},
    "share": {"balance": "controller", "monitor": controlled("share")},
    "weight": {"balance": "controller", "monitor": controlled("weight")},
}


@pytest.mark.parametrize("name", BALANCES)
def test_a_balanced_run_resumes_exactly(tmp_path, name):
    options = dict(BALANCES[name])
    editor = options.pop("editor", None)
    make = lambda path, on_step=None: trainer(path, on_step=on_step, editor=editor and editor(), **options)  # noqa: E731
    make(tmp_path / "run", left_at(tmp_path / "run", 3, 4)).run(MIXED)
    for step in (3, 4):
        path = tmp_path / f"run-{step}"
        make(path).run(MIXED, resume=True)
        assert metrics(path) == metrics(tmp_path / "run")


def test_other_settings_of_the_controller_are_no_resume(tmp_path):
    from carerl_kernels.grpo import CheckpointError

    path = tmp_path / "run"
    with pytest.raises(Killed):
        trainer(path, monitor=controlled("share"), balance="controller", on_step=kill_at(4)).run(MIXED)
    with pytest.raises(CheckpointError, match=r"controller\.by: expected 'share', found 'weight'"):
        trainer(path, monitor=controlled("weight"), balance="controller").run(MIXED, resume=True)


def test_a_controller_needs_a_monitor_that_has_one():
    with pytest.raises(ValueError, match="found no monitor with a controller"):
        trainer(None, balance="controller", monitor=lambda model: DriftMonitor(NAMES))


def test_warm_models_have_groups_that_agree():
    """The metric counts them per domain."""
    tokenizer = character_tokenizer()
    model, domains = small_model(tokenizer, 0), small_domains()
    from carerl_kernels.rewards import exact_match

    for domain in domains:
        domain.reward = exact_match
    warm_up(model, tokenizer, domains, seed=0, steps=3)
    run = GRPOTrainer(model, tokenizer, domains, GRPOConfig(**BASE))
    run.run([Stage(("code", "chat"), 2)])
    assert run.history[-1]["agreed"] == {"code": 1.0, "chat": 1.0} and run.history[-1]["domination"] == 0
