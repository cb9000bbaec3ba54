"""carerl diagnose: one simulated run per cause, whose name comes first; none is named where nothing is lost."""

from __future__ import annotations

import json
import math
import random

import pytest
from carerl_kernels.cli import app
from carerl_kernels.monitor.diagnose import diagnose
from carerl_kernels.monitor.report import RunError
from typer.testing import CliRunner

NAMES = ("code", "chat", "math")
SIZE = 8


def simulated(folder, *, scores, steps=60, every=6, stages=None, split=None, config=None, **lines):
    """A run as the trainer writes it.

    `scores`, `rewards`, `agreed`, `step_share` and others: per domain a function of progress from 0 to 1; of the whole
    step one function. Rewards follow the scores, and prompts agree as right and wrong answers of that accuracy do, unless told.
    """
    draw, names = random.Random(0), tuple(scores)
    folder.mkdir(parents=True)
    settings = {"config": {"group_size": SIZE, "loss": "grpo"}, "domains": list(names), "guarded": False}
    (folder / "config.json").write_text(json.dumps({**settings, **(config or {})}))
    stages = stages or [("+".join(names), names, steps)]
    where = [(name, trained) for name, trained, count in stages for _ in range(count)]
    text = []
    for step in range(len(where) + 1):
        at = step / len(where)
        level = {n: scores[n](at) for n in names}
        line = {"step": step, "stage": None, "seconds": {"loss": 1.0}}
        if step:
            stage, trained = where[step - 1]
            equal = dict.fromkeys(trained, 1 / len(trained))
            noisy = {n: min(1.0, max(0.0, level[n] + draw.gauss(0, 0.02))) for n in trained}
            line |= {
                "stage": stage,
                "rewards": noisy,
                "reward_variance": {n: level[n] * (1 - level[n]) for n in trained},
                "agreed": {n: level[n] ** SIZE + (1 - level[n]) ** SIZE for n in trained},
                "batch_share": equal,
                "grad_norm": 1 + 0.1 * draw.random(),
                "clip_fraction": 0.01,
                "skipped": 0,
                "lr": 1e-3,
            }
            if len(trained) > 1:
                line |= {"step_share": equal, "domination": 1.0}
            for key, value in lines.items():
                line[key] = {n: value[n](at) for n in value if n in trained} if isinstance(value, dict) else value(at)
                if key in ("step_share", "rewards", "agreed"):
                    line[key] = {**{n: noisy[n] for n in trained if key == "rewards"}, **line[key]}
        if step % every == 0:
            line["eval"] = level
            if split is not None and step:
                line["monitor"] = {"split": {"since": step - every, "norm": 1.0, **split(at)}}
        text.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(text))
    return folder


def rise(low=0.3, high=0.8):
    return lambda at: low + (high - low) * (1 - math.exp(-4 * at))


def fall(low=0.2, high=0.6, turn=0.3):
    return lambda at: 0.4 + (high - 0.4) * at / turn if at < turn else high + (low - high) * (at - turn) / (1 - turn)


def shares(**values):
    return {n: (lambda at, v=v: v) for n, v in values.items()}


def split_of(odd, even):
    return lambda at: {
        "acting": "code+chat+math",
        "odd": {"code": odd, "chat": -0.1, "math": -0.05},
        "even": {"code": even, "chat": 0.01, "math": 0.02},
    }


