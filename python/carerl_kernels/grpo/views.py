"""What a guard is shown of each domain of a mixed stage: one batch of prompts with the model's own completions.

bases/STAGE.before/DOMAIN.safetensors    directions the stage began with, of domains the guard did not know
bases/STAGE/DOMAIN.safetensors           the same of all its domains when it had ended: what is history for what follows
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..guard import CapabilityGuard
from ..text import encode_prompts
from .sampling import held
from .update import micro_batches

if TYPE_CHECKING:
    from .learner import Learner


class DomainViews:
    """Shows domains to a guard, and keeps what it saw in a folder, if any; the learner's random state is left alone."""

    def __init__(self, learner: Learner, folder: Path | None) -> None:
        self.learner, self.folder = learner, folder

    def before(self, guard: CapabilityGuard, stage: str, domains: Sequence[str], resumed: bool) -> None:
        """The domains that the guard has no directions of become history; a stage resumed finds them in their files."""
        for name in domains:
            path = self._path(f"{stage}.before", name)
            if resumed and path is not None and path.exists():
                guard.add(path)
            elif name not in guard.history:
                guard.protect(name, self._batches(name, stage), path, progress=False)

    def after(self, guard: CapabilityGuard, stage: str, domains: Sequence[str]) -> None:
        """Directions of all the stage's domains, as the model uses them now."""
        for name in domains:
            guard.protect(name, self._batches(name, f"after {stage}"), self._path(stage, name), progress=False)

    def load(self, guard: CapabilityGuard, stage: str, domains: Sequence[str]) -> None:
        """What :meth:`after` wrote."""
        for name in domains:
            guard.add(self._path(stage, name))  # type: ignore[arg-type]  # there is one: a resumed run has files

    def _path(self, folder: str, domain: str) -> Path | None:
        return None if self.folder is None else self.folder / folder / f"{domain}.safetensors"

    def _batches(self, name: str, occasion: str) -> Iterator[dict[str, Any]]:
        """As many prompts and completions as a step has, by random numbers of their own; this process's share of them."""
        learner, config = self.learner, self.learner.config
        rng = random.Random(f"{config.seed} {name} {occasion}")
        examples = learner.domains[name].draw(rng, config.prompts_per_step)
        seeds = [rng.getrandbits(31) for _ in examples]
        mine = learner.ranks.share(len(examples))
        prompts = encode_prompts(learner.tokenizer, [examples[i].prompt for i in mine])
        with held(learner.sampler) as draw:
            sampled = draw(prompts, [seeds[i] for i in mine], **config.sampling)
        rows = torch.arange(sampled.input_ids.shape[0], device=sampled.input_ids.device)
        for piece in micro_batches(sampled, rows, config):
            part = sampled.select(piece)
            yield {"input_ids": part.input_ids, "attention_mask": part.attention_mask}
