"""Which input vectors are text and which padding, followed through a forward pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_FOLDS = {
    "view",
    "_unsafe_view",
    "reshape",
    "flatten",
    "unflatten",
    "unsqueeze",
    "squeeze",
    "expand",
    "permute",
    "transpose",
}


class Rows:
    """Which positions of a batch count, known also of the tensors that a model makes of them.

    A tensor is known by its shape where that says enough: `[B, T, ...]`, `[T, B, ...]`, `[B*T, ...]`, `[T, ...]`. Rows
    that were gathered from such tensors, as experts of a mixture get them, are known by the index, and stay known through
    operators that keep the number of rows.

    Args:
        mask: `[B, T]` or `[B]` bool, which positions count; None: all.
    """

    def __init__(self, mask: Tensor | None):
        self.mask = None if mask is None or bool(mask.all()) else mask
        self._known = WeakTensorKeyDictionary()  # tensor: bool of its first dimension

    def of(self, tensor: Tensor, dims: int) -> Tensor | None:
        """bool over the first dimensions of a tensor, which are its vectors; None: all count, or it is not known."""
        if self.mask is None or not tensor.numel():
            return None
        shape = tensor.shape[:dims]
        mask = self._by_shape(tensor)
        if mask is None:
            return None
        mask = mask.to(tensor.device)
        while mask.dim() < dims:
            mask = mask.unsqueeze(-1)
        if mask.dim() > dims:  # vectors are longer than one position: those count that hold any
            mask = mask.flatten(dims).any(-1) if dims else mask.any()
        return mask.expand(shape)

    def of_columns(self, tensor: Tensor) -> Tensor | None:
        """The same of the columns of `[K, T]` or `[b, K, T]`."""
        known = self._known.get(tensor) if self.mask is not None else None
        if known is not None and tensor.dim() == 3:
            return known.unsqueeze(1).expand(tensor.shape[0], tensor.shape[2])
        return self.of(tensor.mT, tensor.dim() - 1)

    def _by_shape(self, tensor: Tensor) -> Tensor | None:
        known = self._known.get(tensor)
        if known is not None:
            return known
        assert self.mask is not None
        shape = tuple(tensor.shape)
        mask = self.mask
        if mask.dim() == 2:
            B, T = mask.shape
            if shape[:2] == (B, T):
                return mask
            if shape[:2] == (T, B):
                return mask.mT
            if shape[0] == B * T:
                return mask.flatten()
            if shape[0] == T or shape[:2] == (1, T):  # the same for all sequences, as positions are
                return mask.any(0) if shape[0] == T else mask.any(0, keepdim=True)
            return None
        return mask if shape[0] == mask.shape[0] else None

    def follow(self, name: str, args: Any, out: Any) -> None:
        """Keeps track of rows that an operator folds together, gathers or keeps."""
        if self.mask is None or not args:
            return
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.dim():
                self._follow(name, args, tensor)

    def _follow(self, name: str, args: Any, out: Tensor) -> None:
        source = args[0]
        if name in _FOLDS and isinstance(source, Tensor) and source.dim() and source.shape[0] != out.shape[0]:
            mask = self._by_shape(source)
            lead = source.shape[: max(1, source.dim() - out.dim() + 1)]
            if mask is not None and mask.dim() <= len(lead) and lead.numel() == out.shape[0]:
                self._known[out] = mask.reshape(*mask.shape, *[1] * (len(lead) - mask.dim())).expand(lead).flatten()
        elif name in ("index", "index_select", "index_copy"):
            index = None
            if name == "index" and args[1]:
                index = args[1][0]
            elif name == "index_select" and args[1] == 0:
                index = args[2]
            mask = self._by_shape(source) if isinstance(source, Tensor) and source.dim() else None
            if isinstance(index, Tensor) and mask is not None and index.dim() == 1 and mask.dim() == 1:
                self._known[out] = mask.to(index.device)[index]
        else:
            for tensor in args:
                known = self._known.get(tensor) if isinstance(tensor, Tensor) else None
                if known is not None and out.shape[0] == known.shape[0]:
                    self._known[out] = known
                    return
