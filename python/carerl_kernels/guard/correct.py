"""Corrections of single steps, of the update that the optimizer made or of the gradient before it, by rules that see every one.

What is a projection of the parameters ("bounded", "remove") is in :mod:`carerl_kernels.guard.box`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..linalg import dacsp_core
from ..subspace.recorder import StageRecorder
from .probes import Probes
from .rules import MEMORY, RuleParams, decide
from .settings import Settings
from .stack import RowStack, Stack
from .statistics import Statistics, energies, squared_distance, squared_norm


class StepCorrection:
    """A rule's memory, and the edit of one step."""

    def __init__(self, stack: Stack[Any, Any], settings: Settings, probes: Probes, statistics: Statistics):
        self.stack, self.settings, self.probes, self.statistics = stack, settings, probes, statistics
        rows = stack.rows
        self.params = rule_params(stack, settings)
        zeros = partial(torch.zeros, stack.layout.T, dtype=torch.float64, device=stack.device)
        self.state = {name: zeros(rows) for name in MEMORY.get(settings.rule, ())}
        # coefficients `[T, K]` of the parameters after the last step, and when the stage began
        self.q_prev = zeros(rows if settings.apply_to == "update" else 0)
        self.q_start = self.q_prev.clone()
        # where a step's coefficients and its correction go: memory that is there already costs no page faults
        self._q, self._x = torch.empty_like(self.q_prev), torch.empty_like(self.q_prev)
        self._signs: SignRecording | None = None

    def rebase(self, parameters: Sequence[Tensor]) -> None:
        """Counts from the present parameters on."""
        for remembered in self.state.values():
            remembered.zero_()
        if len(self.stack) and self.settings.apply_to == "update":
            self.q_start = self.stack.project(parameters)
            self.q_prev = self.q_start.clone()

    def moved(self, domain: str) -> float | None:
        """Norm of the net displacement along a domain's directions; None in grad mode, where it is not measured."""
        if self.settings.apply_to == "grad":
            return None
        columns = self.stack.columns(domain)
        return float(self.stack.column_sums((self.q_start - self.q_prev)[:, columns].square()).sum().sqrt())

    def remembered(self) -> dict[str, Tensor]:
        """Everything that is remembered per coefficient."""
        out = {name: rows for name, rows in self.state.items() if rows.shape[1]}
        if self.settings.apply_to == "update":
            out |= {"q_prev": self.q_prev, "q_start": self.q_start}
        return out

    def settle_probes(self) -> None:
        """Takes in the probes since the last step."""
        for name in list(self.probes.sums):
            columns = self.stack.columns(name)
            probe = self.state["probe"][:, columns]
            probe.copy_(self.probes.settle(name, probe, self.stack))

    def edit_update(self, parameters: Sequence[Tensor], own: str | None, snapshot: Sequence[Tensor] | None) -> None:
        """Corrects the step just taken by projecting the parameters themselves (docs/math.md, "reading of signs").

        Rows are in the gradient convention, so a step that repeats prior learning lowers q: c = q_prev - q. The coefficients
        after the edit are predicted as q + S x; what rounding of the parameters makes of it shows up in the next c and is
        corrected there, so errors do not accumulate.

        Args:
            own: the step's domain.
            snapshot: of the parameters before the step, where energy is tracked.
        """
        stack = self.stack
        q = stack.project(parameters, out=self._q)  # [T, K]
        finite = stack.all_finite(q)
        total = None if snapshot is None else stack.layout.shards.sum_(squared_distance(snapshot, parameters))
        correction = self._x
        sums = torch.zeros(2, stack.rows, dtype=q.dtype, device=q.device)
        touched = torch.zeros(stack.rows, dtype=q.dtype, device=q.device)
        free = ~stack.active(own)
        # Coefficients of input bases outnumber their directions by far: chunk by chunk they stay in the caches.
        for rows in stack.chunks:
            before, start = self.q_prev[rows], self.q_start[rows]
            c = torch.where(finite, before - q[rows], 0.0)
            x = self._decide(c, own, total, finite, rows)
            overlapped = stack.overlap_times(x, rows)
            sums += stack.own_sums(energies(c), rows)
            touched += stack.own_sums(x * overlapped, rows)
            correction[rows] = x
            moved = overlapped - c
            # The batch's own rows move freely: their baseline goes along instead of counting as displacement.
            start += torch.where(free, moved, 0.0)
            before += moved
        sums, touched = stack.summed(torch.cat([sums, touched.unsqueeze(0)])).split([2, 1])
        self.statistics.count(stack, sums, touched.sum(), total)
        stack.edit_(parameters, correction)

    def edit_gradients(
        self,
        grads: Sequence[Tensor],
        own: str | None,
        max_grad_norm: float | None = None,
        recorder: StageRecorder | None = None,
    ) -> None:
        """Edits a gradient in place; clipping folds into the scale, known before the second pass. The recorder of a stage
        takes the gradient in on the way, where :meth:`fuses` says so."""
        stack = self.stack
        rounded = stack.rounding and self.settings.rule == "instant"
        asked = rounded or self.settings.track_energy or max_grad_norm is not None
        total = squared_norm(stack, grads) if asked else None
        if isinstance(stack, RowStack) and self.fuses(max_grad_norm):
            if recorder is None:
                c, x = stack.dacsp_(grads, own, self.params, self._floor(total))
            else:
                signs = self._signs
                if signs is None or signs.recorder is not recorder or signs.made_of is not stack.bases:
                    signs = self._signs = SignRecording(stack, recorder)
                c, x = signs.step(grads, own, self.params)
            overlapped = stack.overlap_times(x)
        else:
            c = stack.project(grads)  # [T, K]
            x = self._decide(c, own, total, stack.all_finite(c))
            overlapped = stack.overlap_times(x)
            scale = torch.ones((), dtype=torch.float64, device=c.device)
            if max_grad_norm is not None and total is not None:
                change = stack.column_sums(x * (overlapped - 2 * c)).sum()  # |g - A^T x|^2 - |g|^2
                scale = (max_grad_norm / (total + change).clamp_min(0.0).sqrt().clamp_min(1e-30)).clamp_max(1.0)
            # In place; a parameter without gradient took no part in the step and stays out of it.
            stack.edit_(grads, -x, scale)
        touched = stack.column_sums(x * overlapped).sum()
        self.statistics.count(
            stack, stack.column_sums(energies(c)), touched, total if self.settings.track_energy else None
        )

    def fuses(self, max_grad_norm: float | None = None) -> bool:
        """Whether one fused op can do it: the sign rule on rows that live here whole, and no clipping after the edit."""
        stack = self.stack
        whole = isinstance(stack, RowStack) and not stack.layout.shards.sharded and stack.one_call_each
        return whole and self.settings.rule == "instant" and max_grad_norm is None

    def _floor(self, total: Tensor | None) -> Tensor | float:
        """Three times what rounding of the directions alone makes of a coefficient, where the step's norm is known."""
        return 0.0 if total is None else 3 * self.stack.rounding * (total / self.stack.layout.parameters).sqrt()

    def _decide(
        self, c: Tensor, own: str | None, total: Tensor | None, finite: Tensor, rows: slice = slice(None)
    ) -> Tensor:
        """The correction of all rows or a chunk, given its raw coefficients and, where known, the squared norm of the step."""
        return decide(
            self.settings.rule,
            c,
            self.stack.active(own),
            {name: remembered[rows] for name, remembered in self.state.items()},
            self.params,
            self.stack.frame(own).part(rows),
            self.stack.displacement[rows],
            finite,
            self._fallback(),
            self._floor(total),
        )

    def _fallback(self) -> Tensor | None:
        """`[K]` bool: rows whose probes cannot be trusted; None where none are."""
        if self.settings.rule != "probed" or not (names := self.probes.distrusted(self.stack.names)):
            return None
        mask = torch.zeros(self.stack.rows, dtype=torch.bool, device=self.stack.device)
        for name in names:
            mask[self.stack.columns(name)] = True
        return mask

    def state_dict(self) -> dict[str, Any]:
        return {name: self.stack.unpack(rows) for name, rows in self.remembered().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, rows in self.remembered().items():
            self.stack.pack_(rows, state[name])


class SignRecording:
    """The sign rule while a stage is recorded: rows that act and rows that are being recorded in one tensor, so that `gram`
    and `edit_rotate_` serve both. Two passes over them, where a correction and a recording by themselves take four. Rows are
    float32, and from now on the recorder's live here.
    """

    def __init__(self, stack: RowStack, recorder: StageRecorder):
        self.stack, self.recorder = stack, recorder
        D, k, N = stack.bases.shape
        width = recorder.pca.rows.shape[0]
        self._bases = torch.zeros(D + 1, max(k, width), N, dtype=torch.float32, device=stack.device)
        self._bases[:D, :k] = stack.bases
        self._bases[D, :width] = recorder.pca.rows
        recorder.pca.rows = self._bases[D, :width]
        rows = torch.arange((D + 1) * self._bases.shape[1], device=stack.device).view(D + 1, -1)
        self._acting, self._recorded = rows[:D, :k].flatten(), rows[D, :width]
        self.made_of = stack.bases

    def step(self, grads: Sequence[Tensor], own: str | None, params: RuleParams) -> tuple[Tensor, Tensor]:
        """Records a gradient and edits it in place; returns what :meth:`RowStack.dacsp_` does."""
        stack, pca = self.stack, self.recorder.pca
        measured = stack.layout.gram(self._bases, grads)  # [T, R + 1, R + 1]
        finite = measured.isfinite().all()
        c = torch.where(stack.active(own) & finite, measured[:, self._acting, -1], 0.0)
        _, x = dacsp_core(c, params.aligned, params.conflict, 0.0, stack.root(own))
        mix = torch.zeros(stack.layout.T, measured.shape[-1] - 1, dtype=x.dtype, device=x.device)
        mix[:, self._acting] = x
        mine = torch.cat([self._recorded, self._recorded.new_tensor([measured.shape[-1] - 1])])
        q = pca.decide(measured[:, mine.unsqueeze(1), mine])
        stack.layout.edit_rotate_(grads, self._bases, mix, len(stack), q)
        self.recorder.steps += 1
        return c, -x


def rule_params(stack: Stack[Any, Any], settings: Settings) -> RuleParams:
    """Numbers of every domain, spread over its rows."""
    by_domain = [settings.numbers_of(name) for name in stack.names]
    spread = {
        key: [numbers[key] for numbers in by_domain for _ in range(stack.layout.width)]
        for key in ("aligned", "conflict", "lower", "upper")
    }
    return RuleParams(**{k: torch.tensor(v, dtype=torch.float64, device=stack.device) for k, v in spread.items()})
