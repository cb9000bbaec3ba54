"""Other ways to keep domains from eating each other, for comparison, behind one protocol.

All but GPM work on one gradient per domain of the same step, and all of those are functions of the D x D inner products: the
edited gradient is a weighted sum of the domains' gradients, so that two passes over them suffice, sharded or not.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .._json import nested_tuples
from ..subspace.shards import Shards, is_sharded_type, local
from .build import trainable
from .gradients import gradient_gram, local_gradients, set_aside
from .guard import CapabilityGuard

Gradients = Mapping[str, Sequence[Tensor]]


class Editor(Protocol):
    """Makes one gradient out of one per domain."""

    def combine(self, gradients: Gradients) -> list[Tensor]:
        """The edited gradient, a tensor per parameter, in order.

        Args:
            gradients: per domain a tensor per parameter (of sharded ones the local parts).

        Raises:
            ValueError: no domains, or different numbers of tensors.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on exactly; nothing, unless an editor says otherwise."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from :meth:`state_dict`."""
        return None


class GramEditor(Editor):
    """Weighted sums of the domains' gradients, weights a function of their inner products.

    Args:
        weigh: gives weights `[D]` float64 from the Gram matrix `[D, D]` float64 (on the CPU).
        names: of the parameters: one Gram matrix per module instead of one for all, so that conflicts are looked for where
            they are. Parameters that share everything before the last dot belong together.

    Attributes:
        shards: of sharded parameters; :func:`spread_editor` sets them.
    """

    shards: Shards | None = None

    def __init__(self, weigh: Callable[[Tensor], Tensor], names: Sequence[str] = ()):
        self.weigh, self._modules = weigh, [name.rpartition(".")[0] for name in names]

    @torch.no_grad()
    def combine(self, gradients: Gradients) -> list[Tensor]:
        rows = [list(g) for g in gradients.values()]
        counts = sorted({len(g) for g in rows})
        if len(counts) != 1 or counts[0] == 0:
            raise ValueError(f"expected the same number of tensors for every domain, found {counts or 'no domains'}")
        modules = self._modules or [""] * counts[0]
        if len(modules) != counts[0]:
            raise ValueError(f"expected a tensor per parameter, {len(modules)}, found {counts[0]}")
        weights = {}
        for module in dict.fromkeys(modules):
            own = [[g for g, where in zip(row, modules, strict=True) if where == module] for row in rows]
            weights[module] = self.weigh(gradient_gram(own, self.shards)).tolist()
        out = []
        for index, module in enumerate(modules):
            total = rows[0][index] * weights[module][0]
            for row, weight in zip(rows[1:], weights[module][1:], strict=True):
                total.add_(row[index], alpha=weight)
            out.append(total)
        return out


