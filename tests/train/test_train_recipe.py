"""Recipes: what YAML may say, and what `carerl train` makes of it."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from carerl_kernels._rows import read_rows
from carerl_kernels.cli import app
from carerl_kernels.grpo import Example, answer_loss, special_tokens
from carerl_kernels.grpo.parallel import layers
from carerl_kernels.rewards.verifiers.sandbox import SandboxError
from carerl_kernels.tasks.characters import character_tokenizer, demo_domains
from carerl_kernels.text import encode_prompts
from carerl_kernels.train.domains import Characters, Exact, Words
from carerl_kernels.train.memory import fresh_examples
from carerl_kernels.train.models import byte_tokenizer, load_model
from carerl_kernels.train.plan import plan_run
from carerl_kernels.train.recipe import ModelSpec, Recipe, RecipeError, load_recipe, merged
from carerl_kernels.train.run import _sampler, open_run
from places import EXAMPLES
from safetensors.torch import load_file
from typer.testing import CliRunner

pytest.importorskip("transformers")

RECIPES = EXAMPLES / "recipes"
QUICK = [
    "train.prompts_per_step=4",
    "train.group_size=4",
    "train.max_new_tokens=6",
    "train.checkpoint_every=1",
    "train.eval_every=0",
    "train.eval_samples=1",
    "train.plots=false",
    "train.progress=false",
    "guard.r=2",
]
FIRST = [
    *QUICK,
    "model.warm_up.steps=25",  # enough to be right now and then: without it there is nothing to record
    "model.warm_up.batch=8",
    "domains.largest.eval_size=2",
    "domains.instructions.eval_size=2",
    "stages.0.steps=2",
    "stages.1.steps=2",
]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def carerl(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_two_recipes_in_sequence(tmp_path, monkeypatch):
    """The shipped ones, shortened: run directory, bases, reports; the second goes on from model and bases of the first."""
    monkeypatch.chdir(tmp_path)
    code, out = carerl(RECIPES / "small.yaml", *FIRST)
    assert code == 0 and "4 steps in runs/small" in out, out
    run = tmp_path / "runs" / "small"
    for name in ("largest", "instructions"):
        assert (run / "bases" / f"{name}.safetensors").is_file()
        assert json.loads((run / "bases" / f"{name}.report.json").read_text())["rule"] == "remove"
    recorded = json.loads((run / "config.json").read_text())
    assert recorded["recipe"]["domains"]["largest"]["kind"] == "math"

    code, out = carerl(RECIPES / "small.yaml", *FIRST)
    assert code == 1 and "already holds a run" in out
    code, out = carerl(RECIPES / "small.yaml", *FIRST, "--resume", "model.seed=1")
    assert code == 1 and "recipe.model.seed: expected 0, found 1; restore" in out.replace("\n", "")
    code, out = carerl(RECIPES / "small.yaml", *FIRST, "--resume")
    assert code == 0 and "4 steps" in out

    second = [*QUICK, "stages.0.steps=1", "domains.once.eval_size=1", "domains.largest.eval_size=2"]
    second += ["domains.instructions.eval_size=2"]
    code, out = carerl(RECIPES / "small_next.yaml", *second)
    assert code == 0, out
    report = json.loads((tmp_path / "runs" / "small_next" / "bases" / "once.report.json").read_text())
    assert list(report["domains"]) == ["largest", "instructions", "once"]
    start = load_file(tmp_path / "runs" / "small_next" / "checkpoints" / "step-00000000" / "model.safetensors")
    trained = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(start[name], trained[name]) for name in trained)


def test_verifiable_and_judged_domains_together(tmp_path, monkeypatch):
    """The shipped recipe against the scripted judge over HTTP, with a model built from nothing."""
    pytest.importorskip("httpx")
    pytest.importorskip("reasoning_gym")
    from judge_helpers import ScriptedJudge

    monkeypatch.chdir(tmp_path)
    scratch = yaml.safe_load((RECIPES / "small.yaml").read_text())["model"]["scratch"] | {
        "max_position_embeddings": 1024
    }
    changes = [*QUICK, "stages.0.steps=2"]
    changes += ["domains.letters.eval_size=1", "domains.answers.eval_size=1", "train.prompts_per_step=2"]
    with ScriptedJudge() as judge:
        changes += [f"model={json.dumps({'scratch': scratch})}", f"domains.answers.judge.url={judge.url}"]
        code, out = carerl(RECIPES / "judged.yaml", *changes)
        assert code == 0, out
        assert judge.count("protocol") >= 2 and judge.count("verdict") >= 1
    lines = [json.loads(line) for line in (tmp_path / "runs" / "judged" / "metrics.jsonl").read_text().splitlines()]
    assert set(lines[-1]["rewards"]) == {"letters", "answers"} == set(lines[-1]["eval"])
    assert (tmp_path / "runs" / "judged" / "answers.judge.sqlite").is_file()
    assert (tmp_path / "runs" / "judged" / "bases" / "letters+answers.safetensors").is_file()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_are_valid_and_say_whether_they_were_run(path):
    recipe = load_recipe(path)
    assert recipe.stages and recipe.folder == RECIPES
    assert recipe.model.path not in ("smollm2", None) or path.stem in ("small", "judged")
    if "Qwen" in str(recipe.model.path):
        assert path.read_text().startswith("# NOT RUN")


def test_the_plan_of_a_large_model_adds_up(tmp_path):
    """Shapes alone: Qwen2.5-7B's own sizes on eight processes."""
    sizes = {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    }
    changes = [f"model.scratch={json.dumps(sizes)}", "model.path=null", "train.kl_beta=0.01"]
    plan = plan_run(load_recipe(RECIPES / "qwen2.5-7b.yaml", changes), 8)
    n = plan.parameters
    assert n == plan.trainable == pytest.approx(6.53e9, rel=0.01)  # without Qwen's vocabulary
    assert (
        plan.memory["weights"]
        == plan.memory["gradients"]
        == plan.memory["weights of an earlier step"]
        == -(-n // 8) * 4
    )
    assert plan.memory["optimizer (AdamW)"] == 2 * plan.memory["weights"]
    assert plan.memory["gathered weights"] == 2 * n  # bfloat16, for the reference's log-probabilities
    assert "cache of sampling" not in plan.memory and plan.total == sum(plan.memory.values())
    assert plan.guard is not None and plan.guard["kind"] == "block" and plan.memory["guard"] == plan.guard["total"]
    assert plan.steps == 600 and plan.sequences == 1024

    code, out = carerl(RECIPES / "small.yaml", "--dry-run", "run_dir=" + str(tmp_path / "none"))
    assert code == 0 and "in all" in out and "98,816 parameters" in out and not (tmp_path / "none").exists()
    code, out = carerl(RECIPES / "small.yaml", "--dry-run", "--json")
    assert json.loads(out)["processes"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.lr=-1"], r"train\.lr: .*greater than 0, found -1"),
        (["train.learning_rate=1"], r"train\.learning_rate: Extra inputs"),
        (["stages.0.domain=poetry"], "expected domains out of largest, instructions, found poetry"),
        (["stages.0.setps=3"], r"stages\.0\.setps"),
        (["domains.largest.kind=maths"], "'gym'.*'judged'"),
        (["model.path=x"], "expected one of path and scratch"),
        (["guard.kk=3"], "expected options out of history, shown, answers, rule, basis.*found kk"),
        (["guard.rule=probed", "domains.largest.probes=0"], "expected probes in every domain, none in largest"),
        (["sampler={url: u, model: m}"], r"old_logprobs: expected sampler"),
        (
            ["sampler={url: u, model: m}", "train.old_logprobs=sampler", "train.top_p=0.9", "train.temperature=0.7"],
            r"train\.top_p: expected 1 where an engine.*found top_p=0\.9 at temperature=0\.7",
        ),
        (["train.lr"], "expected PLACE=VALUE"),
        (["stages.7.steps=1"], "no such place"),
        (["domains.largest.system=x"], "needs chat: true"),
        (
            ["domains.largest.ask=Think first."],
            r"largest\.math\.ask: .*expected \{prompt\} in it.*found 'Think first\.'",
        ),
        (["domains.g={kind: gym, ask: Think}"], r"g\.gym\.ask: .*expected \{question\} in it"),
        (["train.lr=[1"], r"override 'train.lr=\[1': expected YAML"),
        (["train.balance=controller"], "controller acts on what the monitor finds: expected a monitor, found none"),
        (["monitor.controller.limit=3"], "expected train.balance: controller, which lets it act, found None"),
        (
            ["train.balance=controller", "monitor.controller.limits=3"],
            "controller: expected options out of by, limit.*found limits",
        ),
        (["domains.*.replay=stored"], "replay: stored of largest, instructions: expected .* a train.replay_fraction"),
        (["train.rehearsal_weight=1", "stages=[{domain: largest, steps: 1}]"], "rehearsal_weight acts on .*found one"),
        (
            ["guard.shown=4", "stages=[{domain: [largest, instructions], steps: 1}]"],
            "expected stages of one domain each",
        ),
        (["stages.*.setps=3"], r"stages\.0\.setps.*\n.*stages\.1\.setps"),
        (["train.balance=equal"], r"train\.balance: .*'shares', 'gradient' or 'controller'"),
    ],
)
def test_what_a_recipe_may_not_say(changes, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(RECIPES / "small.yaml", changes)


def test_a_mixed_stage_that_a_controller_balances(tmp_path, monkeypatch):
    """From YAML to metrics, page and diagnosis; what the monitor compares with then decides the run, and is recorded."""
    monkeypatch.chdir(tmp_path)
    changes = [
        *(change for change in FIRST if not change.startswith("stages") and "eval_every" not in change),
        "stages=[{domain: [largest, instructions], steps: 2}]",
        "train.balance=controller",
        "train.eval_every=1",
        "guard=null",
        "monitor={baseline: {largest: 1.0}, controller: {errors: 0.0, limit: 2.0}, split_every: 1, gradients_every: 1}",
    ]
    code, out = carerl(RECIPES / "small.yaml", *changes)
    assert code == 0, out
    run = tmp_path / "runs" / "small"
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["monitor"]["balance"]["factor"]["largest"] > 1
    assert set(lines[-1]["monitor"]["split"]["even"]) == {"largest", "instructions"}
    assert [p.suffix for p in (run / "snapshots").iterdir()] and lines[-1]["domination"] >= 0
    settings = json.loads((run / "config.json").read_text())
    assert settings["controller"]["limit"] == 2.0 and settings["recipe"]["monitor"]["baseline"] == {"largest": 1.0}
    for command in ("report", "diagnose"):
        assert CliRunner().invoke(app, [command, str(run)]).exit_code == 0


def test_one_seed_goes_to_everything_that_names_none():
    recipe = load_recipe(RECIPES / "small.yaml", ["seed=5", "domains.largest.seed=2", "domains.*.probes=3"])
    assert (recipe.model.seed, recipe.train.seed) == (5, 5)
    assert [(d.seed, d.probes) for d in recipe.domains.values()] == [(2, 3), (5, 3)]
    assert load_recipe(RECIPES / "small.yaml").train.seed == 0


def test_changes_merge_mappings_and_replace_the_rest():
    data = {"a": {"x": 1, "y": [1]}, "b": {"x": 2}, "c": None}
    changed = merged(data, {"*": {"x": 3}, "a": {"y": [2]}, "c": {"z": {"w": 4}}})
    assert changed == {"a": {"x": 3, "y": [2]}, "b": {"x": 3}, "c": {"x": 3, "z": {"w": 4}}}
    assert data == {"a": {"x": 1, "y": [1]}, "b": {"x": 2}, "c": None}


@pytest.mark.parametrize(("kind", "task"), [(Characters, "code"), (Words, "swap")])
def test_built_in_tasks_say_which_answers_are_right(tmp_path, kind, task):
    domain = kind(kind=kind.__name__.lower(), task=task).build("d", tmp_path, None)
    for example in domain.draw(random.Random(0), 8):
        for text, right in ((example.answer, True), (f"{example.answer}x", False), ("", False)):
            assert domain.right(example, text, domain.score(example, text)) == right


def test_a_noisy_reward_goes_on_where_it_was_and_evaluates_without_noise(tmp_path):
    def build():
        spec = Characters(kind="characters", task="code", noise=0.5, scale=10, seed=3, probes=4)
        return spec.build("d", tmp_path, None)

    domain, again = build(), build()
    examples = domain.draw(random.Random(0), 400)
    texts = [e.answer if i % 2 else "?" for i, e in enumerate(examples)]
    first, second = (domain.score_batch(examples, texts) for _ in range(2))
    right, wrong = (torch.tensor(first[i::2], dtype=torch.float64) for i in (1, 0))
    assert abs(right.mean() - 10) < 1.5 and abs(wrong.mean()) < 1.5 and 4 < right.std() < 6
    assert domain.score_batch(examples, texts, training=False) == [float(i % 2) for i in range(400)]
    assert again.score_batch(examples, texts) == first != second
    state = json.loads(json.dumps(again.reward.state_dict()))
    third = again.score_batch(examples, texts)
    assert third == second
    again.reward.load_state_dict(state)
    assert again.score_batch(examples, texts) == third
    assert not domain.verifies and len(domain.probe_examples) == 4


def test_built_in_tasks_in_sequence_shown_replayed_and_resumed(tmp_path):
    """The demonstration's model; a guard that is shown examples; replay of stored ones; the same after an interruption."""
    text = """
seed: 1
model: {path: characters, warm_up: {steps: 10}}
domains:
  code: {kind: characters, probes: 4, replay: stored}
  letters: {kind: characters, task: math, probes: 4, noise: 0.1}
stages: [{domain: code, steps: 2}, {domain: letters, steps: 2}]
train: {lr: 0.003, prompts_per_step: 4, group_size: 4, max_new_tokens: 5, replay_fraction: 0.25, editor: pcgrad,
  checkpoint_every: 1, progress: false, plots: false}
guard: {shown: 8, r: 4}
"""
    (tmp_path / "tasks.yaml").write_text(text)
    assert plan_run(load_recipe(tmp_path / "tasks.yaml")).steps == 4
    code, out = carerl(tmp_path / "tasks.yaml")
    assert code == 1 and "expected the directory of the run's records" in out
    weights, files = [], []
    for name, stop in (("whole", 9), ("parts", 3), ("parts", 9)):

        def step(line, stop=stop):
            if line["step"] == stop:
                raise KeyboardInterrupt

        recipe = load_recipe(tmp_path / "tasks.yaml", [f"run_dir={tmp_path / name}"])
        with open_run(recipe, step, start=tmp_path / "warm.safetensors") as run:
            try:
                run.train(resume=True)
            except KeyboardInterrupt:
                continue
        weights.append([p.detach().clone() for p in run.trainer.model.parameters()])
        files.append({p.name for p in (tmp_path / name / "bases").glob("*.safetensors")})
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert files == [{"code.safetensors", "letters.safetensors"}] * 2


def test_examples_are_shown_with_their_answers_or_as_prompts_alone():
    domains, tokenizer = demo_domains(0, ["code"]), character_tokenizer()

    def shown(domain, answers):
        batches = fresh_examples([domain], tokenizer, 20, answers)(domain.name)
        return [
            row[mask.bool()].tolist()
            for b in batches
            for row, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
        ]

    examples = domains[0].draw(random.Random("shown-code"), 20)
    prompts = encode_prompts(tokenizer, [example.prompt for example in examples])
    assert shown(domains[0], False) == prompts
    ends = [tokenizer(example.answer, add_special_tokens=False)["input_ids"] for example in examples]
    assert shown(domains[0], True) == [[*prompt, *end] for prompt, end in zip(prompts, ends, strict=True)]
    open_ended = replace(domains[0], sample=lambda rng, n: [Example("abc")] * n)
    assert len(shown(open_ended, False)) == 20
    with pytest.raises(
        ValueError, match=r"expected answers in domain 'code', found examples without; set answers: false"
    ):
        shown(open_ended, True)


def test_what_decides_a_run_is_not_where_its_servers_are():
    def record(*changes):
        return load_recipe(RECIPES / "judged_endpoint.yaml", changes).record()

    sampler = "sampler={url: %s, model: m, timeout: %d, max_in_flight: 3, folder: %s, sync_every: %d}"
    judge = "domains.answers.judge."
    one = record("train.old_logprobs=sampler", sampler % ("a", 1, "f", 2))
    moved = record(
        *("train.old_logprobs=sampler", sampler % ("b", 2, "g", 2), judge + "url=c", judge + "timeout=9"),
        *(judge + "attempts=2", judge + "max_in_flight=1", judge + "cache=d"),
    )
    assert one == moved and one["sampler"]["model"] == "m" and one["domains"]["answers"]["judge"]["model"]
    assert record("train.old_logprobs=sampler", sampler % ("a", 1, "f", 3)) != one
    assert record("train.old_logprobs=sampler", sampler % ("a", 1, "f", 2), judge + "model=x") != one


def test_runs_that_share_a_folder_for_the_engine_write_apart(tmp_path):
    pytest.importorskip("httpx")
    folders = []
    for run_dir in (tmp_path / "a" / "run", tmp_path / "b" / "run"):
        changes = [
            f"sampler={{url: http://u/v1, model: m, folder: {tmp_path / 'shared'}}}",
            "train.old_logprobs=sampler",
        ]
        recipe = load_recipe(RECIPES / "small.yaml", [*changes, f"run_dir={run_dir}"])
        model, tokenizer = load_model(scratch(), [])
        folders.append(_sampler(recipe, model, tokenizer).path(1).parent)
    assert len({*folders}) == 2 and all(tmp_path / "shared" in f.parents for f in folders)


def test_errors_are_one_line_with_a_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("[1, 2")
    for arguments, message in (
        (["a.yaml"], "expected YAML"),
        (["none.yaml"], "No such file"),
        (
            [RECIPES / "small.yaml", "guard.history=[nowhere]", *FIRST],
            "expected a basis file or a run's directory, found nowhere",
        ),
        ([RECIPES / "small.yaml", "domains.largest.train=nowhere.jsonl"], "nowhere.jsonl"),
        ([RECIPES / "small.yaml", "--dry-run", "guard.basis_dtype=bf16"], "expected a torch dtype such as bfloat16"),
    ):
        code, out = carerl(*arguments)
        assert code == 1 and message in out.replace("\n", ""), out
    for option in (["--processes", "8"], ["--json"]):
        code, out = carerl(RECIPES / "small.yaml", *option)
        assert code == 2 and "belongs to --dry-run" in out and not list(tmp_path.glob("runs")), out

    def no_isolation(*_):
        raise SandboxError("no isolation here")

    monkeypatch.setattr("carerl_kernels.train.recipe.load_recipe", no_isolation)
    code, out = carerl("a.yaml")
    assert code == 1 and "no isolation here" in out


def test_rows_that_are_none(tmp_path):
    path = tmp_path / "rows.jsonl"
    for text, message in (
        ('{"prompt": "a", "answer": "b"}\n{"prompt": ""}', 'line 2: expected "prompt"'),
        ('{"prompt": "a"}', "line 1: expected answer in the row, found \\['prompt'\\]"),
        ("nonsense", "line 1: expected a JSON object"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            list(read_rows(path, ("prompt", "answer")))


def test_chat_messages_meet_no_option_that_is_for_text(tmp_path):
    row = {"prompt": [{"role": "user", "content": "q"}], "answer": "a"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    for option in ({"ask": "Say {prompt}"}, {"chat": True, "system": "Be brief."}):
        spec = Exact(kind="exact", train="a.jsonl", eval_size=0, **option)
        with pytest.raises(ValueError, match=r"a\.jsonl, line 1: expected a prompt as text, which (ask|system) would"):
            spec.build("d", tmp_path, tmp_path)
    (example,) = (
        Exact(kind="exact", train="a.jsonl", eval_size=0, chat=True)
        .build("d", tmp_path, tmp_path)
        .draw(random.Random(0), 1)
    )
    assert [dict(m) for m in example.prompt] == row["prompt"]


def test_numbers_are_those_of_yaml_1_2(tmp_path):
    text = (RECIPES / "small.yaml").read_text()
    changes = ["guard={energy: 1e-3, bound: 2E+1, history: [1e5x]}", "monitor.alpha=5e-2"]
    recipe = load_recipe(RECIPES / "small.yaml", changes)
    assert recipe.guard.options == {"energy": 0.001, "bound": 20.0} and recipe.guard.history == (Path("1e5x"),)
    assert recipe.monitor.options["alpha"] == 0.05
    (tmp_path / "a.yaml").write_text(text + "\nmonitor: {alpha: 1e-2}\n")
    assert load_recipe(tmp_path / "a.yaml").monitor.options["alpha"] == 0.01


def test_sinks_are_closed_with_the_run(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr("carerl_kernels.monitor.DriftMonitor.close", lambda self: closed.append(self))
    changes = [*FIRST, "model.warm_up=null", "monitor={drop: 0.05}", f"run_dir={tmp_path}"]
    with open_run(load_recipe(RECIPES / "small.yaml", changes)) as run:
        assert not closed
    assert closed == [run.trainer.monitor]


def test_domains_of_every_kind(tmp_path):
    """Data become examples, completions rewards; held-out rows are never trained on; prompts become chats."""
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"prompt": f"q{i}", "answer": str(i)}) + "\n" for i in range(9))
    )
    recipe = load_recipe(RECIPES / "small.yaml")

    def build(name="d", **spec):
        data = {
            "run_dir": "r",
            "model": {"path": "p"},
            "domains": {name: spec},
            "stages": [{"domain": name, "steps": 1}],
        }
        domain = Recipe.model_validate(data).domains[name].build(name, spec.pop("folder", tmp_path), tmp_path / "cache")
        return domain

    exact = build(
        kind="exact", train="a.jsonl", eval_size=4, ask="Say {prompt}!", chat=True, system="Be brief.", probes=2
    )
    seen = {str(e.prompt) for e in exact.draw(random.Random(0), 200)}
    held = {str(e.prompt) for e in exact.eval_examples}
    assert len(seen) == 5 and len(held) == 4 and not seen & held
    system, user = exact.eval_examples[0].prompt
    assert system["content"] == "Be brief." and user["content"].startswith("Say q")
    assert exact.score(exact.eval_examples[0], exact.eval_examples[0].answer) == 1.0 and len(exact.probe_examples) == 2

    math = build(kind="math", train="a.jsonl", eval="a.jsonl")
    assert len(math.eval_examples) == 9 and math.score(Example("?", "1/2"), "It is 0.5") == 1.0
    math.reward.close()
    instructions = recipe.domains["instructions"].build("i", RECIPES, tmp_path / "c")
    example = instructions.eval_examples[0]
    assert instructions.score(example, example.answer) == 1.0 > instructions.score(example, "No, never.")
    code = build(kind="code", train=str(RECIPES / "data" / "programs.jsonl"), eval_size=1, allow_unisolated=True)
    add = next(e for e in code.draw(random.Random(0), 50) if "add(a, b)" in e.prompt)
    assert code.score(add, "```python\ndef add(a, b):\n    return a + b\n```") == 1.0
    assert (
        build("chat", kind="characters").name == "chat" and build(kind="characters", task="math").eval_mode == "exact"
    )
    with pytest.raises(ValueError, match="expected more than eval_size=9 examples, found 9"):
        build(kind="exact", train="a.jsonl", eval_size=9)
    with pytest.raises(ValueError, match="expected task code, chat, math"):
        build(kind="characters")


def scratch(**changes):
    data = yaml.safe_load((RECIPES / "small.yaml").read_text())["model"]
    return ModelSpec.model_validate({"scratch": data["scratch"], **changes})


def test_gradient_checkpointing_changes_memory_only():
    gradients, calls = [], []
    for spec in (scratch(), scratch(gradient_checkpointing=True)):
        model, tokenizer = load_model(spec, [])
        assert model.training == spec.gradient_checkpointing
        passes: list[int] = []
        layers(model)[0].self_attn.register_forward_pre_hook(lambda module, args, passes=passes: passes.append(1))
        examples = [Example("max(1,2,3)=", "3"), Example("Shout abc!", "ABC")]
        answer_loss(model, tokenizer, examples, special_tokens(tokenizer, model)).backward()
        gradients.append([p.grad for p in model.parameters()])
        calls.append(len(passes))
    assert calls == [1, 2]  # again in the backward pass
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients, strict=True))


