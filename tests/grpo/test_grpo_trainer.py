"""The trainer: exact resume, what the guard is told, replay and mixing, records, clear errors."""

import json
import math
import os
import random
import shutil
import signal
from contextlib import contextmanager

import pytest
import torch
from carerl_kernels.grpo import (
    CheckpointError,
    Domain,
    Example,
    GRPOConfig,
    GRPOTrainer,
    RewardError,
    Stage,
    lr_factor,
    prompt_counts,
)
from safetensors.torch import load_file

pytest.importorskip("transformers")
import itertools

from carerl_kernels.grpo.rundir import rng_state, set_rng_state
from carerl_kernels.guard import CapabilityGuard
from carerl_kernels.monitor import DriftMonitor
from carerl_kernels.tasks.characters import character_tokenizer
from processes import start, wait
from trainer_helpers import (
    BASE,
    STAGES,
    Killed,
    kill_at,
    left_at,
    metrics,
    small_domains,
    small_model,
    trainer,
    without_timings,
)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SETTINGS = {
    "plain": {},
    "replay_and_kl": {"replay_fraction": 0.5, "kl_beta": 0.1, "kl_reference": "stage"},
    "rehearsal_and_interpolation": {"rehearsal_weight": 0.5, "rehearsal_batch": 2, "stage_interpolation": 0.5},
    "minibatches_one_optimizer": {
        "inner_epochs": 2,
        "minibatches": 2,
        "micro_batch_size": 5,
        "loss": "dapo",
        "clip_high": 0.28,
        "fresh_optimizer": False,
        "kl_beta": 0.05,
    },
}


@pytest.mark.parametrize("settings", sorted(SETTINGS))
def test_resume_is_bitwise_exact_wherever_the_run_was_killed(tmp_path, settings):
    changes, steps = SETTINGS[settings], (1, 3, 4, 6, 10) if settings == "plain" else (6,)
    whole = trainer(tmp_path / "run", on_step=left_at(tmp_path / "run", *steps), **changes)
    whole.run(STAGES)
    expected = metrics(tmp_path / "run")
    assert [line["step"] for line in expected] == list(range(11))
    for step in steps:
        path = tmp_path / f"run-{step}"
        torch.manual_seed(step)  # whatever the new process's generators hold
        resumed = trainer(path, **changes)
        resumed.run(STAGES, resume=True)
        assert metrics(path) == expected
        assert without_timings(resumed.history) == without_timings(whole.history)
        for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(a, b)


def run_and_be_killed(path, step):
    trainer(path, on_step=lambda line: line["step"] == step and os.kill(os.getpid(), signal.SIGKILL)).run(STAGES)


def test_resume_after_sigkill_with_a_line_cut_short(tmp_path):
    """A real process, killed without warning, several times over."""
    log = tmp_path / "log"
    codes = wait([start("test_grpo_trainer.run_and_be_killed", tmp_path / "killed", 5, log=log)])
    assert codes == [-signal.SIGKILL], log.read_text()
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as f:
        f.write('{"step": 6, "sta')
    trainer(tmp_path / "killed").run(STAGES, resume=True)
    trainer(tmp_path / "whole").run(STAGES)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


def test_a_run_directory_that_cannot_be_written_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"expected a folder that can be written into, .*; choose another path"):
        trainer(tmp_path / "file" / "run").run(STAGES[:1])


def test_finished_run_resumes_to_nothing_and_bad_resumes_are_refused(tmp_path):
    first = trainer(tmp_path / "run")
    first.run(STAGES[:1])
    again = trainer(tmp_path / "run")
    assert without_timings(again.run(STAGES[:1], resume=True)) == without_timings(first.history)
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))

    with pytest.raises(CheckpointError, match="already holds a run"):
        trainer(tmp_path / "run").run(STAGES[:1])
    with pytest.raises(CheckpointError, match=r"lr: expected 0\.001, found 0\.002"):
        trainer(tmp_path / "run", lr=2e-3).run(STAGES[:1], resume=True)
    with pytest.raises(CheckpointError, match="stages: expected"):
        trainer(tmp_path / "run").run(STAGES, resume=True)
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="unreadable"):
        trainer(tmp_path / "run").run(STAGES[:1], resume=True)
    with pytest.raises(ValueError, match="needs the run_dir"):
        trainer(None).run(STAGES[:1], resume=True)


