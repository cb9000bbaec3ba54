"""The drift monitor: a test that keeps its word however often one looks, gradients against dense oracles, sinks, the trainer."""

import contextlib
import copy
import importlib.util
import itertools
import json
import logging
import math
import os
import re
import sqlite3
import subprocess
import sys
import time
import types
from pathlib import Path

import carerl_kernels
import numpy as np
import pytest
import torch
from carerl_kernels.grpo import reward_statistics
from carerl_kernels.monitor import (
    Controller,
    DriftMonitor,
    DropTest,
    JsonLines,
    TensorBoard,
    Trackio,
    WandB,
    sinks,
    smallest_drop,
)
from carerl_kernels.monitor.gradients import gradient_gram
from carerl_kernels.monitor.sequential import log_capital, look_weight
from guard_helpers import make_model
from helpers import CLEAR, resident
from hypothesis import given
from hypothesis import strategies as st
from places import DOCS

SCRIPT = Path(carerl_kernels.__file__).parents[2] / "bench" / "monitor_alerts.py"
spec = importlib.util.spec_from_file_location("monitor_alerts", SCRIPT)
simulation = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = simulation
spec.loader.exec_module(simulation)
Case, main, simulate = simulation.Case, simulation.main, simulation.simulate


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR, "carerl_kernels.monitor")


# --------------------------------------------------------------------------------------------------- the sequential test


@given(
    st.lists(st.floats(0.01, 1), min_size=3, max_size=3),
    st.floats(0, 0.3),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.1]),
)
def test_expected_capital_is_at_most_one_whatever_the_scores(weights, share, n, tolerance):
    """Exactly, by enumeration: differences on {-1, x, 1} with mean at the tolerance, the worst case of the claim."""
    inner = -0.5 + share
    values, p = np.array([-1.0, inner, 1.0]), np.array(weights) / sum(weights)
    mean = float(values @ p)
    if mean > tolerance:  # move mass to -1 until the mean is the tolerance
        keep = (tolerance + 1) / (mean + 1)
        p = p * keep + np.array([1 - keep, 0, 0])
    expected = sum(
        math.prod(p[i] for i in outcome) * float(np.exp(log_capital(values[list(outcome)], tolerance)).mean())
        for outcome in itertools.product(range(3), repeat=n)
    )
    assert expected <= 1 + 1e-9


@pytest.mark.parametrize("planned", [1, 7, 100])
def test_weights_of_all_looks_sum_to_one(planned):
    total = sum(look_weight(look, planned) for look in range(1, 200_000))
    assert 1 - 1e-3 < total <= 1 + 1e-12


@pytest.mark.parametrize("examples", ["fixed", "fresh"])
def test_evidence_and_unspent_weight_are_a_supermartingale(examples):
    """One more evaluation cannot raise their expectation while nothing drops: exact, for +-1 differences of mean zero."""
    test = DropTest(examples, planned=5)
    for seen in ([1.0, 1.0], [-1.0, 1.0], [0.0, 1.0]):
        test.update(np.array(seen))
    spent = sum(look_weight(look, 5) for look in range(1, test.looks + 1))
    before = math.exp(test.log_evidence) + 1 - spent
    after = 0.0
    for outcome in itertools.product((-1.0, 1.0), repeat=3):
        branch = copy.deepcopy(test)
        after += math.exp(branch.update(np.array(outcome))) / 8
    after += 1 - spent - look_weight(test.looks, 5)
    assert after <= before + 1e-9


def test_fixed_evidence_never_falls_and_fresh_evidence_adds_up():
    fixed, fresh = DropTest("fixed", 20), DropTest("fresh", 20)
    drop, none = np.r_[np.ones(20), np.zeros(80), -np.ones(5)], np.r_[np.ones(5), np.zeros(90), -np.ones(5)]
    for _ in range(4):
        last = fixed.log_evidence, fresh.log_evidence
        assert fixed.update(drop) > last[0]
        assert fresh.update(drop) > last[1] + 2
    assert fresh.log_evidence > fixed.log_evidence + 5
    last = fixed.log_evidence
    assert fixed.update(none) >= last