def test_adapters_train_and_are_saved_alone(tmp_path):
    """LoRA under the guard, with a KL term whose reference is the adapter as it was."""
    pytest.importorskip("peft")
    changes = [
        *FIRST,
        "guard={k: 2}",
        "model.lora.r=4",
        "model.warm_up=null",
        "train.kl_beta=0.1",
        f"run_dir={tmp_path / 'run'}",
    ]
    with open_run(load_recipe(RECIPES / "small.yaml", [*changes, "monitor={drop: 0.05, tensorboard: true}"])) as run:
        frozen = {n: p.detach().clone() for n, p in run.trainer.model.named_parameters() if not p.requires_grad}
        history = run.train()
        assert len(history) == 5 and run.trainer.monitor.domains == ("largest", "instructions")
        after = dict(run.trainer.model.named_parameters())
        assert all(torch.equal(after[n], value) for n, value in frozen.items())
    saved = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert saved and all("lora" in name for name in saved)
    (basis,) = (tmp_path / "run" / "bases").glob("largest.safetensors")
    assert basis.stat().st_size < 10 * sum(t.numel() * 4 for t in saved.values())
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert all("lora" in n for n in load_file(next((tmp_path / "run" / "references").iterdir())))


def test_bytes_come_back_as_text():
    tokenizer = byte_tokenizer()
    for text in ("Sum: 3+4=7\n", "naïve – ✓", "  two  spaces "):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "user: Hi\nassistant: "


