"""Balance of mixed batches behind TRL's trainer: weights of advantages, what TRL cannot do, exact resume."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'carerl-kernels[trl]'")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

from carerl_kernels.integrations.balance import AdvantageBalance
from carerl_kernels.integrations.trl import CareGRPOTrainer
from carerl_kernels.monitor import Controller, DriftMonitor
from carerl_kernels.monitor.callback import MonitorCallback
from trainer_helpers import small_model
from trl_helpers import TOKENIZER, rows, settings, trainer

NAMES = ["chat", "code", "math"]
UNDIVIDED = {"scale_rewards": "none", "loss_type": "dr_grpo", "per_device_train_batch_size": 12}


def loud(prompts, completions, domain, **_):
    draw = random.Random(repr((prompts, completions)))
    return [(10.0 if d == "chat" else 1.0) * draw.random() for d in domain]


def run(folder, steps=6, **options):
    changes = options.pop("changes", {})
    return CareGRPOTrainer(
        model=small_model(TOKENIZER, 0),
        reward_funcs=[loud],
        args=settings(folder, **{**UNDIVIDED, "max_steps": steps, **changes}),
        train_dataset=rows(),
        processing_class=TOKENIZER,
        **options,
    )


def late(training):
    """Mean share of the loud domain over the last mixed steps."""
    lines = [line for line in training.state.log_history if "domain/chat/step_share" in line]
    return sum(line["domain/chat/step_share"] for line in lines[-3:]) / len(lines[-3:]), lines[-1]


def test_loud_rewards_are_evened_out(tmp_path):
    plain, balanced = run(tmp_path / "plain"), run(tmp_path / "balanced", balance="gradient")
    for training in (plain, balanced):
        training.train()
    share, line = late(plain)
    assert share > 0.9 and line["domination"] > 1.8 and "domain/chat/weight" not in line
    share, line = late(balanced)
    assert share < 0.8 and line["domain/chat/weight"] < 1


def test_a_resumed_run_has_the_same_weights(tmp_path):
    saved = {"changes": {"save_strategy": "steps", "save_steps": 3}, "balance": "gradient"}
    whole = run(tmp_path, **saved)
    whole.train()
    again = run(tmp_path, **saved)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again._balance.norms.state_dict() == whole._balance.norms.state_dict()
    for p, q in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q)
    (tmp_path / "checkpoint-3" / "balance.json").unlink()
    with pytest.raises(FileNotFoundError, match="balance='gradient' in the checkpoint"):
        run(tmp_path, **saved).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_controller_weighs_and_goes_on_from_a_checkpoint(tmp_path):
    def made(steps):
        controller = Controller(NAMES, by="weight", errors=0.0)
        monitor = DriftMonitor(
            NAMES,
            lambda: {"chat": [0.9, 0.8], "code": [0.5, 0.6], "math": [0.9, 0.9]},
            every=1,
            baseline={"chat": 0.2, "code": 0.9, "math": 0.5},
            controller=controller,
        )
        training = run(tmp_path, steps, balance=controller, changes={"save_strategy": "steps", "save_steps": 3})
        training.add_callback(MonitorCallback(monitor))
        return training, controller

    whole, controller = made(6)
    whole.train()
    assert controller.factors["code"] > 3 and controller.factors["math"] == 1
    lines = [line for line in whole.state.log_history if {"domain/code/weight", "domain/math/weight"} <= line.keys()]
    assert lines and lines[-1]["domain/code/weight"] > 1.4 * lines[-1]["domain/math/weight"]
    resumed, other = made(6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert other.factors == controller.factors
    for p, q in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("balance", ["shares", "controller", Controller(NAMES, by="share")])
def test_what_trl_has_no_place_for_is_refused_by_name(tmp_path, balance):
    with pytest.raises(ValueError, match="TRL's sampler of the data set decides which prompts come"):
        trainer(tmp_path, balance=balance)
    with pytest.raises(ValueError, match="expected two or more domains"):
        trainer(tmp_path, rows(["math"]), balance="gradient")


def test_processes_weigh_alike():
    """Energies are summed over processes: each of two with half of the rows weighs as one with all of them."""
    draw = torch.Generator().manual_seed(0)
    advantages, ids = torch.randn(12, generator=draw), torch.randint(0, 2, (12,), generator=draw)
    advantages[ids == 0] *= 10
    whole = AdvantageBalance("gradient", ["a", "b"])
    expected, logs = whole.weigh(advantages, ids, lambda sums: sums)
    parts = [(advantages[::2], ids[::2]), (advantages[1::2], ids[1::2])]
    sums = []
    for part in parts:
        seen = []
        AdvantageBalance("gradient", ["a", "b"]).weigh(*part, lambda s, seen=seen: seen.append(s) or s)
        sums.append(seen[0])
    for (a, i), place in zip(parts, (slice(0, None, 2), slice(1, None, 2)), strict=True):
        found, _ = AdvantageBalance("gradient", ["a", "b"]).weigh(a, i, lambda s: sums[0] + sums[1])
        assert torch.allclose(found, expected[place])
    assert logs["domain/a/step_share"] == pytest.approx(0.5, abs=1e-5) and logs["domination"] == pytest.approx(
        1, abs=1e-5
    )


def test_a_loud_domain_is_named_once_with_trls_own_setting(caplog):
    balance = AdvantageBalance(None, ["a", "b"])
    ids = torch.tensor([0, 0, 1, 1])
    for _ in range(100):
        balance.weigh(torch.tensor([10.0, -10.0, 0.1, -0.1]), ids, lambda sums: sums)
    (told,) = [record.message for record in caplog.records]
    assert "a has 100% of the step budget" in told and "scale_rewards='group'" in told
    assert "advantages=" not in told
