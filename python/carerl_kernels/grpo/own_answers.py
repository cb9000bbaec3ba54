"""The run's own right answers: kept in a bounded sample per domain, and rehearsed by cross-entropy.

What a domain can do drifts away in pooled runs while others move the weights; its own verified completions, shown again, bring
it back. They are the policy's own words, so rehearsing them moves it little where it still can do the task.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..guard.probes import PromptStore
from ..logprobs import answer_loss
from ..task import Domain, Example
from .rollout import Batch

if TYPE_CHECKING:
    from .learner import Learner


class OwnAnswers:
    """Keeps right completions, and adds the gradient of their cross-entropy."""

    def __init__(self, learner: Learner) -> None:
        config = learner.config
        self.learner, self.weight, self.batch = learner, config.self_rehearsal_weight, config.rehearsal_batch
        self.store = PromptStore(config.self_rehearsal_size, config.seed)
        self.loss: float | None = None  # mean negative log-likelihood per token of what was rehearsed last

    def check(self, domains: Sequence[Domain]) -> None:
        """Before a run: says of which domains no answers will be kept, and refuses (ValueError) that it be all of them."""
        if not self.weight:
            return
        bare = [domain.name for domain in domains if not domain.verifies]
        remedy = "give Domain(verify=...) a function, or a number from which on a reward counts, whoever gives it"
        if len(bare) == len(domains):
            raise ValueError(
                f"self_rehearsal_weight={self.weight}: expected a domain whose right answers a verifier knows, found none "
                f"({', '.join(bare)}); {remedy}, or set self_rehearsal_weight=0"
            )
        if bare:
            warnings.warn(
                f"own answers of {', '.join(bare)} are not kept, for no verifier says which are right: {remedy}",
                stacklevel=3,
            )

    def see(self, batch: Batch) -> None:
        """Takes in the right completions of a step; the same in every process."""
        if not self.weight:
            return
        whole, domains = batch.whole, self.learner.domains
        rows = list(zip(whole.domains, whole.group_ids.tolist(), whole.texts, whole.rewards.tolist(), strict=True))
        right = self.learner.ranks.on_first(
            lambda: [
                domains[name].right(batch.prompts[group], text, reward if reward == reward else None)
                for name, group, text, reward in rows
            ]
        )
        for (name, group, text, _), keep in zip(rows, right, strict=True):
            if keep:
                self.store.add(name, [batch.prompts[group].prompt, text])

    def rehearse(self) -> None:
        """Adds to the gradients. As long as fewer answers are kept than a batch has, they weigh less in the same proportion."""
        if not self.weight or not len(self.store):
            return
        learner = self.learner
        pool = [item for name in self.store.counts() for item in self.store[name]]
        drawn = learner.rng.sample(pool, min(self.batch, len(pool)))
        examples = [Example(prompt, text) for prompt, text in drawn]
        loss = answer_loss(learner.model, learner.tokenizer, examples, learner.tokens)
        (self.weight * len(drawn) / self.batch * loss).backward()
        self.loss = float(loss.detach())

    def metrics(self) -> dict[str, Any]:
        """For a line of metrics."""
        return {"own_answers": self.store.counts(), "self_rehearsal_loss": self.loss} if self.weight else {}

    def state_dict(self) -> dict[str, Any]:
        return self.store.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.store.load_state_dict(state)
