"""One gradient per domain in one optimizer step of TRL's GRPOTrainer, adding up exactly to the step's own gradient.

A micro-batch is cut by domain and each part gets its own forward and backward pass: as many tokens as before, and every
term of the loss that belongs to a token (policy, KL) is in exactly one part. (Masking the other domains' advantages instead
would forward everything D times and count KL and entropy D times.) Terms that are means over the micro-batch, the entropy
bonus and the router's loss, get each part's share.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..guard.build import trainable
from ..guard.editors import Editor, assign_combined, spread_editor
from ..guard.gradients import gradient_of

ROW_MEANS = ("grpo", "sapo", "dr_grpo", "luspo")
"""Losses divided by the sequences of the micro-batch; bnpo by its tokens; the others by numbers of the whole batch."""


class DomainLosses:
    """Backward passes, gradients and the edit of one trainer.

    Args:
        trainer: a :class:`carerl_kernels.integrations.trl.CareMixin`.
        editor: gets D times each domain's share of the gradient, so that the mean of them is the plain gradient; or "guard", for
            which they add up in place and nothing is kept.

    Raises:
        ValueError: options of TRL's that look at the whole micro-batch at once, or no domains.
    """

    def __init__(self, trainer: Any, editor: Editor | str):
        if not trainer.domain_names:
            raise ValueError(
                f"editor: expected a column {trainer.domain_column!r} in the data set, found "
                f"{', '.join(getattr(trainer.train_dataset, 'column_names', None) or ['none'])}; name it with domain_column="
            )
        args = trainer.args
        for option, found, off in (
            ("fp16", bool(args.fp16), False),
            ("top_entropy_quantile", args.top_entropy_quantile, 1.0),
            ("adaptive entropy", bool(getattr(trainer, "use_adaptive_entropy", False)), False),
        ):
            if found != off:
                raise ValueError(f"editor: expected {option} off, found {found}; it does not split by domain")
        self.trainer, self.editor = trainer, editor
        self.by_guard = editor == "guard"
        self._named: list[tuple[str, nn.Parameter]] = []
        self._gradients: dict[int, list[Tensor | None]] = {}
        self._parts: Any = None  # of the guard: whose share of what is in the gradients
        self._current: int | None = None
        self._other_losses: Tensor | float = 0.0

    def begin(self) -> None:
        """Training begins: what the optimizer moves is in the model now (during a pass, FSDP2 puts whole copies there)."""
        self._named = trainable(self.trainer.model)
        self._gradients.clear()
        self._parts = None
        if not isinstance(self.editor, str):
            spread_editor(self.editor, self._named)

    # ------------------------------------------------------------------------------------------------------ micro-batches

    def backward_all_but_last(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Backward passes of all domains but one, whose loss is returned for the trainer to do the same."""
        if "pixel_values" in inputs:
            raise ValueError("editor: expected text alone, found images, whose rows are not those of the batch")
        trainer = self.trainer
        # FSDP2 keeps unsynchronised gradients where nobody can tell the domains' apart
        synchronise = getattr(model, "set_requires_gradient_sync", None)
        if synchronise is not None:
            synchronise(True)
        ids = inputs["domain_ids"]
        counts = torch.bincount(ids, minlength=len(trainer.domain_names))
        # rows per domain in any process
        most = trainer.accelerator.gather(counts).view(-1, len(counts)).amax(0).tolist()
        todo = {domain for domain, count in enumerate(most) if count}
        if self.by_guard:
            self._share_what_is_known(model)
        elif trainer.accelerator.sync_gradients:
            todo |= set(self._gradients)  # gradients gathered before have to be averaged over processes now
        metrics, self._other_losses = _Metrics(trainer), 0.0
        order = sorted(todo)
        for domain in order[:-1]:
            loss = self._loss(model, inputs, domain, max(most[domain], 1), metrics)
            self._other_losses += loss.detach()
            self._take_in(domain)
            trainer.accelerator.backward(loss)
            self._put_away()
        loss = self._loss(model, inputs, order[-1], max(most[order[-1]], 1), metrics)
        self._take_in(order[-1])
        metrics.merge()
        return loss

    def _loss(self, model: nn.Module, inputs: dict[str, Any], domain: int, size: int, metrics: _Metrics) -> Tensor:
        """The domain's share of the micro-batch's loss.

        Every process computes as many passes of `size` rows, or collectives would wait for ever: rows that are missing here
        are copies without a token.
        """
        trainer, ids = self.trainer, inputs["domain_ids"]
        rows = (ids == domain).nonzero().flatten()
        count = len(rows)
        rows = torch.cat([rows, rows.new_zeros(size - count)])
        part = {
            key: value[rows] if isinstance(value, Tensor) and value.dim() and len(value) == len(ids) else value
            for key, value in inputs.items()
        }
        part["domain_ids"] = torch.full_like(rows, domain)
        part["completion_mask"][count:] = 0
        part["advantages"][count:] = 0
        tokens = float(_mask(part).sum() / _mask(inputs).sum().clamp(min=1))
        sequences = size / len(ids)
        metrics.tokens.append(tokens)
        loss = trainer._compute_loss(model, part)
        kind = trainer.loss_type
        share = sequences if kind in ROW_MEANS else tokens if kind == "bnpo" else 1.0
        return share * loss + self._means(part, tokens - share, count / len(ids) - share)

    def _means(self, part: dict[str, Any], entropy: float, router: float) -> Tensor | float:
        """What the entropy bonus and the router's loss lack beyond the policy's share."""
        trainer, extra = self.trainer, 0.0
        _, entropies, aux = trainer.last_forward
        steps = trainer.current_gradient_accumulation_steps
        if trainer._entropy_bonus_enabled:
            mask = _mask(part)
            mean = (entropies * mask).sum() / mask.sum().clamp(min=1.0)
            extra = extra - entropy * trainer.entropy_coef * mean / steps
        if trainer.aux_loss_enabled:
            extra = extra + router * trainer.router_aux_loss_coef * aux / steps
        return extra

    # ---------------------------------------------------------------------------------------------------------- gradients

    def _share_what_is_known(self, model: nn.Module) -> None:
        """DDP averages everything gathered in the step with its first synchronised pass: what the guard knows of it, too."""
        replicated = isinstance(model, nn.parallel.DistributedDataParallel)
        if self._parts is None:
            self._parts = self.trainer.guard.mixed()
        elif replicated and self.trainer.accelerator.sync_gradients:
            self._parts.average_(model.process_group)

    def _take_in(self, domain: int) -> None:
        """Lets backward add to what this domain has gathered so far."""
        self._current = domain
        if self.by_guard:
            return
        kept = self._gradients.get(domain, [None] * len(self._named))
        for (_, p), grad in zip(self._named, kept, strict=True):
            p.grad = grad

    def _put_away(self) -> None:
        assert self._current is not None
        if self.by_guard:
            self._parts.gained(self.trainer.domain_names[self._current])
            return
        self._gradients[self._current] = [p.grad for _, p in self._named]
        for _, p in self._named:
            p.grad = None

    def after_backward(self) -> Tensor | float:
        """The trainer has done the last backward pass; returns the losses of the others."""
        self._put_away()
        self.trainer.last_forward = None  # it would keep the graph
        return self._other_losses

    @torch.no_grad()
    def combine(self) -> None:
        """Makes the step's gradient out of the domains' and puts it where the optimizer looks."""
        if self.by_guard:
            self._parts.finish()
            self._parts = None
            return
        names = self.trainer.domain_names
        gradients = {
            names[domain]: [gradient_of(p, g) for (_, p), g in zip(self._named, grads, strict=True)]
            for domain, grads in sorted(self._gradients.items())
        }
        self._gradients.clear()
        assert not isinstance(self.editor, str)
        assign_combined(self._named, self.editor, gradients)


def _mask(inputs: dict[str, Any]) -> Tensor:
    """Tokens that count, `[B, L]`."""
    return inputs["completion_mask"] * inputs.get("tool_mask", 1)


class _Metrics:
    """TRL logs once per call of its loss; the calls for one micro-batch become one entry again."""

    def __init__(self, trainer: Any):
        self.metrics = trainer._mode_metrics()
        self.before = {key: len(values) for key, values in self.metrics.items()}
        self.tokens: list[float] = []  # of each call, its share of the tokens

    def merge(self) -> None:
        """Means weighted by tokens; smallest and largest values by themselves."""
        for key, values in self.metrics.items():
            start = self.before.get(key, 0)
            new = values[start:]
            if len(new) != len(self.tokens) or len(new) < 2 or key.startswith("domain/"):
                continue
            known = [(v, w) for v, w in zip(new, self.tokens, strict=True) if v == v and w > 0]
            if key.endswith(("_min", "_max")):
                merged = (min if key.endswith("_min") else max)((v for v, _ in known), default=float("nan"))
            else:
                total = sum(w for _, w in known)
                merged = sum(v * w for v, w in known) / total if total else float("nan")
            values[start:] = [merged]
