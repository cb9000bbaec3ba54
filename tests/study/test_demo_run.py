"""The demonstration as a whole, very small: its JSON, table and picture, resuming, failures, interruption."""

import io
import json
import multiprocessing
from dataclasses import replace

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
from carerl_kernels.study.cells import Record, run_cell, run_cells
from carerl_kernels.study.demo import run_demo
from carerl_kernels.study.demo_report import Summary, Variant, print_summary
from carerl_kernels.study.grid import Grid
from carerl_kernels.train import models
from carerl_kernels.train.recipe import RecipeError, merged
from processes import server
from rich.console import Console
from trainer_helpers import small_model

DEMO = Grid.load("demo")
VARIANTS = {name: DEMO.methods[name] for name in DEMO.runs[0].methods}


@pytest.fixture
def grid(tmp_path_factory):
    """A grid as the demonstration's, with two steps a stage."""
    setting = merged(
        DEMO.settings["demo"].model_dump(),
        {
            "model": {"warm_up": {"steps": 25, "batch": 8}},
            "train": {"prompts_per_step": 4, "group_size": 4, "eval_every": 2},
        },
    )
    setting["train"]["checkpoint_every"] = 1
    setting["stages"] = [{**stage, "steps": 2} for stage in setting["stages"]]
    methods = {name: method.model_dump(exclude_defaults=True) for name, method in VARIANTS.items()}
    path = tmp_path_factory.mktemp("grid") / "tiny.yaml"
    runs = [{"setting": "demo", "methods": list(methods), "seeds": [0, 1]}]
    path.write_text(json.dumps({"settings": {"demo": setting}, "methods": methods, "runs": runs}))
    return path


@pytest.fixture
def tiny(grid, monkeypatch):
    """The same with a model of one layer."""
    monkeypatch.setattr(models, "tiny_model", small_model)
    return grid


def quiet():
    return Console(file=io.StringIO(), width=80)


def test_summary_json_table_and_picture(tmp_path, tiny):
    console = quiet()
    data = run_demo(
        tmp_path / "out", seeds=1, json_path=tmp_path / "demo.json", workers=1, console=console, preset=tiny
    )
    assert json.loads((tmp_path / "demo.json").read_text()) == data
    assert data["domains"] == ["code", "chat", "math"]
    assert data["seeds"] == 1
    assert list(data["variants"]) == list(VARIANTS)
    for name, variant in data["variants"].items():
        for part in ("final", "after_own_stage"):
            assert list(variant[part]) == data["domains"]
            for numbers in variant[part].values():
                assert len(numbers["values"]) == 1
                assert numbers["mean"] == numbers["values"][0]
                assert 0 <= numbers["mean"] <= 1
        guarded = "guard" in VARIANTS[name].recipe
        assert (variant["guard_time_share"] > 0) == guarded
        assert (variant["touched_share"] is not None) == guarded
        assert (tmp_path / "out" / name / "seed-0" / "metrics.jsonl").exists()
        assert (tmp_path / "out" / name / "seed-0" / "bases" / "code.safetensors").exists() == guarded
    # the first stage knows no history: from one checkpoint and at one learning rate, guards do there what plain training does
    first = {name: variant["after_own_stage"]["code"]["mean"] for name, variant in data["variants"].items()}
    for scale in (0.5, 1.0):
        alike = {"naive", "lower_lr", *(n for n, v in VARIANTS.items() if "guard" in v.recipe)}
        assert len({first[n] for n in alike if VARIANTS[n].lr[0] == scale}) == 1
    assert (tmp_path / "out" / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    printed = console.file.getvalue()
    assert all(name in printed for name in VARIANTS)
    assert max(len(line) for line in printed.splitlines()) <= 80
    assert "…" not in printed


def test_processes_change_no_number(tmp_path, grid, monkeypatch):
    context = server()
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
    cells = [Grid.load(grid).cell(f"demo/{name}@1/0") for name in ("naive", "guarded")]
    here, elsewhere = (run_cells(cells, tmp_path / str(workers), workers=workers) for workers in (1, 2))
    assert [(r.scores, r.touched) for r in here] == [(r.scores, r.touched) for r in elsewhere]


def test_interruptions_change_no_number(tmp_path, tiny):
    """One call for everything, against a finished and an interrupted run that are continued."""
    chosen, parts = ["naive", "guarded"], tmp_path / "parts"
    whole = run_demo(tmp_path / "whole", seeds=1, workers=1, console=quiet(), preset=tiny, variants=chosen)
    run_demo(parts, seeds=1, workers=1, console=quiet(), preset=tiny, variants=["naive"])

    def interrupt(step):
        if step == 5:
            raise KeyboardInterrupt

    guarded = replace(Grid.load(tiny).cell("demo/guarded@1/0"), kept=parts / "guarded" / "seed-0")
    with pytest.raises(KeyboardInterrupt):
        run_cell(guarded, parts / "cache", interrupt)
    after = run_demo(parts, seeds=1, workers=1, console=quiet(), preset=tiny, variants=chosen)
    for name in chosen:
        for key in ("final", "after_own_stage", "touched_share"):
            assert whole["variants"][name][key] == after["variants"][name][key]


def test_without_out_only_the_picture_stays(tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_demo(seeds=2, workers=1, console=quiet(), preset=tiny, variants=["lowest_lr"])
    assert [p.name for p in tmp_path.iterdir()] == ["carerl-demo.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": 0}, "one seed or more, found 0"),
        ({"variants": ["guraded"]}, "found guraded"),
        ({"variants": []}, "found none"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(RecipeError, match=message):
        run_demo(tmp_path / "out", console=quiet(), **arguments)
    assert not (tmp_path / "out").exists()


def test_foreign_or_differing_directory_is_refused(tmp_path, tiny):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match="new or empty directory"):
        run_demo(tmp_path, console=quiet(), preset=tiny)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "demo.json").write_text("{}")
    with pytest.raises(RecipeError, match="of other sizes"):
        run_demo(tmp_path / "out", console=quiet(), preset=tiny)


def variant(name, finals, starts=None):
    """With these accuracies of all domains at the end of every seed's run, and before and right after their own stages."""
    cell = DEMO.cell(f"demo/{name}@{VARIANTS[name].lr[0]:g}/0")
    stages = [["code"], ["chat"], ["math"]]
    records = [
        Record(cell.name, cell.key, stages, [[start] * 3] * 3 + [[end] * 3], 1.0, touched=0.25, guard_share=0.5)
        for start, end in zip(starts or finals, finals, strict=True)
    ]
    return Variant(cell, records, [])


def test_verdict_counts_seeds_and_says_who_lost():
    (sentence,) = Summary(
        2, 1.0, [variant("naive", [0.5, 0.5]), variant("lower_lr", [0.6, 0.8]), variant("guarded", [0.65, 0.6])]
    ).verdicts()
    assert sentence.startswith(
        "guarded against lower_lr (the best plain learning rate): average -0.075, better on 1 of 2"
    )


def test_table_fits_a_terminal_when_earlier_domains_gain():
    console = quiet()
    print_summary(console, Summary(2, 1.0, [variant(name, [0.9, 0.9], [0.1, 0.3]) for name in VARIANTS]))
    printed = console.file.getvalue()
    assert "-.70±.10" in printed and "25.0%" in printed
    assert "…" not in printed and max(map(len, printed.splitlines())) <= 80
