"""Cells of a real language model: LoRA adapters of SmolLM2-135M on easy verifiable tasks on words, few-shot prompts."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..grpo import Domain, Example, GRPOConfig, GRPOTrainer, Stage
from ..smollm2 import load_smollm2
from .grid import Cell, GridError
from .lm import Pools, guard_figures, scores_of
from .methods import editor_of, guard_of

WORDS = (  # of five letters or so, each one or two tokens
    "river stone house cloud bread chair table light music water green paper plant horse tiger apple grape lemon olive onion "
    "pearl piano queen radio salad scarf shark sheep shirt skirt snake spoon storm sugar sword toast tower train truck uncle "
    "video voice wagon watch whale wheat wheel woman world youth beach berry blade brain brick bride brush cabin camel candy "
    "chain chalk cheek chest child clock coach coast couch cream crown dance dress drink eagle earth field flame floor fruit "
    "ghost glass glove grass guard heart honey hotel juice knife ladder"
)
TASKS: dict[str, Callable[[str, str], str]] = {
    "first": lambda a, b: a,
    "second": lambda a, b: b,
    "swap": lambda a, b: f"{b} {a}",
    "alphabet": min,
}
PAIRS, SHOWN = 160, 2
EVAL_EXAMPLES, EVAL_SAMPLES = 24, 4
LORA_RANK = 8


def run(cell: Cell, cache: Path, report: Callable[[Any], None]) -> dict[str, Any]:
    """Train one cell of a setting of kind "smollm2", as `lm.run` does its own; goes on where an interrupted one stopped.

    Raises:
        GridError: A domain that is not one of the tasks.
        ImportError, RuntimeError: peft or the model's package is missing.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as e:
        raise ImportError("the smollm2 setting needs peft: pip install 'carerl-kernels[trl]'") from e
    setting, method, seed = cell.setting, cell.method, cell.seed
    unknown = [d for d in setting.domains if d not in TASKS]
    if unknown:
        raise GridError(f"{cell.name}: expected tasks out of {', '.join(TASKS)}, found {', '.join(unknown)}")
    base, tokenizer = load_smollm2()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = get_peft_model(
            base,
            LoraConfig(
                r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
            ),
        )
    config = GRPOConfig(
        **{
            "prompts_per_step": 4,
            "group_size": 6,
            "max_new_tokens": 6,
            "lr": setting.lr * cell.lr,
            "eval_samples": EVAL_SAMPLES,
            "eval_batch_size": EVAL_EXAMPLES,
            "record_last": False,
            "checkpoint_every": 5,
            "keep_checkpoints": 1,
            "seed": seed,
            "progress": False,
            "plots": False,
            **setting.train,
            **method.train,
        }
    )
    guard = guard_of(method, model, seed, setting.k)
    pools, run_dir = Pools(setting.groups, setting.steps), cache / "smollm2" / cell.key
    trainer = GRPOTrainer(
        model,
        tokenizer,
        [pools.limit(word_domain(name, seed), method.stored) for name in setting.domains],
        config,
        guard=guard,
        editor=editor_of(method, model, seed),
        run_dir=run_dir,
        on_step=lambda line: report(line["step"]),
    )
    pools.follow(trainer)
    history = trainer.run([Stage(group, setting.steps) for group in setting.groups], resume=True)
    result = {"scores": scores_of(history, setting.domains), **guard_figures(guard, trainer)}
    shutil.rmtree(run_dir)  # the record is what stays: the cell run again starts anew
    return result


def word_domain(name: str, seed: int) -> Domain:
    """A task on two words, its name and two examples in every prompt; the first line of the completion counts."""
    rng, words, answer = random.Random(f"{name}-{seed}"), WORDS.split(), TASKS[name]
    pairs = [rng.sample(words, 2) for _ in range(PAIRS)]
    shown = "".join(f"{name}: {a} {b} -> {answer(a, b)}\n" for a, b in pairs[:SHOWN])
    examples = [Example(f"{shown}{name}: {a} {b} ->", f" {answer(a, b)}") for a, b in pairs[SHOWN:]]
    held_out = examples[:EVAL_EXAMPLES]
    shown_there = {example.prompt for example in held_out}
    train = [example for example in examples[EVAL_EXAMPLES:] if example.prompt not in shown_there]
    return Domain(
        name=name,
        sample=lambda rng, n: rng.choices(train, k=n),
        reward=_first_line,
        eval_examples=held_out,
        probe_examples=train,
    )


def _first_line(example: Example, text: str) -> float:
    return float(text.strip().split("\n")[0].strip() == (example.answer or "").strip())