def test_order_of_examples_and_scale_of_scores_do_not_matter():
    rng = np.random.default_rng(0)
    a, b, order = rng.random(50), rng.random(50), rng.permutation(50)
    found = []
    for scores, base, options in (
        (a, b, {}),
        (a[order], b[order], {}),
        (10 * a - 5, 10 * b - 5, {"score_range": (-5.0, 5.0), "drop": 0.3}),
    ):
        monitor = DriftMonitor(["x"], baseline={"x": base}, **options)
        found.append(monitor.step(0, scores={"x": scores})["domains"]["x"]["p"])
        assert monitor._watched["x"].test.log_evidence == pytest.approx(DropTest().update(b - a), abs=1e-9)
    assert found[0] == pytest.approx(found[1])
    assert found[0] == pytest.approx(found[2])


def naive_alarms(case: Case, runs: int) -> int:
    """What a z-test of the difference at every evaluation would say of the same simulated runs."""

    class Naive(DriftMonitor):
        def step(self, step, metrics=None, *, scores=None):
            record = super().step(step, metrics, scores=scores)
            wrong = [f for f in record["domains"].values() if "drop" in f and f["drop"] > max(0.02, 1.645 * f["error"])]
            return {"alerts": [{"domain": "any"}]} if wrong else {}

    module = simulation
    original, module.DriftMonitor = module.DriftMonitor, Naive
    try:
        return simulate(case, 0.0, runs).false
    finally:
        module.DriftMonitor = original


# With 40 runs and a false-alarm rate of 5 %, more than 8 have a probability below 5e-4.
@pytest.mark.parametrize(
    "case",
    [
        Case("fixed", "start", "1 sample", 96),
        Case("fixed", "best", "1 sample", 48),
        Case("fresh", "start", "1 sample", 96),
    ],
    ids=str,
)
def test_false_alarms_are_rare_and_a_naive_test_would_not_be(case):
    assert simulate(case, 0.0, 40).false <= 8
    if case.baseline == "start":
        assert naive_alarms(case, 20) > 10  # the simulated runs do tempt


def test_drops_are_found():
    exact = simulate(Case("fixed", "start", "exact", 512), 0.1, 12, seed=1)
    assert len(exact.delays) == 12 and exact.false == 0
    assert sorted(exact.delays)[6] <= 2
    fresh = simulate(Case("fresh", "start", "1 sample", 512), 0.05, 8, seed=1)
    assert len(fresh.delays) == 8
    assert simulate(Case("fresh", "start", "1 sample", 128), 0.1, 8, seed=1).delays >= [1]


def test_smallest_drop_is_about_right():
    """At twice the drop that one evaluation is said to establish it is found at once, at half of it it is not."""
    n, deviation = 400, 0.5
    for factor, found in ((1.5, True), (0.5, False)):
        d = smallest_drop(n, deviation, domains=1) * factor
        ups = round(n * (deviation**2 + d) / 2)
        differences = np.r_[np.ones(ups), -np.ones(round(n * deviation**2) - ups)]
        differences = np.r_[differences, np.zeros(n - len(differences))]
        assert (DropTest().update(differences) >= math.log(1 / 0.05)) == found


def test_command_prints_the_table(capsys, monkeypatch):
    monkeypatch.setattr(simulation, "LOOKS", 11)
    main(runs=1, power_runs=1, n=[16])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| examples | baseline | scores | n | false alarms in 1 |")
    assert len([line for line in lines if line.startswith("| f")]) == 7


# ------------------------------------------------------------------------------------------------------------- the monitor


def scores_of(p: float, n: int = 200) -> list[float]:
    return [1.0] * round(p * n) + [0.0] * (n - round(p * n))


def test_alert_once_per_baseline_and_what_it_says(tmp_path):
    heard = []
    monitor = DriftMonitor(["math", "chat"], on_alert=heard.append, sinks=[JsonLines(tmp_path / "metrics.jsonl")])
    for step, p in enumerate((0.8, 0.8, 0.5, 0.4, 0.4)):
        record = monitor.step(step, {"loss": 1.0}, scores={"math": scores_of(p), "chat": scores_of(0.6)})
        assert record["domains"]["chat"].get("fallen", False) is False
        assert record["domains"]["math"].get("fallen", False) is (p < 0.6)
    (alert,) = heard
    assert monitor.alerts == heard
    assert (alert.domain, alert.step, alert.n, alert.alpha) == ("math", 2, 200, 0.05)
    assert alert.drop == pytest.approx(0.3) and (alert.baseline, alert.score) == pytest.approx((0.8, 0.5))
    assert alert.error == pytest.approx(np.std([1] * 60 + [0] * 140, ddof=1) / math.sqrt(200))
    assert alert.p <= 0.05
    assert "math fell by 30.0" in str(alert) and "step 2" in str(alert)
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert [len(line["monitor"].get("alerts", ())) for line in lines] == [0, 0, 1, 0, 0]
    assert lines[2]["eval"] == {"math": 0.5, "chat": 0.6} and lines[2]["loss"] == 1.0
    assert set(lines[2]["seconds"]) == {"other", "monitor"}
    monitor.rebase(["math"])
    for step, p in ((5, 0.4), (6, 0.05)):
        monitor.step(step, scores={"math": scores_of(p)})
    assert [a.step for a in monitor.alerts] == [2, 6]
    assert monitor.alerts[1].baseline == pytest.approx(0.4)
    assert monitor._watched["math"].test.looks == 6  # what was spent stays spent


