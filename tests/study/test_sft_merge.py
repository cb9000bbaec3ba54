"""The study's supervised bed and merged experts, on models of a few thousand parameters instead of SmolLM2."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from carerl_kernels.study import sft
from carerl_kernels.study.cells import Record, run_cells
from carerl_kernels.study.costs import beyond
from carerl_kernels.study.grid import Grid
from carerl_kernels.study.tables import FRONT, at_equal_new, measures_table, rows_of
from carerl_kernels.tasks import smollm2, texts
from carerl_kernels.train import models
from carerl_kernels.train.models import byte_tokenizer
from carerl_kernels.train.recipe import RecipeError

pytest.importorskip("yaml")
transformers = pytest.importorskip("transformers")

GRID = """
settings:
  one: {text: text, kind: sft, stages: [text, backwards], steps: 3, train: {lr: 0.003}}
  two: {text: two tasks, kind: sft, stages: [backwards, shortest], steps: 3, train: {lr: 0.003}}
  sums: {text: experts, kind: merge, model: {path: characters, warm_up: {steps: 20}}, train: {lr: 0.003, max_new_tokens: 5},
    domains: {code: {kind: characters}, chat: {kind: characters}}, stages: [{domain: code, steps: 2}, {domain: chat, steps: 2}]}
  sampled: {text: GRPO, model: {path: smollm2},
    train: {lr: 0.01, prompts_per_step: 2, group_size: 4, max_new_tokens: 2, eval_samples: 1},
    domains: {first: &named {kind: words, shots: 0, probes: 4}, second: *named},
    stages: [{domain: first, steps: 2}, {domain: second, steps: 1}]}
methods:
  everything: {text: all inputs, lr: [1], guard: {shown: 40, basis: input, r: 96, energy: 1.0, room: 1.0, every: 1000}}
  everything-every2: {text: the same, lr: [1], guard: {shown: 40, basis: input, r: 96, energy: 1.0, room: 1.0, every: 2}}
  nothing: {text: nothing happens, lr: [1], train: {stage_interpolation: 1.0e-9}}
