"""TRL's GRPOTrainer behind the guard: the same losses and the same steps as the reference trainer, domains, stages, resume."""

from __future__ import annotations

import contextlib
import json
import math
import re

import pytest
import torch
from places import DOCS

pytest.importorskip("trl", reason="trl is not installed: pip install 'carerl-kernels[trl]'")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:basis of domain 'math' ends at weights")

import datasets
import trl
from carerl_kernels import CapabilityGuard
from carerl_kernels.grpo import completion_logprobs, policy_loss
from carerl_kernels.guard.editors import PCGrad
from carerl_kernels.integrations.transformers import GuardCallback
from carerl_kernels.integrations.trl import CareGRPOTrainer
from carerl_kernels.subspace import DomainBasis
from carerl_kernels.tasks.characters import DOMAINS
from trainer_helpers import small_model
from trl_helpers import TOKENIZER, Watched, reference_gradients, rows, trainer

KINDS = {  # ours: TRL's settings
    "grpo": {"loss_type": "grpo", "importance_sampling_level": "token"},
    "dr_grpo": {"loss_type": "dr_grpo", "importance_sampling_level": "token"},
    "dapo": {"loss_type": "dapo", "importance_sampling_level": "token"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
}


def batch(domains=3, size=9, width=5, seed=0):
    """A micro-batch as TRL's loss gets it: ragged, off-policy, with a reference."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, len(TOKENIZER), (size, 6 + width), generator=generator)
    lengths = torch.randint(1, width + 1, (size,), generator=generator)
    mask = (torch.arange(width) < lengths[:, None]).long()
    prompt_mask = (torch.arange(6) >= torch.randint(0, 3, (size, 1), generator=generator)).long()
    return {
        "prompt_ids": ids[:, :6] * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": ids[:, 6:] * mask,
        "completion_mask": mask,
        "advantages": torch.randn(size, generator=generator),
        "num_items_in_batch": mask.sum(),
        "noise": torch.randn(2, size, width, generator=generator) * 0.2
        + torch.randn(2, size, 1, generator=generator) * 0.3,
        "domain_ids": torch.randint(0, domains, (size,), generator=generator),
    }


def off_policy(model, inputs):
    """Adds old and reference log-probabilities near the model's own, so that some ratios are clipped and some are not."""
    with torch.no_grad():
        logp = logprobs(model, inputs)
    old, ref = inputs.pop("noise")
    return {**inputs, "old_per_token_logps": logp + old, "ref_per_token_logps": logp + ref}


def logprobs(model, inputs):
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    return completion_logprobs(model, ids, mask, inputs["completion_ids"].shape[1])


def set_loss(run, kind, beta=0.0, **more):
    run.beta, run.current_gradient_accumulation_steps = beta, 1
    for name, value in {**KINDS.get(kind, {"loss_type": kind, "importance_sampling_level": "token"}), **more}.items():
        setattr(run, name, value)
    run.model.train()
    run.model.zero_grad()


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def assert_close(a, b, bound):
    assert len(a) == len(b) > 0
    gap = max(float((x.detach().double() - y.detach().double()).abs().amax()) for x, y in zip(a, b, strict=True))
    assert gap <= bound


@pytest.fixture(scope="module")
def idle(tmp_path_factory):
    """A trainer whose loss is asked for by hand. TRL weights its KL by the ratio unless told otherwise."""
    return trainer(tmp_path_factory.mktemp("idle"), editor=PCGrad(), changes={"use_bias_correction_kl": False})


@pytest.fixture(scope="module")
def math_file(tmp_path_factory):
    """A stage recorded by TRL."""
    folder = tmp_path_factory.mktemp("math")
    options = {"guard": lambda m: CapabilityGuard(m, k=4), "stage": "math", "stage_path": folder / "math.safetensors"}
    run = trainer(folder, rows(["math"]), changes={"max_steps": 6}, **options)
    run.train()
    assert run.guard.history == ["math"]
    return folder / "math.safetensors"


# --------------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_trl_s(idle, kind, beta):
    """Same batch, same loss, with and without KL: TRL's own `_compute_loss` against the reference trainer's."""
    inputs = off_policy(idle.model, batch())
    set_loss(idle, kind, beta)
    theirs = super(CareGRPOTrainer, idle)._compute_loss(idle.model, inputs)
    theirs.backward()
    want = gradients(idle.model)
    idle.model.zero_grad()
    ours, stats = policy_loss(
        logprobs(idle.model, inputs),
        inputs["old_per_token_logps"],
        inputs["advantages"],
        inputs["completion_mask"],
        kind=kind,
        clip_low=idle.epsilon_low,
        clip_high=idle.epsilon_high,
        max_tokens=idle.max_completion_length,
        ref_logp=inputs["ref_per_token_logps"],
        kl_beta=beta,
    )
    ours.backward()
    assert 0 < stats.clipped < stats.units  # both branches were there
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-5)
    assert_close(gradients(idle.model), want, 1e-5)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo", "gspo", "bnpo", "cispo"])
