"""Cells of merged experts: one model a domain, all trained from one checkpoint by the demonstration's trainer, then summed.

The last stage of such a setting, of all domains, is the merge. A cell's @LR is the scale of the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..demo import tasks
from ..grpo import Domain, GRPOTrainer, Stage, special_tokens, success_probability
from ..grpo.rundir import load_weights, model_tensors, save_weights
from ..guard.checkpoints import merge
from ..guard.sums import task_arithmetic, ties
from .grid import Cell
from .lm import config_of, shown_by, start_model
from .methods import guard_of


def run(cell: Cell, cache: Path, report: Callable[[Any], None]) -> dict[str, Any]:
    """Train the experts, unless `cache` has them, and merge them.

    Returns:
        scores as `cells.Record` has them: of the start, of every expert, of the merge.
    """
    setting, seed = cell.setting, cell.seed
    tokenizer = tasks.character_tokenizer(setting.domains)
    model = start_model(cell, tokenizer, cache)
    domains = tasks.demo_domains(seed, setting.domains)

    def scores() -> list[float]:
        tokens = special_tokens(tokenizer, model)
        return [
            float(
                success_probability(
                    model, tokenizer, d.eval_examples, tokens, max_new_tokens=tasks.MAX_NEW_TOKENS
                ).mean()
            )
            for d in domains
        ]

    out = [scores()]
    with TemporaryDirectory() as folder:
        start = Path(folder) / "start.safetensors"
        save_weights(start, model)
        experts = {}
        for domain in domains:
            experts[domain.name] = expert(cell, model, tokenizer, domain, start, cache)
            out.append(scores())
        batches = shown_by(domains, tokenizer, cell.method.shown)
        guard = guard_of(cell.method, model, seed, shown=batches, measure=False)
        if guard is not None:
            for name, path in experts.items():
                load_weights(path, model)
                guard.protect(name, batches(name), progress=False)
            merged = Path(folder) / "merged"
            bases = [guard.basis(name) for name in experts]
            merge(start, experts, bases, merged, scale=cell.lr, room=guard.settings.room)
            load_weights(merged / start.name, model)
        else:
            add(cell, model, start, experts)
    out.append(scores())
    return {"scores": out}


def expert(cell: Cell, model: Any, tokenizer: Any, domain: Domain, start: Path, cache: Path) -> Path:
    """A file of the model trained on one domain alone; the model has its weights."""
    setting = cell.setting
    path = cache / "experts" / f"{domain.name}-{setting.warm_up}-{setting.steps}-{setting.lr:g}-{cell.seed}.safetensors"
    if path.exists():
        load_weights(path, model)
        return path
    load_weights(start, model)
    config = config_of(cell, setting.lr)
    GRPOTrainer(model, tokenizer, [domain], config).run([Stage(domain.name, setting.steps)])
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(path, model)
    return path


@torch.no_grad()
def add(cell: Cell, model: Any, start: Path, experts: dict[str, Path]) -> None:
    """Sum the experts' changes as others do."""
    own, density = model_tensors(model), cell.method.ties
    found: dict[str, list[torch.Tensor]] = {name: [] for name in own}
    for path in (start, *experts.values()):
        load_weights(path, model)
        for name, tensor in own.items():
            found[name].append(tensor.clone())
    for name, tensor in own.items():
        first, *others = found[name]
        if density is None:
            tensor.copy_(task_arithmetic(first, others, cell.lr))
        else:
            tensor.copy_(ties(first, others, cell.lr, density))
