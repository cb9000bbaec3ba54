"""What methods share that act on every optimizer step: both runners of language models, "grpo" and "sft", drive them alike."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..grpo import special_tokens
from ..logprobs import answer_logprobs
from ..train.recipe import RecipeError
from .methods import Addition

if TYPE_CHECKING:
    from ..train.run import Run


class Trainee(Protocol):
    """A model that is trained on domains in sequence.

    Attributes:
        model: What is trained.
        trained: Its trainable parameters, by name.
        seed: Of the run.
    """

    @property
    def model(self) -> nn.Module: ...
    @property
    def trained(self) -> dict[str, nn.Parameter]: ...
    @property
    def seed(self) -> int: ...

    def nats(self, domain: str, n: int) -> Iterator[Callable[[], Tensor]]:
        """Of each of `n` stored examples: minus the log-probability of its answer, when called."""


class Actor:
    """What a method does in one run, from the second stage on; it is made before the first."""

    def turn(self, ended: str) -> None:
        """The stage on the domain `ended` has ended, and the next one begins with these weights."""

    def before(self, optimizer: Optimizer) -> None:
        """Gradients are there, after clipping; the optimizer has not moved."""

    def after(self, optimizer: Optimizer) -> None:
        """The optimizer has moved."""

    def figures(self) -> dict[str, Any]:
        """Of the whole run, as fields of `cells.Record`."""
        return {}


class Acting(Addition):
    """A method that is an `Actor`; without a guard and without resuming, which would lose what the actor knows."""

    kinds: ClassVar[tuple[str, ...]] = ("grpo", "sft")

    def check(self, recipe: Any, source: str) -> None:
        name = type(self).__module__.rpartition(".")[2]
        if len(recipe.stages) < 2 or any(getattr(stage, "mixed", False) for stage in recipe.stages):
            raise RecipeError(f"{source}: expected two or more stages of one domain each to go with add: {name}")
        if recipe.guard is not None:
            raise RecipeError(
                f"{source}: expected no guard to go with add: {name}, which acts on the same steps; found one"
            )
        if getattr(recipe.train, "checkpoint_every", 0):
            raise RecipeError(
                f"{source}: expected train.checkpoint_every: 0 to go with add: {name}, whose state is in no checkpoint, "
                f"found {recipe.train.checkpoint_every}"
            )

    def actor(self, trainee: Trainee) -> Actor:
        raise NotImplementedError

    @contextmanager
    def during(self, run: Run) -> Iterator[dict[str, Any]]:
        """The trainer's steps tell which stage it is in."""
        figures: dict[str, Any] = {}
        actor, trainer = self.actor(Policy(run)), run.trainer
        ends = list(accumulate(stage.steps for stage in run.stages))
        at = 0

        def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            nonlocal at
            now = bisect_right(ends, trainer.history[-1]["step"])
            if now > at:
                at = now
                actor.turn(run.stages[now - 1].name)
            if at:
                actor.before(optimizer)

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if at:
                actor.after(optimizer)

        hooks = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
        try:
            yield figures
            figures |= actor.figures()
        finally:
            for hook in hooks:
                hook.remove()


class Policy:
    """The trainee of a run of the GRPO trainer.

    Args:
        run: Whose domains store examples with answers.
    """

    def __init__(self, run: Run) -> None:
        self._trainer = run.trainer
        self.model: nn.Module = run.trainer.model
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.seed = run.trainer.config.seed

    def nats(self, domain: str, n: int) -> Iterator[Callable[[], Tensor]]:
        trainer = self._trainer
        tokens = special_tokens(trainer.tokenizer, self.model)

        def loss(example: Any) -> Tensor:
            logp, mask = answer_logprobs(self.model, trainer.tokenizer, [example], tokens)
            return -logp.masked_fill(mask == 0, 0.0).sum()

        examples = trainer.domains[domain].probe_examples[:n]
        return (partial(loss, example) for example in examples)