def test_domains_gradients_add_up_to_the_whole(idle, kind):
    """KL and entropy bonus included, each counted once; the loss and TRL's metrics too."""
    inputs = off_policy(idle.model, batch())
    set_loss(idle, kind, 0.1, _entropy_bonus_enabled=True, entropy_coef=0.05)
    idle._metrics["train"].clear()
    idle.accelerator.gradient_state._set_sync_gradients(True)
    plain = super(CareGRPOTrainer, idle)._compute_loss(idle.model, inputs)
    plain.backward()
    want, once = gradients(idle.model), {k: v[-1] for k, v in idle._metrics["train"].items()}
    idle.model.zero_grad()
    idle._metrics["train"].clear()
    seen = {}

    class Sum:
        def combine(self, gradients):
            seen.update(gradients)
            return [torch.stack(parts).mean(0) for parts in zip(*gradients.values(), strict=True)]

    idle._losses.editor = Sum()
    idle._losses.begin()
    last = idle._losses.backward_all_but_last(idle.model, inputs)
    last.backward()
    plain, total = plain.detach(), last.detach() + idle._losses.after_backward()
    idle._losses.combine()
    idle._entropy_bonus_enabled = False
    assert list(seen) == ["chat", "code", "math"]
    assert float(total) == pytest.approx(float(plain), abs=1e-5)
    assert_close(gradients(idle.model), want, 2e-6)
    metrics = {k: v for k, v in idle._metrics["train"].items() if not k.startswith("domain/")}
    assert all(len(values) == 1 for values in metrics.values())
    for name in ("kl", "entropy", "clip_ratio/high_max"):
        if name in once and not (kind == "gspo" and "clip" in name):
            assert metrics[name][0] == pytest.approx(once[name], rel=1e-5)


def test_entropy_and_kl_per_domain_are_those_of_its_tokens(idle):
    inputs = off_policy(idle.model, batch())
    set_loss(idle, "grpo", 0.1)
    idle._metrics["train"].clear()
    idle._compute_loss(idle.model, inputs)
    logp, mask = logprobs(idle.model, inputs).detach().double(), inputs["completion_mask"].double()
    delta = inputs["ref_per_token_logps"].double() - logp
    kl = (delta.exp() - delta - 1) * mask
    for i, name in enumerate(idle.domain_names):
        mine = inputs["domain_ids"] == i
        (got,) = idle._metrics["train"][f"domain/{name}/kl"]
        assert got == pytest.approx(float(kl[mine].sum() / mask[mine].sum()), rel=1e-4)
    entropies = [idle._metrics["train"][f"domain/{n}/entropy"][0] for n in idle.domain_names]
    weights = [float(mask[inputs["domain_ids"] == i].sum()) for i in range(3)]
    whole = sum(e * w for e, w in zip(entropies, weights, strict=True)) / sum(weights)
    assert whole == pytest.approx(idle._metrics["train"]["entropy"][0], rel=1e-5)


