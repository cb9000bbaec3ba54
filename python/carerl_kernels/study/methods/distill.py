"""Multi-teacher on-policy distillation of experts that were trained apart (GKD, arXiv:2306.13649, with a teacher per domain).

Half of every stage's steps trains an expert on its domain alone, all from the start that methods share. The other half trains the
student from the same start: it samples completions of its own on the prompts of all domains, in equal shares, and learns by the
reverse KL divergence, KL(student || expert of the prompt's domain), of the whole distribution at every token that it wrote. So
the run samples as many completions as one in sequence does. In settings of kind "sft" experts learn from answers, and the student
still from what it samples itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ...grpo import special_tokens
from ...grpo.config import lr_factor
from ...grpo.rollout import prompt_counts, rollout
from ...grpo.rundir import load_weights, save_weights
from ...grpo.sampling import Rollout, sample
from ...tasks.texts import Pair
from ...text import SpecialTokens, position_ids
from ...train.recipe import Recipe, RecipeError
from . import Addition, Extra
from .merged import apart

if TYPE_CHECKING:
    from ...train.run import Run
    from ..grid import Cell


class Method(Addition):
    """Args:
    share: Of every stage's steps that trains experts.
    """

    kinds: ClassVar[tuple[str, ...]] = ("grpo", "sft")
    share: float = Field(default=0.5, gt=0, lt=1)

    def check(self, recipe: Any, source: str) -> None:
        if not isinstance(recipe, Recipe):
            apart(recipe, f"{source}: add: distill")
            return
        domains = [stage.domain for stage in recipe.stages]
        train = recipe.train
        if any(stage.mixed for stage in recipe.stages) or len(set(domains)) < max(2, len(domains)):
            raise RecipeError(f"{source}: expected stages of one domain each, every one once, to go with add: distill")
        if (
            recipe.guard
            or train.replay_fraction
            or train.rehearsal_weight
            or train.self_rehearsal_weight
            or train.kl_beta
        ):
            raise RecipeError(
                f"{source}: expected no guard, replay, rehearsal or KL term to go with add: distill, which has its own loss"
            )
        if train.updates_per_step > 1 or recipe.model.lora is not None:
            raise RecipeError(
                f"{source}: expected one optimizer step a batch and whole models to go with add: distill, found more or lora"
            )

    def run(self, cell: Cell, cache: Path, report: Callable[[Any], None]) -> dict[str, Any]:
        if cell.setting.kind == "sft":
            return self._supervised(cell, cache, report)
        from ..grpo import opened, start_of
        from ..merge import scores, trained_alone

        halves, steps = self._split(cell.recipe.stages)
        start = start_of(cell, cache)
        plain = cell.recipe.model_copy(update={"stages": halves})
        names = [stage.name for stage in halves]
        experts = trained_alone(cell, plain, start, cache)
        with opened(cell, plain, start, lambda line: None) as bed, TemporaryDirectory() as folder:
            first = Path(folder) / "start.safetensors"
            save_weights(first, bed.trainer.model)
            found, teachers = [scores(bed, names)], {}
            for name, path in experts.items():
                load_weights(path, bed.trainer.model)
                found.append(scores(bed, names))
                teachers[name] = deepcopy(bed.trainer.model)
            load_weights(first, bed.trainer.model)
            learn(bed, teachers, steps, report)
            found.append(scores(bed, names))
        return {"stages": [*([name] for name in names), names], "scores": found}

    def _supervised(self, cell: Cell, cache: Path, report: Callable[[Any], None]) -> dict[str, Any]:
        from ..sft import Bed

        short = replace(cell)
        short.recipe = cell.recipe.model_copy(update={"steps": self._experts(cell.recipe)})
        bed, tasks = Bed(short, cache, report), list(cell.recipe.stages)
        measured, teachers = [bed.measure()], {}
        for task in bed.alone():
            measured.append(bed.measure())
            teachers[task] = deepcopy(bed.model)
        torch.manual_seed(cell.seed)

        def divergence(task: str, pairs: list[Pair]) -> Tensor:
            prompts, answers = (
                [bed.tokenizer(text)["input_ids"] for text in texts] for texts in zip(*pairs, strict=True)
            )
            end = answers[0][-1]  # of the line
            own = sample(bed.model, prompts, SpecialTokens(end, (end,)), max_new_tokens=max(map(len, answers)))
            student = token_logprobs(bed.model, own, (), 1.0)
            with torch.no_grad():
                expert = token_logprobs(teachers[task], own, (), 1.0)
            return reverse_kl(student, expert, own.completion_mask).mean()

        bed.train(tasks, bed.rate(1), steps=self._student(cell.recipe), loss_of=divergence)
        bed.known = None
        return bed.found([*([task] for task in tasks), tasks], [*measured, bed.measure()])

    def _experts(self, recipe: Any) -> int:
        """Steps of an expert, supervised."""
        return max(1, round(self.share * recipe.steps))

    def _student(self, recipe: Any) -> int:
        """Steps of the student, supervised."""
        return max(1, len(recipe.stages) * (recipe.steps - self._experts(recipe)))

    def _split(self, stages: Any) -> tuple[tuple[Any, ...], int]:
        """Stages of the experts, and steps of the student."""
        halves = tuple(replace(stage, steps=max(1, round(self.share * stage.steps))) for stage in stages)
        return halves, max(1, sum(stage.steps for stage in stages) - sum(stage.steps for stage in halves))

    def extra(self, recipe: Any) -> Extra:
        if not isinstance(recipe, Recipe):
            from ..sft import BATCH

            return Extra(forward=2 * self._student(recipe) * BATCH, stores=f"{len(recipe.stages)} models")
        train, (halves, steps) = recipe.train, self._split(recipe.stages)
        return Extra(forward=steps * train.prompts_per_step * train.group_size, stores=f"{len(halves)} models")


def learn(bed: Run, teachers: dict[str, Any], steps: int, report: Callable[[Any], None]) -> None:
    """Train the bed's model, on what it samples itself, as the trainer's configuration says."""
    trainer, config, names = bed.trainer, bed.trainer.config, list(teachers)
    model: Any = trainer.model
    tokens = special_tokens(trainer.tokenizer, model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
    rng = random.Random(config.seed)
    torch.manual_seed(config.seed)
    for step in range(steps):
        factor = lr_factor(step, steps, warmup=config.warmup_steps, decay=config.decay, final=config.final_lr_fraction)
        optimizer.param_groups[0]["lr"] = config.lr * factor
        counts = prompt_counts(names, [], config.prompts_per_step, 0.0, step)
        batch = rollout(model, trainer.tokenizer, tokens, trainer.domains, counts, config, rng=rng)
        loss = torch.zeros(())
        for name in counts:
            rows = batch.of(name, torch.arange(len(batch.texts)))
            own = batch.rollout.select(rows)
            student = token_logprobs(model, own, tokens.banned, config.temperature)
            with torch.no_grad():
                expert = token_logprobs(teachers[name], own, tokens.banned, config.temperature)
            loss = loss + reverse_kl(student, expert, own.completion_mask).sum() / len(batch.texts)
        optimizer.zero_grad()
        loss.backward()
        if config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        report(step + 1)


def reverse_kl(student: Tensor, expert: Tensor, mask: Tensor) -> Tensor:
    """KL(student || expert) in nats a token, averaged over each sequence.

    Args:
        student, expert: `[B, L, V]` log-probabilities, finite.
        mask: `[B, L]`, 1 where a token was written.

    Returns:
        `[B]`.
    """
    nats = (student.exp() * (student - expert)).sum(-1)
    return (nats * mask).sum(1) / mask.sum(1).clamp(min=1)


def token_logprobs(model: Any, own: Rollout, banned: tuple[int, ...], temperature: float) -> Tensor:
    """Log-probabilities `[B, L, V]` of every token that could be written; banned ones are next to impossible."""
    mask, length = own.attention_mask, own.completion_mask.shape[1]
    logits = model(input_ids=own.input_ids, attention_mask=mask, position_ids=position_ids(mask)).logits
    logits = logits[:, -(length + 1) : -1] / temperature
    if banned:
        logits = logits.index_fill(-1, torch.tensor(banned), -1e4)
    return logits.log_softmax(-1)
