"""A TRL run's own right answers: kept as token ids in a bounded sample per domain, rehearsed by cross-entropy, in checkpoints."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from .._files import write_json
from .._json import nested_tuples
from ..guard.probes import PromptStore
from ..text import left_pad, right_pad


class OwnAnswers(TrainerCallback):
    """Of one process: it keeps what it generated itself, and draws from that.

    Right is what every reward function that verifies (`function.verifies`) gives a 1; what other functions say, a judge's among
    them, does not count.

    Args:
        trainer: a :class:`carerl_kernels.integrations.trl.CareMixin`.
        weight: The weight of the mean negative log-likelihood per token.
        size: answers kept per domain, of all that come a uniform sample.
        batch: answers drawn in every optimizer step; as long as fewer are kept they weigh less in the same proportion.

    Raises:
        ValueError: no reward function verifies; fp16 scaling, which another backward pass would get wrong.
    """

    def __init__(self, trainer: Any, weight: float, size: int, batch: int):
        verifying = [bool(getattr(function, "verifies", False)) for function in trainer.reward_funcs]
        if not any(verifying):
            raise ValueError(
                "self_rehearsal_weight: expected a reward function that verifies, found none; make it of a verifier "
                "(trl_reward(exact_match)), or set function.verifies = True where its 1 means that the answer is right"
            )
        if trainer.args.fp16:
            raise ValueError("self_rehearsal_weight: expected fp16 off, found fp16=True; use bf16")
        self.trainer, self.weight, self.batch = trainer, weight, batch
        self._verifying = torch.tensor(verifying)
        seed = trainer.args.seed + trainer.accelerator.process_index
        self.store, self._rng = PromptStore(size, seed), random.Random(seed)

    def see(self, output: dict[str, Any], rewards: Tensor, domains: list[str]) -> None:
        """Takes in the right ones among the completions that this process generated.

        Args:
            output: The output of TRL's generation, before it is shuffled.
            rewards: `[B, functions]` of all processes.
        """
        first = self.trainer.accelerator.process_index * len(domains)
        mine = rewards[first : first + len(domains)].cpu()[:, self._verifying]
        for i in (mine == 1).all(1).nonzero().flatten().tolist():
            item = [
                output[f"{part}_ids"][i][output[f"{part}_mask"][i].bool()].tolist() for part in ("prompt", "completion")
            ]
            if all(item):
                self.store.add(domains[i], item)

    def rehearse(self, model: nn.Module) -> None:
        """Adds to the gradients of a step that is about to be taken; collective, and nothing before every process has some."""
        trainer = self.trainer
        device = trainer.accelerator.device
        have = trainer.accelerator.gather(torch.tensor([len(self.store)], device=device))
        if not int(have.min()):
            return
        pool = [item for name in self.store.counts() for item in self.store[name]]
        drawn = self._rng.sample(pool, min(self.batch, len(pool)))
        pad = trainer.processing_class.pad_token_id
        prompts, prompt_mask = left_pad([prompt for prompt, _ in drawn], pad, device)
        answers, mask = right_pad([answer for _, answer in drawn], pad, device)
        ids, seen = torch.cat([prompts, answers], 1), torch.cat([prompt_mask, mask], 1)
        with trainer.compute_loss_context_manager():
            logp = trainer._get_per_token_logps_and_entropies(model, ids, seen, answers.shape[1])[0]
            loss = -(logp * mask).sum() / mask.sum()
        (self.weight * len(drawn) / self.batch * loss).backward()
        metrics = trainer._mode_metrics()
        metrics["self_rehearsal/loss"].append(float(loss.detach()))
        for name, count in self.store.counts().items():
            metrics[f"self_rehearsal/{name}"].append(float(count))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes what is kept beside the model."""
        if not args.save_only_model:
            content = {"store": self.store.state_dict(), "random": self._rng.getstate()}
            write_json(self._path(args, state), content, indent=None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A resumed run goes on with what was kept."""
        if not state.global_step:
            return
        path = self._path(args, state)
        if not path.exists():
            raise FileNotFoundError(
                f"resuming: expected the run's own answers in {path}, found none; resume from a checkpoint that was written with "
                "self_rehearsal_weight and as many processes, with save_only_model=False"
            )
        content = json.loads(path.read_text())
        self.store.load_state_dict(content["store"])
        self._rng.setstate(nested_tuples(content["random"]))

    def _path(self, args: Any, state: Any) -> Path:
        rank = self.trainer.accelerator.process_index
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / f"own_answers-{rank}.json"