# --------------------------------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("mode", ["update", "grad"])
def test_guarded_steps_are_the_reference_trainer_s(math_file, tmp_path, mode, parts):
    """Same model, batches and guard: same parameters after every step, with TRL's clipping before an update edit and after a
    gradient edit, and with accumulation.

    Plain SGD, because Adam divides every element by its own size: of one that is all rounding the sign is chance, and what
    order torch sums in would decide how far the two are apart. Here they are apart by the rounding of the gradients.
    """
    lr, norm, steps = 0.5, 0.05, 3

    def make(model):
        rule = {"rule": "bounded", "every": 1} if mode == "update" else {"rule": "remove", "apply_to": "grad"}
        return CapabilityGuard.load(math_file, model=model, **rule)

    start = small_model(TOKENIZER, 0)
    run = trainer(
        tmp_path,
        rows(["chat"]),
        small_model(TOKENIZER, 0),
        kind=Watched,
        changes={
            "max_grad_norm": norm,
            "gradient_accumulation_steps": parts,
            "loss_type": "grpo",
            "learning_rate": lr,
            "optim": "sgd",
            "max_steps": steps,
        },
        guard=make,
    )
    run.seen = []
    run.train()
    assert run.args.max_grad_norm == norm  # given back
    guard = make(start)
    guard.max_grad_norm = norm if mode == "grad" else None
    optimizer = torch.optim.SGD(start.parameters(), lr=lr)
    guard.attach(optimizer)
    for step in range(steps):
        optimizer.zero_grad()
        reference_gradients(start, run.seen[step * parts : (step + 1) * parts])
        if mode == "update":
            assert float(torch.nn.utils.clip_grad_norm_(start.parameters(), norm)) > norm
        with guard.domain("chat"):
            optimizer.step()
    # A sum of some hundred terms in another order is off by some hundred roundings of the whole, at worst; and every step rounds
    # the parameters, which are smaller than 1, twice.
    eps = torch.finfo(torch.float32).eps
    assert_close(list(run.model.parameters()), list(start.parameters()), steps * eps * (300 * lr * norm + 2))
    mine, theirs = guard.report(), run.guard.report()
    assert theirs["steps"] == 3
    if mode == "grad":
        energies = [of["domains"]["math"]["energy"]["aligned"] for of in (mine, theirs)]
        assert energies[0] == pytest.approx(energies[1], abs=1e-3)
    if mode == "update":
        assert theirs["domains"]["math"]["net_displacement"] > 0


def test_guard_as_editor_takes_each_domain_s_gradient_by_itself(math_file, tmp_path):
    """B = D: rows of math act on the gradients of chat and code, not on that of math; TRL clips the sum."""

    run = trainer(
        tmp_path,
        kind=Watched,
        changes={
            "gradient_accumulation_steps": 2,
            "max_steps": 1,
            "per_device_train_batch_size": 12,
            "loss_type": "grpo",
        },
        guard=lambda m: CapabilityGuard.load(math_file, model=m, rule="remove", apply_to="grad"),
        editor="guard",
    )
    run.seen, start = [], small_model(TOKENIZER, 0)
    edits, combine = [], run._losses.combine

    def keep():
        combine()
        edits.append(gradients(run.model))

    run._losses.combine = keep
    run.train()
    assert len(set(torch.cat([s["domain_ids"] for s in run.seen]).tolist())) == 3
    guard = CapabilityGuard.load(math_file, model=start, rule="remove", apply_to="grad")
    want = None
    for i, name in enumerate(run.domain_names):
        start.zero_grad()
        for part in run.seen:
            mine = {**part, "advantages": part["advantages"] * (part["domain_ids"] == i)}
            loss = reference_gradients(start, [mine])
            assert math.isfinite(loss)
        grads = [g / 2 for g in gradients(start)]
        if name != "math":
            guard.remove_(grads)
        want = grads if want is None else [a + b for a, b in zip(want, grads, strict=True)]
    assert_close(edits[0], want, 1e-6)


def test_editors_run_and_log(tmp_path):
    run = trainer(tmp_path, changes={"per_device_train_batch_size": 12}, editor=PCGrad())
    before = [p.detach().clone() for p in run.model.parameters()]
    run.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
    line = next(entry for entry in run.state.log_history if "loss" in entry)
    assert line["grad_norm"] > 0 and math.isfinite(line["loss"])