class PCGrad(GramEditor):
    """Projecting conflicting gradients (Yu et al. 2020, arXiv:2001.06782): from each domain's gradient, what opposes another's is
    removed, in random order; the results are averaged.

    Args:
        seed: The seed of the domains' order, which has to be the same in every process.
        names: see :class:`GramEditor`.
    """

    def __init__(self, seed: int = 0, names: Sequence[str] = ()):
        super().__init__(self._project, names)
        self._rng = random.Random(seed)

    def state_dict(self) -> dict[str, Any]:
        return {"order": self._rng.getstate()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._rng.setstate(nested_tuples(state["order"]))

    def _project(self, gram: Tensor) -> Tensor:
        D = gram.shape[0]
        total = torch.zeros(D, dtype=torch.float64)
        for i in range(D):
            weights = torch.zeros(D, dtype=torch.float64)  # of this gradient, edited so far
            weights[i] = 1.0
            for j in self._rng.sample([j for j in range(D) if j != i], D - 1):
                along = weights @ gram[:, j]
                if along < 0 and gram[j, j] > 0:
                    weights[j] -= along / gram[j, j]
            total += weights
        return total / D


def modular_surgery(model: nn.Module, seed: int = 0) -> PCGrad:
    """Modular gradient surgery (arXiv:2602.02301): PCGrad within every module, because domains that agree over the whole
    model may still fight over one of its layers."""
    editor = PCGrad(seed, [name for name, _ in trainable(model)])
    spread_editor(editor, model)
    return editor


EDITORS: dict[str, Callable[[nn.Module, int], Editor]] = {
    "pcgrad": lambda model, seed: PCGrad(seed),
    "modular_surgery": modular_surgery,
}
"""Editors that a trainer's settings can name; each is made of the model and a seed."""


def torchjd_editor(weighting: Callable[[Any], Tensor]) -> GramEditor:
    """Any of TorchJD's Gramian weightings (`torchjd.aggregation.UPGradWeighting()` and others; pip install
    'carerl-kernels[editors]'): they see the inner products only, so nothing is flattened or gathered."""
    return GramEditor(lambda gram: weighting(gram).double())


class GPM(Editor):
    """Gradient projection memory (Saha et al. 2021, arXiv:2103.09762): what lies in the span of earlier stages' inputs is
    removed from the summed gradient.

    Args:
        guard: built with `basis="input", room=1.0` (or "per_matrix" for gradient subspaces), `rule="remove"`,
            `apply_to="grad"` and its history added. It need not be attached.
    """

    def __init__(self, guard: CapabilityGuard):
        if (guard.rule, guard.apply_to) != ("remove", "grad"):
            raise ValueError(
                f"GPM: expected a guard with rule='remove' and apply_to='grad', found {guard.rule!r} and {guard.apply_to!r}"
            )
        self.guard = guard

    @torch.no_grad()
    def combine(self, gradients: Gradients) -> list[Tensor]:
        mean = GramEditor(lambda gram: torch.full((len(gram),), 1 / len(gram), dtype=torch.float64))
        total = mean.combine(gradients)
        self.guard.remove_(total)
        return total


def spread_editor(editor: Editor, model: nn.Module | Iterable[tuple[str, nn.Parameter]]) -> None:
    """Lets an editor that was built without `shards` sum its inner products over the processes that hold the model's parts.

    Without that every process would weigh its own part by itself, and no sum of the domains' gradients would come out.

    Args:
        editor: any; changed if its weights come from inner products.
        model: The model as it is trained, sharded already; or pairs of name and parameter.
    """
    if isinstance(editor, GramEditor) and (editor.shards is None or not editor.shards.sharded):
        editor.shards = Shards.of(trainable(model))


def domain_gradients(model: nn.Module, losses: Mapping[str, Callable[[], Tensor]]) -> dict[str, list[Tensor]]:
    """One gradient per domain: a backward pass each. What `p.grad` held before is there again afterwards."""
    parameters = [p for _, p in trainable(model)]
    out = {}
    for name, loss in losses.items():
        with set_aside(parameters):
            loss().backward()
            out[name] = local_gradients(parameters)
    return out


def assign_combined(
    model: nn.Module | Iterable[tuple[str, nn.Parameter]], editor: Editor, shares: Mapping[str, list[Tensor]]
) -> None:
    """Puts what an editor makes of a step's gradient where the optimizer looks for it.

    Args:
        model: or pairs of name and parameter.
        editor: one that edits nothing gives the mean of what it gets.
        shares: Every domain's share of the step's gradient; they add up to it, and are multiplied by their number in place.
    """
    for tensors in shares.values():
        torch._foreach_mul_(tensors, float(len(shares)))
    assign(model, editor.combine(shares))


def assign(model: nn.Module | Iterable[tuple[str, nn.Parameter]], gradient: Sequence[Tensor]) -> None:
    """Puts an edited gradient where the optimizer looks for it; the model, or pairs of name and parameter."""
    for (_, p), g in zip(trainable(model), gradient, strict=True):
        if is_sharded_type(p):
            p.grad = torch.zeros_like(p)
            local(p.grad).copy_(g)
        else:
            p.grad = g