def test_an_alert_speaks_of_points_only_where_the_range_has_size_one():
    monitor = DriftMonitor(["x"], baseline={"x": [8.0] * 400}, score_range=(0.0, 10.0))
    monitor.step(0, scores={"x": [5.0] * 200 + [5.5] * 200})
    (alert,) = monitor.alerts
    assert str(alert).startswith("x fell by 2.75 ± 0.013 (8.000 -> 5.250, 400 examples)") and "points" not in str(alert)


def test_a_significant_drop_smaller_than_asked_for_is_no_alert():
    monitor = DriftMonitor(["x"], drop=0.05, baseline={"x": scores_of(0.80, 4000)})
    record = monitor.step(0, scores={"x": scores_of(0.77, 4000)})["domains"]["x"]
    assert record["p"] < 0.01 and not record["fallen"] and not monitor.alerts


def test_best_finds_what_rose_before_it_fell():
    rise_and_fall = (0.5, 0.7, 0.9, 0.5)
    for baseline, alerts in (("start", 0), ("best", 1)):
        monitor = DriftMonitor(["x"], baseline=baseline, planned=10)
        for step, p in enumerate(rise_and_fall):
            monitor.step(step, scores={"x": scores_of(p)})
        assert len(monitor.alerts) == alerts
    assert monitor.alerts[0].baseline == pytest.approx(0.9)


def test_evaluate_is_called_when_due_and_cost_is_counted():
    called = []
    monitor = DriftMonitor(["x"], lambda: called.append(1) or {"x": scores_of(0.5)}, every=3)
    records = [monitor.step(step) for step in range(1, 8)]
    assert [bool(r) for r in records] == [True, False, True, False, False, True, False]  # the first, 3 and 6
    assert len(called) == 3
    cost = monitor.cost()
    assert set(cost["seconds"]) == {"evaluate", "test", "sinks"} and 0 < cost["share"] <= 1