runs: []
"""


class Bytes:
    """A tokenizer of bytes."""

    def __call__(self, text):
        return {"input_ids": list(text.encode("ascii", "replace"))}


@pytest.fixture
def grid(tmp_path, monkeypatch):
    from trainer_helpers import small_model

    def small(vocabulary=128):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=False,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config), Bytes()

    monkeypatch.setattr(models, "tiny_model", small_model)
    monkeypatch.setattr(sft, "load_smollm2", small)
    sft.pretrained.cache_clear()
    (tmp_path / "grid.yaml").write_text(GRID)
    yield Grid.load(tmp_path / "grid.yaml")
    sft.pretrained.cache_clear()


def test_texts_are_the_same_each_time_and_apart():
    held_out = texts.descriptions()
    first, again = (texts.text_batch(Bytes(), held_out, 5, seed=3) for _ in range(2))
    assert torch.equal(first.ids, again.ids) and first.ids.shape == (5, texts.LENGTH)
    assert first.scored.sum() == 5 * (texts.LENGTH - 1)
    apart = list(islice(texts.task_pairs("backwards", "0"), 4))
    assert not set(apart) & set(islice(texts.task_pairs("backwards", "0", apart=apart), 50))
    prompt, answer = apart[0]
    assert answer.split() == sorted(prompt.split("\n")[0].split()[1:], reverse=True)


def test_only_answers_are_scored():
    batch = texts.pairs_batch(Bytes(), [("abc", "de"), ("a", "b")])
    assert batch.mask.sum(1).tolist() == [5, 2]
    assert [row.nonzero().flatten().tolist() for row in batch.scored] == [[3, 4], [1]]


def test_confined_checkpoints_of_a_supervised_cell(grid, tmp_path):
    """Where all inputs are protected, what was learned of them is gone; interpolation at zero is the start."""
    names = [
        "one/none@1/0",
        "one/interpolate@1/0",
        "one/everything@1/0",
        "one/everything-every2@1/0",
        "one/nothing@1/0",
    ]
    plain, half, ended, every2, start = run_cells([grid.cell(n) for n in names], tmp_path / "out")
    assert plain.scores[0] == plain.scores[1] == half.scores[0]
    assert plain.scores[2] != half.scores[2] != plain.scores[1]
    assert start.scores[2] == pytest.approx(start.scores[0], abs=1e-3)
    assert plain.new > plain.scores[0][1]  # it learned
    for confined in (ended, every2):  # every direction of 16 and 24 inputs: weights cannot move at all, norms can
        assert abs(confined.forgetting) < 0.5 * abs(plain.scores[2][1] - plain.scores[0][1])
        assert confined.new < plain.new
    assert every2.guard_share > 0 and ended.guard_share is None
    assert set(plain.extras) == {"documentation", "facts", "exact backwards"}
    (again,) = run_cells([grid.cell(names[2])], tmp_path / "again")
    assert again.scores == ended.scores  # with the plain end and the directions made anew


def test_two_tasks_start_from_one_checkpoint(grid, tmp_path):
    names = ["two/none@1/0", "two/none@0.5/0", "two/everything@1/0"]
    records = run_cells([grid.cell(n) for n in names], tmp_path)
    assert len({tuple(r.scores[1]) for r in records}) == 1
    assert len({tuple(r.scores[2]) for r in records}) == 3


def test_what_others_do_with_two_supervised_tasks(grid, tmp_path):
    """A refresh goes on from the plain end; experts start where everything starts, and what is made of them is something else."""
    names = ["two/none@1/0", "two/refresh@1/0", "two/arithmetic@1/0", "two/ties-sft@1/0", "two/distill@1/0"]
    cells = [grid.cell(name) for name in names]
    plain, refresh, sums, ties, distilled = run_cells(cells, tmp_path)
    assert refresh.scores[:3] == plain.scores and refresh.stages == [*plain.stages, ["backwards"]]
    assert refresh.scores[3][0] != refresh.scores[2][0]
    assert sums.scores[:3] == ties.scores[:3] and sums.scores[1] == plain.scores[1]
    assert sums.scores[2] != plain.scores[2] != sums.scores[0]
    assert len({tuple(r.scores[3]) for r in (sums, ties, distilled)}) == 3
    assert distilled.scores[3] != distilled.scores[0] and distilled.stages[-1] == ["backwards", "shortest"]
    assert [beyond(cell).split(" sequences")[0] for cell in cells] == [
        "",
        "8",
        "stores 2 models",
        "stores 2 models",
        "32",
    ]


def test_what_a_pretrained_model_could_before_is_measured_at_every_stage_of_grpo(grid, tmp_path, monkeypatch):
    """At no learning rate it stays where it started; where a run rehearses, it moves, whatever its rewards are."""
    tokenizer = byte_tokenizer()
    monkeypatch.setattr(smollm2, "load_smollm2", lambda: (sft.load_smollm2(len(tokenizer))[0], tokenizer))
    names = ["sampled/none@1e-12/0", "sampled/rehearsal@1/0"]
    still, moved = run_cells([grid.cell(n) for n in names], tmp_path)
    for name in ("text", "documentation", "facts"):
        assert len(moved.extras[name]) == len(moved.scores) == 3
        assert still.extras[name] == [moved.extras[name][0]] * 3
        assert moved.extras[name][2] != moved.extras[name][1]


def test_merged_experts(grid, tmp_path):
    """Experts do not depend on how they are merged; the sum at scale 0 is the start."""
    cell = grid.cell("sums/none@1/0")
    nearly = replace(cell, lr=1e-9)
    names = ["sums/ties@1/0", "sums/merge-confined@1/0"]
    whole, nothing, ties, confined = run_cells([cell, nearly, *(grid.cell(n) for n in names)], tmp_path)
    assert whole.scores[:3] == ties.scores[:3] == confined.scores[:3]
    assert nothing.scores[3] == pytest.approx(nothing.scores[0], abs=1e-4)
    assert len({tuple(r.scores[3]) for r in (whole, nothing, ties, confined)}) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one/rehearsal@1/0", "rehearsal_weight: Extra inputs"),
        ("one/input-bounded@1/0", "expected shown examples"),
        ("one/ties@1/0", "ties: Extra inputs"),
        ("bandit/shown-every8@1/0", "records stages of its own, found shown"),
        ("sums/rehearsal@1/0", "nothing of earlier domains|read stored examples"),
        ("sums/input-bounded@1/0", "expected shown examples of every domain"),
        ("sums/alone@1/0", "in settings of kind grpo, found merge"),
        ("one/arithmetic@1/0", "two or more tasks, no text"),
        ("two/arithmetic@0.5/0", "expected @1"),
    ],
)
def test_what_would_be_ignored_is_refused(grid, name, message):
    with pytest.raises(RecipeError, match=message):
        grid.cell(name).check()


def test_forgetting_at_equal_new_learning():
    """On the front the difference is zero; between two rates it is the distance to their line."""

    def record(variant, seed, new, lost, **more):
        return Record(
            f"s/{variant}/{seed}", "k", [["a"], ["b"]], [[1.0, 0.0], [1.0, 0.0], [1.0 - lost, new]], 1.0, **more
        )

    records = []
    for seed, shift in enumerate((0.0, 0.1, 0.2)):
        records += [record("none@1", seed, 0.8, 0.4 + shift), record("none@0.5", seed, 0.4, 0.2 + shift)]
        records += [
            record("on@1", seed, 0.6, 0.3 + shift),
            record("off@1", seed, 0.5, 0.1 + shift, extras={"x": [0.1, 0.2]}),
        ]
        records += [record("beyond@1", seed, 0.9, 0.4 + shift), record("below@1", seed, 0.1, 0.0)]
    rows = rows_of(records, "s")
    found = {row.variant: at_equal_new(row, [r for r in rows if r.method == FRONT]) for row in rows}
    assert found["on@1"] == [(pytest.approx(own), pytest.approx(own)) for own in (0.3, 0.4, 0.5)]
    assert found["off@1"] == [(pytest.approx(own), pytest.approx(own + 0.15)) for own in (0.1, 0.2, 0.3)]
    assert found["beyond@1"] == [(pytest.approx(own), pytest.approx(own)) for own in (0.4, 0.5, 0.6)]
    assert found["below@1"] == found["none@1"] == []
    (line,) = (line for line in measures_table(rows).splitlines() if line.startswith("| off@1 | 3 | "))
    assert "| -.150 ± .000 (3) | 57% |" in line
    assert measures_table([row for row in rows if row.variant != "off@1"]) == ""
