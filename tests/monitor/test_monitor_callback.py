"""The monitor in TRL's GRPOTrainer: steps, gradients, the trainer's logs, checkpoints."""

import json
import types
import warnings
from pathlib import Path

import pytest
import torch
from carerl_kernels.monitor import DriftMonitor, JsonLines
from carerl_kernels.monitor.diagnose import diagnose
from carerl_kernels.monitor.report import RunRecord, build_page
from processes import start, wait

pytest.importorskip("trl")
pytest.importorskip("transformers")


@pytest.fixture
def train(tmp_path):
    from carerl_kernels.grpo import answer_loss, special_tokens, success_probability
    from carerl_kernels.monitor.callback import MonitorCallback
    from carerl_kernels.tasks.characters import character_tokenizer, demo_domains
    from datasets import Dataset
    from trainer_helpers import small_model
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = character_tokenizer()
    tokens = special_tokens(tokenizer, small_model(tokenizer, 0))
    domains = [d for d in demo_domains(0) if d.name != "math"]
    rows = [{"prompt": e.prompt, "answer": e.answer} for d in domains for e in d.probe_examples[:8]]

    def reward(prompts, completions, answer, **kwargs):
        return [
            float(sum(a == b for a, b in zip(c, x, strict=False))) for c, x in zip(completions, answer, strict=True)
        ]

    def run(name, steps, resume=False):
        model = small_model(tokenizer, 0)
        model.train()

        def evaluate():
            return {
                d.name: success_probability(model, tokenizer, d.eval_examples[:16], tokens, max_new_tokens=5).tolist()
                for d in domains
            }

        monitor = DriftMonitor(
            [d.name for d in domains],
            evaluate,
            every=2,
            model=model,
            gradients_every=2,
            split_every=1,
            snapshots=tmp_path / name / "snapshots",
            sinks=[JsonLines(tmp_path / name / "metrics.jsonl")],
        )
        losses = {d.name: lambda d=d: answer_loss(model, tokenizer, d.probe_examples[:4], tokens) for d in domains}
        settings = GRPOConfig(
            output_dir=str(tmp_path / "trl"),
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=4,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            max_steps=steps,
            logging_steps=1,
            save_steps=3,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            seed=0,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.add_callback(MonitorCallback(monitor, losses))
        trainer.train(resume_from_checkpoint=resume or None)
        return monitor, model

    return run, tmp_path


def test_trl_run_is_monitored_and_resumed(train):
    run, folder = train
    monitor, model = run("whole", 3)
    lines = [json.loads(text) for text in (folder / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert [("eval" in line, "gradients" in line.get("monitor", {})) for line in lines] == [
        (True, False),
        (False, False),
        (True, True),
        (False, False),
    ]
    assert all("reward" in line and "rewards/reward/mean" in line for line in lines[1:])
    assert set(lines[2]["monitor"]["gradients"]["cosine"]["batch"]) == {"code", "chat"}
    saved = json.loads((folder / "trl" / "checkpoint-3" / "monitor.json").read_text())
    split = lines[2]["monitor"]["split"]
    assert split["norm"] > 0 and set(split["odd"]) == set(split["even"]) == {"code", "chat"}
    assert saved["step"] == 3 and saved["watched"]["code"]["test"]["looks"] == 1

    again, _ = run("whole", 6, resume=True)
    assert again._watched["code"].test.looks == 3  # at steps 2, 4 and 6
    assert again._watched["code"].baselines[0] == pytest.approx(monitor._watched["code"].baselines[0])
    record = RunRecord.read(folder / "whole")
    assert [step for step, _ in record.found("monitor", "split")] == [2, 4, 6]
    assert [line["step"] for line in record.lines] == [0, 1, 2, 3, 4, 5, 6]
    page = build_page(record)
    assert {c.name for c in page.cards} == {"code", "chat"} and page.monitored
    assert torch.isfinite(next(model.parameters())).all()


@pytest.fixture
def plain(tmp_path):
    """transformers' own Trainer on a linear model, which costs next to nothing."""
    from carerl_kernels.monitor.callback import MonitorCallback
    from transformers import Trainer, TrainingArguments

    class Model(torch.nn.Linear):
        def forward(self, x, labels):
            return {"loss": (super().forward(x) - labels).square().mean()}

    def make(name, steps=2, **options):
        monitor = DriftMonitor(["x"], lambda: {"x": [0.5, 1.0]}, every=1, sinks=[JsonLines(tmp_path / "metrics.jsonl")])
        settings = TrainingArguments(
            output_dir=str(tmp_path / name),
            max_steps=steps,
            save_steps=2,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        data = [{"x": torch.ones(2), "labels": torch.ones(1)}] * 16
        trainer = Trainer(model=Model(2, 1), args=settings, train_dataset=data)
        trainer.add_callback(MonitorCallback(monitor, **options))
        return trainer, monitor

    return make, tmp_path


def steps_of(folder):
    return [line["step"] for line in RunRecord.read(folder).lines]


def test_a_second_training_with_the_same_callback_is_refused(plain):
    make, folder = plain
    trainer, monitor = make("one")
    trainer.train()
    before = monitor.state_dict()
    with pytest.raises(RuntimeError, match=r"begin after step 2.*found step 0.*new DriftMonitor"):
        trainer.train()
    assert monitor.state_dict()["step"] == before["step"] == 2
    trainer.args.max_steps = 3
    trainer.train(resume_from_checkpoint=True)  # goes on: nothing is counted twice
    assert monitor._watched["x"].test.looks == 3 and steps_of(folder) == [0, 1, 2, 3]


@pytest.mark.parametrize("told", ["callback", "arguments", "nobody"])
def test_the_state_is_found_in_a_checkpoint_elsewhere(plain, told):
    make, folder = plain
    make("one")[0].train()
    checkpoint = str(folder / "one" / "checkpoint-2")
    trainer, monitor = make("two", 3, **({"resume_from_checkpoint": checkpoint} if told == "callback" else {}))
    if told == "arguments":
        trainer.args.resume_from_checkpoint = checkpoint
    if told == "nobody":
        with pytest.warns(
            UserWarning, match=r"no monitor.json of step 2.*MonitorCallback\(..., resume_from_checkpoint=...\)"
        ):
            trainer.train(resume_from_checkpoint=checkpoint)
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    assert monitor._watched["x"].test.looks == (1 if told == "nobody" else 3)
    assert steps_of(folder) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("saved", "error", "message"),
    [(None, FileNotFoundError, "expected the state of a monitor"), (5, ValueError, "state of step 2.*found 5")],
)
def test_a_named_checkpoint_without_the_state_is_an_error(plain, saved, error, message):
    make, folder = plain
    make("one")[0].train()
    path = folder / "one" / "checkpoint-2" / "monitor.json"
    if saved is None:
        path.unlink()
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), "step": saved}))
    trainer, _ = make("two", 3, resume_from_checkpoint=path.parent)
    with pytest.raises(error, match=message):
        trainer.train(resume_from_checkpoint=str(path.parent))