def test_baselines_from_a_file_and_missing_scores(tmp_path):
    single = DriftMonitor(["math"])
    single.step(0, scores={"math": [1.0, 0.0, None, 1.0]})
    single.save_scores(tmp_path / "math.json")
    mixed = DriftMonitor(["math", "chat"], baseline=tmp_path / "math.json", test_from=2)
    assert "p" not in mixed.step(1, scores={"math": [0.0] * 4, "chat": [1.0]})["domains"]["math"]
    found = mixed.step(2, scores={"math": [0.0, 0.0, 1.0, None], "chat": [1.0]})["domains"]
    assert found["math"] == pytest.approx(
        {"score": 1 / 3, "n": 2, "baseline": 0.5, "drop": 0.5, "error": 0.5, "p": found["math"]["p"], "fallen": False}
    )
    assert found["chat"]["baseline"] == 1.0  # not in the file: its own start
    number = DriftMonitor(["math"], baseline={"math": 0.9})
    assert number.step(0, scores={"math": scores_of(0.5)})["domains"]["math"]["drop"] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"domains": []}, "distinct names"),
        ({"domains": "math"}, "distinct names"),
        ({"domains": ["a", "a"]}, "distinct names"),
        ({"every": 0}, "every: out of range, found 0"),
        ({"alpha": 1.0}, "alpha: out of range"),
        ({"drop": -0.1}, "drop: out of range"),
        ({"score_range": (1.0, 1.0)}, "score_range"),
        ({"examples": "new"}, "expected 'fixed' or 'fresh', found 'new'"),
        ({"examples": "fresh", "baseline": "best"}, "expected examples='fixed'"),
        ({"gradients_every": 5}, "needs model="),
        ({"baseline": {"y": 0.5}}, "expected domains out of x, found y"),
        ({"baseline": {"x": 1.5}}, "baseline of 'x'.*found 1.5"),
        ({"baseline": "nowhere.json"}, "save_scores.*nowhere.json"),
        ({"examples": "fresh", "baseline": {"x": [1.0, 0.0]}}, "fresh examples expected a known score.*'fixed'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_arguments_are_named(options, message):
    options = {"domains": ["x"], **options}
    with pytest.raises(ValueError, match=message):
        DriftMonitor(options.pop("domains"), **options)


def test_bad_scores_are_named_and_nothing_is_counted():
    monitor = DriftMonitor(["x", "y"])
    monitor.step(0, scores={"x": [1.0, 0.0], "y": [1.0]})
    for scores, message in (
        ({"z": [1.0]}, "expected domains out of x, y, found z"),
        ({"x": [1.0, 0.0, 1.0], "y": [1.0]}, "scores of 'x': expected 2, one per example"),
        ({"x": [1.0, 2.0]}, "found 2"),
        ({"x": [None, None]}, "no judged example"),
    ):
        with pytest.raises(ValueError, match=message):
            monitor.step(1, scores=scores)
    assert all(w.test.looks == 0 for w in monitor._watched.values())
    monitor.step(1, scores={"x": [1.0, 1.0]})
    with pytest.raises(ValueError, match="expected a step after 1, found 1"):
        monitor.step(1)
    before = monitor.state_dict()["watched"]
    with pytest.raises(ValueError, match="rebase: expected a domain out of x, y"):
        monitor.rebase(["x", "z"])
    assert monitor.state_dict()["watched"] == before  # none of them, then
    with pytest.raises(ValueError, match="expected a pair"):
        DriftMonitor(["x"], examples="fresh").step(0, scores={"x": [1.0]})
    with pytest.raises(ValueError, match=r"known score 0.9, found a pair"):
        DriftMonitor(["x"], examples="fresh", baseline={"x": 0.9}).step(0, scores={"x": ([1.0], [0.5])})
    with pytest.raises(RuntimeError, match="none yet"):
        DriftMonitor(["x"]).save_scores("never.json")
    with pytest.raises(ValueError, match="built with model="):
        monitor.keep_gradients("x")


@pytest.mark.parametrize("baseline", ["start", "best"])
def test_going_on_from_a_saved_state_is_exact(tmp_path, baseline):
    rng = np.random.default_rng(0)
    looks = [{"x": (rng.random(60) < 0.8 - 0.08 * t).astype(float).tolist(), "y": [0.5] * 5} for t in range(8)]
    looks[2]["x"][3] = None
    whole = DriftMonitor(["x", "y"], baseline=baseline, sinks=[JsonLines(tmp_path / "whole.jsonl")])
    expected = [whole.step(t, scores=scores) for t, scores in enumerate(looks)]
    assert whole.alerts
    for stop in range(1, 8):
        sink = JsonLines(tmp_path / f"{stop}.jsonl")
        first = DriftMonitor(["x", "y"], baseline=baseline, sinks=[sink])
        for t in range(stop):
            first.step(t, scores=looks[t])
        state = json.loads(json.dumps(first.state_dict()))
        first.step(stop, {"void": 1}, scores=looks[stop])
        with open(sink.path, "a") as file:
            file.write('{"step": 9, "cut')
        second = DriftMonitor(["x", "y"], baseline=baseline, sinks=[JsonLines(sink.path)])
        second.load_state_dict(state)
        assert [second.step(t, scores=looks[t]) for t in range(stop, 8)] == expected[stop:]
        assert second.alerts == whole.alerts
        lines = [json.loads(text) for text in sink.path.read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(8)) and not any("void" in line for line in lines)
    with pytest.raises(ValueError, match="expected the domains x, y as saved, found z"):
        DriftMonitor(["z"]).load_state_dict(state)


def test_fresh_examples_refuse_a_file_of_other_examples_and_take_a_number(tmp_path):
    single = DriftMonitor(["x"])
    single.step(0, scores={"x": [1.0, 0.0]})
    single.save_scores(tmp_path / "x.json")
    with pytest.raises(ValueError, match="baseline of 'x': with fresh examples expected a known score"):
        DriftMonitor(["x"], examples="fresh", baseline=tmp_path / "x.json")
    known = DriftMonitor(["x"], examples="fresh", baseline={"x": np.float32(0.5)})
    assert known.step(0, scores={"x": (0.0, 0.5)})["domains"]["x"]["drop"] == pytest.approx(0.25)  # two scores, no pair


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"planned": 20},
            "expected planned 100 as saved, found 20; build the monitor with the planned of the saved run",
        ),
        ({"examples": "fresh"}, "expected examples 'fixed' as saved, found 'fresh'"),
        ({"tolerance": 0.01}, "expected tolerance 0.0 as saved, found 0.01"),
        ({"alpha": 0.1}, "expected alpha 0.05 as saved, found 0.1"),
        ({"score_range": (0.0, 2.0)}, "expected score_range"),
        ({"baseline": "best"}, "expected baseline x: start as saved, found x: best"),
        ({"baseline": {"x": 0.5}}, "found x: the known score 0.5"),
        ({"baseline": {"x": [0.5, 0.5]}}, "found x: given scores"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_state_does_not_go_on_under_other_settings(changed, message):
    first = DriftMonitor(["x"])
    first.step(0, scores={"x": [0.5, 0.5]})
    state = json.loads(json.dumps(first.state_dict()))
    other = DriftMonitor(["x"], **changed)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    assert other.state_dict()["step"] is None  # nothing was taken over
    DriftMonitor(["x"], drop=0.1, every=7).load_state_dict(state)  # may change


def test_seconds_of_the_run_before_are_not_told_again(tmp_path):
    first = DriftMonitor(["x"])
    first.step(0, scores={"x": [0.5]})
    state = first.state_dict()
    state["seconds"]["evaluate"] = 1000.0
    second = DriftMonitor(["x"], sinks=[JsonLines(tmp_path / "metrics.jsonl")])
    second.load_state_dict(state)
    second.step(1, scores={"x": [0.5]})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["seconds"]["monitor"] < 500
    assert second.cost()["seconds"]["evaluate"] == 1000.0


# ------------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("chunk", [1, 7, 100, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("D", [1, 2, 5])
def test_gram_equals_the_dense_one(D, dtype, chunk):
    generator = torch.Generator().manual_seed(D)
    shapes = [(13, 11), (0,), (11,), (1, 1), (3, 5, 2)] if chunk > 1 else [(3, 2), (0,), (2,)]
    gradients = [[torch.randn(s, generator=generator).to(dtype) for s in shapes] for _ in range(D)]
    flat = np.stack([np.concatenate([t.double().numpy().ravel() for t in g]) for g in gradients])
    expected = flat @ flat.T
    found = gradient_gram(gradients, chunk=chunk).numpy()
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(flat).max() ** 2 * flat.shape[1]


def test_gram_refuses_what_does_not_match():
    with pytest.raises(ValueError, match="over the same parameters"):
        gradient_gram([[torch.ones(2)], [torch.ones(3)]])
    with pytest.raises(ValueError, match="over the same parameters"):
        gradient_gram([])


@pytest.mark.skipif(not CLEAR.exists(), reason="no /proc/self/clear_refs to reset the peak with")
def test_gram_makes_no_temporary_of_the_model_size():
    gradients = [[torch.ones(8_000_000, dtype=torch.bfloat16)] for _ in range(2)]  # a float32 copy of one: 32 MB
    gradient_gram([[torch.ones(100_000)] for _ in range(2)])
    CLEAR.write_text("5")
    before = resident("VmRSS")
    gram = gradient_gram(gradients)
    assert resident("VmHWM") - before <= 16 << 20  # the buffer is 8 MB
    assert gram[0, 1] == 8_000_000


def losses(model, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(8, 13, generator=generator), torch.randn(8, 3, generator=generator)
    return (model(x) - y).square().mean()


def test_training_gradients_are_bitwise_those_without_a_monitor():
    plain, watched = make_model(), make_model()
    monitor = DriftMonitor(["a", "b"], model=watched, gradients_every=2)
    assert not monitor.gradients_due()  # the next step is 1
    monitor.step(1)
    assert monitor.gradients_due()
    for seed in (1, 2, 3):
        losses(plain, seed).backward()
    with monitor.gradients("a"):
        losses(watched, 1).backward()
    with monitor.gradients("b"):
        losses(watched, 2).backward()
    with monitor.gradients("a"):  # another micro-batch
        losses(watched, 3).backward()
    with monitor.gradients("held out", training=False):
        losses(watched, 4).backward()
    assert not monitor.gradients_due()
    for p, q in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    torch.nn.utils.clip_grad_norm_(watched.parameters(), 1e-3)  # what was kept is not touched by what follows
    found = monitor.step(2)["gradients"]

    def gradient(*seeds):
        model = make_model()
        for seed in seeds:
            losses(model, seed).backward()
        return np.concatenate([p.grad.double().numpy().ravel() for p in model.parameters()])

    a, b, c = gradient(1, 3), gradient(2), gradient(4)
    for name, vector in (("a", a), ("b", b), ("held out", c)):
        assert found["norm"][name] == pytest.approx(np.linalg.norm(vector), rel=1e-5)
    for first, second, u, v in (("a", "b", a, b), ("a", "held out", a, c), ("b", "held out", b, c)):
        assert found["cosine"][first][second] == pytest.approx(u @ v / np.linalg.norm(u) / np.linalg.norm(v), abs=1e-5)
    assert monitor.step(3) == {}


def test_several_backward_passes_in_a_block_are_summed_before_they_are_added():
    """What is promised bitwise is one pass per block; of several, this order of additions."""
    watched, alone, earlier = make_model(), make_model(), make_model()
    monitor = DriftMonitor(["a"], model=watched)
    losses(watched, 1).backward()
    with monitor.gradients("a"):
        losses(watched, 2).backward()
        losses(watched, 3).backward()
    losses(earlier, 1).backward()
    losses(alone, 2).backward()
    losses(alone, 3).backward()
    for p, q, old in zip(watched.parameters(), alone.parameters(), earlier.parameters(), strict=True):
        assert torch.equal(p.grad, old.grad + q.grad)


def test_a_zero_gradient_has_no_cosine_and_a_missing_one_is_an_error():
    model = make_model()
    monitor = DriftMonitor(["a"], model=model)
    with monitor.gradients("a"):
        losses(model, 1).backward()
    with monitor.gradients("nothing"):
        (0.0 * losses(model, 2)).backward()
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"gradients of 'b'.*loss.backward\(\) inside"), monitor.gradients("b"):
        pass
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))
    found = monitor.step(1)["gradients"]
    assert found["cosine"] == {"a": {"nothing": None}} and found["norm"]["nothing"] == 0.0


