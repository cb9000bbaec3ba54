"""The monitor in TRL's GRPOTrainer: steps, gradients, the trainer's logs, checkpoints."""

import json

import pytest
import torch
from carerl_kernels.monitor import DriftMonitor, JsonLines
from carerl_kernels.monitor.report import RunRecord, build_page

pytest.importorskip("trl")
pytest.importorskip("transformers")


@pytest.fixture
def train(tmp_path):
    from carerl_kernels.demo.tasks import character_tokenizer, demo_domains, tiny_model
    from carerl_kernels.grpo import answer_loss, special_tokens, success_probability
    from carerl_kernels.monitor.callback import MonitorCallback
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = character_tokenizer()
    tokens = special_tokens(tokenizer, tiny_model(tokenizer, 0))
    domains = [d for d in demo_domains(0) if d.name != "math"]
    rows = [{"prompt": e.prompt, "answer": e.answer} for d in domains for e in d.probe_examples[:8]]

    def reward(prompts, completions, answer, **kwargs):
        return [
            float(sum(a == b for a, b in zip(c, x, strict=False))) for c, x in zip(completions, answer, strict=True)
        ]

    def run(name, steps, resume=False):
        model = tiny_model(tokenizer, 0)
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
    assert saved["step"] == 3 and saved["watched"]["code"]["test"]["looks"] == 1

    again, _ = run("whole", 6, resume=True)
    assert again._watched["code"].test.looks == 3  # at steps 2, 4 and 6
    assert again._watched["code"].baselines[0] == pytest.approx(monitor._watched["code"].baselines[0])
    record = RunRecord.read(folder / "whole")
    assert [line["step"] for line in record.lines] == [0, 1, 2, 3, 4, 5, 6]
    page = build_page(record)
    assert {c.name for c in page.cards} == {"code", "chat"} and page.monitored
    assert torch.isfinite(next(model.parameters())).all()
