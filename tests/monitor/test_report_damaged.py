"""Reports of files that other loops, other versions or broken disks left: a page or a sentence, never a traceback."""

from __future__ import annotations

import copy
import json

import pytest
from carerl_kernels.cli import app
from carerl_kernels.monitor.diagnose import diagnose
from carerl_kernels.monitor.report import RunError, write_report
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

ALERT = {"domain": "math", "step": 2, "drop": 0.2, "error": 0.01, "baseline": 0.9, "score": 0.7, "n": 50, "p": 0.001}
FOUND = {"score": 0.7, "baseline": 0.9, "drop": 0.2, "error": 0.01, "n": 50, "p": 0.001, "fallen": True}
SPLIT = {"norm": 0.5, "odd": {"math": 0.1, "chat": 0.2}, "even": {"math": 0.1, "chat": 0.2}}
DECISION = {"domain": "math", "step": 1, "before": 1.0, "after": 1.5, "drop": 0.05, "error": 0.01}
LINE = {
    "stage": "math",
    "eval": {"math": 0.7, "chat": 0.5},
    "rewards": {"math": 0.7, "chat": 0.1},
    "reward_variance": {"math": 0.1, "chat": 0.2},
    "batch_share": {"math": 0.5, "chat": 0.5},
    "step_share": {"math": 0.9, "chat": 0.1},
    "domination": 1.8,
    "agreed": {"math": 0.5, "chat": 0.1},
    "weight": {"math": 0.5, "chat": 1.5},
    "redrawn": {"math": 3, "chat": 0},
    "grad_norm": 1.0,
    "clip_fraction": 0.1,
    "lr": 1e-3,
    "skipped": 0,
    "seconds": {"sample": 1.0, "guard": 0.1},
    "monitor": {
        "alpha": 0.05,
        "drop": 0.03,
        "span": 1.0,
        "domains": {"math": FOUND, "chat": FOUND | {"fallen": False}},
        "alerts": [ALERT],
        "gradients": {"norm": {"math": 1.0, "batch": 1.0}, "cosine": {"math": {"batch": 0.1}}},
        "budget": {"gradient": {"math": 0.9, "chat": 0.1}, "step": {"math": 0.8, "chat": 0.2}},
        "split": SPLIT | {"since": 0, "acting": "math", "by": {"math": SPLIT}},
        "balance": {"by": "share", "factor": {"math": 2.0, "chat": 1.0}, "decisions": [DECISION]},
        "guard": {"touched_share": 0.1, "domains": {"math": {"conflicting": 0.1, "net_displacement": 0.2}}},
    },
}
CONFIG = {"domains": ["math", "chat"], "parameters": 1000, "guarded": True}
GUARD = {
    "domains": {"math": {"net_displacement": 0.1, "capture": {"displacement": 0.9}, "energy": {"aligned": 0.1}}},
    "open_windows": ["chat"],
}


def write(folder, lines, config=CONFIG, guard=GUARD):
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"step": i, **line}) + "\n" for i, line in enumerate(lines))
    (folder / "metrics.jsonl").write_text(text)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "bases").mkdir(exist_ok=True)
    (folder / "bases" / "math.report.json").write_text(json.dumps(guard))
    return folder


def places(value, here=()):
    yield here
    if isinstance(value, dict):
        for key, part in value.items():
            yield from places(part, (*here, key))
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from places(part, (*here, i))


def replaced(value, place, new):
    if not place:
        return new
    value = copy.deepcopy(value)
    part = value
    for step in place[:-1]:
        part = part[step]
    part[place[-1]] = new
    return value


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.floats(),
    st.sampled_from(
        [10**400, -(10**30), 1e200, 5e-324, "", "x", "a\x1b[31mb", "\u202e", [], {}, [1], {"math": {}}, [[]]]
    ),
    st.recursive(
        st.integers() | st.text(max_size=3), lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(max_size=3), c)
    ),
)
PLACES = [p for p in places(LINE) if p]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PLACES), ODD), min_size=1, max_size=3), st.integers(0, 2))
def test_a_line_of_any_shape_is_read_as_far_as_it_goes(tmp_path, changes, number):
    line = LINE
    for place, new in changes:
        try:
            line = replaced(line, place, new)
        except (KeyError, TypeError, IndexError):
            continue  # the place is gone with an earlier change
    lines = [LINE, LINE, LINE]
    lines[number] = line
    path, page = write_report(write(tmp_path / "run", lines))
    diagnose(tmp_path / "run")
    assert "nan" not in page.summary and "\x1b" not in path.read_text()


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.sampled_from(list(places(CONFIG))), st.sampled_from(list(places(GUARD))), ODD)
def test_files_beside_it_of_any_shape(tmp_path, in_config, in_guard, new):
    for config, guard in ((replaced(CONFIG, in_config, new), GUARD), (CONFIG, replaced(GUARD, in_guard, new))):
        folder = write(tmp_path / "run", [LINE, LINE], config, guard)
        if isinstance(config, dict) and isinstance(guard, dict):
            write_report(folder)
        else:
            with pytest.raises(RunError, match="expected a JSON object"):
                write_report(folder)


def test_what_is_left_out_is_said(tmp_path):
    broken = replaced(LINE, ("monitor", "alerts", 0), {"domain": "math"})
    _, page = write_report(write(tmp_path / "run", [LINE, broken]))
    assert any("monitor.alerts.0 (line 2)" in note for note in page.record.notes)
    assert len(page.record.alerts) == 1


@pytest.mark.parametrize(
    "text",
    [
        '{"step": true}',
        '{"step": -1}',
        '{"step": 1e3}',
        '{"step": ' + "9" * 500 + "}",
        "[" * 5000,
        '{"step": 1' + "}" * 9,
        "nul",
    ],
    ids=lambda text: text[:20],
)
def test_a_damaged_line_is_a_sentence(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text + '\n{"step": 5}\n')
    got = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert got.exit_code == 1 and "line 1: expected" in " ".join(got.output.split()) and "Traceback" not in got.output


def test_names_do_not_reach_the_terminal_as_commands(tmp_path):
    name = "math\x1b]0;owned\x07\x1b[2J\u202e\r"
    line = {"stage": name, "eval": {name: 0.5}, "rewards": {name: 0.5}}
    got = CliRunner().invoke(app, ["report", str(write(tmp_path / "run", [line] * 2, {"domains": [name]}))])
    assert got.exit_code == 0, got.output
    assert "owned" in got.output and all(c.isprintable() for c in got.output.replace("\n", ""))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "owned" in page and "\x1b" not in page and "\u202e" not in page
