"""Balance of mixed batches in TRL's trainer, which gives away the advantages and nothing else of the mixture."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import TrainerCallback

from .._files import write_json
from ..grpo.balance import LOUD_OVER, EqualNorms, domination_of, loud
from ..monitor.controller import Controller

STATE = "balance.json"
_log = logging.getLogger(__name__)


class AdvantageBalance(TrainerCallback):
    """Weighs the advantages of a batch per domain, and tells of the step budget; its state is in the trainer's checkpoints.

    What TRL cannot do: its sampler of the data set decides which prompts come, so shares of prompts and fresh draws for groups
    that agree are refused by name.

    Args:
        balance: a controller by weight, whose factors the advantages are multiplied by; "gradient": weights under which every
            domain's squared advantages are the same; None: nothing is weighed.

    Raises:
        ValueError: a balance that TRL has no place for.
    """

    def __init__(self, balance: Controller | Literal["gradient"] | None, names: Sequence[str]) -> None:
        by_share = isinstance(balance, Controller) and balance.by != "weight"
        if by_share or not (balance in (None, "gradient") or isinstance(balance, Controller)):
            found = "a Controller by share" if by_share else repr(balance)
            raise ValueError(
                "balance: expected 'gradient' or Controller(domains, by='weight'), which weigh advantages, found "
                f"{found}; TRL's sampler of the data set decides which prompts come, so neither shares of prompts nor "
                "fresh draws for groups that agree ('shares') can be had here: mix the data set, or use `carerl train`"
            )
        if balance is not None and len(names) < 2:
            raise ValueError(
                f"balance: expected two or more domains in the data set, found {', '.join(names) or 'none'}"
            )
        self.names = list(names)
        self.controller = balance if isinstance(balance, Controller) else None
        self.norms = EqualNorms() if balance == "gradient" else None
        self._recent: list[dict[str, float]] = []
        self._warned = False

    def weigh(
        self, advantages: Tensor, ids: Tensor, reduce: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """A batch is about to be learned from.

        Args:
            advantages: `[B]` of this process.
            ids: `[B]` places of their domains in `names`.
            reduce: sums a tensor over all processes.

        Returns:
            Weighted advantages, and per domain what to log: "domain/NAME/weight" where there is one, "domain/NAME/step_share",
            "domination".
        """
        energy = self._energy(advantages, ids, reduce)
        present = list(energy)
        weights: dict[str, float] = {}
        if len(present) > 1 and self.norms is not None:
            self.norms.see(energy)
            weights = self.norms.weights(present)
        elif len(present) > 1 and self.controller is not None:
            weights = self.controller.weights(present)
        logs = {f"domain/{name}/weight": weight for name, weight in weights.items()}
        if weights:
            factors = advantages.new_tensor([weights.get(name, 1.0) for name in self.names])
            advantages = advantages * factors[ids]
            energy = self._energy(advantages, ids, reduce)
        if len(present) > 1:
            total = sum(energy.values())
            shares = {name: square / total if total > 0 else 0.0 for name, square in energy.items()}
            logs |= {f"domain/{name}/step_share": share for name, share in shares.items()}
            logs["domination"] = domination_of(shares)
            self._recent = [*self._recent, shares][-LOUD_OVER:]
            told = None if self._warned else loud(self._recent, "scale_rewards='group'")
            if told is not None:
                self._warned = True
                _log.warning("%s", told)
        return advantages, logs

    def _energy(self, advantages: Tensor, ids: Tensor, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Squared advantages per domain that is there, of all processes."""
        sums = torch.zeros(len(self.names), 2, device=advantages.device)
        squares = advantages.detach().float().square()
        sums.index_add_(0, ids, torch.stack([squares, torch.ones_like(squares)], 1))
        found = reduce(sums).tolist()
        return {name: square for name, (square, count) in zip(self.names, found, strict=True) if count}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.norms is not None and state.is_world_process_zero:
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE
            write_json(path, self.norms.state_dict(), indent=None)

    def resume(self, folder: Path | str) -> None:
        """Goes on from a checkpoint of the trainer, which has to have been written with this balance."""
        path = Path(folder) / STATE
        if self.norms is None:
            return
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: expected the state of balance='gradient' in the checkpoint, found no such file; go on with the "
                "balance that the run was started with"
            )
        self.norms.load_state_dict(json.loads(path.read_text()))
