"""What every timed call must have computed, in float64 from the same inputs, by nothing of the package.

Coefficients, Gram matrices and singular values are compared in full, N-sized results on a few windows of columns (both
ends among them), because comparing all of a gigabyte after every call would take longer than the calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .cases import ALIGNED, CONFLICT, OUTPUTS, THRESHOLD, Inputs
from .cost import SCALE_BLOCK, Case

WINDOW, WINDOWS = 61, 6  # columns each, and how many: odd, so that they straddle vectors, tiles and int8 blocks
CHUNK = 1 << 18

# Relative to the norm of the expected values: of coefficients, and of N-sized results by the dtype they are stored in.
COEFFICIENT_TOLERANCE = 1e-5
STORED_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
# Baselines may round coefficients to bf16 on the way, or add up a million products in fp32: inaccurate is allowed, wrong is not.
BASELINE_TOLERANCE = 2.5e-2


class WrongResult(RuntimeError):
    """A timed call returned something else than float64 says."""


def relative(seen: Tensor, expected: Tensor) -> float:
    """Norm of the difference over norm of what is expected."""
    return float((seen.double() - expected).norm() / expected.norm().clamp_min(1e-300))


def judged(case: Case, variant: str, errors: dict[str, float], allowed: Callable[[str], float]) -> dict[str, float]:
    """The errors, if they are small enough for each output; else a WrongResult that names the case, variant and output."""
    for name, error in errors.items():
        if not error <= allowed(name):  # NaN is wrong too
            raise WrongResult(
                f"{case.name}: {variant} returned {name} with relative error {error:.2g}, "
                f"expected at most {allowed(name):.2g}"
            )
    return errors


def _columns(x: Inputs) -> Tensor:
    """Windows over N, of a list the ends of tensors spread over it (between them is padding that nobody writes)."""
    if not x.tensors:
        ends = torch.linspace(min(WINDOW, x.case.N), x.case.N, WINDOWS).long()
    else:
        chosen = torch.linspace(0, len(x.tensors) - 1, WINDOWS).long().tolist()
        ends = torch.tensor([x.offsets[t] + x.tensors[t].numel() for t in chosen])
    return (ends.unsqueeze(1) - 1 - torch.arange(WINDOW)).flatten().clamp_min(0).unique()


class Expectation:
    """Expected outputs of a case, from its inputs before the first call.

    Outputs are dictionaries with some of: `coeffs [B, K]`, `gram [K+B, K+B]`, `grads [B, N]` or a list of
    tensors, `rows [k, N]` (of the first domain), `singular_values [k]`. With singular values, rows are compared
    through `U^T diag(s^2) U`, which does not depend on their signs.
    """

    def __init__(self, x: Inputs):
        self.x, case = x, x.case
        n, self._rows = case.N, case.k if case.packet in ("rotate_", "pca_update_") else case.D * case.k
        self.columns = _columns(x)
        size = self._rows + case.B
        total = torch.zeros(size, size, dtype=torch.float64)
        at = None  # which of these products the op needs
        if case.packet in ("gram", "pca_update_"):
            at = slice(None)
        elif case.packet in ("project", "dacsp_", "input_project", "input_confine_", "input_dacsp_"):
            at = slice(self._rows, None)
        for start in range(0, n if at is not None else 0, CHUNK):
            stack = self._stack(torch.arange(start, min(start + CHUNK, n)))
            total[at] += stack[at] @ stack.mT
        self.expected = self._expected(total, self._stack(self.columns))

    def _stack(self, at: Tensor) -> Tensor:
        """Columns of [U; G] in float64 `[K+B, m]`."""
        x = self.x
        where = slice(int(at[0]), int(at[-1]) + 1) if at.numel() == CHUNK else at
        rows = x.bases.flatten(0, 1)[: self._rows, where].double()
        if x.scales is not None:
            rows *= x.scales.flatten(0, 1)[:, at // SCALE_BLOCK].double()
        return torch.cat([rows, x.grads[:, where].double()])

    def _expected(self, total: Tensor, stack: Tensor) -> dict[str, Tensor]:
        x, case = self.x, self.x.case
        op, k = case.packet, case.k
        u, g = stack[: self._rows], stack[self._rows :]
        c = total[self._rows :, : self._rows]
        if op == "pca_update_":
            weight = torch.cat([x.singular_values, torch.ones(case.B, dtype=torch.float64)])
            values, vectors = torch.linalg.eigh(weight.unsqueeze(1) * total * weight)
            kept = vectors[:, -k:].mT @ (weight.unsqueeze(1) * stack)
            return {"energy": kept.mT @ kept, "singular_values": values[-k:].flip(0).clamp_min(0).sqrt()}
        found = {"coeffs": c, "gram": total, "rows": x.q.double() @ torch.cat([u[:k], g])}
        if op == "input_confine_":
            d = x.anchor.double() - c
            found["grads"] = g + (d - torch.clamp(d, -x.bound.double(), x.bound.double())) @ u
        elif op in ("dacsp_", "input_dacsp_"):
            gain = (c > THRESHOLD) * (ALIGNED - 1.0) + (c < -THRESHOLD) * (CONFLICT - 1.0)
            found["grads"] = g + (gain * c) @ u
        elif op in ("edit_", "edit_rotate_"):
            found["grads"] = x.scale.double().unsqueeze(1) * (g + x.mix.double() @ u)
        return {name: found[name] for name in OUTPUTS[op]}

    def errors(self, outputs: Mapping[str, Any]) -> dict[str, float]:
        """Relative error of each output: norm of the difference over norm of what is expected. WrongResult: one is missing."""
        seen = self._sampled(outputs)
        missing = self.expected.keys() - seen.keys()
        if missing:
            raise WrongResult(
                f"{self.x.case.name}: expected outputs {sorted(self.expected)}, {sorted(missing)} missing"
            )
        return {name: relative(seen[name], value) for name, value in self.expected.items()}

    def _sampled(self, outputs: Mapping[str, Any]) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        for name, value in outputs.items():
            if name == "grads" and isinstance(value, list):
                value = self.x.flat(value)
            if name in ("grads", "rows"):
                value = value[:, self.columns]
            seen[name] = value.view(self.expected[name].shape) if name in self.expected else value
        if "energy" in self.expected and "rows" in seen:
            weighted = outputs["singular_values"].double().unsqueeze(1) * seen["rows"].double()
            seen["energy"] = weighted.mT @ weighted
        return seen

    def check(self, variant: str, outputs: Mapping[str, Any], exact: bool) -> dict[str, float]:
        """Errors, if they are small enough.

        Args:
            exact: what we promise of our own ops, instead of what is let pass in a baseline (its errors are reported).

        Raises:
            WrongResult: names case, variant, output, error and tolerance.
        """
        return judged(self.x.case, variant, self.errors(outputs), lambda name: self.tolerance(name, exact))

    def tolerance(self, name: str, exact: bool) -> float:
        case = self.x.case
        if not exact:
            return BASELINE_TOLERANCE
        stored = STORED_TOLERANCE[case.grad if name == "grads" or case.basis == torch.int8 else case.basis]
        if case.op.startswith("pca_update_"):
            # Small coefficients of large vectors, amplified by the gaps of the spectrum.
            return 20 * stored
        if name in ("coeffs", "gram"):
            return COEFFICIENT_TOLERANCE
        return stored