# ----------------------------------------------------------------------------------------------------------------- sinks


def watch(sink):
    monitor = DriftMonitor(["math"], sinks=[sink])
    for step, p in enumerate((0.9, 0.3)):
        monitor.step(step, {"loss": 0.5 + step, "note": "text", "bad": math.nan}, scores={"math": scores_of(p)})
    monitor.close()
    return monitor


def test_numbers_of_torch_and_numpy_reach_the_sinks(tmp_path):
    class Memory(JsonLines):
        def log(self, step, line):
            super().log(step, line)
            told.append(sinks.scalars(line))

    told = []
    monitor = DriftMonitor(["x"], sinks=[Memory(tmp_path / "metrics.jsonl")])
    metrics = {
        "a": torch.tensor(0.5, requires_grad=True),
        "b": {"c": np.float32(0.25), "d": [np.int64(3)]},
        "e": np.bool_(True),
    }
    monitor.step(0, metrics)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (line["a"], line["b"], line["e"]) == (0.5, {"c": 0.25, "d": [3]}, True)
    assert (told[0]["a"], told[0]["b/c"], told[0]["e"]) == (0.5, 0.25, 1.0)


def test_a_second_run_is_not_written_into_the_first_ones_file(tmp_path):
    evaluated = []

    def run():
        monitor = DriftMonitor(
            ["x"], lambda: evaluated.append(1) or {"x": [1.0]}, sinks=[JsonLines(tmp_path / "m.jsonl")]
        )
        for step in range(2):
            monitor.step(step)

    run()
    before = (tmp_path / "m.jsonl").read_text()
    with pytest.raises(FileExistsError, match=r"m.jsonl: expected no file.*directory of its own"):
        run()
    assert (tmp_path / "m.jsonl").read_text() == before and len(evaluated) == 1  # refused before anything was spent
    (tmp_path / "m.jsonl").write_text("")
    run()


