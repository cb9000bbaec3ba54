"""What the trainer offers against forgetting besides the guard: rehearsal, gradients per domain, interpolation, shares."""

import itertools
import random
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
from carerl_kernels.grpo import GRPOConfig, GRPOTrainer, Stage, answer_loss, prompt_counts, special_tokens
from carerl_kernels.guard import CapabilityGuard
from carerl_kernels.guard.editors import GramEditor, PCGrad
from carerl_kernels.tasks.characters import character_domain, character_tokenizer, demo_domains
from carerl_kernels.train.memory import StoredReplay
from trainer_helpers import small_model

BASE = {
    "prompts_per_step": 6,
    "group_size": 4,
    "max_new_tokens": 4,
    "lr": 1e-3,
    "max_grad_norm": 0.0,
    "seed": 3,
    "progress": False,
    "plots": False,
}
MIXED = Stage(("code", "chat", "math"), 2)
MEAN = GramEditor(lambda gram: torch.full((gram.shape[0],), 1 / gram.shape[0], dtype=torch.float64))


def noisy(judge, rng):
    """Every group disagrees, so that an untrained model has a gradient."""
    return lambda example, text: judge(example, text) + rng.random()


def train(
    stages, *, editor=None, guarded=False, run_dir=None, resume=False, on_step=None, domains=None, sgd=False, **changes
):
    tokenizer, rng = character_tokenizer(), random.Random(1)
    model = small_model(tokenizer, 0)
    if domains is None:
        domains = demo_domains(0)
        for domain in domains:
            domain.eval_examples, domain.probe_examples = domain.eval_examples[:4], domain.probe_examples[:3]
            domain.reward = noisy(domain.reward, rng)
    make = (lambda parameters: torch.optim.SGD(parameters, lr=1.0)) if sgd else None
    trainer = GRPOTrainer(
        model,
        tokenizer,
        domains,
        GRPOConfig(**(BASE | changes)),
        editor=editor,
        guard=CapabilityGuard(model, k=4) if guarded else None,
        run_dir=run_dir,
        make_optimizer=make,
        on_step=on_step,
    )
    trainer.run(stages, resume=resume)
    return trainer


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).double()


def start():
    model = small_model(character_tokenizer(), 0)
    return model, torch.cat([p.detach().flatten() for p in model.parameters()]).double()


@pytest.mark.parametrize("loss", ["grpo", "dapo"])
def test_the_mean_of_gradients_per_domain_is_the_gradient_of_the_batch(loss):
    plain, edited = (train([MIXED], editor=editor, sgd=True, loss=loss) for editor in (None, MEAN))
    moved = weights(plain) - start()[1]
    assert moved.norm() > 1e-3
    assert (weights(edited) - weights(plain)).norm() < 1e-4 * moved.norm()
    for a, b in zip(plain.history, edited.history, strict=True):
        if a["stage"]:
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
            assert a["kl"] == pytest.approx(b["kl"], abs=1e-6)


def test_a_batch_of_one_domain_needs_no_editor():
    assert torch.equal(weights(train([Stage("code", 2)])), weights(train([Stage("code", 2)], editor=PCGrad())))


def test_the_order_of_pcgrad_survives_an_interruption(tmp_path):
    def stop(line):
        if line["step"] == 3:
            raise KeyboardInterrupt

    stage, kept = Stage(("code", "chat", "math"), 4), {"checkpoint_every": 2}
    for part in (stop, None):
        try:
            resumed = train([stage], editor=PCGrad(), run_dir=tmp_path, resume=True, on_step=part, **kept)
        except KeyboardInterrupt:
            continue
    whole = train([stage], editor=PCGrad(), **kept)
    # rewards draw from a generator of the test's own, which starts anew: what PCGrad drew is compared
    assert resumed.editor.state_dict() == whole.editor.state_dict()


