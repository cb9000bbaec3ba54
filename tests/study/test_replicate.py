"""The study: grid, cells that are never run twice, statistics against scipy, the report and the command."""

import json
import random
import re

import numpy as np
import pytest
import torch
from carerl_kernels.cli import app
from carerl_kernels.study import pictures
from carerl_kernels.study.cells import RAW, Record, append_record, current, read_records, run_cells
from carerl_kernels.study.grid import PRESETS, Grid
from carerl_kernels.study.report import write_report
from carerl_kernels.study.stats import estimate, holm, pareto
from carerl_kernels.study.tables import Row, pooled_table, rows_of, verdicts, versus, worst
from carerl_kernels.train import models
from carerl_kernels.train.recipe import RecipeError
from places import DOCS
from typer.testing import CliRunner

pytest.importorskip("yaml")

TINY = """
settings:
  tiny: {text: very small, kind: bandit, domains: {a: {probes: 32}, b: {probes: 32}, c: {probes: 32}}, steps: 3,
    train: {lr: 0.01}, k: 4}
runs:
  - {setting: tiny, methods: [none, remove, probed, rehearsal, surgery, interpolate, kl], seeds: [0, 1]}
"""


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small(monkeypatch):
    """Models of characters with one layer."""
    pytest.importorskip("transformers")
    from trainer_helpers import small_model

    monkeypatch.setattr(models, "tiny_model", small_model)


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def carerl(*arguments):
    return CliRunner().invoke(app, ["replicate", *map(str, arguments)])


# ------------------------------------------------------------------------------------------------------- statistics


def test_estimate_is_the_t_test_of_one_sample():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(0).normal(0.1, 0.2, size=6)
    e = estimate(values.tolist())
    expected = stats.ttest_1samp(values, 0.0)
    assert (e.mean, e.p) == pytest.approx((values.mean(), expected.pvalue))
    assert (e.mean - e.half, e.mean + e.half) == pytest.approx(tuple(expected.confidence_interval()))
    assert not estimate([0.5]).holds(0.5)
    with pytest.raises(ValueError, match="found none"):
        estimate([])


def test_an_interval_for_one_more_seed_holds_it_95_times_in_100():
    draws = np.random.default_rng(1).normal(size=(1000, 6))
    held = np.mean([estimate(row[:5].tolist()).holds(row[5]) for row in draws])
    assert abs(held - 0.95) < 4 * (0.95 * 0.05 / 1000) ** 0.5


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_pareto_keeps_ties_and_drops_what_is_dominated():
    assert pareto([(0.0, 1.0), (1.0, 0.0), (0.5, 0.5), (0.4, 0.5), (0.5, 0.5)]) == [0, 1, 2, 4]


# --------------------------------------------------------------------------------------------------- grid and records


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_whole(preset):
    cells = list(Grid.load(preset).cells())
    assert len({c.name for c in cells}) == len(cells) > 20
    for cell in cells:
        cell.check()


def test_keys_change_with_what_decides_a_result_and_nothing_else(tiny):
    grid, text = Grid.load(tiny), tiny.read_text()
    cell = grid.cell("tiny/none@0.5/0")
    tiny.write_text(text.replace("very small", "tiny"))
    assert Grid.load(tiny).cell(cell.name).key == cell.key
    tiny.write_text(text.replace("steps: 3", "steps: 4"))
    assert Grid.load(tiny).cell(cell.name).key != cell.key
    names = ("tiny/none@1/0", "tiny/none@0.5/1", "tiny/kl@0.5/0")
    assert len({cell.key, *(grid.cell(n).key for n in names)}) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny/none", "expected a cell SETTING/METHOD@LR/SEED"),
        ("tiny/none@x/0", "expected a cell SETTING/METHOD@LR/SEED"),
        ("small/none@1/0", "expected a setting out of .*tiny"),
        ("tiny/nothing@1/0", "expected a method out of none"),
        ("tiny/none@-1/0", "positive learning rate"),
    ],
)
def test_cells_that_do_not_exist(tiny, name, message):
    with pytest.raises(RecipeError, match=message):
        Grid.load(tiny).cell(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "expected a mapping with `runs`, found list"),
        ("runs: [", "expected YAML"),
        ("runs: [{setting: nowhere, methods: [none], seeds: [0]}]", "found 'nowhere'"),
        ("runs: [{setting: lm, methods: [nothing], seeds: [0]}]", "found 'nothing'"),
        ("runs: [{setting: lm, methods: [none], seed: [0]}]", "seed"),
        ("methods: {x: {text: x, lr: fast}}", "methods.x.lr"),
    ],
)
def test_files_that_are_no_grid(tmp_path, text, message):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        Grid.load(path)
    with pytest.raises(RecipeError, match="expected a preset"):
        Grid.load(tmp_path / "missing.yaml")