def test_tensorboard_reads_back(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watch(TensorBoard(tmp_path))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 0.5), (1, 1.5)]
    assert [e.value for e in events.Scalars("eval/math")] == pytest.approx([0.9, 0.3])
    assert [e.value for e in events.Scalars("monitor/domains/math/drop")] == pytest.approx([0.6])
    assert "bad" not in events.Tags()["scalars"] and "note" not in events.Tags()["scalars"]
    (text,) = events.Tensors("alerts/text_summary")
    assert b"math fell by 60.0" in text.tensor_proto.string_val[0]


def test_tensorboard_forgets_what_came_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoard(tmp_path)
    for step in range(4):
        sink.log(step, {"loss": step})
    sink.close()
    again = TensorBoard(tmp_path)
    again.resume(1)
    again.log(2, {"loss": 20})
    again.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 0), (1, 1), (2, 20)]


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    sink = WandB(project="carerl-test", mode="offline", dir=str(tmp_path))
    watch(sink)
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    wanted = {b"monitor/domains/math/drop", b"math fell by 60.0"}
    deadline = time.monotonic() + 60
    while not all(word in written.read_bytes() for word in wanted):  # another process of theirs writes
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_trackio_locally(tmp_path):
    pytest.importorskip("trackio")
    code = "from test_monitor import Trackio, watch; watch(Trackio('carerl-test', name='one'))"
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path)}  # read when trackio is imported
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=Path(__file__).parent, check=True, timeout=300)
    with contextlib.closing(sqlite3.connect(tmp_path / "carerl-test.db")) as database:
        rows = database.execute("select step, metrics from metrics order by step").fetchall()
    assert [step for step, _ in rows] == [0, 1]
    assert json.loads(rows[1][1])["eval/math"] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("make", "package"),
    [(lambda: TensorBoard("x"), "tensorboard"), (lambda: WandB(), "wandb"), (lambda: Trackio("p"), "trackio")],
)
def test_a_missing_library_says_what_to_install(monkeypatch, make, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"pip install '{package}'"):
        make()