# ------------------------------------------------------------------------------------- data and recipes that are damaged


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ('{"prompt": "a\u2028b\u0085c\x0c"}'.replace("\x0c", "\\f"), ["a\u2028b\u0085c\f"]),
        ('\ufeff{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n', ["a", "b"]),
        ('{"prompt": "a"}', ["a"]),
        ('   \n\t\n{"prompt": "a"}\n', ["a"]),
        ('{"prompt": [{"role": "user", "content": null}]}', [[{"role": "user", "content": None}]]),
    ],
    ids=ascii,
)
def test_rows_that_are_valid(tmp_path, data, found):
    (tmp_path / "a.jsonl").write_bytes(data.encode())
    assert [row["prompt"] for row in read_rows(tmp_path / "a.jsonl", ("prompt",))] == found


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            '{"prompt": "a"}\n{"prompt": "\u00e9"}'.encode("latin-1"),
            r"a\.jsonl, line 2: expected UTF-8, found byte 0xe9",
        ),
        ('{"prompt": "a"}'.encode("utf-16"), r"a\.jsonl: expected UTF-8, found UTF-16"),
        (b'{"prompt": "a"}\r{"prompt": "b"}', "line 1: expected a JSON object"),
        (b'{"prompt": [1, 2]}', 'line 1: expected "prompt" as text or chat'),
        (b'{"prompt": [{"role": 1}]}', 'line 1: expected "prompt"'),
        (b'{"prompt": "a", "x": NaN}', "line 1: .*expected finite numbers, found NaN"),
        (b'{"prompt": "a", "x": 1e999}', "line 1: .*expected finite numbers"),
        (b'{"prompt": "a", "prompt": "b"}', "line 1: .*every key once, found 'prompt' twice"),
        (b'{"prompt": "a", "x": ' + b"[" * 500 + b"]" * 500 + b"}", "line 1: .*nested at most 100 deep"),
        (b"\x00", "line 1: expected a JSON object"),
    ],
    ids=ascii,
)
def test_rows_that_are_damaged(tmp_path, data, message):
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        list(read_rows(tmp_path / "a.jsonl", ("prompt",)))
    assert "\n" not in str(error.value)


