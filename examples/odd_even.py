"""Conflict or curvature: what twenty steps on chat do to code, split into the odd and the even part of the change of its loss.

    taskset -c 1 python examples/odd_even.py             # three seeds, about three minutes on one core; --seeds 1: one

The demo's small language model learns code and math together by reinforcement, then takes twenty steps on chat alone. With
Delta their displacement, code's held-out loss at theta + Delta and theta - Delta gives odd = first-order conflict of directions
and even = damage by curvature, which no cosine shows; see docs/monitor.md. Rows: the steps as they are, with noise in the judge
and without, at half the learning rate, along random directions that the guard may not touch, and with the guard of code's and
math's input directions.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics

import torch
from carerl_kernels import CapabilityGuard
from carerl_kernels.grpo import GRPOConfig, answer_loss, lr_factor, prompt_counts, success_probability
from carerl_kernels.grpo.learner import Learner
from carerl_kernels.monitor.split import KeptWeights, split_since
from carerl_kernels.subspace.random_basis import as_random, random_basis
from carerl_kernels.tasks.characters import MAX_NEW_TOKENS, character_tokenizer, demo_domains, tiny_model, warm_up

LR, STEPS, PROMPTS = 1.5e-3, 20, 12
FIRST, RECORDED = 80, 10  # steps of code and math together; steps of each that its directions are recorded from
GUARD = {"rule": "remove", "basis": "input", "r": 32, "room": 0.5, "apply_to": "grad"}
ROWS = {  # what: learning rate, standard deviation of the judge's noise, whose directions nothing may move along
    "plain": (LR, 0.5, None),
    "plain, judge without noise": (LR, 0.0, None),
    "plain, half the learning rate": (LR / 2, 0.5, None),
    "random directions": (LR, 0.5, "random"),
    "guard (input directions of the others)": (LR, 0.5, "recorded"),
}


def train(learner: Learner, counts, steps: int, lr: float, guard=None, stage: str | None = None, decay=False) -> None:
    """Steps of one optimizer: `counts(step)` prompts of each domain, recorded as a stage or edited by a guard."""
    learner.guard = guard
    optimizer = torch.optim.AdamW(learner.parameters, lr=lr, weight_decay=0.0)
    if guard is not None:
        guard.attach(optimizer)
    inside = guard.stage(stage) if stage is not None else None
    if inside is not None:
        learner.recorder = inside.__enter__()
    for step in range(steps):
        factor = lr_factor(step, steps, warmup=5, decay="linear" if decay else "constant", final=0.0)
        optimizer.param_groups[0]["lr"] = lr * factor
        learner.step(optimizer, counts(step), stage or "chat")
    if inside is not None:
        inside.__exit__(None, None, None)
        learner.recorder = None
    if guard is not None:
        guard.detach()
    learner.guard = None


def measure(seed: int) -> dict[str, dict[str, float]]:
    """Every row for one seed."""
    tokenizer = character_tokenizer()
    model, domains = tiny_model(tokenizer, seed), {d.name: d for d in demo_domains(seed)}
    warm_up(model, tokenizer, list(domains.values()), seed=seed)

    def learner(**settings) -> Learner:
        config = GRPOConfig(**{"max_new_tokens": MAX_NEW_TOKENS, "seed": seed, "prompts_per_step": 16, **settings})
        return Learner(model, tokenizer, domains, config, None)

    first = learner(loss="dr_grpo")
    train(first, lambda step: prompt_counts(["code", "math"], [], 16, 0.0, step), FIRST, 7.5e-4, decay=True)
    start = KeptWeights(model).take()
    tokens, exact = first.tokens, domains["chat"].reward

    bases = []
    for name in ("code", "math"):
        recorder = CapabilityGuard(model, **GUARD)
        train(learner(), lambda step, name=name: {name: 16}, RECORDED, LR, recorder, stage=name)
        bases.append(recorder.basis(name))
        start.put_back()

    def losses() -> dict[str, float]:
        with torch.no_grad():
            return {n: float(answer_loss(model, tokenizer, d.eval_examples, tokens)) for n, d in domains.items()}

    def accuracy() -> float:
        examples = domains["code"].eval_examples
        return float(success_probability(model, tokenizer, examples, tokens, max_new_tokens=MAX_NEW_TOKENS).mean())

    at_start, before, out = losses(), accuracy(), {}
    for row, (lr, noise, directions) in ROWS.items():
        draw = random.Random(f"judge-{seed}")
        domains["chat"] = copy.copy(domains["chat"])
        domains["chat"].reward = lambda e, text, sd=noise, draw=draw: float(exact(e, text) or 0.0) + draw.gauss(0.0, sd)
        guard = None if directions is None else CapabilityGuard(model, **GUARD)
        for i, basis in enumerate(bases if guard is not None else []):
            if directions == "random":
                basis = as_random(basis, random_basis(guard.layout, 1000 * seed + i))
            guard.add(basis)
        train(learner(prompts_per_step=PROMPTS), lambda step: {"chat": PROMPTS}, STEPS, lr, guard)
        after = accuracy()
        found = split_since(start, KeptWeights(model).take(), losses, at_start)
        start.put_back()
        out[row] = {
            "norm": found.norm,
            "odd": found.odd["code"],
            "even": found.even["code"],
            "from": before,
            "to": after,
        }
    return out


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--seeds", type=int, default=3)
    torch.set_num_threads(1)
    seeds = [measure(seed) for seed in range(arguments.parse_args().seeds)]
    print("| chat's steps | norm of Delta | odd | even | code's accuracy |\n|---|---|---|---|---|")
    for row in ROWS:
        mean = {key: statistics.fmean(seed[row][key] for seed in seeds) for key in seeds[0][row]}
        print(
            f"| {row} | {mean['norm']:.2f} | {mean['odd']:+.2f} | {mean['even']:+.2f} | "
            f"{mean['from']:.2f} -> {mean['to']:.2f} |"
        )
    print(
        "\nEvery seed, even part: "
        + "; ".join(f"{row} " + " ".join(f"{s[row]['even']:+.2f}" for s in seeds) for row in ROWS)
    )


if __name__ == "__main__":
    main()