# ------------------------------------------------------------------------------------------------ statistics, the trainer


def test_reward_statistics():
    found = reward_statistics(
        ["a", "a", "a", "a", "b", "b"], [1.0, 0.0, 1.0, 1.0, None, 3.0], groups=[0, 0, 1, 1, 2, 2]
    )
    assert found == {
        "rewards": {"a": 0.75, "b": 3.0},
        "reward_variance": {"a": 0.125, "b": 0.0},  # (.25 + .25 + 0 + 0) / 4 around the groups' means
        "agreed": {"a": 0.5, "b": 1.0},
        "batch_share": {"a": 4 / 6, "b": 2 / 6},
    }
    assert reward_statistics(["a", "a"], [0.0, 1.0])["reward_variance"] == {"a": 0.25}
    assert reward_statistics(["a"], [math.nan]) == {
        "rewards": {},
        "reward_variance": {},
        "agreed": {},
        "batch_share": {"a": 1.0},
    }
    with pytest.raises(ValueError, match="found 1, 2, 2"):
        reward_statistics(["a"], [1.0, 2.0])


@pytest.fixture
def train():
    pytest.importorskip("transformers")
    from trainer_helpers import STAGES, small_domains, trainer

    names = [d.name for d in small_domains()]

    def make(path: Path, watched=True, on_step=None, **options):
        run = trainer(path, on_step=on_step)
        if watched:
            run.monitor = DriftMonitor(names, model=run.model, gradients_every=3, **options)
            run._learner.monitor = run.monitor
        return run

    return make, STAGES