# --------------------------------------------------------------------------------------------------- domains and metrics


def test_metrics_per_domain(math_file, tmp_path):
    """Rewards, lengths and shares per domain in TRL's log, beside the guard's own."""
    data, got = rows(), []

    def reward(prompts, completions, domain, **_):
        values = [
            {"chat": 1.0, "code": 2.0, "math": 3.0}[d] + 0.1 * len(c) for d, c in zip(domain, completions, strict=True)
        ]
        got.append((list(domain), values, [len(c) for c in completions]))
        return values

    run = CareGRPOTrainer(
        model=small_model(TOKENIZER, 0),
        reward_funcs=[reward],
        args=trainer(tmp_path, changes={"per_device_train_batch_size": 12}).args,
        train_dataset=data,
        processing_class=TOKENIZER,
        guard=lambda m: CapabilityGuard.load(math_file, model=m, track_energy=True, every=1),
    )
    run.train()
    lines = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(lines) == len(got) == 3
    for line, (domains, values, _) in zip(lines, got, strict=True):
        for name in set(domains):
            mine = [v for d, v in zip(domains, values, strict=True) if d == name]
            assert line[f"domain/{name}/reward"] == pytest.approx(sum(mine) / len(mine), rel=1e-5)
            assert line[f"domain/{name}/share"] == pytest.approx(domains.count(name) / 12)
            assert 0 < line[f"domain/{name}/entropy"] <= math.log(len(TOKENIZER))
        for key in ("guard/touched_share", "guard/math/orthogonal", "guard/math/net_displacement"):
            assert math.isfinite(line[key])
    json.dumps(lines)


def test_owner_of_a_step_is_the_domain_of_its_prompts(tmp_path):
    """One domain in all micro-batches: its own; several: nobody's; a stage: the stage's."""
    owners = []

    class Seen(CapabilityGuard):
        def _own(self):
            owners.append(super()._own())
            return owners[-1]

    for data, options, want in (
        (rows(["chat"]), {}, {"chat"}),
        (rows(["chat", "code"], each=1), {}, {None}),
        (rows(["chat", "code"], each=1), {"stage": "chat"}, {"chat"}),
        (rows(["chat"]).remove_columns("domain"), {}, {None}),
    ):
        owners.clear()
        run = trainer(tmp_path, data, changes={"max_steps": 1}, guard=lambda m: Seen(m, k=2), **options)
        run.train()
        assert set(owners) == want


def test_what_does_not_fit_is_refused(tmp_path, math_file):
    with pytest.raises(ValueError, match="expected a guard that does it"):
        trainer(tmp_path, stage="math")
    with pytest.raises(ValueError, match=r"editor: expected a column 'domain' in the data set, found prompt, answer"):
        trainer(tmp_path, rows().remove_columns("domain"), editor=PCGrad())
    with pytest.raises(ValueError, match="expected an editor, or 'guard' with guard="):
        trainer(tmp_path, editor="guard")
    with pytest.raises(ValueError, match=r"expected domains=\[...\]"):
        trainer(tmp_path, rows().to_iterable_dataset(), guard=CapabilityGuard)
    with pytest.raises(ValueError, match="top_entropy_quantile"):
        trainer(tmp_path, changes={"top_entropy_quantile": 0.5}, editor=PCGrad())
    with pytest.raises(ValueError, match="expected one of chat, found 'math'"):
        trainer(tmp_path, rows(["math"]), domains=["chat"]).train()
    with pytest.raises(ValueError, match="mixed batches: expected rule 'bounded' or 'remove', found 'probed'"):
        trainer(
            tmp_path, guard=lambda m: CapabilityGuard.load(math_file, model=m, rule="probed"), editor="guard"
        ).train()
    with pytest.raises(ValueError, match="probe_loss=function"):
        trainer(tmp_path, guard=lambda m: CapabilityGuard.load(math_file, model=m, rule="probed")).train()
    with pytest.raises(ValueError, match="expected a stage to record"):
        GuardCallback(CapabilityGuard, path="x")