def record(cell, scores, **more):
    return Record(cell, "k", [["a"], ["b"], ["c"]], scores, 1.0, **more)


def test_measures_of_a_record():
    r = record("s/m@1/0", [[0.1, 0.2, 0.3], [0.9, 0.2, 0.3], [0.6, 0.8, 0.3], [0.5, 0.6, 0.7]])
    assert r.average == pytest.approx(0.6)
    assert r.forgetting == pytest.approx((0.4 + 0.2) / 2)
    assert r.retention == pytest.approx(0.55)
    assert r.new == pytest.approx(0.75)
    before = record("s/m@1/0", [[0.1, 0.4, 0.5], [0.9, 0.3, 0.4], [0.6, 0.8, 0.2], [0.5, 0.6, 0.7]])
    assert before.window == pytest.approx(((0.4 - 0.3) + (0.5 - 0.2)) / 2)
    mixed = Record("s/m@1/0", "k", [["a", "b"], ["a", "b", "c"]], [[0, 0, 0], [0.8, 0.6, 0.1], [0.4, 0.7, 0.5]], 1.0)
    assert mixed.forgetting == pytest.approx((0.4 - 0.1) / 2)
    assert mixed.new == pytest.approx(0.5)


def test_measures_of_a_pooled_record():
    """One mixed stage: nothing is new or old; what counts is the end and the lowest point."""
    r = Record("s/m@1/0", "k", [["a", "b"]], [[0.4, 0.2], [0.5, 0.6]], 1.0, lowest=[0.1, 0.3])
    assert r.average == pytest.approx(0.55)
    assert r.dip == pytest.approx(-0.3)
    assert all(np.isnan(getattr(r, measure)) for measure in ("forgetting", "retention", "new", "window"))
    assert np.isnan(record("s/m@1/0", [[0.1] * 3] * 4).dip)
    alone = Record("s/alone@1/0", "k", [["a", "b"]], [[0.4, 0.2], [0.7, 0.5]], 1.0, lowest=[0.4, 0.2])
    assert worst(r, alone) == pytest.approx(-0.2)
    rows = [Row("alone@1", {0: alone}), Row("none@1", {0: r})]
    lines = pooled_table("s", rows).splitlines()
    assert lines[2].startswith("| before | 1 | | .400 | .200 |")
    assert "| none@1 | 1 | .550 | .500 | .600 | -.300 | -.200 |" in lines[4]


def test_raw_lines_survive_a_kill(tmp_path):
    path = tmp_path / RAW
    first, second = (record(f"s/m@1/{i}", [[0.1] * 3] * 4, touched=0.5) for i in range(2))
    append_record(path, first)
    with path.open("a") as file:
        file.write('{"cell": "s/m@1/9", "ke')
    assert read_records(path) == [first]
    append_record(path, second)
    assert read_records(path) == [first, second]
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(RecipeError, match="line 1: expected a record"):
        read_records(path)


# ------------------------------------------------------------------------------------------------------- runs, report


