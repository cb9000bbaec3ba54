"""What a memory is worth: how much likelier it makes the right answer.

For agents that read a long text in chunks and keep a memory, the final success says little about which memory was good. In the
spirit of InfoMem (arXiv:2606.03329; its formula is not public to us, this is a reconstruction), a memory m that the policy wrote
earns r = (log p(y | m, q) - log p(y | q)) / |y|: nats per token that it adds to the right answer y of question q. It shall be
normalised by itself and counted on successful trajectories only, which a gated component does:

    Composition([Component("success", success), Component("memory", InformationGain(model, tokenizer), gate="success")])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch

from ..logprobs import answer_logprobs, evaluating
from ..task import Example, Messages, group_numbers
from ..text import special_tokens

Template = Callable[[Example, str | None], str | Messages]


def plain_prompt(example: Example, memory: str | None) -> str | Messages:
    """The question after the memory, or by itself; from `example.info["question"]` if that is there, else the prompt."""
    question = example.info.get("question", example.prompt)
    if isinstance(question, str):
        return question if memory is None else f"{memory}\n\n{question}"
    if memory is None:
        return tuple(question)
    return ({"role": "system", "content": memory}, *question)


@dataclass(eq=False)
class InformationGain:
    """Reward: nats per token by which a completion, taken as memory, raises the log-probability of `example.answer`.

    Log-probabilities come from the model's logits through `torch.ops.carerl.token_logprobs`, without gradient.

    Args:
        model: Causal LM that reads memory and question: a frozen reference, or the policy itself.
        prompt: Builds the prompt with (or, for None, without) a memory.
        batch_size: Sequences at once.
        max_gain: Gains are clipped to +-max_gain: one impossible token must not outweigh everything.
    """

    model: Any
    tokenizer: Any
    _: KW_ONLY
    prompt: Template = plain_prompt
    batch_size: int = 16
    max_gain: float = 10.0

    def __post_init__(self) -> None:
        self.tokens = special_tokens(self.tokenizer, self.model)
        self.__name__ = "information_gain"

    def score_batch(self, examples: Sequence[Example], completions: Sequence[str]) -> list[float | None]:
        """Gains, example i's answer with completion i as memory. ValueError: an example has no answer."""
        questions = [Example(self.prompt(e, None), e.answer) for e in examples]
        numbers = group_numbers(questions)
        alone = {n: questions[n] for n in numbers}  # once per question, not once per completion
        without = dict(zip(alone, self._mean_logprobs(list(alone.values())), strict=True))
        told = [Example(self.prompt(e, m), e.answer) for e, m in zip(examples, completions, strict=True)]
        gains = [p - without[n] for p, n in zip(self._mean_logprobs(told), numbers, strict=True)]
        return [min(self.max_gain, max(-self.max_gain, g)) for g in gains]

    def __call__(self, example: Example, completion: str) -> float | None:
        """The gain of one completion; see `score_batch`."""
        return self.score_batch([example], [completion])[0]

    @torch.no_grad()
    def _mean_logprobs(self, examples: Sequence[Example]) -> list[float]:
        """Log-probability per token of each answer and its end."""
        means: list[float] = []
        with evaluating(self.model):
            for i in range(0, len(examples), self.batch_size):
                chunk = examples[i : i + self.batch_size]
                logp, mask = answer_logprobs(self.model, self.tokenizer, chunk, self.tokens)
                sums = logp.masked_fill(mask == 0, 0.0).double().sum(1)
                means += (sums / mask.sum(1)).tolist()
        return means
