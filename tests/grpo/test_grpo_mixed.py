"""Mixed stages of the trainer: the guard on each domain's part, advantages by domain, resume, records, warnings."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from carerl_kernels.grpo import GRPOConfig, GRPOTrainer, Stage
from carerl_kernels.grpo.learner import Learner
from carerl_kernels.grpo.rollout import rollout
from safetensors.torch import load_file

pytest.importorskip("transformers")
from carerl_kernels.guard import CapabilityGuard
from carerl_kernels.tasks.characters import character_tokenizer, demo_domains
from trainer_helpers import Killed, kill_at, metrics, small_model

SETTINGS = {
    "prompts_per_step": 6,
    "group_size": 3,
    "max_new_tokens": 4,
    "lr": 1e-2,
    "warmup_steps": 1,
    "eval_every": 2,
    "checkpoint_every": 1,
    "seed": 3,
    "progress": False,
    "plots": False,
}
MIXED = Stage(("code", "chat", "math"), 3)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def domains():
    out = demo_domains(0)
    for scale, domain in enumerate(out, 1):
        domain.eval_examples = domain.eval_examples[:4]
        domain.reward = lambda example, text, scale=scale: 10.0**scale * (sum(map(ord, text)) % 7)
    return out


def trainer(path=None, *, guarded=True, on_step=None, editor="guard", **changes):
    tokenizer = character_tokenizer()
    model = small_model(tokenizer, 0)
    guard = CapabilityGuard(model, r=4) if guarded else None
    config = GRPOConfig(**(SETTINGS | changes))
    return GRPOTrainer(model, tokenizer, domains(), config, guard=guard, editor=editor, run_dir=path, on_step=on_step)


def bases(path):
    return {str(f.relative_to(path)): load_file(f) for f in sorted(path.rglob("bases/**/*.safetensors"))}


STAGES = [Stage("code", 2), MIXED, Stage("math", 2)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody interrupts."""
    run = trainer(tmp_path_factory.mktemp("whole"))
    run.run(STAGES)
    return run


@pytest.mark.parametrize("step", [2, 5, 6])
def test_resume_is_bitwise_exact(tmp_path, step, whole):
    """Killed before, in and after a mixed stage: directions seen before it are files, those seen after it are made again."""
    with pytest.raises(Killed):
        trainer(tmp_path, on_step=kill_at(step)).run(STAGES)
    torch.manual_seed(step)
    resumed = trainer(tmp_path)
    resumed.run(STAGES, resume=True)
    assert metrics(tmp_path) == metrics(whole.directory.path)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    ours, theirs = bases(tmp_path), bases(whole.directory.path)
    assert ours.keys() == theirs.keys()
    assert {f"bases/code+chat+math/{n}.safetensors" for n in MIXED.domains} < ours.keys()
    assert {f"bases/code+chat+math.before/{n}.safetensors" for n in ("chat", "math")} < ours.keys()
    assert all(torch.equal(ours[f][n], theirs[f][n]) for f in ours for n in ours[f])
    assert resumed.guard.history == whole.guard.history == ["code", "chat", "math"]


def gradients(run, takes_rows, **changes):
    learner = run._learner
    learner.by_domain, learner.takes_rows = True, takes_rows
    learner.config = learner.config.model_copy(update=changes)
    batch = rollout(
        run.model,
        run.tokenizer,
        learner.tokens,
        learner.domains,
        {"code": 3, "math": 2},  # chat is missing
        learner.config,
        rng=type(learner.rng)(5),
        advantages="none",
    )
    rows = torch.arange(len(batch.texts))
    run.model.zero_grad()
    loss, stats, _ = learner._gradients(batch, rows, None, None)
    return loss, stats.tokens, [p.grad.clone() for p in run.model.parameters()]


@pytest.mark.parametrize("changes", [{}, {"micro_batch_size": 4}, {"micro_batch_tokens": 60}])
def test_row_by_row_and_domain_by_domain_are_one_gradient(changes):
    run = trainer()
    run._views.before(run.guard, "x", MIXED.domains, False)
    loss, tokens, rows = gradients(run, True, **changes)
    assert run._learner.takes_rows
    other, other_tokens, passes = gradients(run, False, **changes)
    assert loss == pytest.approx(other, abs=1e-3) and tokens == other_tokens  # of terms of 1e3 that cancel
    scale = max(float(p.abs().max()) for p in passes)
    for a, b in zip(rows, passes, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6 * scale, rtol=1e-3)


def test_a_model_whose_weights_are_used_otherwise_is_passed_domain_by_domain():
    run = trainer()
    run._views.before(run.guard, "x", MIXED.domains, False)
    layer = run.model.model.layers[0].mlp
    layer.forward = lambda x: layer.down_proj(
        layer.act_fn(layer.gate_proj(x)) * torch.nn.functional.linear(x, layer.up_proj.weight)
    )
    loss, _, found = gradients(run, True)
    assert not run._learner.takes_rows
    other, _, passes = gradients(run, False)
    assert loss == other and all(torch.equal(a, b) for a, b in zip(found, passes, strict=True))


def test_clipping_comes_after_the_edit():
    run = trainer(max_grad_norm=1e-3)
    run.run([MIXED])
    assert all(line["grad_norm"] > 1e-3 for line in run.history[1:])
    assert run.guard.report()["steps"] == 3


def test_advantages_of_mixed_stages_are_divided_by_the_domain_s_spread():
    """Whoever has the largest rewards must not take the step; stages of one domain stay as they were."""
    for loss in ("grpo", "dr_grpo"):
        config = GRPOConfig(loss=loss)
        assert config.advantage_mode(mixed=True) == "domain"
        assert config.advantage_mode() == ("none" if loss == "dr_grpo" else "group")
    assert GRPOConfig(advantages="none").advantage_mode(mixed=True) == "none"
    run, seen = trainer(guarded=False, editor=None, loss="dr_grpo", replay_fraction=0.5), []

    class Spy(Learner):
        def _fixed_logprobs(self, batch):
            seen.append({d: batch.advantages[[n == d for n in batch.domains]].abs().max() for d in batch.domains})
            return super()._fixed_logprobs(batch)

    run._learner.__class__ = Spy
    run.run([Stage("code", 1), Stage("math", 1), Stage(("code", "math"), 1)])
    _, pooled, mixed = seen
    assert pooled["math"] > 10 * pooled["code"]  # replayed prompts of a stage of one domain
    assert 0.2 < mixed["math"] / mixed["code"] < 5


def test_mixed_batches_without_the_editor_are_warned_of_once():
    run = trainer(editor=None)
    with pytest.warns(UserWarning, match=r"mixes code, chat, math: .*of code too.*editor='guard'"):
        run.run([Stage("code", 1), MIXED])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(editor=None).run([Stage("code", 1), Stage(("chat", "math"), 1)])


def test_the_editor_is_a_setting_too(tmp_path):
    tokenizer = character_tokenizer()
    model = small_model(tokenizer, 0)
    config = GRPOConfig(**SETTINGS, editor="guard")
    run = GRPOTrainer(model, tokenizer, domains(), config, guard=CapabilityGuard(model, r=4), run_dir=tmp_path / "a")
    run.run([MIXED])
    assert json.loads((tmp_path / "a" / "config.json").read_text())["editor"] == "guard"
    given = trainer(tmp_path / "b")
    given.run([MIXED])
    assert [line["loss"] for line in metrics(tmp_path / "a")[1:]] == [
        line["loss"] for line in metrics(tmp_path / "b")[1:]
    ]
    with pytest.raises(ValueError, match="expected a guard, found guard=None"):
        trainer(guarded=False)