ERODED = {"code": fall(), "chat": rise(), "math": rise()}
CASES = {
    "loud": (
        {"scores": ERODED, "step_share": shares(code=0.05, chat=0.9, math=0.05)},
        "step budget",
        ["code"],
        "advantages='domain'",
    ),
    "many prompts": (
        {
            "scores": ERODED,
            "step_share": shares(code=0.12, chat=0.76, math=0.12),
            "batch_share": shares(code=0.125, chat=0.75, math=0.125),
        },
        "step budget",
        ["code"],
        "halve the learning rate, equal shares",
    ),
    "curvature": ({"scores": ERODED, "split": split_of(-0.02, 0.2)}, "curvature", ["code"], "halve the learning rate"),
    "conflict": ({"scores": ERODED, "split": split_of(0.3, 0.02)}, "conflict", ["code"], "PCGrad"),
    "noise": (
        {
            "scores": {"code": fall(), "chat": rise(0.6, 0.97), "math": rise()},
            "agreed": shares(chat=0.0),
            "step_share": shares(code=0.3, chat=0.45, math=0.25),
        },
        "judge's noise",
        ["code"],
        "make chat's rewards say less by chance",
    ),
    "noise on the scale of the score": (
        {
            "scores": {"code": fall(), "chat": rise(0.3, 0.6), "math": rise()},
            "reward_variance": {
                "code": lambda at: fall()(at) * (1 - fall()(at)),
                "chat": lambda at: 0.45,
                "math": lambda at: 0.2,
            },
            "agreed": shares(chat=0.0),
        },
        "judge's noise",
        ["code"],
        "make chat's rewards say less by chance",
    ),
    "dead": (
        {"scores": {"code": lambda at: 0.02, "chat": rise(), "math": rise()}, "agreed": shares(code=0.95)},
        "dead groups",
        ["code"],
        "balance='shares'",
    ),
    "rate": (
        {
            "scores": {"code": fall(), "chat": fall(0.1, 0.7, 0.2), "math": fall(0.3)},
            "grad_norm": lambda at: math.exp(4 * at),
        },
        "learning rate",
        ["code", "chat", "math"],
        "halve the learning rate (it was 0.001)",
    ),
    "overfit": (
        {"scores": {"code": fall(0.45), "chat": rise(), "math": rise()}, "rewards": {"code": rise(0.3, 0.99)}},
        "overfit",
        ["code"],
        "more and other prompts",
    ),
    "unprotected": (
        {
            "scores": {"code": lambda at: 0.4 + at if at <= 0.5 else 0.9 - 1.2 * (at - 0.5), "chat": rise()},
            "stages": [("code", ("code",), 30), ("chat", ("chat",), 30)],
        },
        "unprotected stage",
        ["code"],
        "guard.protect",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_cause_of_a_simulated_run_comes_first(tmp_path, name):
    run, cause, suffer, remedy = CASES[name]
    found = diagnose(simulated(tmp_path / name, **run))
    first = found.causes[0]
    assert first.name == cause and first.domains == suffer and remedy in first.remedy
    assert [loss.domain for loss in found.lost] == suffer
    assert len(found.causes) <= 3 and all(0 < c.strength <= 1 for c in found.causes)
    assert first.evidence and all(0 <= figure.step <= 60 and figure.text for figure in first.evidence)
    strengths = [c.strength for c in found.causes]
    assert strengths == sorted(strengths, reverse=True)


@pytest.mark.parametrize("name", CASES)
def test_no_other_cause_is_named_in_a_run_of_one(tmp_path, name):
    """The simulated runs have one cause each; erosion by the split is told by the split alone."""
    run, cause, _, _ = CASES[name]
    names = [c.name for c in diagnose(simulated(tmp_path / name, **run), limit=9).causes]
    assert names == [cause]


WHOLE = {"code": rise(), "chat": rise(0.4, 0.9), "math": rise(0.2, 0.6)}


@pytest.mark.parametrize(
    "symptoms",
    [
        {},
        {"step_share": shares(code=0.02, chat=0.96, math=0.02)},
        {"agreed": shares(code=0.95, chat=0.0)},
        {"split": split_of(-0.3, 0.2)},
        {"grad_norm": lambda at: math.exp(4 * at), "clip_fraction": lambda at: 0.5},
    ],
    ids=["clean", "loud", "dead", "curved", "rough"],
)
def test_nothing_is_named_where_nothing_is_lost(tmp_path, symptoms):
    found = diagnose(simulated(tmp_path / "run", scores=WHOLE, **symptoms))
    assert found.lost == [] and found.causes == []


def test_a_wobble_within_its_error_is_no_loss(tmp_path):
    wobble = lambda at: rise()(at) - (0.2 if 0.55 < at < 0.65 else 0.0)  # noqa: E731
    path = simulated(tmp_path / "run", scores={**WHOLE, "code": wobble})
    assert [loss.domain for loss in diagnose(path).lost] == ["code"]
    lines = [json.loads(text) for text in (path / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "eval" in line:
            line["monitor"] = {"domains": {n: {"score": s, "error": 0.1} for n, s in line["eval"].items()}}
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert diagnose(path).lost == []


def test_a_fall_that_fits_nothing_is_said_to(tmp_path):
    found = diagnose(simulated(tmp_path / "run", scores=ERODED))
    assert not found.causes and any("None of the known causes fits" in note for note in found.notes)
    assert any("split_every=1" in note for note in found.notes)


def test_command(tmp_path):
    path = simulated(tmp_path / "loud", **CASES["loud"][0])
    result = CliRunner().invoke(app, ["diagnose", str(path)])
    assert result.exit_code == 0
    assert "code fell: 0.600 at step 18, 0.200 at step 60; 0.200 at the end" in result.output
    assert "1. step budget (code; strength" in result.output and "chat had 90% of the step budget" in result.output
    told = json.loads(CliRunner().invoke(app, ["diagnose", str(path), "--json"]).output)
    assert told["causes"][0]["name"] == "step budget" and told["lost"][0]["domain"] == "code"
    whole = CliRunner().invoke(app, ["diagnose", str(simulated(tmp_path / "whole", scores=WHOLE))])
    assert whole.exit_code == 0 and "Nothing is lost" in whole.output
    missing = CliRunner().invoke(app, ["diagnose", str(tmp_path / "none")])
    assert missing.exit_code == 1 and "does not exist" in missing.output
    with pytest.raises(RunError):
        diagnose(tmp_path / "none")


def test_a_run_without_evaluations_says_what_to_record(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "reward": 0.5}\n')
    found = diagnose(folder)
    assert not found.causes and "eval_examples" in found.notes[0]
