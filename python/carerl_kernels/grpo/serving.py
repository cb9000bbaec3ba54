"""Keeping an engine that samples at the present weights, and knowing which ones it has, also after an interruption."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .endpoint import EndpointSampler
from .parallel import Ranks
from .progress import quiet_transformers
from .rundir import gather_whole, model_tensors
from .sampling import SamplerError

if TYPE_CHECKING:
    from .learner import Learner


def write_model(
    model: Any,
    tokenizer: Any,
    ranks: Ranks,
    then: Callable[[Callable[[Path], None]], None],
    dtype: torch.dtype | None = None,
) -> None:
    """The model in transformers' own format, weights gathered; every process calls it.

    Args:
        then: Called in the first process with a function that writes into a folder.
        dtype: The dtype of the floating-point weights; None: as they are.
    """
    weights = gather_whole(model_tensors(model), ranks)  # tied ones once, as transformers has it
    if dtype is not None:
        weights = {n: t.to(dtype) if t.is_floating_point() else t for n, t in weights.items()}

    def write(path: Path) -> None:
        with quiet_transformers():
            model.save_pretrained(path, state_dict=weights)
            tokenizer.save_pretrained(path)

    ranks.on_first(partial(then, write))


class Serving:
    """The trainer's side of a sampler: pushes weights when they are due. Does nothing for a model that samples itself.

    The first process talks to the engine. Weights that kept checkpoints have in it stay on the disk, to be served again.
    """

    def __init__(self, learner: Learner) -> None:
        self.sampler = learner.sampler if isinstance(learner.sampler, EndpointSampler) else None
        self.learner, self.ranks = learner, learner.ranks
        self._needed: list[int] = []

    def refresh(self, step: int, *, fresh: bool = False) -> None:
        """Before sampling at a step: new weights for the engine, where they are due or must be those of the step."""
        sampler = self.sampler
        if sampler is None or not (sampler.due(step) or (fresh and sampler.served != step)):
            return
        learner, push = self.learner, partial(sampler.push, step)
        with learner.clock.timed("push"):
            write_model(learner.model, learner.tokenizer, self.ranks, push, sampler.dtype)
        sampler.served = step
        if self.ranks.first:
            sampler.forget({step, *self._needed})

    def check(self, step: int, metrics: dict[str, Any]) -> None:
        """Adds the staleness of a step's completions, and makes sure (SamplerError) that fresh ones come from this policy."""
        sampler = self.sampler
        if sampler is None or sampler.served is None:
            return
        metrics["staleness"] = step - sampler.served
        if step == sampler.served and metrics["sampler_gap"] > sampler.max_gap:
            raise SamplerError(
                f"expected log-probabilities of the present weights from the engine, found a mean difference of "
                f"{metrics['sampler_gap']:.3f} nats per token (limit {sampler.max_gap}): it serves other weights, or reports "
                "log-probabilities before temperature (vLLM: start it with --logprobs-mode processed_logprobs)"
            )

    def state_dict(self) -> dict[str, Any]:
        """What the engine has at a checkpoint."""
        if self.sampler is None:
            return {}
        if self.sampler.served is not None:
            self._needed = [*self._needed, self.sampler.served][-self.learner.config.keep_checkpoints :]
        return {"served": self.sampler.served, "needed": list(self._needed)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Has the engine serve again what it had, if that is still on the disk; the next refresh pushes otherwise."""
        sampler = self.sampler
        if sampler is None or not state:
            return
        self._needed, step = list(state["needed"]), state["served"]
        if step is not None and self.ranks.on_first(lambda: sampler.path(step).is_dir()):
            self.ranks.on_first(lambda: sampler.push(step, None))
            sampler.served = step