def test_evaluation_and_reused_batches(math_file, tmp_path):
    """Domains in evaluation's log too; several optimizer steps on one batch of completions, with an editor."""
    run = trainer(
        tmp_path,
        changes={
            "steps_per_generation": 2,
            "num_iterations": 2,
            "max_steps": 4,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "per_device_eval_batch_size": 8,
        },
        eval_dataset=rows(each=2),
        guard=lambda m: CapabilityGuard.load(math_file, model=m),
        editor=PCGrad(),
    )
    run.train()
    (line,) = [entry for entry in run.state.log_history if "eval_loss" in entry]
    for name in ("chat", "code", "math"):
        assert math.isfinite(line[f"eval_domain/{name}/reward"]) and line[f"eval_domain/{name}/entropy"] > 0
    assert run.guard.report()["steps"] == 4


@pytest.mark.parametrize("held", ["domain of its own", "no domain", "no column", "unknown to domains="])
def test_evaluation_may_hold_what_training_does_not(tmp_path, held):
    """A stage is not lost at its first evaluation."""
    data, options = rows(["text"] if "text" in DOMAINS else ["math"], each=4), {}
    names = [n for n in DOMAINS if n != data["domain"][0]][:2]
    if held == "no domain":
        data = datasets.Dataset.from_list([{**row, "domain": None} for row in data])
    elif held == "no column":
        data = data.remove_columns("domain")
    elif held == "unknown to domains=":
        options = {"domains": names}
    run = trainer(
        tmp_path,
        rows(names),
        changes={"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1, "per_device_eval_batch_size": 8},
        eval_dataset=data,
        **options,
    )
    warned = pytest.warns(UserWarning, match="is not in domains=") if options else contextlib.nullcontext()
    with warned:
        run.train()
    (line,) = [entry for entry in run.state.log_history if "eval_loss" in entry]
    own = [key for key in line if key.startswith("eval_domain/")]
    assert bool(own) == (held == "domain of its own") and math.isfinite(line["eval_reward"])


def test_a_domain_column_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"domain_column: expected a column .*prompt.*, found 'skill'"):
        trainer(tmp_path, rows(["math"]), domain_column="skill")


def test_a_training_row_without_a_domain_is_refused_before_anything_runs(tmp_path):
    data = datasets.Dataset.from_list(
        [{**row, "domain": None if i == 3 else "math"} for i, row in enumerate(rows(["math"]))]
    )
    with pytest.raises(ValueError, match="expected a name in every row of the training data, found None"):
        trainer(tmp_path, data)


# ----------------------------------------------------------------------------------------------------- stages and resume


def test_callback_alone_records_the_same_stage(math_file, tmp_path):
    """Plain GRPOTrainer, no column, one callback: the same file as the trainer's, bit by bit."""
    callback = GuardCallback(lambda m: CapabilityGuard(m, k=4), stage="math", path=tmp_path / "math.safetensors")
    run = trainer(tmp_path, rows(["math"]), kind=trl.GRPOTrainer, changes={"max_steps": 6}, callbacks=[callback])
    run.train()
    a, b = DomainBasis.load(math_file), DomainBasis.load(tmp_path / "math.safetensors")
    assert torch.equal(a.directions, b.directions) and a.info == b.info
    assert run.state.log_history[0]["guard/dropped_steps"] == 0 and a.info.steps == 6


def test_callback_behind_any_trainer(tmp_path):
    """transformers' own Trainer, supervised: a stage is recorded and the next training is held along its directions."""
    import transformers

    ids = TOKENIZER([row["prompt"] + row["answer"][0] for row in rows(["math"])])["input_ids"]
    data = [{"input_ids": row, "labels": row} for row in ids]

    def train(model, callback):
        args = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=5,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=5,
        )
        transformers.Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
        return callback.guard.report()

    model, path = small_model(TOKENIZER, 0), tmp_path / "math.safetensors"
    report = train(model, GuardCallback(lambda m: CapabilityGuard(m, k=4), stage="math", path=path))
    assert report["steps"] == 5 and DomainBasis.load(path).info.steps == 5
    report = train(model, GuardCallback(lambda m: CapabilityGuard.load(path, model=m, rule="remove"), domain="chat"))
    assert report["domains"]["math"]["net_displacement"] < 1e-3