def watched_on_a_disk_of_its_own(rank: int, folder: Path) -> None:
    import torch.distributed as dist
    from carerl_kernels.monitor.callback import MonitorCallback

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    warnings.simplefilter("error")  # the state must be found
    monitor = DriftMonitor(["x"], lambda: {"x": [0.5, 1.0]}, every=1)
    args = types.SimpleNamespace(output_dir=f"{folder}/disk-{rank}")
    state = types.SimpleNamespace(global_step=2, is_world_process_zero=rank == 0)
    MonitorCallback(monitor).on_train_begin(args, state, None)
    print(json.dumps([monitor.state_dict()[key] for key in ("step", "watched")]))
    dist.destroy_process_group()


def test_processes_without_a_shared_disk_go_on_with_the_first_ones_state(tmp_path):
    first = DriftMonitor(["x"], lambda: {"x": [0.5, 1.0]}, every=1)
    for step in range(3):
        first.step(step)
    checkpoint = tmp_path / "disk-0" / "checkpoint-2"  # and nothing on disk-1
    checkpoint.mkdir(parents=True)
    (checkpoint / "monitor.json").write_text(json.dumps(first.state_dict()))
    logs = [tmp_path / f"log-{rank}" for rank in range(2)]
    call = "test_monitor_callback.watched_on_a_disk_of_its_own"
    codes = wait([start(call, rank, tmp_path, log=log) for rank, log in enumerate(logs)], timeout=240)
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    told = [json.loads(log.read_text().splitlines()[-1]) for log in logs]
    assert told[0] == told[1] == [2, first.state_dict()["watched"]]


def test_figures_that_the_guarded_trainer_logs_by_domain_reach_report_and_diagnosis(tmp_path):
    from carerl_kernels.monitor.callback import MonitorCallback

    path = tmp_path / "metrics.jsonl"
    scores = iter([0.9, 0.2])
    monitor = DriftMonitor(["a/b"], lambda: {"a/b": [next(scores)] * 64}, every=6, sinks=[JsonLines(path)])
    callback = MonitorCallback(monitor)
    callback._observe(0)
    for step in range(1, 7):
        logs = {"domain/a/b/reward": 0.0, "domain/a/b/frac_reward_zero_std": 1.0, "domain/a/b/share": 1.0, "loss": 0.5}
        callback.on_log(None, None, None, {**logs, "domain/a/b/entropy": 0.1})
        callback._observe(step)
    record = RunRecord.read(tmp_path)
    assert record.series("rewards", "a/b") == [(step, 0.0) for step in range(1, 7)]
    assert record.series("loss") == [(step, 0.5) for step in range(1, 7)]
    assert "dead groups" in [cause.name for cause in diagnose(tmp_path).causes]


@pytest.mark.parametrize("domain", [None, "new"])
def test_a_run_of_one_domain_is_known_by_its_name(tmp_path, domain):
    """A supervised trainer logs no domains: who is told what it trains names the stage that others fell in."""
    from carerl_kernels.monitor.callback import MonitorCallback

    scores = iter([0.9, 0.2])
    sinks = [JsonLines(tmp_path / "metrics.jsonl")]
    callback = MonitorCallback(
        DriftMonitor(["old"], lambda: {"old": [next(scores)] * 64}, every=6, sinks=sinks), domain=domain
    )
    for step in range(7):
        callback.on_log(None, None, None, {"loss": 0.5})
        callback._observe(step)
    record = RunRecord.read(tmp_path)
    assert [(s.name, s.first, s.last) for s in record.spans] == ([] if domain is None else [("new", 1, 6)])
    causes = {cause.name: cause for cause in diagnose(tmp_path).causes}
    assert ("unprotected stage" in causes) == (domain is not None)