def test_a_study_goes_on_where_it_stopped_and_repeats_itself(tiny, tmp_path):
    tiny.write_text(TINY.replace("seeds: [0, 1]", "seeds: [0]"))
    grid, out = Grid.load(tiny), tmp_path / "out"
    cells = list(grid.cells())
    assert len(cells) == 4 + 3 * 2 + 3  # none has four learning rates, three others two
    ran = []

    def note(key, kind, payload):
        if kind == "done":
            ran.append(key)

    first = run_cells(cells[:7], out, on_event=note)
    everything = run_cells(cells, out, on_event=note)
    assert ran == [c.name for c in cells]
    assert everything[:7] == first
    again = run_cells(cells[-3:], tmp_path / "again")
    assert [r.scores for r in again] == [r.scores for r in everything[-3:]]
    for r in everything:
        assert len(r.scores) == 4
        assert np.isfinite(r.scores).all() and 0 < np.min(r.scores) <= np.max(r.scores) < 1
        assert (r.touched is not None) == r.variant.startswith(("remove", "probed"))
    assert len({json.dumps(r.scores[0]) for r in everything}) == 1
    firsts = {r.variant: r.scores[1] for r in everything}
    assert firsts["remove@0.5"] == firsts["rehearsal@0.5"] == firsts["none@0.5"] != firsts["interpolate@0.5"]


def test_command_runs_reports_compares(tiny, tmp_path):
    tiny.write_text(re.sub(r"methods: \[.*?\]", "methods: [none, remove]", TINY))  # every method has its cells above
    out = tmp_path / "out"
    chosen = ("--preset", tiny, "--out", out, "--workers", 1)
    ran = carerl(*chosen)
    assert ran.exit_code == 0, ran.output
    assert (out / "tiny.png").read_bytes()[:4] == b"\x89PNG"
    assert len((out / "cells.csv").read_text().splitlines()) == 13
    refused = carerl(*chosen)
    assert refused.exit_code == 1
    assert "--resume" in refused.output
    assert carerl(*chosen, "--resume").exit_code == 0
    report = carerl("--preset", tiny, "--out", tmp_path / "report", "--report", "--data", out / RAW)
    assert report.output == (out / "report.md").read_text() == (tmp_path / "report" / "report.md").read_text()
    assert "`tiny/remove@0.5/0`" in report.output
    one = carerl("--preset", tiny, "--out", tmp_path / "one", "--cell", "tiny/remove@0.5/0", "--data", out / RAW)
    assert "against its own record: equal" in one.output
    listed = carerl(*chosen, "--list").output.splitlines()
    assert len(listed) == 12
    assert all(line.startswith("done") for line in listed)
    nothing = carerl("--preset", tiny, "--out", tmp_path / "none", "--report")
    assert nothing.exit_code == 1 and "found none" in nothing.output


def test_verdicts_follow_the_numbers():
    """A method that is better on every seed, one that is worse, one that is the same with noise."""
    rng = np.random.default_rng(0)
    records = []
    for seed in range(6):
        base = 0.5 + 0.1 * rng.random()
        finals = {"none@1": base, "none@0.5": base - 0.2, "good@1": base + 0.1, "bad@1": base - 0.1, "same@1": base}
        for name, value in finals.items():
            score = value + 0.01 * rng.standard_normal()
            records.append(record(f"s/{name}/{seed}", [[0.3] * 3, [0.6] * 3, [0.6] * 3, [score] * 3]))
    records.append(record("s/good@1/100", [[0.0] * 3] * 4))  # of choosing: no part of it
    rows = rows_of(records, "s")
    assert rows[0].variant == "good@1"
    assert all(len(r.records) == 6 for r in rows)
    better, worse, rest = verdicts(rows)
    assert better.endswith(": good@1.")
    assert worse == "Worse: bad@1."
    assert rest == "Not told apart: same@1."
    assert versus(rows, "good@1").count("\n") == 1 + 4
    assert [r.variant for r in rows_of(records, "s", confirming=False)] == ["good@1"]