def test_a_run_stopped_before_its_first_checkpoint_starts_again(tmp_path, monkeypatch):
    run = trainer(tmp_path / "run")
    monkeypatch.setattr(run, "_checkpoint", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        run.run([Stage("code", 2)])
    assert len(metrics(tmp_path / "run")) == 1
    trainer(tmp_path / "run").run([Stage("code", 2)], resume=True)
    trainer(tmp_path / "whole").run([Stage("code", 2)])
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_damaged_weights_of_a_checkpoint_are_named(tmp_path):
    trainer(tmp_path).run([Stage("code", 1)])
    weights = sorted((tmp_path / "checkpoints").iterdir())[-1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="is damaged"):
        trainer(tmp_path).run([Stage("code", 1)], resume=True)


def test_full_disk_leaves_the_previous_checkpoint_and_nothing_half_written(tmp_path, monkeypatch):
    run = trainer(tmp_path / "run")
    with monkeypatch.context() as patched:
        save, calls = torch.save, []

        def failing(*arguments, **keywords):
            calls.append(1)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
            save(*arguments, **keywords)

        patched.setattr(torch, "save", failing)
        with pytest.raises(OSError, match="No space left"):
            run.run(STAGES)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000000"]
    trainer(tmp_path / "run").run(STAGES, resume=True)
    trainer(tmp_path / "whole").run(STAGES)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_a_deleted_checkpoint_and_what_a_killed_run_left_do_no_harm(tmp_path):
    """The run goes back a stage, where the KL term compared with other weights; half-written files are swept."""
    changes = {"kl_beta": 0.3, "kl_reference": "stage", "keep_checkpoints": 3}
    trainer(tmp_path / "whole", **changes).run(STAGES)
    with pytest.raises(Killed):
        trainer(tmp_path / "run", on_step=kill_at(6), **changes).run(STAGES)
    checkpoints = tmp_path / "run" / "checkpoints"
    names = sorted(p.name for p in checkpoints.iterdir())
    assert names == ["step-00000002", "step-00000004", "step-00000006"]
    for name in names[1:]:
        shutil.rmtree(checkpoints / name)
    for leftover in (checkpoints / ".tmp-0", tmp_path / "run" / "references"):
        leftover.mkdir(exist_ok=True)
        (leftover / ".step.safetensors.x.tmp").touch()
    trainer(tmp_path / "run", **changes).run(STAGES, resume=True)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert not [p for p in (tmp_path / "run").rglob("*") if "tmp" in p.name]
    kept = sorted(p.stem for p in (tmp_path / "run" / "references").iterdir())
    assert kept == ["step-00000007"]  # no checkpoint is left of the stages before


def test_run_directory_is_complete(tmp_path):
    run = trainer(tmp_path / "run", plots=True)
    run.run(STAGES[:2])
    present = {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert {"config.json", "metrics.jsonl", "accuracy.png", "training.png", "model/model.safetensors"} <= present
    assert {"checkpoints/step-00000007/model.safetensors", "checkpoints/step-00000007/state.pt"} <= present
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2  # keep_checkpoints
    assert not [p for p in present if "tmp" in p]
    line = metrics(tmp_path / "run")[3]
    for key in ("loss", "reward", "rewards", "kl", "clip_fraction", "entropy", "grad_norm", "tokens", "lr", "skipped"):
        assert key in line
    import transformers

    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), reloaded.parameters(), strict=True))


def test_evaluating_more_often_changes_no_training_step():
    often, never = (without_timings(trainer(None, eval_every=n).run(STAGES)) for n in (1, 0))
    assert len([line for line in often if "eval" in line]) == 11
    assert len([line for line in never if "eval" in line]) == 4
    for a, b in zip(often, never, strict=True):
        a.pop("eval"), b.pop("eval", None)
        assert a == b


