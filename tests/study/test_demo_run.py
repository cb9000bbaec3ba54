"""The demonstration as a whole, very small: its JSON, table and picture, resuming, failures, interruption."""

import io
import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
from carerl_kernels.demo import VARIANTS, DemoError, run_demo
from carerl_kernels.demo.report import Summary, print_summary
from carerl_kernels.demo.variants import RunResult, Scale, run_variant
from rich.console import Console

TINY = Scale(warm_up_steps=30, steps=2, eval_every=2, config={"prompts_per_step": 4, "group_size": 4})


def quiet():
    return Console(file=io.StringIO(), width=80)


def test_summary_json_table_and_picture(tmp_path):
    console = quiet()
    data = run_demo(tmp_path / "out", seeds=1, json_path=tmp_path / "demo.json", workers=1, console=console, scale=TINY)
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
        guarded = VARIANTS[name].guard is not None
        assert (variant["guard_time_share"] > 0) == guarded
        assert (variant["touched_share"] is not None) == guarded
        assert (tmp_path / "out" / name / "seed-0" / "metrics.jsonl").exists()
        assert (tmp_path / "out" / name / "seed-0" / "bases" / "code.safetensors").exists() == guarded
    # the first stage knows no history: from one checkpoint and at one learning rate, guards do there what plain training does
    first = {name: variant["after_own_stage"]["code"]["mean"] for name, variant in data["variants"].items()}
    for scale in (0.5, 1.0):
        alike = {"naive", "lower_lr", *(n for n, v in VARIANTS.items() if v.guard is not None)}
        assert len({first[n] for n in alike if VARIANTS[n].lr_scale == scale}) == 1
    assert (tmp_path / "out" / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    printed = console.file.getvalue()
    assert all(name in printed for name in VARIANTS)
    assert max(len(line) for line in printed.splitlines()) <= 80
    assert "…" not in printed


def test_processes_and_interruptions_change_no_number(tmp_path):
    """One call for everything here; against a finished and an interrupted run, continued by processes."""
    chosen, parts = ["naive", "guarded"], tmp_path / "parts"
    whole = run_demo(tmp_path / "whole", seeds=1, workers=1, console=quiet(), scale=TINY, variants=chosen)
    run_demo(parts, seeds=1, workers=1, console=quiet(), scale=TINY, variants=["naive"])

    def interrupt(line):
        if line["step"] == 5:
            raise KeyboardInterrupt

    start = parts / "warm-up" / "seed-0.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run_variant(VARIANTS["guarded"], 0, TINY, start, parts / "guarded" / "seed-0", interrupt)
    after = run_demo(parts, seeds=1, workers=2, console=quiet(), scale=TINY, variants=chosen)
    for name in chosen:
        for key in ("final", "after_own_stage", "touched_share"):
            assert whole["variants"][name][key] == after["variants"][name][key]


def test_without_out_only_the_picture_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_demo(seeds=2, workers=1, console=quiet(), scale=TINY, variants=["lowest_lr"])
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
    with pytest.raises(DemoError, match=message):
        run_demo(tmp_path / "out", console=quiet(), **arguments)
    assert not (tmp_path / "out").exists()


def test_foreign_or_differing_directory_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DemoError, match="new or empty directory"):
        run_demo(tmp_path, console=quiet(), scale=TINY)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "demo.json").write_text("{}")
    with pytest.raises(DemoError, match="of other sizes"):
        run_demo(tmp_path / "out", console=quiet(), scale=TINY)


def test_verdict_counts_seeds_and_says_who_lost():
    def run(variant, seed, final):
        scores = {"code": final, "chat": final, "math": final}
        return RunResult(variant, seed, [(0, scores), (9, scores)], scores, scores, 1.0, 0.0, None)

    results = [run("naive", 0, 0.5), run("naive", 1, 0.5), run("lower_lr", 0, 0.6), run("lower_lr", 1, 0.8)]
    results += [run("guarded", 0, 0.65), run("guarded", 1, 0.6)]
    chosen = [VARIANTS[name] for name in ("naive", "lower_lr", "guarded")]
    (sentence,) = Summary.of(results, chosen, ("code", "chat", "math"), 2, 1.0).verdicts()
    assert sentence.startswith(
        "guarded against lower_lr (the best plain learning rate): average -0.075, better on 1 of 2"
    )


def test_table_fits_a_terminal_when_earlier_domains_gain():
    def run(variant, seed):
        before, after = (dict.fromkeys(("code", "chat", "math"), x) for x in (0.1 + 0.2 * seed, 0.9))
        return RunResult(variant, seed, [(0, before), (9, after)], before, after, 1.0, 0.5, 0.25)

    console, chosen = quiet(), list(VARIANTS.values())
    summary = Summary.of([run(v.name, s) for v in chosen for s in (0, 1)], chosen, ("code", "chat", "math"), 2, 1.0)
    print_summary(console, summary, chosen, TINY)
    printed = console.file.getvalue()
    assert "-.70±.10" in printed and "25.0%" in printed
    assert "…" not in printed and max(map(len, printed.splitlines())) <= 80
