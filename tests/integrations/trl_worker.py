"""What every process of the distributed TRL tests runs, with RANK and WORLD_SIZE set.

Completions are a function of the prompt and of the place within the group, so that any number of processes trains on the same
batches and has to end at the same weights.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from carerl_kernels import CapabilityGuard
from carerl_kernels.guard.editors import PCGrad
from carerl_kernels.integrations.trl import CareGRPOTrainer
from carerl_kernels.tasks.characters import tiny_model
from peft import LoraConfig
from trl_helpers import TOKENIZER, rows, trainer

WORLD = int(os.environ["WORLD_SIZE"])
FSDP = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"],
        "state_dict_type": "SHARDED_STATE_DICT",
    },
}


def allow_fsdp_on_cpus() -> None:
    """accelerate turns FSDP on for accelerators alone; what it then does to the model works on CPUs too."""
    from accelerate import DistributedType
    from accelerate.state import AcceleratorState, PartialState

    original = AcceleratorState.__init__

    def patched(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # as accelerate does

    AcceleratorState.__init__ = patched


class Scripted(CareGRPOTrainer):
    """Real in everything but the sampling."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        completions, times = [], {}
        for ids in prompt_ids:
            place = times[tuple(ids)] = times.get(tuple(ids), -1) + 1
            digest = hashlib.sha256(f"{ids} {place}".encode()).digest()
            completions.append([2 + d % (len(TOKENIZER) - 2) for d in digest[: 1 + digest[-1] % 5]])
        return completions, None


def run(folder: Path, name: str, sharded: bool, domains, changes=None, resume=None, kind=Scripted, **options) -> None:
    changes = {
        "per_device_train_batch_size": 8 // WORLD,
        "learning_rate": 1e-4,
        "loss_type": "grpo",
        "ddp_backend": "gloo" if WORLD > 1 else None,
        **(FSDP if sharded and WORLD > 1 else {}),
        **(changes or {}),
    }
    model = tiny_model(TOKENIZER, 0)  # with the second of its layers: they are sharded one by one
    it = trainer(folder / f"{name}-{WORLD}", rows(domains), model, kind=kind, changes=changes, **options)
    it.train(resume_from_checkpoint=resume and str(folder / f"{name}-{WORLD}" / resume))
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in it.model.parameters()]
    log = [line for line in it.state.log_history if "loss" in line]
    sharded = hasattr(next(iter(it.model.parameters())), "full_tensor")
    name = f"{name}{'-resumed' if resume else ''}-{WORLD}-{os.environ['RANK']}.pt"
    torch.save({"parameters": whole, "sharded": sharded, "log": log}, folder / name)


def load(folder, **options):
    return lambda model: CapabilityGuard.load(folder / f"stage-{WORLD}.safetensors", model=model, **options)


def stage(folder, sharded):
    path = folder / f"stage-{WORLD}.safetensors"
    run(
        folder,
        f"stage{sharded}",
        sharded,
        ["math"],
        guard=lambda m: CapabilityGuard(m, k=4),
        stage="math",
        stage_path=path,
    )


def update(folder, sharded):
    """A stage behind the guard; interrupted, where sharded, and resumed."""
    changes = {"save_strategy": "steps", "save_steps": 2} if sharded else {}
    options = {"guard": load(folder, track_energy=True), "stage": "chat"}
    run(folder, f"update{sharded}", sharded, ["chat"], changes, **options)
    if sharded:
        run(folder, f"update{sharded}", sharded, ["chat"], changes, "checkpoint-2", **options)


def domains(folder, sharded):
    """One gradient per domain, accumulated, edited by the guard."""
    run(
        folder,
        f"domains{sharded}",
        sharded,
        ["chat", "code", "math"],
        {"gradient_accumulation_steps": 3, "max_steps": 2},
        guard=load(folder, rule="remove", apply_to="grad"),
        editor="guard",
    )


def surgery(folder, sharded):
    changes = {"gradient_accumulation_steps": 3, "max_steps": 2}
    run(folder, f"surgery{sharded}", sharded, ["chat", "code", "math"], changes, editor=PCGrad())


def sampled(folder, sharded):
    """The model's own completions and adapters; what is sampled depends on the number of processes, not on how they share it."""
    if WORLD == 1:
        return
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    options = {"guard": lambda m: CapabilityGuard(m, k=4), "stage": "chat", "peft_config": config}
    path = folder / f"sampled{sharded}.safetensors"
    run(folder, f"sampled{sharded}", sharded, ["chat"], kind=CareGRPOTrainer, stage_path=path, **options)


# FSDP last: a process does not go back to DDP
SCENARIOS = {
    f"{f.__name__}{sharded}": (lambda folder, f=f, sharded=sharded: f(folder, sharded))
    for sharded in (False, True)
    for f in (stage, update, domains, surgery, sampled)
}


def main(folder: Path) -> None:
    allow_fsdp_on_cpus()
    for scenario in SCENARIOS.values():
        scenario(folder)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