def test_a_monitored_stage_of_a_domain_that_is_not_evaluated():
    domains = small_domains()
    domains[0].eval_examples = []
    monitor = DriftMonitor(["chat", "math"], drop=0.0)
    tokenizer = character_tokenizer()
    run = GRPOTrainer(small_model(tokenizer, 0), tokenizer, domains, GRPOConfig(**BASE), monitor=monitor)
    history = run.run([Stage((domains[0].name, "chat"), 1), Stage(domains[0].name, 1)])
    assert [sorted(line["eval"]) for line in history] == [["chat", "math"]] * 3


@pytest.mark.parametrize("here", [1, 3])
def test_random_states_of_more_or_fewer_devices(monkeypatch, here):
    """Those of the devices that are here come back, whatever the machine had that saved them."""
    put = {}
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: here,
        "set_rng_state": lambda state, device: put.update({device: int(state)}),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [torch.tensor(7), torch.tensor(8)])
    set_rng_state(rng_state())
    assert put == dict(list({0: 7, 1: 8}.items())[:here])


def test_micro_batches_change_rounding_only():
    whole, parts = (
        trainer(None, micro_batch_size=size, loss="dr_grpo", kl_beta=0.1).run([Stage("chat", 2)]) for size in (0, 5)
    )
    for a, b in zip(whole[1:], parts[1:], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-7)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_reinforcement_learns():
    """A one-letter task: reward far above chance within seconds, by every loss."""
    tokenizer = character_tokenizer()
    domain = Domain(
        "letter",
        sample=lambda rng, n: [Example(f"c^{rng.choice('abcd')}>", "e") for _ in range(n)],
        reward=lambda example, text: float(text.startswith("e")),
        eval_examples=[Example("c^a>", "e")],
        eval_mode="sampled",
    )
    for loss in ("grpo", "dr_grpo", "dapo", "gspo"):
        config = GRPOConfig(
            prompts_per_step=8, group_size=8, max_new_tokens=2, lr=5e-3, loss=loss, progress=False, eval_samples=64
        )
        run = GRPOTrainer(small_model(tokenizer, 0), tokenizer, [domain], config)
        history = run.run([Stage("letter", 40)])
        assert history[0]["eval"]["letter"] < 0.3
        assert history[-1]["eval"]["letter"] > 0.9, loss


class WatchingGuard:
    """Edits nothing and writes down what it is told."""

    def __init__(self, model):
        self.told, self.history, self.seconds, self._gradients = [], [], {"act": 0.0}, list(model.parameters())
        self.due = False

    def attach(self, optimizer):
        self.told.append(("attach", type(optimizer).__name__))

    def add(self, basis):
        self.history.append(basis.stem)

    def detach(self):
        self.told.append(("detach",))

    def settle(self):
        pass

    def meets_mixed(self, domains):
        self.met = domains

    @contextmanager
    def stage(self, name, path=None):
        self.told.append(("stage", name, None if path is None else path.name))
        yield
        self.told.append(("recorded", name))
        self.history.append(name)

    @contextmanager
    def domain(self, name):
        yield
        self.told.append(("domain", name))

    @contextmanager
    def probe(self, name):
        kept = [p.grad for p in self._gradients]
        for p in self._gradients:
            p.grad = None
        yield
        self.told.append(("probe", name, all(p.grad is not None for p in self._gradients)))
        for p, g in zip(self._gradients, kept, strict=True):
            p.grad = g

    def gradient_norm(self, norm):
        assert math.isfinite(norm)

    def probes_due(self):
        return self.due

    def report(self):
        return {"stages": len(self.history)}

    def state_dict(self):
        return {"history": list(self.history)}

    def load_state_dict(self, state):
        self.history = list(state["history"])


