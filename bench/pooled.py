"""What guarding a mixed batch costs, by number of domains: `python bench/pooled.py` (two minutes on one core).

The demo's model and tasks, 16 prompts x 8 completions, AdamW. Three learners with the same weights take a step each in turn:
plainly; with the guard looking at every row of one backward pass; with the guard and a pass for each domain, as models need it
whose weights are sharded or used in ways that rows cannot tell. A ratio is taken within a round, of processor time of one thread:
what else the machine does hardly counts.
"""

from __future__ import annotations

import time

import torch
from carerl_kernels import CapabilityGuard
from carerl_kernels.bench.measure import Spread
from carerl_kernels.grpo import GRPOConfig, prompt_counts
from carerl_kernels.grpo.learner import Learner
from carerl_kernels.grpo.views import DomainViews
from carerl_kernels.tasks.characters import character_tokenizer, demo_domains, tiny_model, warm_up
from rich.console import Console
from rich.table import Table

NAMES = ("code", "chat", "math", "turn", "flip", "merge")
ROUNDS = 24


def main() -> None:
    torch.set_num_threads(1)
    tokenizer, domains = character_tokenizer(NAMES), demo_domains(0, NAMES)
    start = tiny_model(tokenizer, 0)
    warm_up(start, tokenizer, domains, seed=0)
    config = GRPOConfig(max_new_tokens=5, lr=1e-5, progress=False)

    def learner(names: tuple[str, ...], rows: bool | None) -> tuple[Learner, torch.optim.Optimizer]:
        model = tiny_model(tokenizer, 0)
        model.load_state_dict(start.state_dict())
        guard = None if rows is None else CapabilityGuard(model)
        out = Learner(model, tokenizer, {domain.name: domain for domain in domains}, config, guard)
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
        if guard is not None:
            DomainViews(out, None).before(guard, "pooled", names, False)
            guard.attach(optimizer)
            out.by_domain, out.takes_rows = True, bool(rows)
        return out, optimizer

    table = Table(title="a mixed step behind the guard, in plain steps (median, quartiles)")
    for name in ("domains", "plain, ms", "one pass", "a pass per domain"):
        table.add_column(name, justify="right")
    for count in (1, 2, 3, 6):
        names = NAMES[:count]
        ways = {"plain": learner(names, None), "rows": learner(names, True), "passes": learner(names, False)}
        spent: dict[str, list[float]] = {way: [] for way in ways}
        for step in range(ROUNDS + 3):
            counts = prompt_counts(names, [], config.prompts_per_step, 0.0, step)
            for way, (who, optimizer) in ways.items():
                begun = time.process_time()
                who.step(optimizer, counts, "pooled", mixed=True)
                spent[way].append(1e3 * (time.process_time() - begun))
        plain = spent["plain"][3:]  # the first steps warm up
        row = [str(count), f"{Spread.of(plain).median:.0f}"]
        for way in ("rows", "passes"):
            found = Spread.of([a / b for a, b in zip(spent[way][3:], plain, strict=True)])
            row.append(f"{found.median:.2f} ({found.low:.2f} .. {found.high:.2f})")
        table.add_row(*row)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
