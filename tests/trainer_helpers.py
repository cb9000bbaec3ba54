"""Small training runs of the demonstration's model, for tests of the trainer and of what watches it."""

from __future__ import annotations

import json
import random
import shutil

# rich draws from the global generator when it is first imported; the verifiers here draw from it, too, and a run that came to its
# first import would see other numbers than the next one.
import rich.progress  # noqa: F401

# Imported when tests are collected, not by the first model and optimizer: conftest freezes what is there by then, and studies and
# the trainers of transformers look for garbage after every run.
import torch._dynamo  # noqa: F401
import transformers.models.qwen3.modeling_qwen3  # noqa: F401
from carerl_kernels.grpo import GRPOConfig, GRPOTrainer, Stage
from carerl_kernels.tasks.characters import character_tokenizer, demo_domains, tiny_model

BASE = {
    "prompts_per_step": 4,
    "group_size": 3,
    "max_new_tokens": 4,
    "lr": 1e-3,
    "warmup_steps": 2,
    "eval_every": 2,
    "eval_batch_size": 64,
    "checkpoint_every": 2,
    "seed": 3,
    "progress": False,
    "plots": False,
}
STAGES = [Stage("code", 4), Stage(("chat", "math"), 3), Stage("code", 3, lr=5e-4)]


def small_model(tokenizer, seed=0):
    """The demonstration's model with one of its two layers: calls of torch are what a step here costs, and half of them do."""
    model = tiny_model(tokenizer, seed)
    del model.model.layers[1:]
    model.config.num_hidden_layers, model.config.layer_types = 1, model.config.layer_types[:1]
    return model


def noisy(judge):
    """A verifier that uses a global generator, as some do: it too must come back after an interruption. The noise also
    gives every group something to learn from, whatever the untrained model writes."""
    return lambda example, text: judge(example, text) + 0.01 * random.random()


def small_domains():
    domains = demo_domains(0)
    for domain in domains:
        domain.eval_examples = domain.eval_examples[:6]
        domain.probe_examples = domain.probe_examples[:3]
    domains[2].eval_mode = "sampled"
    for domain in domains:
        domain.reward = noisy(domain.reward)
    return domains


def trainer(path, *, guard=None, on_step=None, model=None, **changes):
    random.seed(0)
    tokenizer = character_tokenizer()
    model = model or small_model(tokenizer)
    guard = guard(model) if guard is not None else None
    config = GRPOConfig(**(BASE | changes))
    return GRPOTrainer(model, tokenizer, small_domains(), config, guard=guard, run_dir=path, on_step=on_step)


def without_timings(lines):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def metrics(path):
    return without_timings(json.loads(text) for text in (path / "metrics.jsonl").read_text().splitlines())


class Killed(Exception):
    pass


def kill_at(step):
    def on_step(line):
        if line["step"] == step:
            raise Killed

    return on_step


def left_at(path, *steps):
    """Copies the run directory after each of these steps to `PATH-STEP`: what a process leaves that is killed there."""

    def on_step(line):
        if line["step"] in steps:
            shutil.copytree(path, f"{path}-{line['step']}")

    return on_step