def test_pooled_cells(small, tmp_path):
    """Noise and scale, an earlier stage that all share, domains alone, the guard as editor, a controller; and their report."""
    path, out = tmp_path / "pooled.yaml", tmp_path / "out"
    path.write_text(
        """
settings:
  pool: {text: pooled, model: {path: characters, warm_up: {steps: 30, lr: 3.0e-3, batch: 8}},
    domains: {code: {kind: characters}, chat: {kind: characters, noise: 0.5, scale: 10}, math: {kind: characters}},
    stages: [{domain: [code, chat, math], steps: 4, shares: [1, 2, 1]}],
    train: {lr: 0.003, prompts_per_step: 8, group_size: 4, max_new_tokens: 5, advantages: group, eval_every: 2},
    earlier: {stages: [{domain: [code, math], steps: 2}], train: {eval_every: 0}}}
methods:
  watched: {text: controller, lr: [1], train: {balance: controller, eval_every: 1},
    monitor: {baseline: {code: 1.0, chat: 0.0, math: 0.0}, controller: {errors: 0.0}}}
runs: [{setting: pool, methods: [none, alone, watched, own, pooled-guard, pooled-guard-random], seeds: [0]}]
"""
    )
    cells = ["none@1", "alone@1", "watched@1", "own@1", "pooled-guard@1", "pooled-guard-random@1"]
    wanted = [word for cell in cells for word in ("--cell", f"pool/{cell}/0")]
    ran = carerl("--preset", path, "--out", out, "--workers", 1, *wanted)
    assert ran.exit_code == 0, ran.output
    records = {r.variant: r for r in read_records(out / RAW)}
    assert list(records) == cells
    assert len({json.dumps(r.scores[0]) for r in records.values()}) == 1
    ends = [json.dumps(r.scores[1]) for r in records.values()]
    assert len(set(ends)) == len(ends)
    for r in records.values():
        assert len(r.scores) == 2 and len(r.lowest) == 3
        assert all(low <= end for low, end in zip(r.lowest, r.scores[1], strict=True))
    assert records["pooled-guard@1"].guard_share > 0 and records["none@1"].guard_share is None
    assert "nan" not in ran.output and "lowest - start" in ran.output
    report = carerl("--preset", path, "--out", out, "--report")
    assert report.exit_code == 0, report.output
    assert "| pooled-guard@1 | 1 |" in report.output and "worst domain - alone" in report.output
    assert (out / "pool.png").read_bytes()[:4] == b"\x89PNG"


def test_language_model_cells(small, tmp_path):
    """Sequence and mixture, guarded and not, with everything that a record can hold; the same again."""
    common = (
        "model: {path: characters, warm_up: {steps: 60, lr: 3.0e-3, batch: 16}}, k: 4, "
        "train: {lr: 0.003, prompts_per_step: 8, group_size: 4, max_new_tokens: 5, record_last: false}"
    )
    task = "{kind: characters, probes: 32}"
    path = tmp_path / "lm.yaml"
    path.write_text(
        f"""
settings:
  three: {{text: sequence, domains: {{flip: {task}, code: {task}, merge: {task}}}, {common},
    stages: [{{domain: flip, steps: 2}}, {{domain: code, steps: 2}}, {{domain: merge, steps: 2}}]}}
  mix: {{text: mixture, domains: {{code: {task}, math: {task}, chat: {{kind: characters, probes: 32, noise: 0.5}}}}, {common},
    stages: [{{domain: [code, math], steps: 2}}, {{domain: [code, math, chat], steps: 2, shares: [1, 1, 6]}}]}}
runs: []
"""
    )
    grid = Grid.load(path)
    names = [
        "three/probed@1/0",
        "three/none@1/0",
        "three/remove-random@1/0",
        "mix/surgery@1/0",
        "mix/replay-stored@1/0",
    ]
    records = run_cells([grid.cell(name) for name in names], tmp_path / "out")
    probed, plain, random, mixed, _ = records
    assert probed.domains == ["flip", "code", "merge"] and mixed.domains == ["code", "math", "chat"]
    assert [len(r.scores) for r in records] == [4, 4, 4, 3, 3]
    assert probed.scores[:2] == plain.scores[:2] == random.scores[:2]  # nothing acts before there is history
    assert probed.scores[-1] != plain.scores[-1]
    assert probed.touched > 0 and 0 < probed.guard_share < 1
    assert set(probed.displacement["merge"]) == set(probed.validity) == {"flip", "code"}
    for share in probed.validity.values():
        assert len(share) == 3 and all(0 < s < 1 for s in share)
    assert random.touched > 0 and plain.touched is None and plain.validity == {}
    (again,) = run_cells([grid.cell(names[0])], tmp_path / "again")
    assert (again.scores, again.validity) == (probed.scores, probed.validity)


