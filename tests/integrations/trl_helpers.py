"""TRL runs of the demo's tiny model, and what the reference trainer makes of the same batches."""

from __future__ import annotations

import gc

import datasets
import torch
import trl
from carerl_kernels.grpo import GRPOConfig, Rollout, SpecialTokens
from carerl_kernels.grpo.rollout import Batch, Judged
from carerl_kernels.grpo.update import accumulate_gradients
from carerl_kernels.integrations.trl import CareGRPOTrainer
from carerl_kernels.rewards.adapters import trl_reward
from carerl_kernels.tasks.characters import DOMAINS, GENERATORS, character_tokenizer
from trainer_helpers import small_model

gc.freeze()  # as conftest does, here for the processes of trl_worker
TOKENIZER = character_tokenizer()
TOKENIZER.padding_side = "left"
# TRL may sample padding like any other token, so nothing is banned here.
TOKENS = SpecialTokens(pad=TOKENIZER.pad_token_id, eos=(TOKENIZER.eos_token_id,))


def dense_reward(example, completion):
    """Differs between completions of a model that knows nothing yet."""
    return len(set(completion)) + 0.5 * completion.count(example.answer[0]) - 0.1 * len(completion)


def rows(domains=DOMAINS, each=8):
    columns = [{"prompt": e.prompt, "answer": e.answer, "domain": n} for n in domains for e in GENERATORS[n]()[:each]]
    return datasets.Dataset.from_list(columns)


def settings(folder, **changes):
    common = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 5,
        "max_steps": 3,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,  # TRL computes in bfloat16 unless told otherwise
        "save_strategy": "no",
        "disable_tqdm": True,
        "log_level": "error",
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
    }
    return trl.GRPOConfig(output_dir=str(folder), **{**common, **changes})


def trainer(folder, data=None, model=None, kind=CareGRPOTrainer, changes=None, **options):
    return kind(
        model=small_model(TOKENIZER, 0) if model is None else model,
        reward_funcs=[trl_reward(dense_reward)],
        args=settings(folder, **(changes or {})),
        train_dataset=rows() if data is None else data,
        processing_class=TOKENIZER,
        **options,
    )


class Watched(CareGRPOTrainer):
    """Keeps the inputs of every micro-batch."""

    seen: list

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.seen.append({k: v.clone() if torch.is_tensor(v) else v for k, v in inputs.items()})
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def as_batch(parts) -> Batch:
    """Micro-batches of TRL as one batch of the reference trainer."""

    def side(ids, mask, left):
        width = max(p[ids].shape[1] for p in parts)
        pads = [width - p[ids].shape[1] for p in parts]
        return [
            torch.cat(
                [torch.nn.functional.pad(p[key], (n, 0) if left else (0, n)) for p, n in zip(parts, pads, strict=True)]
            )
            for key in (ids, mask)
        ]

    prompt, completion = side("prompt_ids", "prompt_mask", True), side("completion_ids", "completion_mask", False)
    nothing = torch.zeros(completion[0].shape)
    advantages = torch.cat([p["advantages"] for p in parts])
    count = len(advantages)
    judged = Judged([""] * count, nothing[:, 0], nothing[:, 0], advantages, [""] * count)
    rollout = Rollout(*prompt, *completion, nothing, nothing)
    return Batch(
        **vars(judged), rollout=rollout, rows=list(range(count)), whole=judged, drawn=judged.rewards, redrawn={}
    )


def reference_gradients(model, parts, kind="grpo", **changes):
    """Gradients of the reference trainer's loss in the parameters; returns the loss."""
    batch = as_batch(parts)
    config = GRPOConfig(loss=kind, max_new_tokens=5, lr=2e-3, **changes)
    every = torch.arange(len(batch.advantages))
    loss, _, _ = accumulate_gradients(model, batch, every, TOKENS, config, old_logp=None, ref_logp=None)
    return loss