def test_a_verifier_looks_at_every_row_before_anything_runs(tmp_path, monkeypatch):
    """Through its `check`; file and line are named."""
    from carerl_kernels.train import domains

    class Picky:
        def check(self, example):
            if example.answer == "bad":
                raise ValueError("expected another answer")

        def __call__(self, example, completion):
            return 1.0

    monkeypatch.setattr(domains.Exact, "reward", lambda self, cache: Picky())
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "answer": "good"}\n\n{"prompt": "a", "answer": "bad"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3: expected another answer"):
        Exact(kind="exact", train="a.jsonl", eval_size=0).build("d", tmp_path, tmp_path)


SMALL = """run_dir: runs/x
model: {path: p}
domains: {NAME: {kind: judged, train: d.jsonl, judge: {url: "http://127.0.0.1:9/v1", model: m}}}
stages: [{domain: NAME, steps: 1}]
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ('"a\\0b"', "printable characters"),
        ('"a\\nb"', "printable characters"),
        ('"a\\u202eb"', "printable characters"),
        ("'..'", "begins with no dot"),
        ("'.hidden'", "begins with no dot"),
        ("' a'", "no blanks at its ends"),
        ("'../../../evil'", "a name without"),
        ("'a\\b'", "a name without"),
        ("'a+b'", "a name without"),
        ("x" * 150, "at most 100 bytes"),
        ("\u00e9" * 60, "at most 100 bytes"),
        ("''", "a non-empty name"),
    ],
    ids=ascii,
)
def test_names_that_no_file_can_have_are_refused_before_anything_runs(tmp_path, monkeypatch, name, message):
    from carerl_kernels.grpo import Domain
    from carerl_kernels.task import name_problem

    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(SMALL.replace("NAME", name), encoding="utf-8")
    with pytest.raises(RecipeError, match=f"{message}|expected a domain name"):
        load_recipe(tmp_path / "r.yaml")
    assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"]
    import yaml

    value = yaml.safe_load(name)
    assert name_problem(value) is not None
    with pytest.raises(ValueError, match=message):
        Domain(value, lambda rng, n: [], lambda e, t: 0.0)


@pytest.mark.parametrize("name", ["math", "gsm8k-de", "C++".replace("+", "p"), "數學", "a b", "<b>&chat", "x" * 100])
def test_names_that_files_can_have(tmp_path, name):
    (tmp_path / "r.yaml").write_text(SMALL.replace("NAME", json.dumps(name)), encoding="utf-8")
    assert list(load_recipe(tmp_path / "r.yaml").domains) == [name]


def test_mixed_stages_whose_name_no_file_can_have():
    from carerl_kernels.grpo import Stage

    with pytest.raises(ValueError, match="at most 200 bytes together"):
        Stage(tuple(c * 60 for c in "abcd"), 1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("run_dir: other\n", "every key once, found 'run_dir' twice"),
        ("train: {lr: 1e-3, lr: 2e-3}\n", "every key once, found 'lr' twice"),
        ("train: {lr: .inf}\n", "finite numbers, found inf"),
        ("train: {lr: -.inf}\n", "finite numbers, found -inf"),
        ("train: {lr: .nan}\n", "finite numbers, found nan"),
        ("guard: {bound: [1, .inf]}\n", "finite numbers, found inf"),
        ("train: {seed: " + "9" * 50 + "}\n", "at most 19 digits"),
        ("train: {seed: " + "9" * 5000 + "}\n", "cannot be read"),
        ("x: " + "[" * 100 + "]" * 100 + "\n", "nesting without end"),
        ("x: " + "[" * 20_000 + "\n", "cannot be read"),
        ("x: &a [*a]\n", "nesting without end"),
        ("a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
            f"{y}: &{y} [{','.join([f'*{x}'] * 10)}]\n" for x, y in zip("abcdefgh", "bcdefghi", strict=True)
        ), "found too much"),
        ("x: 2024-13-45\n", "cannot be read"),
        ("x: \x01\n", "unacceptable character"),
        ("x: !!python/object:os.system y\n", "could not determine a constructor"),
    ],
    ids=lambda v: ascii(v)[:40],
)  # fmt: skip
def test_recipes_that_are_damaged_are_one_sentence(tmp_path, more, message):
    (tmp_path / "r.yaml").write_text(SMALL.replace("NAME", "chat") + more)
    with pytest.raises(RecipeError, match=message) as error:
        load_recipe(tmp_path / "r.yaml")
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    (tmp_path / "r.yaml").write_bytes(SMALL.replace("NAME", "\u00e9").encode("latin-1"))
    with pytest.raises(RecipeError, match="expected UTF-8"):
        load_recipe(tmp_path / "r.yaml")


def test_overrides_are_as_strict(tmp_path):
    (tmp_path / "r.yaml").write_text("\ufeff" + SMALL.replace("NAME", "chat"), encoding="utf-8")
    assert load_recipe(tmp_path / "r.yaml", ["train.lr=1e-5"]).train.lr == 1e-5
    for override in ("train.lr=.inf", "train={lr: 1, lr: 2}", "train=" + "[" * 3000):
        with pytest.raises(RecipeError, match="override 'train"):
            load_recipe(tmp_path / "r.yaml", [override])