def test_the_tables_in_the_documentation_are_those_of_the_raw_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "_save", lambda *_: None)  # two dozen, rendered for nobody
    evidence = DOCS / "evidence"
    grid, records = Grid.load("small"), read_records(evidence / RAW)
    assert current(grid, records) == (records, [])  # every line is of a cell as it is defined now
    text = write_report(grid, records, tmp_path)
    assert text + "\n" == (evidence / "report.md").read_text()
    assert (tmp_path / "cells.csv").read_text() == (evidence / "cells.csv").read_text()


# ------------------------------------------------------------------------------- what a grid defines otherwise by now


def test_what_the_grid_defines_otherwise_is_named_and_left_out(tiny, tmp_path):
    grid, out = Grid.load(tiny), tmp_path / "out"
    run_cells([grid.cell(f"tiny/{name}/{seed}") for name in ("none@1", "remove@0.5") for seed in (0, 1)], out)
    tiny.write_text(TINY.replace("lr: 0.01", "lr: 0.02"))
    changed = ("--preset", tiny, "--out", out)
    nothing = carerl(*changed, "--report")
    assert nothing.exit_code == 1 and "found none" in nothing.output and "none@1 (seeds 0, 1)" in nothing.output
    assert not (out / "report.md").exists() and not (out / "cells.csv").exists()
    one = carerl(*changed, "--cell", "tiny/none@1/0")
    assert "Left out" in one.output and "other recorded seeds: 0" in one.output
    report = carerl(*changed, "--report").output
    assert "tiny/none@1 (seed 1); tiny/remove@0.5 (seeds 0, 1)." in report
    assert "`tiny/none@1/0`" in report and "`tiny/remove@0.5" not in report
    assert len((out / "cells.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize("what", [("--report",), ("--list",), ()])
def test_a_setting_that_does_not_exist_is_refused(tiny, tmp_path, what):
    out = tmp_path / "out"
    run_cells([Grid.load(tiny).cell("tiny/none@1/0")], out)
    refused = carerl("--preset", tiny, "--out", out, "--setting", "tiny", "--setting", "tini", *what)
    assert refused.exit_code == 1 and "found tini" in refused.output
    assert not (out / "report.md").exists()
    both = carerl("--preset", tiny, "--out", out, "--setting", "tiny", "--cell", "tiny/none@1/0")
    assert both.exit_code == 1 and "expected --cell alone, found it with --setting" in " ".join(both.output.split())
    both = carerl("--preset", tiny, "--out", out, "--cell", "tiny/none@1/0", "--report")
    assert both.exit_code == 1 and "expected --cell alone, found it with --report" in " ".join(both.output.split())
    empty = carerl("--preset", tiny, "--out", out, "--setting", "lm", "--report")
    assert empty.exit_code == 1 and "found none" in empty.output
    assert not (out / "report.md").exists()


def test_a_cell_runs_whatever_is_recorded_unless_resumed(tiny, tmp_path):
    out, name = tmp_path / "out", "tiny/none@1/0"
    cell = ("--preset", tiny, "--out", out, "--workers", 1, "--cell", name)
    lines = []
    for more in ((), (), ("--resume",)):
        output = carerl(*cell, *more).output
        lines.append(len((out / RAW).read_text().splitlines()))
        assert ("not run again" in output) == bool(more)
        assert ("against its own record: equal" in output) == (len(lines) == 2)
    assert lines == [1, 2, 2]
    (only,) = read_records(out / RAW)
    assert only.cell == name


# ------------------------------------------------------------------------------------------ nothing is ignored silently


BANDIT = "kind: bandit, steps: 1, train: {lr: 0.01}, domains: {a: {probes: 4}, b: {probes: 4}}"
LM = "model: {path: characters}, train: {lr: 0.01}, domains: {code: {kind: characters}, math: {kind: characters}}"
IN_TURN = "stages: [{domain: code, steps: 1}, {domain: math, steps: 1}]"
MIXED = "stages: [{domain: [code, math], steps: 1}]"


@pytest.mark.parametrize(
    ("setting", "method", "message"),
    [
        (f"{BANDIT}, stages: [a, b, a]", "", "stages: Extra inputs"),
        (f"{BANDIT}, model: {{path: characters}}", "", "model: Extra inputs"),
        (f"{BANDIT}, earlier: {{stages: [a]}}", "", "stages: Extra inputs"),
        (BANDIT, "train: {clip_low: 0.1}", "train.clip_low: Extra inputs"),
        (BANDIT, "train: {kl_beta: 0.1, kl_reference: start}", "train.kl_reference: .*found 'start'"),
        (BANDIT, "domains: {a: {noise: 1.0}}", "domains.a.noise: Extra inputs"),
        (
            BANDIT,
            'domains: {"*": {probes: 0, replay: stored}}, train: {replay_fraction: 0.25}',
            "expected probes to draw",
        ),
        (BANDIT, 'domains: {"*": {replay: stored}}', "expected probes to draw from and a train.replay_fraction"),
        (BANDIT, 'guard: {rule: probed}, domains: {"*": {probes: 0}}', "expected probes in every domain"),
        (BANDIT, "guard: {shown: 4}", "found shown"),
        (BANDIT, "add: alone", "in settings of kind grpo, found bandit"),
        (f"{LM}, {IN_TURN}", "domains: {chat: {noise: 1.0}}", "domains.chat"),
        (f"{LM}, {MIXED}", "guard: {shown: 4}", "expected stages of one domain each"),
        (f"{LM}, {MIXED}", "train: {replay_fraction: 0.25}", "expected two stages or more"),
        (f"{LM}, {IN_TURN}", "train: {lr: 0.1}", "lr and seed from the cell"),
        (f"{LM}, {IN_TURN}", "seed: 3", "lr and seed from the cell"),
        (f"{LM}, {IN_TURN}", "add: random", "a guard to go with add: random"),
        (
            f"{LM}, {IN_TURN}",
            "add: nothing",
            "expected add to name a file of carerl_kernels.study.methods, found 'nothing'",
        ),
        (f"{LM}, {IN_TURN}", "guard: {}, add: {name: random, colour: red}", "colour: Extra inputs"),
        (f"{LM}, {IN_TURN}", "add: alone", "one mixed stage and no guard"),
        (f"{LM}, {IN_TURN}, earlier: {{stages: [{{domain: chat, steps: 1}}]}}", "", "found chat"),
        (f"{LM}, {MIXED}", "train: {editor: guard}", "expected a section guard"),
        (f"{LM}, {MIXED}, kind: gpro", "", "kind: "),
    ],
)
def test_what_would_be_ignored_is_refused_before_anything_runs(tmp_path, setting, method, message):
    path = tmp_path / "grid.yaml"
    more = f", {method}" if method else ""
    path.write_text(f"settings: {{s: {{text: s, {setting}}}}}\nmethods: {{m: {{text: m{more}}}}}\nruns: []\n")
    with pytest.raises(RecipeError, match=message):
        run_cells([Grid.load(path).cell("s/m@1/0")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_replay_of_words_draws_from_what_is_stored():
    pytest.importorskip("transformers")
    from types import SimpleNamespace

    from carerl_kernels.grpo import Stage
    from carerl_kernels.tasks.words import word_domain
    from carerl_kernels.train.memory import StoredReplay

    trainer, replay = SimpleNamespace(history=[]), StoredReplay([Stage("first", 3), Stage("second", 1)])
    replay.follow(trainer)
    free = word_domain("first", "first", 0, 4)
    few = replay.limit(free)

    def drawn(domain):
        return {example.prompt for example in domain.sample(random.Random(0), 200)}

    stored = {example.prompt for example in few.probe_examples}
    assert drawn(few) == drawn(free) > stored  # its own stage
    trainer.history = [{"step": 3}]  # the next one, as a run that goes on finds it
    assert drawn(few) == stored < drawn(free)
    with pytest.raises(ValueError, match="at most"):
        word_domain("second", "second", 0, 1000)