def test_monitored_training_is_the_same_training_and_resumes_exactly(tmp_path, train):
    from trainer_helpers import kill_at, metrics

    make, stages = train
    plain = make(tmp_path / "plain", watched=False)  # seeds the verifiers' generator: run before the next is made
    plain.run(stages)
    watched = make(tmp_path / "watched")
    watched.run(stages)
    for p, q in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(p, q)
    lines = metrics(tmp_path / "watched")
    assert [{k: v for k, v in line.items() if k != "monitor"} for line in lines] == metrics(tmp_path / "plain")
    for line in lines:
        assert ("eval" in line) == ("domains" in line.get("monitor", {}))
        for name, value in line.get("eval", {}).items():
            assert line["monitor"]["domains"][name]["score"] == pytest.approx(value)
        assert ("gradients" in line.get("monitor", {})) == (line["step"] in (3, 6, 9))
        if line["step"]:
            assert set(line["reward_variance"]) == set(line["batch_share"]) == set(line["rewards"])
            assert sum(line["batch_share"].values()) == pytest.approx(1)
    found = lines[3]["monitor"]["gradients"]["cosine"]
    assert set(found["batch"]) == {"code", "chat", "math"} and all(-1 <= v <= 1 for v in found["batch"].values())
    # at the end of a stage its domains are compared with what it made of them
    after_first, at_end = lines[4], lines[6]
    assert at_end["monitor"]["domains"]["code"]["baseline"] == pytest.approx(after_first["eval"]["code"])
    assert at_end["monitor"]["domains"]["chat"]["baseline"] == pytest.approx(lines[0]["eval"]["chat"])

    from trainer_helpers import Killed

    for step in (5, 7):
        path = tmp_path / f"killed-{step}"
        with pytest.raises(Killed):
            make(path, on_step=kill_at(step)).run(stages)
        make(path).run(stages, resume=True)
        assert metrics(path) == lines


def test_a_real_model_wrecked_by_its_learning_rate_is_caught_and_a_gentle_one_is_not():
    pytest.importorskip("transformers")
    from carerl_kernels.grpo import answer_loss, special_tokens, success_probability
    from carerl_kernels.tasks.characters import character_tokenizer, demo_domains, tiny_model, warm_up

    tokenizer = character_tokenizer()
    model, domains = tiny_model(tokenizer, 0), demo_domains(0)
    tokens = special_tokens(tokenizer, model)
    warm_up(model, tokenizer, domains, seed=0, steps=60)
    start = copy.deepcopy(model.state_dict())
    code, _, math_domain = domains
    for lr, fell in ((1e-2, ["code", "math"]), (1e-5, [])):
        model.load_state_dict(start)
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)

        def evaluate():
            shown = {d.name: d.eval_examples for d in (code, math_domain)}
            return {n: success_probability(model, tokenizer, e, tokens).tolist() for n, e in shown.items()}

        monitor = DriftMonitor(["code", "math"], evaluate, every=4, planned=10)
        monitor.step(0)
        for step in range(1, 9):
            optimizer.zero_grad()
            answer_loss(model, tokenizer, code.probe_examples, tokens).backward()
            optimizer.step()
            monitor.step(step)
        assert [a.domain for a in monitor.alerts] == fell


def test_code_of_the_documentation_runs(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "monitor.md").read_text()
    loop, callback, gradients, split, control = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    batch = types.SimpleNamespace(domains=["math", "chat"], rewards=[1.0, 0.0], prompt_ids=[0, 1])
    common = {
        "evaluate": lambda: {"math": [1.0, 0.0], "chat": [0.5]},
        "loss": torch.tensor(1.0),
        "batches": [batch] * 2,
    }
    exec(loop, common)
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("loss") for line in lines] == [None, 1.0, 1.0]
    exec(callback, {"monitor": common["monitor"], "trainer": types.SimpleNamespace(add_callback=lambda callback: None)})
    model, seeds = make_model(), [{"a": 2 * i, "b": 2 * i + 1} for i in range(50)]
    space = {"domains": ["a", "b"], "evaluate": None, "model": model, "batches": seeds, "DriftMonitor": DriftMonitor}
    recorded = []
    monkeypatch.setattr(DriftMonitor, "_tell", lambda self, step, metrics, record, alerts: recorded.append(record))
    exec(gradients, {**space, "loss": lambda seed: losses(model, seed)})
    exec(control, {"DriftMonitor": DriftMonitor, "Controller": Controller, "evaluate": common["evaluate"]})
    told = []
    seen = {"a": [1.0], "b": [0.5]}
    there = lambda: {name: float(losses(model, i).detach()) for i, name in enumerate("ab")}  # noqa: E731
    exec(split, {**space, "evaluate": lambda: seen, "losses": there, "print": told.append})
    assert set(told[0]) == {"since", "acting", "norm", "odd", "even"} and told[0]["acting"] == "chat"
    recorded = recorded[:50]
    assert len(recorded) == 50 and set(recorded[-1]["gradients"]["norm"]) == {"a", "b"} and not any(recorded[:-1])
