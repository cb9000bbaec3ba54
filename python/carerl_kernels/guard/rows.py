"""Watching a backward pass row by row: what each domain's rows add to the coefficients of every weight's gradient.

Directions are taken out of a gradient `dy^T x` by taking them out of its inputs, row by row. So one pass over a mixed batch is
enough, and thin products are all that is added to it (docs/math.md, "mixed batches").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._wrapped import unwrapped
from ..thin import full_precision
from .input_stack import InputStack
from .stack import Stack

Place = tuple[int, int]
"""Of a matrix: number of its group, position in it."""


class RowWatch:
    """Hooks on linear layers and embeddings (each with the place of its weight) that gather what :class:`MixedGradient`
    takes out, where bases are of inputs."""

    def __init__(self, stack: InputStack, places: list[tuple[nn.Module, Place]], dtype: torch.dtype):
        self._stack, self._places = stack, places
        self.out = stack.nothing_seen()  # sums over all rows of what `stack.along` says of each domain's part
        self.untold = False  # a module was fed something else than one row for each of the batch
        draw = torch.Generator(stack.device).manual_seed(0)
        self._probes = [torch.randn(p.shape[-1], generator=draw, device=stack.device) for p in self.out]
        # what one random combination of the directions sees of the gradient, per group `[G, rows of each]`
        self.check = [torch.zeros(part.shape[:2], device=stack.device) for part in self.out]
        self._tolerance = 1e-3 if dtype == torch.float32 else 5e-2
        self._slices: list[tuple[slice | Tensor, list[Tensor]]] = []  # rows of a domain, and projectors of each group
        self._rows = 0

    @classmethod
    def of(cls, stack: Stack[Any, Any], module: nn.Module, parameters: Sequence[nn.Parameter]) -> RowWatch | None:
        """A watch over a model; None where weights are spread over processes or devices, or used by other modules."""
        if not isinstance(stack, InputStack) or stack.layout.shards.sharded or not len(stack):
            return None
        if any(p.device != stack.device for p in parameters):
            return None
        where: dict[int, tuple[Place, str]] = {}
        for number, group in enumerate(stack.layout.groups):
            for position, index in enumerate(group.indices):
                if id(parameters[index]) in where:
                    return None  # one of several matrices of a stack
                where[id(parameters[index])] = (number, position), group.side
        places = []
        for part in unwrapped(module).modules():
            for name, own in part._parameters.items():
                if own is None or id(own) not in where:
                    continue
                place, side = where[id(own)]
                linear = type(part) is nn.Linear and name == "weight" and side == "right"
                if not linear and not (type(part) is nn.Embedding and name == "weight"):
                    return None
                places.append((part, place))
        return cls(stack, places, parameters[0].dtype)

    @contextmanager
    def watching(self, domains: list[str]) -> Iterator[None]:
        """For one forward and backward pass over a batch with these domains' rows."""
        self._rows, self._slices = len(domains), []
        for name in dict.fromkeys(domains):
            rows = [i for i, domain in enumerate(domains) if domain == name]
            together = rows[-1] - rows[0] + 1 == len(rows)
            at = slice(rows[0], rows[-1] + 1) if together else torch.tensor(rows, device=self._stack.device)
            self._slices.append((at, self._stack.projectors(name)))
        with ExitStack() as hooks:
            for module, place in self._places:
                handle = module.register_forward_hook(self._hook(module, place))
                hooks.callback(handle.remove)
            yield

    def _hook(self, module: nn.Module, place: Place) -> Any:
        def called(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            fed = args[0].detach() if args else None
            if fed is None or fed.shape[0] != self._rows or output.dim() != 3:
                self.untold = True
                return
            if isinstance(module, nn.Embedding):
                output.register_hook(partial(self._look_up, module, place, fed))
            else:
                output.register_hook(partial(self._multiply, place, fed))

        return called

    @torch.no_grad()
    def _multiply(self, place: Place, x: Tensor, dy: Tensor) -> None:
        """A linear layer was fed x `[B, T, n]`; dy `[B, T, m]`."""
        with full_precision(x.device):
            coeffs = x.float() @ self._span(place)
            self._add(place, dy.flatten(0, 1).float().mT, coeffs)

    @torch.no_grad()
    def _look_up(self, module: nn.Embedding, place: Place, ids: Tensor, dy: Tensor) -> None:
        """An embedding was asked for ids `[B, T]`; dy `[B, T, n]`."""
        number, position = place
        dy, Q = dy.float(), self._span(place)
        if module.padding_idx is not None:
            dy = dy.masked_fill((ids == module.padding_idx).unsqueeze(-1), 0.0)
        with full_precision(dy.device):
            if self._stack.layout.groups[number].side == "left":  # inputs are tokens
                self._add(place, dy.flatten(0, 1).mT, Q[ids])
                return
            coeffs = dy @ Q  # the weight is shared with a layer that multiplies from the other side
            self.check[number][position].index_add_(0, ids.flatten(), (coeffs @ self._probes[number]).flatten())
            self.out[number][position].index_add_(0, ids.flatten(), self._others(coeffs, place).flatten(0, 1))

    def _span(self, place: Place) -> Tensor:
        return self._stack.spans[place[0]][place[1]]

    def _add(self, place: Place, dy: Tensor, coeffs: Tensor) -> None:
        """Inputs with these coefficients `[B, T, kept]` met dy `[m, B T]`."""
        number, position = place
        self.check[number][position].addmv_(dy, (coeffs @ self._probes[number]).flatten())
        self.out[number][position].addmm_(dy, self._others(coeffs, place).flatten(0, 1))

    def _others(self, coeffs: Tensor, place: Place) -> Tensor:
        """Of coefficients `[B, T, kept]`, what lies along the directions that act on each row."""
        number, position = place
        out = torch.empty_like(coeffs)
        for at, projectors in self._slices:
            out[at] = coeffs[at] @ projectors[number][position]
        return out

    def agrees(self, gradients: Sequence[Tensor]) -> bool:
        """Whether the rows add up to what is in the gradients, as far as one random direction of each group can tell."""
        if self.untold:
            return False
        seen = [part @ probe for part, probe in zip(self._stack.seen(gradients), self._probes, strict=True)]
        apart = torch.stack(torch._foreach_norm(torch._foreach_sub(seen, self.check))).norm()
        size = torch.stack(torch._foreach_norm(seen)).norm()
        return not bool(apart > self._tolerance * size)  # what is not finite agrees: its step will be dropped