def test_guard_is_told_stage_domain_and_nothing_else_changes(tmp_path):
    guarded = trainer(tmp_path / "run", guard=WatchingGuard)
    guarded.run(STAGES)
    told = guarded.guard.told
    assert told[:2] == [("attach", "AdamW"), ("stage", "code", "code.safetensors")]
    assert told[2:6] == [("domain", "code")] * 4
    assert told[6:8] == [("recorded", "code"), ("detach",)]
    assert told[9:13] == [("stage", "chat+math", "chat+math.safetensors")] + [("domain", "chat+math")] * 3
    assert told[16] == ("stage", "code", "code-3.safetensors")
    assert guarded.guard_reports["code"] == {"stages": 1}
    assert json.loads((tmp_path / "run" / "bases" / "code.report.json").read_text()) == {"stages": 1}
    plain = trainer(None)
    plain.run(STAGES)
    assert without_timings(plain.history) == without_timings(guarded.history)


GUARDS = {
    "remove": {"rule": "remove", "k": 4, "track_energy": True},
    "input": {"every": 3},
    "bounded_flat": {"rule": "bounded", "basis": "flat", "k": 4},
    "probed": {"rule": "probed", "k": 4, "probe_every": 2},
    "integrated_gradient": {"rule": "integrated", "k": 4, "apply_to": "grad"},
}


@pytest.mark.parametrize("options", sorted(GUARDS))
def test_resume_with_a_guard_is_bitwise_exact(tmp_path, options):
    """Bases come back from their files; the recording in progress, rule memory and baselines from the checkpoint."""

    def guard(model):
        return CapabilityGuard(model, **GUARDS[options])

    stages = [Stage("code", 4), Stage("chat", 4), Stage(("code", "math"), 3)]
    whole = trainer(tmp_path / "run", guard=guard, on_step=left_at(tmp_path / "run", 3, 7))
    whole.run(stages)
    for step in (3, 7):
        path = tmp_path / f"run-{step}"
        resumed = trainer(path, guard=guard)
        resumed.run(stages, resume=True)
        assert metrics(path) == metrics(tmp_path / "run")
        for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(a, b)
        for name in ("code", "chat", "code+math"):
            ours, theirs = (load_file(root / "bases" / f"{name}.safetensors") for root in (path, tmp_path / "run"))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[n], theirs[n]) for n in ours)
        assert resumed.guard.history == whole.guard.history == ["code", "chat", "code+math"]
        ours, theirs = resumed.guard.report(), whole.guard.report()
        for report in (ours, theirs):  # all but the clock
            report.pop("seconds")
            report.get("probes", {}).pop("seconds", None)
        assert ours == theirs


def test_a_stage_without_any_gradient_is_protected_by_what_was_fed_in(tmp_path):
    """No group ever differs in reward: nothing moves, and yet the domain's inputs are known, and nothing moves along them."""
    run = trainer(
        tmp_path, guard=lambda m: CapabilityGuard(m, "remove", basis="input", r=2, every=1), record_last=False
    )
    run.domains["code"].reward = lambda example, text: 0.5
    run.run([Stage("code", 2), Stage("chat", 3)])
    assert run.guard.history == ["code"] and "code" not in run.guard.report()["open_windows"]
    basis, report = run.guard.basis("code"), run.guard.report()["domains"]["code"]
    assert basis.info.displacement_capture is None and not any(t.any() for t in basis.moved.values())
    assert report["net_displacement"] is None and report["moved"] < 1e-4


def test_probes_read_the_earlier_domain_and_leave_training_alone():
    def due(model):
        guard = WatchingGuard(model)
        guard.due = True
        return guard

    stages = [Stage("code", 2), Stage("math", 2)]
    probing = trainer(None, guard=due)
    probing.run(stages)
    plain = trainer(None)
    plain.run(stages)
    assert [t for t in probing.guard.told if t[0] == "probe"] == [("probe", "code", True)] * 2
    assert without_timings(plain.history) == without_timings(probing.history)
    assert probing.seconds["probe"] > 0

    mixed = trainer(None, guard=due)
    mixed.run([Stage(("code", "chat"), 1), Stage("math", 1)])
    assert [t for t in mixed.guard.told if t[0] == "probe"] == [("probe", "code+chat", True)]

    probing.domains["code"].probe_examples = ()
    with pytest.raises(ValueError, match=r"probe of domain 'code'.*found none stored"):
        probing.run([Stage("math", 1)])


