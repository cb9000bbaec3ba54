"""Watching weights at work: a dispatch mode that knows every covered weight by its memory and sees what it is multiplied with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from .moments import Accumulator
from .rows import Rows
from .sites import plain_name
from .terms import Leaf, Product, Term, Weight, at, broadcast, locate, names_of, picked, viewed, without_memory

_VIEWS = {
    *("alias", "as_strided", "detach", "diagonal", "expand", "lift_fresh", "movedim", "permute", "reshape", "select"),
    *("slice", "split", "split_with_sizes", "chunk", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view"),
    *("_unsafe_view", "_reshape_alias", "unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes"),
}
_SAME = {"_to_copy", "clone", "clamp", "neg", "contiguous", "copy", "nan_to_num"}
"""Elementwise of one tensor: what a weight is multiplied with is what its copy is multiplied with."""
_SCALED = {"mul", "div"}
_ADDED = {"add", "sub", "rsub"}
_SILENT = {"empty_like", "zeros_like", "ones_like", "sym_size", "sym_stride", "is_same_size", "_local_scalar_dense"}


class Watch(TorchDispatchMode):
    """Feeds an accumulator with the inputs of covered weights while a model runs.

    Args:
        model: its parameters are looked up anew when one turns up that is not known (FSDP2 gathers them on the way).
    """

    supports_higher_order_operators = True  # they are let through; what is inside one is not seen

    def __init__(self, model: nn.Module, names: Sequence[str], accumulator: Accumulator):
        super().__init__()
        self.model, self.names, self.accumulator = model, frozenset(names), accumulator
        self.rows = Rows(None)  # which positions of the present batch count
        # by name the operators that used a weight without multiplying an input by it
        self.other: dict[str, set[str]] = {}
        self.untold: set[str] = set()  # labels of matrices whose inputs could not be told from padding; all counted
        self._weights: dict[int, list[Weight]] = {}  # by storage
        self._storages: dict[int, Any] = {}  # keeps them, so that no other gets the number
        self._derived = WeakTensorKeyDictionary()  # tensor: its terms
        self._learn()

    def _learn(self) -> None:
        """Finds out where the parameters are now."""
        for name, parameter in self.model.named_parameters():
            if not _plain(parameter):
                continue
            storage = parameter.untyped_storage()
            here = self._weights.setdefault(storage._cdata, [])
            self._storages[storage._cdata] = storage
            shape, stride = tuple(parameter.shape), parameter.stride()
            if len(shape) < 2:
                continue
            if len(shape) > 3:
                shape, stride = (shape[0], parameter[0].numel()), (stride[0], 1)
            covered = plain_name(name) if plain_name(name) in self.names else None
            weight = Weight(covered, int(parameter.storage_offset()), shape, stride, parameter.dtype)
            if weight not in here:
                here.append(weight)

    def terms(self, tensor: Tensor) -> tuple[Term, ...]:
        """What of covered weights a tensor consists of; empty: nothing."""
        if not _plain(tensor):
            return ()
        found = self._derived.get(tensor)
        if found is not None:
            return found
        storage = tensor.untyped_storage()._cdata
        if storage not in self._weights:
            if not isinstance(tensor, nn.Parameter):
                return ()
            self._learn()
        weights = self._weights.get(storage, ())
        return tuple(Leaf(weight, tensor) for weight in weights if weight.holds(tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            self.accumulator.settle()  # what waits may be about to change
        name = func._schema.name.split("::")[1]
        known = [(t, terms) for t in _tensors(args, kwargs) if (terms := self.terms(t))]
        derive = self._meet_all(name, args, kwargs) if known else None
        out = func(*args, **kwargs)
        if derive is not None:
            if found := derive(out):
                self._derived[out] = found
        elif known:
            self._follow(func, name, args, kwargs, out, known)
        self.rows.follow(name, args, out)
        return out

    # --------------------------------------------------------------------------------------------------------- products

    def _meet_all(self, name: str, args: Any, kwargs: Any) -> Callable[[Tensor], tuple[Term, ...]] | None:
        """Handles products: feeds the accumulator, and says what the result consists of (something where two weights meet). None:
        no product."""
        if name in ("mm", "bmm", "mv", "_scaled_mm", "_scaled_mm_v2", "_int_mm"):
            return self._product(*args[:2])
        if name in ("addmm", "baddbmm", "addbmm", "addmv", "_addmm_activation"):
            derive = self._product(*args[1:3])
            added = self.terms(args[0])
            if derive is _no_terms or name in ("addmv", "_addmm_activation", "addbmm"):
                return derive
            return lambda out: (*derive(out), *broadcast(added, out))
        if name in ("linear", "mkldnn_linear"):
            transposed = tuple(viewed(term, lambda v: v.mT) for term in self.terms(args[1]))
            return self._product(args[0], args[1].mT, of_b=transposed)
        if name == "dot":
            return self._product(args[0].unsqueeze(0), args[1])
        if "grouped_mm" in name:
            offs = next((t for t in (*args[2:], *kwargs.values()) if _is_offsets(t)), None)
            return self._product(args[0], args[1], offs)
        if name in ("embedding", "_embedding_bag", "_embedding_bag_forward_only"):
            self._look_up(args[0], args[1], self.rows.of(args[1], args[1].dim()))
            return _no_terms
        return None

    def _product(
        self, a: Tensor, b: Tensor, offs: Tensor | None = None, of_b: tuple[Term, ...] | None = None
    ) -> Callable[[Tensor], tuple[Term, ...]]:
        of_a, of_b = self.terms(a), self.terms(b) if of_b is None else of_b
        if b.dim() == 1:
            b, of_b = b.unsqueeze(1), tuple(viewed(term, lambda v: v.unsqueeze(1)) for term in of_b)
        if of_a and of_b:
            return lambda out: (
                (Product(a, b, of_a, of_b, torch.empty(out.shape, device="meta")),) if out.dim() == b.dim() else ()
            )
        if any(names_of(term) for term in of_b):
            keep = self.rows.of(a, a.dim() - 1)
            for term in of_b:
                self._meet(term, a, keep, -2, -1, offs)
        if any(names_of(term) for term in of_a):
            keep = self.rows.of_columns(b)
            for term in of_a:
                self._meet(term, b.mT, keep, -1, -2, offs)
        return _no_terms

    def _meet(self, term: Term, x: Tensor, keep: Tensor | None, c: int, o: int, offs: Tensor | None = None) -> None:
        """A term is multiplied with input vectors.

        Args:
            x: `[T, K]`, or `[b, T, K]` for a batch of matrices; with `offs`, `[T, K]` sorted by matrix.
            keep: which vectors count; None: not known here.
            c, o: dimension of the term's view that is summed over, and the other one.
            offs: ends of the vectors of each matrix.
        """
        view = term.view
        pick = term.pick if isinstance(term, Leaf) else None
        if view.dim() == 2:
            if x.dim() == 3:  # one matrix for all
                x = x.flatten(0, 1)
            self._meet_matrix(term, x, None if keep is None else keep.flatten(), c, o, None)
        elif view.dim() != 3:
            self._used(term, "a product of more dimensions")
        elif offs is not None:
            start = 0
            for e, end in enumerate(offs.tolist()):
                if end > start:
                    part = None if keep is None else keep.reshape(-1)[start:end]
                    self._meet_matrix(at(term, e), x[start:end], part, c, o, None)
                start = end
        elif pick is not None:
            for e in pick.unique().tolist():
                chosen = (pick == e).nonzero().squeeze(1)
                part = None if keep is None else keep[chosen].flatten()
                self._meet_matrix(at(term, 0), x[chosen].flatten(0, 1), part, c, o, e)
        elif view.stride(0) == 0:
            self._meet_matrix(at(term, 0), x.flatten(0, 1), None if keep is None else keep.flatten(), c, o, None)
        else:
            for e in range(view.shape[0]):
                part = None if keep is None else keep[e]
                self._meet_matrix(at(term, e), x[e] if x.dim() == 3 else x, part, c, o, None)

    def _meet_matrix(self, term: Term, x: Tensor, keep: Tensor | None, c: int, o: int, pick: int | None) -> None:
        if isinstance(term, Leaf):
            if term.weight.name is None:
                return
            found = locate(term, c, o, pick)
            if found is None:
                return self._used(term, "a product with a part of it")
            uses, n, columns = found
            if keep is None:
                keep = self.rows.of(x, 1)
            if keep is None and self.rows.mask is not None:
                self.untold.update(use[0] for use in uses)
            for use in uses:
                self.accumulator.see(use, x, keep, n, None if columns is None else columns.to(x.device))
            return
        rows, inner = term.left.shape[-2], term.right.shape[-1]
        e, rest = divmod(int(term.view.storage_offset()), rows * inner)
        left, right = (t if t.dim() == 2 else t[e] for t in (term.left, term.right))
        lefts = [t if t.view.dim() == 2 else at(t, e) for t in term.left_terms]
        rights = [t if t.view.dim() == 2 else at(t, e) for t in term.right_terms]
        along = term.view.shape[c] == 1 or term.view.stride(c) == 1  # summed over the inner side: D x = L (R x)
        size, first = (inner, rest % inner) if along else (rows, rest // inner)
        if term.view.shape[c] != size:
            x = torch.nn.functional.pad(x, (first, size - first - term.view.shape[c]))
        first_met, then_met, factor, dims = (
            (rights, lefts, right.mT, (-1, -2)) if along else (lefts, rights, left, (-2, -1))
        )
        for t in first_met:
            self._meet_matrix(t, x, keep, *dims, picked(t, e))
        x = x.to(factor.dtype) @ factor
        for t in then_met:
            self._meet_matrix(t, x, keep, *dims, picked(t, e))

    def _look_up(self, weight: Tensor, positions: Tensor, keep: Tensor | None) -> None:
        if keep is not None:
            positions = positions[keep.reshape(positions.shape)]
        for term in self.terms(weight):
            if not names_of(term):
                continue
            found = locate(term, 0, 1, None) if isinstance(term, Leaf) and term.view.dim() == 2 else None
            if found is None:
                self._used(term, "a lookup in a part of it")
                continue
            uses, n, columns = found
            if keep is None and self.rows.mask is not None:
                self.untold.update(use[0] for use in uses)
            here = positions if columns is None else columns.to(positions.device)[positions]
            for use in uses:
                self.accumulator.look_up(use, here, n)

    def _used(self, term: Term, how: str) -> None:
        for name in names_of(term):
            self.other.setdefault(name, set()).add(how)

    # ----------------------------------------------------------------------------------- copies and sums of weights

    def _follow(
        self, func: Any, name: str, args: Any, kwargs: Any, out: Any, known: list[tuple[Tensor, tuple[Term, ...]]]
    ) -> None:
        """What the result of an operator that is no product consists of."""
        first, terms = known[0]
        inplace = func._schema.is_mutable and name.endswith("_")
        what = name[:-1] if inplace else name
        if what in _VIEWS:
            if self._derived.get(first) is not None:  # views of the parameters themselves are known by their storage
                self._view(func, args, kwargs, out, terms)
        elif what in _SAME and (not inplace or what == "copy"):
            self._derived[out] = broadcast(terms if first is not args[0] else known[-1][1], out)
        elif what in _SCALED and len(known) == 1 and _is_scale(args, first):
            if not inplace:
                self._derived[out] = broadcast(terms, out)
        elif what in _ADDED and len(known) == 2:
            self._derived[out] = tuple(t for _, terms in known for t in broadcast(terms, out))
        elif name in ("index", "index_select") and self._gather(name, args, out):
            pass
        elif name not in _SILENT:
            for _, terms in known:
                for term in terms:
                    self._used(term, name)

    def _view(self, func: Any, args: Any, kwargs: Any, out: Any, terms: tuple[Term, ...]) -> None:
        outs = list(out) if isinstance(out, tuple | list) else [out]
        try:
            views = [func(term.view, *args[1:], **kwargs) for term in terms]
        except RuntimeError:  # the copy lies together where the weight does not
            for term in terms:
                self._used(term, func._schema.name)
            return
        for number, tensor in enumerate(outs):
            viewed = (v[number] if isinstance(out, tuple | list) else v for v in views)
            self._derived[tensor] = tuple(replace(t, view=v) for t, v in zip(terms, viewed, strict=True))

    def _gather(self, name: str, args: Any, out: Tensor) -> bool:
        """Rows of a matrix, as embeddings written by hand take them, or slices of a stack."""
        weight = args[0]
        if name == "index_select":
            if args[1] != 0:
                return False
            positions = args[2]
        else:
            if len(args[1]) != 1 or args[1][0] is None or args[1][0].dtype == torch.bool:
                return False
            positions = args[1][0]
        if weight.dim() == 2:
            self._look_up(weight, positions, self.rows.of(positions, positions.dim()))
            return True
        terms = self.terms(weight)
        if weight.dim() != 3 or positions.dim() != 1 or not all(isinstance(t, Leaf) and t.pick is None for t in terms):
            return False
        first = (at(t, 0) for t in terms)
        self._derived[out] = tuple(
            replace(t, view=without_memory(t.view).expand(len(positions), -1, -1), pick=positions) for t in first
        )
        return True


def _no_terms(out: Any) -> tuple[Term, ...]:
    return ()


def _plain(tensor: Tensor) -> bool:
    """Whether a tensor has memory of its own to know it by; subclasses that dispatch themselves have not."""
    return type(tensor).__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl and tensor.dim() > 0


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    out = []
    for a in (*args, *kwargs.values()):
        if isinstance(a, Tensor):
            out.append(a)
        elif isinstance(a, list | tuple):
            out += [b for b in a if isinstance(b, Tensor)]
    return out


def _is_offsets(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1 and value.dtype in (torch.int32, torch.int64)


def _is_scale(args: Any, weight: Tensor) -> bool:
    """Whether the other factor is one number."""
    others = [a for a in args[:2] if a is not weight]
    return all(not isinstance(a, Tensor) or a.numel() == 1 for a in others) and isinstance(args[0], Tensor)
