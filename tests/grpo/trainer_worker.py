"""A training run of the tests, as one of several processes: `python trainer_worker.py SCENARIOS RANK WORLD FOLDER`.

A world of 1 means no process group: the plain single process that the others have to equal.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from carerl_kernels.grpo import Domain, GRPOConfig, GRPOTrainer, Stage
from carerl_kernels.grpo.parallel import shard
from carerl_kernels.guard import CapabilityGuard
from carerl_kernels.guard.editors import PCGrad
from carerl_kernels.monitor import DriftMonitor
from carerl_kernels.tasks.characters import character_tokenizer, demo_domains, tiny_model

STAGES = [Stage("code", 4), Stage(("chat", "code"), 3)]
UNEVEN = [Stage(("chat", "code", "math"), 2)]
KILLED_AT = 6  # in the second stage: the guard acts, and records
SETTINGS = {
    "prompts_per_step": 5,  # uneven: three prompts here, two there
    "group_size": 3,
    "max_new_tokens": 4,
    "lr": 0.02,
    "warmup_steps": 2,
    "eval_every": 2,
    "checkpoint_every": 2,
    "minibatches": 2,
    "micro_batch_tokens": 45,
    "kl_beta": 0.05,
    "kl_reference": "stage",
    "seed": 3,
    "progress": False,
    "plots": False,
}


class Running:
    """A reward with a state, which only the process that judges may move."""

    def __init__(self) -> None:
        self.seen = 0

    def score_batch(self, examples, completions):
        self.seen += len(completions)
        return [sum(map(ord, text)) % 7 + 0.01 * self.seen for text in completions]

    def evaluate_batch(self, examples, completions):
        return [float(len(text)) for text in completions]

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def domains() -> list[Domain]:
    out = demo_domains(0)
    for domain in out:
        domain.eval_examples, domain.reward = domain.eval_examples[:5], Running()
    out[1].eval_mode = "sampled"
    return out


def trainer(
    path: Path | None, world: int, on_step: Callable | None = None, guarded: bool = True, **changes
) -> GRPOTrainer:
    tokenizer = character_tokenizer()
    model = tiny_model(tokenizer, 0).train()
    precision, editor, basis = (
        changes.pop(*n) for n in (("precision", "fp32"), ("editor", None), ("basis", "per_matrix"))
    )
    if world > 1 or precision == "bf16":
        shard(model, precision)
    options = {"k": 3} if basis == "per_matrix" else {"r": 3}
    guard = CapabilityGuard(model, "bounded", basis=basis, **options) if guarded else None
    names = [d.name for d in domains()]
    snapshots = None if path is None else path / "snapshots"
    options = {"split_every": 2, "snapshots": snapshots, "score_range": (0.0, 8.0), "drop": 0.0}
    monitor = DriftMonitor(names, model=model, gradients_every=3, **options)
    return GRPOTrainer(
        model,
        tokenizer,
        domains(),
        GRPOConfig(**(SETTINGS | changes)),
        guard=guard,
        monitor=monitor,
        editor=editor,
        run_dir=path,
        # Adam divides by the gradient's size, so that its first steps magnify rounding without bound
        make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0, momentum=0.9),
        on_step=on_step,
    )


def killed(path: Path, world: int) -> None:
    """No warning, no clean-up."""
    trainer(path, world, lambda line: line["step"] == KILLED_AT and os.kill(os.getpid(), signal.SIGKILL)).run(STAGES)


def bf16(path: Path, world: int) -> None:
    run = trainer(path, world, precision="bf16", guarded=False)
    seen = set()
    inside = run.model.model.layers[0].mlp
    inside.register_forward_hook(lambda module, args, output: seen.update((args[0].dtype, output.dtype)))
    run.run(STAGES[:1])
    assert seen == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


def uneven(path: Path | None, world: int) -> GRPOTrainer:
    """Processes that have nothing of a minibatch or of a batch of examples; one that is late; gradients that are edited."""
    run = trainer(path, world, guarded=False, editor=PCGrad(), minibatches=8, eval_batch_size=2)
    run.domains["chat"].eval_mode = run.domains["code"].eval_mode = "sampled"
    run.domains["chat"].eval_examples = run.domains["chat"].eval_examples[:1]
    assert run.directory is not None
    sweep = run.directory.sweep
    run.directory.sweep = lambda: (sweep(), time.sleep(1.0 if run.ranks.rank else 0.0))  # type: ignore[method-assign]
    run.run(UNEVEN, resume=True)
    return run


def redrawn(path: Path | None, world: int) -> None:
    """Prompts that agree give way to others, also where one process has none of them."""
    run = trainer(path, world, guarded=False, balance="shares", minibatches=1)
    for domain in run.domains.values():
        domain.reward = lambda example, text: float(sum(map(ord, text)) % 2)
    run.run(UNEVEN)
    assert sum(sum(line["redrawn"].values()) for line in run.history[1:]) > 0


def mixed(path: Path | None, world: int) -> GRPOTrainer:
    """Domains that the guard sees from a batch each; one gradient, of which each part is without what the others live on."""
    run = trainer(path, world, basis="input", editor="guard")
    run.run(UNEVEN)
    return run


SCENARIOS: dict[str, Callable[[Path, int], object]] = {
    "whole": lambda path, world: trainer(path, world).run(STAGES),
    "killed": killed,
    "resumed": lambda path, world: trainer(path.with_name("killed"), world).run(STAGES, resume=True),
    "bf16": bf16,
    "uneven": uneven,
    "redrawn": redrawn,
    "mixed": mixed,
}


def main(names: list[str], rank: int, world: int, folder: Path) -> None:
    store = f"file://{folder}/rendezvous-{names[0]}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=300))
    for name in names:
        SCENARIOS[name](folder / name, world)
    dist.destroy_process_group()
