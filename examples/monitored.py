"""The demo's small language model learns three domains one after the other, watched by a drift monitor; then read the report.

    python examples/monitored.py runs/monitored          # guarded; --plain: without a guard; --mixed: all three in every batch
    carerl report runs/monitored                         # writes runs/monitored/report.html

Takes about a minute on one core. Held-out examples are scored exactly (probability of the right answer); every domain is compared
with the best that it has been, so that forgetting after its own stage is found.
"""

from __future__ import annotations

import sys
from pathlib import Path

from carerl_kernels import CapabilityGuard
from carerl_kernels.grpo import GRPOConfig, GRPOTrainer, Stage
from carerl_kernels.monitor import DriftMonitor
from carerl_kernels.tasks.characters import (
    DOMAINS,
    MAX_NEW_TOKENS,
    character_tokenizer,
    demo_domains,
    tiny_model,
    warm_up,
)

STEPS, EVERY = 80, 8


def main(run: Path, guarded: bool, mixed: bool) -> None:
    tokenizer = character_tokenizer()
    model = tiny_model(tokenizer, seed=0)
    domains = demo_domains(seed=0)
    warm_up(model, tokenizer, domains, seed=0)
    # directions of gradients let some forgetting through: there is something to see
    guard = CapabilityGuard(model, basis="per_matrix", track_energy=True) if guarded else None
    stages = [Stage(DOMAINS, len(DOMAINS) * STEPS)] if mixed else [Stage(name, STEPS) for name in DOMAINS]
    monitor = DriftMonitor(
        DOMAINS,
        baseline="best",
        planned=len(DOMAINS) * STEPS // EVERY,
        model=model,
        gradients_every=EVERY,
        split_every=1,
        snapshots=run / "snapshots",
        guard=guard,
    )
    config = GRPOConfig(max_new_tokens=MAX_NEW_TOKENS, lr=7.5e-4, eval_every=EVERY, eval_batch_size=512, plots=False)
    trainer = GRPOTrainer(model, tokenizer, domains, config, guard=guard, monitor=monitor, run_dir=run)
    trainer.run(stages, resume=True)
    share = monitor.cost()["share"]
    print(
        f"{len(monitor.alerts)} alerts; monitoring took {share:.1%} of the time, evaluations by the trainer not included"
    )


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("expected the run's directory: python examples/monitored.py runs/monitored [--plain | --mixed]")
    options = sys.argv[2:]
    main(Path(sys.argv[1]), guarded=not {"--plain", "--mixed"} & {*options}, mixed="--mixed" in options)