def test_replay_mixes_earlier_domains_into_the_stages_own_steps():
    run = trainer(None, guard=WatchingGuard, replay_fraction=0.5)
    history = run.run([Stage("code", 1), Stage("chat", 1), Stage("math", 2)])
    assert [set(line.get("rewards", {})) for line in history[1:]] == [
        {"code"},
        {"chat", "code"},
        {"math", "code", "chat"},
        {"math", "code", "chat"},
    ]
    assert [line["domain"] for line in history[1:]] == ["code", None, None, None]
    assert [t[1] for t in run.guard.told if t[0] == "domain"] == ["code", "chat", "math", "math"]


def test_prompt_counts_are_even_and_rotate():
    assert prompt_counts(["a"], [], 16, 0.25, 0) == {"a": 16}
    assert prompt_counts(["a"], ["b", "c"], 16, 0.25, 5) == {"a": 12, "b": 2, "c": 2}
    assert prompt_counts(["a", "b"], [], 5, 0.0, 0) == {"a": 3, "b": 2}
    assert prompt_counts(["a", "b"], [], 5, 0.0, 1) == {"b": 3, "a": 2}
    total = {"b": 0, "c": 0, "d": 0}
    for step in range(3):
        for name, n in prompt_counts(["a"], ["b", "c", "d"], 16, 0.25, step).items():
            if name != "a":
                total[name] += n
    assert total == {"b": 4, "c": 4, "d": 4}


def test_learning_rate_shape():
    factors = [lr_factor(i, 10, warmup=4, decay="linear", final=0.1) for i in range(10)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    steps = [a - b for a, b in itertools.pairwise(factors[4:])]
    assert all(s == pytest.approx(steps[0]) for s in steps)
    assert lr_factor(9, 10, warmup=4, decay="constant", final=0.0) == 1.0
    assert lr_factor(1, 2, warmup=5, decay="linear", final=0.0) == 1.0


def test_poisoned_gradients_touch_nothing():
    run = trainer(None)
    before = [p.detach().clone() for p in run.model.parameters()]
    handle = next(run.model.parameters()).register_hook(lambda g: torch.full_like(g, math.nan))
    history = run.run([Stage("code", 2)])
    handle.remove()
    assert [line["skipped"] for line in history[1:]] == [1, 1]
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf, "high"])
def test_bad_reward_names_domain_and_value(value):
    run = trainer(None)
    run.domains["code"].reward = lambda example, text: value
    with pytest.raises(RewardError, match=f"domain 'code': expected a finite number.*{value!r}"):
        run.run([Stage("code", 1)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GRPOConfig(group_size=1), "group_size"),
        (lambda: GRPOConfig(learning_rate=1), "learning_rate"),
        (lambda: GRPOConfig(loss="ppo"), "loss"),
        (lambda: GRPOConfig(minibatches=1000), "exceeds the 128 sequences"),
        (lambda: GRPOConfig(prompts_per_step=1, replay_fraction=0.25), "rounds to no prompt"),
        (lambda: Stage("code", 0), "expected steps >= 1, found 0"),
        (lambda: Stage(("a", "a"), 1), "named twice"),
        (lambda: Stage("a", 1, lr=-1.0), "expected lr > 0"),
        (lambda: Example(""), "non-empty prompt"),
        (lambda: Domain("a/b", lambda r, n: [], lambda e, t: 0.0), "found 'a/b'"),
        (
            lambda: Domain("a", lambda r, n: [], lambda e, t: 0.0, eval_examples=[Example("x")], eval_mode="exact"),
            "1 have none",
        ),
        (lambda: Domain("a", lambda r, n: [], lambda e, t: 0.0).draw(random.Random(), 2), "2 Example objects, found 0"),
        (lambda: trainer(None).run([Stage("poetry", 1)]), "found \\['poetry'\\]"),
        (lambda: trainer(None).run([]), "found no stage"),
    ],
)
def test_errors_say_what_was_found(make, message):
    with pytest.raises(ValueError, match=message):
        make()
