"""What a recipe will do and need, before anything is loaded: steps, tokens, and bytes per process by purpose."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, get_args

from torch import nn

from .._command import size
from ..grpo.parallel import layers
from ..subspace.layout import RowKind
from .models import shapes
from .recipe import Recipe


@dataclass(frozen=True)
class RunPlan:
    """What a run will do, and what it needs."""

    parameters: int  # of the model
    trainable: int  # of them trained
    processes: int  # planned for
    sequences: int  # sampled and trained on per step
    tokens: int  # written in them, at most
    steps: int  # of all stages
    memory: dict[str, int]  # bytes per process, by purpose, all of them there at once at worst
    guard: dict[str, Any] | None  # the guard's own plan
    notes: tuple[str, ...]  # what the numbers leave out

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    def as_json(self) -> str:
        return json.dumps({**asdict(self), "total": self.total}, indent=2)


def plan_run(recipe: Recipe, processes: int = 1) -> RunPlan:
    """Plans a recipe.

    Raises:
        OSError: The model's config cannot be had.
        ValueError: A guard that does not fit the model.
    """
    model = shapes(recipe.model)
    config, train = model.config, recipe.train
    whole = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    item = next(model.parameters()).dtype.itemsize
    computed = 2 if recipe.model.precision == "bf16" else item
    sharded = processes > 1 or recipe.model.precision == "bf16"
    share = lambda n: -(-n // processes)  # noqa: E731
    sequences = train.prompts_per_step * train.group_size
    own = -(-train.prompts_per_step // processes) * train.group_size
    memory = {
        "weights": share(whole) * item,
        "gradients": share(trainable) * item,
        "optimizer (AdamW)": 2 * share(trainable) * item,
    }
    kept = (train.kl_beta > 0) + (train.stage_interpolation != 1)
    if kept:
        memory["weights of an earlier step"] = kept * share(trainable) * item
    if sharded:
        passes = recipe.sampler is None or train.updates_per_step > 1 or train.kl_beta > 0
        units = [sum(p.numel() for p in b.parameters()) for b in layers(model)] or [whole]
        memory["gathered weights"] = computed * (whole if passes else whole - sum(units) + 2 * max(units))
    if recipe.sampler is None:
        memory["cache of sampling"] = _cache(config, own, train.max_new_tokens, computed)
    memory["activations and logits"] = _activations(recipe, config, own, computed)
    guard, domains = None, 0
    if recipe.guard is not None:
        guard, domains = _guard(recipe, model, processes), len(_recorded(recipe))
        memory["guard"] = guard["total"]
    notes = [
        "the cache of sampling and activations leave prompts out: add their length to max_new_tokens where they are long",
        *(["the guard's history of earlier runs is counted as it will be after the last stage"] if domains else []),
    ]
    return RunPlan(
        parameters=whole,
        trainable=trainable,
        processes=processes,
        sequences=sequences,
        tokens=sequences * train.max_new_tokens,
        steps=sum(s.steps for s in recipe.stages),
        memory=memory,
        guard=guard,
        notes=tuple(notes),
    )


def _cache(config: Any, rows: int, length: int, item: int) -> int:
    """Keys and values of all rows at full length."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * rows * length * item


def _activations(recipe: Recipe, config: Any, rows: int, item: int) -> int:
    """Of the largest micro-batch: hidden states (one per layer with checkpointing, about 16 without) and logits with their
    gradient."""
    train = recipe.train
    rows = min(rows, train.micro_batch_size or rows)
    tokens = rows * train.max_new_tokens
    if train.micro_batch_tokens:
        tokens = min(tokens, max(train.micro_batch_tokens, train.max_new_tokens))
    states = config.num_hidden_layers * (1 if recipe.model.gradient_checkpointing else 16)
    return tokens * (config.hidden_size * states * item + 2 * config.vocab_size * item)


def _recorded(recipe: Recipe) -> set[str]:
    """Under which names the run's stages become history."""
    apart = recipe.guards_mixed
    return {name for stage in recipe.stages for name in (stage.domains if apart else (stage.name,))}


def _guard(recipe: Recipe, model: nn.Module, processes: int) -> dict[str, Any]:
    from ..subspace.kinds import kind_of, rank_of
    from ..subspace.plan import plan
    from .run import basis_dtype, history_files

    assert recipe.guard is not None
    options = recipe.guard.options
    kind = kind_of(options.get("basis"), k=options.get("k"), dtype=basis_dtype(recipe.guard))
    rank = rank_of(kind, options.get("k"), options.get("r"))
    item = next(model.parameters()).dtype.itemsize
    names = _recorded(recipe)
    earlier = len(history_files(recipe.guard.history))
    return plan(model, kind, rank, max(1, earlier + len(names)), processes, basis_dtype(recipe.guard), item).as_dict()


def lines(recipe: Recipe, plan: RunPlan) -> list[str]:
    """The plan as text."""
    train = recipe.train
    out = [
        f"model     {plan.parameters:,} parameters, {plan.trainable:,} trained in {recipe.model.dtype}, computed in "
        f"{recipe.model.precision}" + (", activations checkpointed" if recipe.model.gradient_checkpointing else ""),
        f"processes {plan.processes}",
    ]
    for stage in recipe.stages:
        kinds = ", ".join(f"{d} ({recipe.domains[d].kind})" for d in stage.domains)
        out.append(f"stage     {stage.name}: {stage.steps} steps on {kinds}")
    out.append(
        f"step      {train.prompts_per_step} prompts x {train.group_size} completions, at most {plan.tokens:,} tokens; "
        f"{train.updates_per_step} optimizer step{'s' if train.updates_per_step > 1 else ''}, loss {train.loss}"
    )
    where = "the model itself" if recipe.sampler is None else f"{recipe.sampler.engine} at {recipe.sampler.url}"
    out.append(f"sampling  {where}")
    if recipe.guard is not None and plan.guard is not None:
        g = plan.guard
        out.append(
            f"guard     {g['kind']}, {'k' if g['kind'] in get_args(RowKind) else 'r'} = {g['k']}, {g['domains']} domains in the "
            f"end; covers {g['covered'] / max(plan.trainable, 1):.0%}, a file of {size(g['disk'])} per stage"
        )
    out.append("memory per process, at worst:")
    out += [f"  {size(n):>10}  {name}" for name, n in plan.memory.items()]
    out.append(f"  {size(plan.total):>10}  in all")
    return out + [f"  ({note})" for note in plan.notes]
