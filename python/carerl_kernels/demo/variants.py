"""What the demonstration compares: plain learning rates, replay, rehearsal, and guards, from the same warm-up checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..grpo import GRPOConfig, GRPOTrainer, Stage
from . import tasks

BASE_LR = 1.5e-3


@dataclass(frozen=True)
class Variant:
    """One way to train the three stages.

    Attributes:
        name: As in tables and JSON.
        text: What it is, for captions.
        lr_scale: Times the base learning rate.
        replay: Share of prompts from earlier domains.
        rehearsal: Weight of the cross-entropy on stored answers of earlier domains.
        guard: Options of `CapabilityGuard`, or None.
        memory: What it keeps of earlier domains' data, for captions.
    """

    name: str
    text: str
    lr_scale: float = 1.0
    replay: float = 0.0
    rehearsal: float = 0.0
    guard: Mapping[str, Any] | None = None
    memory: str = "none"


# The default guard protects enough to keep the learning rate; guards of gradient directions run at half of it, and are to be
# compared with lower_lr, replay_low and rehearse.
VARIANTS: dict[str, Variant] = {
    v.name: v
    for v in (
        Variant("naive", "nothing protects earlier domains"),
        Variant("lower_lr", "learning rate x0.5", lr_scale=0.5),
        Variant("lowest_lr", "learning rate x0.25", lr_scale=0.25),
        Variant("replay", "25 % of prompts from earlier domains", replay=0.25, memory="all prompts"),
        Variant(
            "replay_low",
            "25 % of prompts from earlier domains, learning rate x0.5",
            lr_scale=0.5,
            replay=0.25,
            memory="all prompts",
        ),
        Variant(
            "rehearse",
            "cross-entropy on stored answers, learning rate x0.5",
            lr_scale=0.5,
            rehearsal=1.0,
            memory=f"{tasks.PROBE_EXAMPLES} answers a domain",
        ),
        Variant(
            "guarded",
            "CapabilityGuard(model), as it comes",
            guard={},
        ),
        Variant(
            "probed",
            "rule 'probed' on gradient directions, signs from stored prompts; learning rate x0.5",
            lr_scale=0.5,
            guard={"rule": "probed", "basis": "per_matrix"},
            memory=f"{tasks.PROBE_EXAMPLES} prompts a domain",
        ),
        Variant(
            "instant",
            "the literal rule on gradient directions, sign of each minibatch; learning rate x0.5",
            lr_scale=0.5,
            guard={"rule": "instant", "basis": "per_matrix"},
        ),
    )
}


@dataclass(frozen=True)
class Scale:
    """Size of a demonstration.

    Attributes:
        warm_up_steps: Supervised steps before everything.
        steps: GRPO steps per stage.
        eval_every: Steps between evaluations.
        config: Further settings of the trainer.
    """

    warm_up_steps: int = 60
    steps: int = 80
    eval_every: int = 16
    config: Mapping[str, Any] = field(default_factory=dict)


FULL = Scale()
FAST = Scale(steps=48, eval_every=12, config={"prompts_per_step": 8})


@dataclass
class RunResult:
    """What one variant did with one seed. Accuracies are exact success probabilities at temperature 1.

    Attributes:
        variant: Name.
        seed: Seed.
        curve: (step, {domain: accuracy}) at every evaluation, step 0 included.
        after_own_stage: Accuracy of each domain right after its own stage.
        final: Accuracy of each domain at the end.
        seconds: Wall-clock seconds of training and evaluation.
        guard_time_share: Share of those spent in the guard, probes included.
        touched_share: Energy of the guard's corrections over energy of all raw updates it saw; None without guard.
    """

    variant: str
    seed: int
    curve: list[tuple[int, dict[str, float]]]
    after_own_stage: dict[str, float]
    final: dict[str, float]
    seconds: float
    guard_time_share: float
    touched_share: float | None


def warm_start(seed: int, scale: Scale, path: Path) -> None:
    """Write the checkpoint that all variants of a seed start from, unless it is there already.

    Args:
        seed: Initialises the model, draws the warm-up examples, splits the domains.
        scale: Number of supervised steps.
        path: safetensors file, written atomically.
    """
    from ..grpo.rundir import save_weights

    if path.exists():
        return
    tokenizer = tasks.character_tokenizer()
    model = tasks.tiny_model(tokenizer, seed)
    tasks.warm_up(model, tokenizer, tasks.demo_domains(seed), seed=seed, steps=scale.warm_up_steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(path, model)


def run_variant(
    variant: Variant,
    seed: int,
    scale: Scale,
    start: Path,
    run_dir: Path | None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> RunResult:
    """Train the three stages one after the other; continue where an interrupted run in `run_dir` stopped.

    Args:
        variant: How.
        seed: Of the domains' split and of sampling.
        scale: How long.
        start: Warm-up checkpoint.
        run_dir: Keeps the run, or None.
        on_step: Called with each line of metrics.
    """
    from ..grpo.rundir import load_weights
    from ..guard import CapabilityGuard

    tokenizer = tasks.character_tokenizer()
    model = tasks.tiny_model(tokenizer, seed)
    load_weights(start, model)
    domains = tasks.demo_domains(seed)
    config = GRPOConfig(
        **{
            "max_new_tokens": tasks.MAX_NEW_TOKENS,
            "lr": BASE_LR * variant.lr_scale,
            "replay_fraction": variant.replay,
            "rehearsal_weight": variant.rehearsal,
            "eval_every": scale.eval_every,
            "eval_batch_size": 512,
            "checkpoint_every": max(1, scale.steps // 2),
            "keep_checkpoints": 1,
            "seed": seed,
            "progress": False,
            "plots": False,
            **scale.config,
        }
    )
    guard = None if variant.guard is None else CapabilityGuard(model, track_energy=True, **variant.guard)
    trainer = GRPOTrainer(model, tokenizer, domains, config, guard=guard, run_dir=run_dir, on_step=on_step)
    history = trainer.run([Stage(name, scale.steps) for name in tasks.DOMAINS], resume=run_dir is not None)
    curve = [(int(line["step"]), dict(line["eval"])) for line in history if "eval" in line]
    at = dict(curve)
    phases: dict[str, float] = {}
    for line in history:  # summed over the lines and not over this process: the run may have been resumed
        for phase, seconds in line["seconds"].items():
            phases[phase] = phases.get(phase, 0.0) + seconds
    total = sum(phases.values())
    return RunResult(
        variant=variant.name,
        seed=seed,
        curve=curve,
        after_own_stage={name: at[(i + 1) * scale.steps][name] for i, name in enumerate(tasks.DOMAINS)},
        final=at[len(tasks.DOMAINS) * scale.steps],
        seconds=total,
        guard_time_share=(phases.get("guard", 0.0) + phases.get("probe", 0.0)) / total,
        touched_share=None if guard is None else guard.report()["touched_share"],
    )