def test_rehearsal_adds_the_gradient_of_the_stored_answers():
    """One step of plain SGD in the second stage, with and without: they differ by the weighted gradient, by autograd."""
    stages, weight = [Stage("code", 1, lr=1e-9), Stage("chat", 1)], 0.7
    changes = {"warmup_steps": 0, "decay": "constant", "lr": 0.5}
    domains = demo_domains(0)
    stored = list(domains[0].probe_examples)[:3]
    plain, rehearsed = (
        train(stages, sgd=True, rehearsal_weight=w, rehearsal_batch=32, **changes) for w in (0.0, weight)
    )
    model, _ = start()
    tokenizer = character_tokenizer()
    answer_loss(model, tokenizer, stored, special_tokens(tokenizer, model)).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    difference = weights(rehearsed) - weights(plain)
    expected = -changes["lr"] * weight * gradient
    assert (difference - expected).norm() < 1e-3 * expected.norm()


def test_rehearsal_without_stored_answers_says_what_is_missing():
    domains = demo_domains(0)
    for domain in domains:
        domain.probe_examples = ()
    with pytest.raises(ValueError, match=r"earlier domains code: expected probe_examples"):
        train([Stage("code", 1), Stage("chat", 1)], domains=domains, rehearsal_weight=1.0)


def test_interpolation_ends_a_stage_between_its_start_and_its_end():
    whole, half = (train([Stage("code", 2)], stage_interpolation=a) for a in (1.0, 0.25))
    first = start()[1]
    torch.testing.assert_close(weights(half), first + 0.25 * (weights(whole) - first), rtol=0, atol=1e-6)
    assert half.history[-1]["eval"] != whole.history[-1]["eval"]


def test_a_last_stage_that_is_not_recorded_trains_the_same(tmp_path):
    stages = [Stage("code", 2), Stage("chat", 2)]
    runs = {
        record: train(stages, guarded=True, run_dir=tmp_path / str(record), record_last=record)
        for record in (True, False)
    }
    assert torch.equal(weights(runs[True]), weights(runs[False]))
    files = {record: {p.name for p in (tmp_path / str(record) / "bases").glob("*.safetensors")} for record in runs}
    assert files == {True: {"code.safetensors", "chat.safetensors"}, False: {"code.safetensors"}}
    again = train(stages, guarded=True, run_dir=tmp_path / "False", resume=True, record_last=False)
    assert torch.equal(weights(again), weights(runs[False]))


def test_shares_hold_over_many_steps_and_nearly_in_each():
    shares = (1.0, 1.0, 6.0)
    steps = [prompt_counts(("a", "b", "c"), (), 16, 0.0, step, shares) for step in range(50)]
    assert all(sum(counts.values()) == 16 for counts in steps)
    for name, share in zip("abc", shares, strict=True):
        assert sum(c.get(name, 0) for c in steps) == pytest.approx(50 * 16 * share / 8, abs=2)
        assert all(abs(c.get(name, 0) - 2 * share) <= 2 for c in steps)
    with pytest.raises(ValueError, match="positive share per domain"):
        Stage(("a", "b"), 1, shares=(1.0,))


def test_stored_prompts_are_all_that_is_left_of_a_domain_after_its_stage():
    domain = character_domain("code", "code", seed=0, stored=4)
    replay = StoredReplay([Stage("code", 5), Stage("chat", 5), Stage(("code", "math"), 5)])
    limited, trainer = replay.limit(domain), SimpleNamespace(history=[])
    replay.follow(trainer)
    kept = {e.prompt for e in limited.probe_examples}
    assert len(kept) == 4

    def drawn():
        return {e.prompt for e in limited.draw(random.Random(0), 64)}

    seen = {}
    for step, stage in itertools.zip_longest((0, 4, 5, 9, 10), "aabbc"):
        trainer.history = [{"step": step}]  # another list where a run goes on
        seen.setdefault(stage, []).append(drawn())
    assert all(len(prompts) > 32 for prompts in seen["a"] + seen["c"])
    assert all(prompts <= kept for prompts in seen["b"])
