"""TRL's GRPOTrainer behind a guard: domains from a data set column, per-domain metrics, per-domain gradients in one step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..guard import CapabilityGuard
from ..guard.editors import Editor
from ..monitor.controller import Controller
from .balance import AdvantageBalance
from .own_answers import OwnAnswers
from .per_domain import DomainLosses
from .transformers import GuardCallback, MakeGuard

try:
    from trl import GRPOTrainer
except ImportError as e:
    raise ImportError(f"carerl_kernels.integrations.trl needs TRL ({e}): pip install 'carerl-kernels[trl]'") from e


_Trainer: Any = object  # whatever trainer the mixin stands before; type checkers ask nothing of it


class CareMixin(_Trainer):
    """What :class:`CareGRPOTrainer` adds; put it before a subclass of TRL's `GRPOTrainer` of your own.

    Args:
        guard: a guard, or `make(model) -> CapabilityGuard`; see :class:`GuardCallback`. None: metrics and editor alone.
        stage: name of the domain this training is recorded as. All its steps are this domain's, also where the data set
            replays prompts of others.
        stage_path: where the stage's basis goes.
        domain_column: column of the data set that names each prompt's domain. Without a stage a step belongs to the domain of its
            prompts, in all accumulated micro-batches and processes; where they differ, to none, and all history acts.
            Evaluation may have domains of its own, and prompts without one, which count in no domain's metrics.
        domains: all names that the column holds; None looks them up (not possible in a stream).
        editor: makes the step's gradient out of one per domain (:mod:`carerl_kernels.guard.editors`); "guard" means the guard
            itself: the directions of all others act on each domain's part (:meth:`CapabilityGuard.mixed`). TRL's clipping
            follows.
        self_rehearsal_weight: of the cross-entropy of the run's own right answers (:class:`OwnAnswers`); 0: none are kept.
        self_rehearsal_size: The number of right answers that are kept per domain.
        self_rehearsal_batch: The number of them that are drawn in every optimizer step.
        probe_loss, protect: see :class:`GuardCallback`.
        balance: weighs the advantages of mixed batches per domain: "gradient", so that every domain's squared advantages are the
            same, or a controller by weight that a monitor feeds (`MonitorCallback(DriftMonitor(..., controller=controller))`).

    Raises:
        ValueError: domains are needed and not there, or an option of TRL's that per-domain gradients cannot honour.
    """

    _signature_columns: Any

    def __init__(
        self,
        *args: Any,
        guard: CapabilityGuard | MakeGuard | None = None,
        stage: str | None = None,
        stage_path: Path | str | None = None,
        domain_column: str = "domain",
        domains: Sequence[str] | None = None,
        editor: Editor | str | None = None,
        self_rehearsal_weight: float = 0.0,
        self_rehearsal_size: int = 256,
        self_rehearsal_batch: int = 32,
        probe_loss: Callable[[nn.Module, str], Tensor] | None = None,
        protect: Mapping[str, Iterable[Any]] | None = None,
        balance: Controller | Literal["gradient"] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.domain_column = domain_column
        self.domain_names = _domain_names(self.train_dataset, self.eval_dataset, domain_column, domains)
        self._step_domains = torch.zeros(len(self.domain_names), dtype=torch.bool)
        self._step_owner: str | tuple[str, ...] | None = None
        self._batch_ids: Tensor | None = None  # domains of the generation batch, of all processes
        self.last_forward: Any = None  # log-probabilities, entropies, router's loss of the loss just computed
        self.guard_callback: GuardCallback | None = None
        if guard is not None:
            domain: Any = None if stage is not None or not self.domain_names else (lambda: self._step_owner)
            self.guard_callback = _TRLCallback(
                self, guard, stage=stage, path=stage_path, domain=domain, probe_loss=probe_loss, protect=protect
            )
            self.add_callback(self.guard_callback)
        elif stage is not None or protect:
            what = f"stage={stage!r}" if stage is not None else f"protect={list(protect or ())}"
            raise ValueError(f"{what}: expected a guard that does it, found guard=None; pass guard=CapabilityGuard")
        if isinstance(editor, str) and (editor != "guard" or guard is None):
            raise ValueError(
                f"editor: expected an editor, or 'guard' with guard=, found {editor!r} with guard={guard!r}"
            )
        self._losses = None if editor is None else DomainLosses(self, editor)
        self._balance = AdvantageBalance(balance, self.domain_names)
        self.add_callback(self._balance)
        self.own_answers: OwnAnswers | None = None
        self._rewards: Any = None  # of the generation batch, by function, of all processes
        if self_rehearsal_weight:
            self.own_answers = OwnAnswers(self, self_rehearsal_weight, self_rehearsal_size, self_rehearsal_batch)
            self.add_callback(self.own_answers)

    @property
    def guard(self) -> CapabilityGuard | None:
        """The guard; None before training where a function makes it."""
        return None if self.guard_callback is None else self.guard_callback.guard

    # -------------------------------------------------------------------------------------------- from data to the loss

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.domain_column not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, self.domain_column]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        ids: Tensor | None = None
        if self.domain_names:
            ids = torch.tensor([self._domain_id(row) for row in inputs], device=self.accelerator.device)
            self._batch_ids = self.accelerator.gather(ids)
        output = super()._generate_and_score_completions(inputs)
        if ids is not None:
            output["domain_ids"] = ids  # shuffled and split with the batch by TRL
        if not self.model.training:
            return output
        if ids is not None:
            output["advantages"], logs = self._balance.weigh(output["advantages"], ids, self.accelerator.reduce)
            for key, value in logs.items():
                self._mode_metrics()[key].append(value)
        if self.own_answers is not None:
            names = ["all"] * len(inputs) if ids is None else [self.domain_names[i] for i in ids.tolist()]
            self.own_answers.see(output, self._rewards, names)
        return output

    def _domain_id(self, row: Mapping[str, Any]) -> int:
        """Place of a row's domain in `domain_names`; -1 for none, which only evaluation may have."""
        name = row.get(self.domain_column)
        if name in self.domain_names:
            return self.domain_names.index(name)
        if not self.model.training:
            if name is not None:
                warnings.warn(
                    f"evaluation holds domain {name!r}, which is not in domains={self.domain_names}: no metrics of its own",
                    stacklevel=2,
                )
            return -1
        raise ValueError(
            f"column {self.domain_column!r}: expected one of {', '.join(self.domain_names)}, found {name!r}; "
            "name them all in domains="
        )

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        out = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if kwargs.get("compute_entropy"):
            self.last_forward = out
        return out

    # ------------------------------------------------------------------------------------------------------------ steps

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._losses is not None:
            loss = loss + self._losses.after_backward()
        if self.accelerator.sync_gradients:  # the optimizer steps next
            present = self._step_domains.to(self.accelerator.device, torch.float32)
            if len(present):
                found = self.accelerator.reduce(present, "sum").nonzero().flatten().tolist()
                names = tuple(self.domain_names[i] for i in found)
                self._step_owner = names[0] if len(names) == 1 else names
                self._step_domains.zero_()
            if self._losses is not None:
                self._losses.combine()
            if self.own_answers is not None:
                self.own_answers.rehearse(model)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        recorder = None if self.guard_callback is None else self.guard_callback.recorder
        if recorder is not None and self.model.training:
            whole = {
                what: torch.cat([inputs[f"prompt_{what}"], inputs[f"completion_{what}"]], 1) for what in ("ids", "mask")
            }
            recorder.see({"input_ids": whole["ids"], "attention_mask": whole["mask"]})
        if self.domain_names and self.model.training:
            self._step_domains[inputs["domain_ids"].unique().cpu()] = True
            if self._losses is not None:
                return self._losses.backward_all_but_last(model, inputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _compute_loss(self, model: nn.Module, inputs: Any) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        if self.domain_names:
            self._log_tokens(inputs)
        if self._losses is None:
            self.last_forward = None  # it would keep the graph
        return loss

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self._losses is not None:
            self._losses.begin()
        return prepared

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        folder = kwargs.get("resume_from_checkpoint")
        if folder:
            self._balance.resume(folder)
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            if self.guard_callback is not None:
                self.guard_callback.abandon()

    # ---------------------------------------------------------------------------------------------------------- metrics

    def _mode_metrics(self) -> dict[str, list[float]]:
        return self._metrics["train" if self.model.training else "eval"]

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._rewards = rewards  # [B, functions], all processes
        if self.domain_names:
            lengths = rewards.new_tensor([len(ids) for ids in completion_ids_list], dtype=torch.float32)
            self._log_rewards(rewards, self.accelerator.gather(lengths))
        return rewards

    def _log_rewards(self, rewards: Tensor, lengths: Tensor) -> None:
        size = self.num_generations if self.model.training else self.num_generations_eval
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(1)  # [B]
        total[rewards.isnan().all(1)] = torch.nan
        ids, metrics = self._batch_ids, self._mode_metrics()
        assert ids is not None
        for i, name in enumerate(self.domain_names):
            mine = ids == i
            if not bool(mine.any()):
                continue
            groups = total.view(-1, size)[ids.view(-1, size)[:, 0] == i]
            judged = [group[~group.isnan()] for group in groups]
            flat = [float(bool((group == group[:1]).all())) for group in judged]
            values = total[mine & ~total.isnan()]
            for what, value in {
                "reward": float(values.mean()) if len(values) else math.nan,
                "reward_std": float(values.std()) if len(values) > 1 else math.nan,
                "frac_reward_zero_std": sum(flat) / len(flat),
                "completion_length": float(lengths[mine].mean()),
                "share": float(mine.float().mean()),
            }.items():
                metrics[f"domain/{name}/{what}"].append(value)

    @torch.no_grad()
    def _log_tokens(self, inputs: Any) -> None:
        """Entropy, and KL where there is a reference, per token of each domain in this micro-batch of all processes."""
        logps, entropies, _ = self.last_forward
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        values = [mask.float(), entropies.float() * mask]
        if self.beta != 0.0:
            delta = (inputs["ref_per_token_logps"] - logps) * mask
            values.append(torch.expm1(delta) - delta)
        sums = torch.zeros(len(self.domain_names), len(values), device=mask.device)
        known = inputs["domain_ids"] >= 0
        sums.index_add_(0, inputs["domain_ids"][known], torch.stack([v.sum(1) for v in values], 1)[known])
        sums = self.accelerator.reduce(sums, "sum").tolist()
        for name, (tokens, *totals) in zip(self.domain_names, sums, strict=True):
            if tokens:
                for what, value in zip(("entropy", "kl"), totals, strict=False):
                    self._mode_metrics()[f"domain/{name}/{what}"].append(value / tokens)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.guard_callback is not None and "loss" in logs:
            logs.update(self.guard_callback.metrics())
        super().log(logs, start_time)


class CareGRPOTrainer(CareMixin, GRPOTrainer):
    """TRL's `GRPOTrainer` with a guard and domains: its arguments, and those of :class:`CareMixin` by name."""


class _TRLCallback(GuardCallback):
    """Knows the trainer it belongs to."""

    def __init__(self, trainer: Any, guard: CapabilityGuard | MakeGuard, **options: Any):
        super().__init__(guard, **options)
        self._trainer = trainer

    def guarded_model(self, model: nn.Module) -> nn.Module:
        wrapped = self._trainer.model_wrapped
        return wrapped if isinstance(wrapped, nn.parallel.DistributedDataParallel) else model

    def clips(self) -> bool:
        # the guard as editor has done its work before TRL clips
        return super().clips() and not (self._trainer._losses is not None and self._trainer._losses.by_guard)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """The trainer's own log has the numbers already, where every reporter sees them."""


def _domain_names(train: Any, evaluation: Any, column: str, domains: Sequence[str] | None) -> list[str]:
    """Names in the column of the training data and of what is evaluated, the same in every process; none where the training
    data have no such column.

    Raises:
        ValueError: a column other than the default that is not there, a stream, whose names nobody knows beforehand, or a row
            of the training data without a name.
    """
    if domains is not None:
        return list(domains)
    names = getattr(train, "column_names", None) or []
    if column not in names:
        if column != "domain" and names:
            raise ValueError(
                f"domain_column: expected a column of the training data ({', '.join(names)}), found {column!r}"
            )
        return []
    held = list(evaluation.values()) if isinstance(evaluation, Mapping) else [evaluation]
    held = [data for data in held if column in (getattr(data, "column_names", None) or [])]
    for data in (train, *held):
        if not hasattr(data, "unique"):
            raise ValueError(
                f"expected domains=[...], all names in column {column!r}, with a data set that is a stream, found None"
            )
    for name in train.unique(column):
        if not isinstance(name, str) or not name:
            raise ValueError(f"column {column!r}: expected a name in every row of the training data, found {name!r}")
    return sorted({name for data in (train, *held) for name in data.unique(column) if isinstance(name, str) and name})