def test_a_training_goes_on_after_an_interruption(tmp_path):
    """Ctrl-C tells no callback anything: the next train() clips as the first did and has one guard."""
    import transformers

    ids = TOKENIZER([row["prompt"] + row["answer"][0] for row in rows(["math"])])["input_ids"]
    seen = []

    class Interrupting(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((guard.guard, args.max_grad_norm, guard.guard.max_grad_norm, guard.guard.report()["steps"]))
            if len(seen) == 1:
                raise KeyboardInterrupt

    guard = GuardCallback(lambda m: CapabilityGuard(m, k=4, rule="remove", apply_to="grad"), stage="math")
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, max_grad_norm=0.5
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    run = transformers.Trainer(small_model(TOKENIZER, 0), args, train_dataset=data, callbacks=[guard, Interrupting()])
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.train()
    assert [line[1:] for line in seen] == [(0.0, 0.5, 1), (0.0, 0.5, 1), (0.0, 0.5, 2)]
    assert seen[0][0] is not seen[1][0] and seen[0][0].report()["steps"] == 1
    assert args.max_grad_norm == 0.5 and guard.guard.history == ["math"] and seen[0][0].history == []


def test_resumed_run_is_the_uninterrupted_one(math_file, tmp_path):
    """A stage interrupted in the middle goes on from TRL's checkpoint: same weights, same recorded directions."""

    def start(folder, steps, path):
        return trainer(
            folder,
            rows(["chat"], each=16),
            changes={"max_steps": steps, "save_strategy": "steps", "save_steps": 2},
            guard=lambda m: CapabilityGuard.load(math_file, model=m),
            stage="chat",
            stage_path=path,
        )

    whole = start(tmp_path / "whole", 4, tmp_path / "whole.safetensors")
    whole.train()
    resumed = start(tmp_path / "whole", 4, tmp_path / "resumed.safetensors")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_close(list(resumed.model.parameters()), list(whole.model.parameters()), 0)
    a, b = (DomainBasis.load(tmp_path / f"{name}.safetensors") for name in ("whole", "resumed"))
    assert a.info.steps == b.info.steps == 4
    assert_close([b.directions, b.displacement], [a.directions, a.displacement], 1e-6)
    assert resumed.guard.report()["domains"]["math"]["net_displacement"] == pytest.approx(
        whole.guard.report()["domains"]["math"]["net_displacement"], rel=1e-6
    )
    (tmp_path / "whole" / "checkpoint-2" / "guard.pt").unlink()
    with pytest.raises(FileNotFoundError, match="expected the guard's state"):
        start(tmp_path / "whole", 4, None).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


def test_interrupted_stage_leaves_nothing_behind(tmp_path):
    class Stop(Exception):
        pass

    class Bomb(Watched):
        def training_step(self, *args):
            if self.state.global_step == 2:
                raise Stop
            return super().training_step(*args)

    guard = CapabilityGuard(model := small_model(TOKENIZER, 0), k=2)
    run = trainer(tmp_path, model=model, kind=Bomb, guard=guard, stage="math", stage_path=tmp_path / "m.safetensors")
    run.seen = []
    with pytest.raises(Stop):
        run.train()
    assert guard.history == [] and not (tmp_path / "m.safetensors").exists()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard.attach(optimizer)  # it was detached
    with guard.stage("math"):  # and no stage is in progress
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert guard.history == ["math"]


def test_lora(tmp_path):
    """Adapters alone are guarded, recorded and edited; the base model stays."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    path = tmp_path / "math.safetensors"
    model = small_model(TOKENIZER, 0)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    options = {"peft_config": config, "changes": {"max_steps": 3}}
    first = trainer(
        tmp_path,
        rows(["math"]),
        model,
        guard=lambda m: CapabilityGuard(m, k=4),
        stage="math",
        stage_path=path,
        **options,
    )
    first.train()
    assert all("lora" in n for n in DomainBasis.load(path).info.names)
    second = trainer(
        tmp_path, rows(["chat"]), guard=lambda m: CapabilityGuard.load(path, model=m, track_energy=True), **options
    )
    second.train()
    report = second.guard.report()
    assert report["steps"] == 3 and 0 <= report["touched_share"] < 1
    tuned = {
        n.removeprefix("base_model.model.").replace(".base_layer", ""): p for n, p in first.model.named_parameters()
    }
    assert all(torch.equal(base[n], tuned[n]) for n in base)


def test_probes(math_file, tmp_path):
    """Rule "probed" asks for the earlier domain's loss, and training gradients survive it."""
    asked = []

    def probe_loss(model, name):
        asked.append(name)
        ids = torch.tensor([TOKENIZER("m^372>7")["input_ids"]])
        return model(input_ids=ids, labels=ids).loss

    run = trainer(
        tmp_path,
        rows(["chat"]),
        guard=lambda m: CapabilityGuard.load(math_file, model=m, rule="probed", probe_every=2),
        probe_loss=probe_loss,
    )
    run.train()
    assert asked == ["math", "math"]  # before the first and the third step
    assert run.guard.report()["probes"]["fallback"] == {}


def test_streams_need_names_and_then_run(tmp_path):
    run = trainer(tmp_path, rows().to_iterable_dataset(), domains=["math", "chat", "code"], changes={"max_steps": 1})
    run.train()
    assert any(key.startswith("domain/") for key in run.state.log_history[0])
    assert isinstance(run.train_dataset, datasets.IterableDataset)


# --------------------------------------------------------------------------------------------------------------- the docs

PAGE = DOCS / "integrations.md"


def test_code_of_the_docs_runs(tmp_path, monkeypatch):
    """Every Python block of docs/integrations.md but those marked no-run, as it stands."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    for number, block in enumerate(blocks):
        namespace: dict = {}
        exec(compile(block, f"integrations.md block {number}", "exec"), namespace)
        assert namespace["guard" if number else "trainer"] is not None
    assert {p.name for p in tmp_path.glob("*.safetensors")} == {"math.safetensors", "tanh.safetensors"}


# ------------------------------------------------------------------------------------------------------- pooled runs


def test_own_answers_are_the_verifier_s_and_come_back(tmp_path):
    """Right by the function that verifies, whatever the other one says; in checkpoints; beside the guard on mixed batches."""

    def verified(completions, **_):
        return [float(len(set(text)) > 1) for text in completions]

    verified.verifies = True

    def judge(completions, **_):
        return [1.0 + 0.01 * len(text) for text in completions]

    def run(**changes):
        return CareGRPOTrainer(
            model=small_model(TOKENIZER, 0),
            reward_funcs=[verified, judge],
            args=trainer(tmp_path, changes={"per_device_train_batch_size": 12, "save_steps": 2, **changes}).args,
            train_dataset=rows(),
            processing_class=TOKENIZER,
            guard=lambda m: CapabilityGuard(m, r=4),
            protect={name: [r["prompt"] for r in rows([name])] for name in DOMAINS},
            editor="guard",
            self_rehearsal_weight=0.5,
            self_rehearsal_size=5,
            self_rehearsal_batch=4,
        )

    whole = run(save_strategy="steps")
    whole.train()
    counts = whole.own_answers.store.counts()
    assert counts and max(counts.values()) <= 5
    texts = [
        TOKENIZER.decode(answer, skip_special_tokens=True) for n in counts for _, answer in whole.own_answers.store[n]
    ]
    assert verified(texts) == [1.0] * len(texts)
    lines = [entry for entry in whole.state.log_history if "loss" in entry]
    assert math.isfinite(lines[-1]["self_rehearsal/loss"]) and lines[-1]["guard/dropped_steps"] == 0
    resumed = run(save_strategy="steps")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.own_answers.store.state_dict() == whole.own_answers.store.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
    with pytest.raises(ValueError, match="expected a reward function that verifies, found none"):
        trainer(tmp_path, self_rehearsal_weight=0.5)
