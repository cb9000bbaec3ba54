"""List ops over a layout: what the host would have to wait for a GPU for."""

from __future__ import annotations

import pytest
import torch
from carerl_kernels.subspace.layout import Layout
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2"}


class Watch(TorchDispatchMode):
    """Raises where a tensor's values are asked for, where host and device (here: meta) meet, and where an index is neither
    the result of an op nor one of `known`: a list, which Python makes a tensor of and copies to the device unseen."""

    def __init__(self, known: list[torch.Tensor] | None = None) -> None:
        super().__init__()
        self.known, self.indices, self.results = known, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in WAITS, f"{name} reads what the device has computed"
        out = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, out))
        devices = {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim() > 0}
        assert len(devices) <= 1, f"{name} brings host and device together"
        for index in args[1] if name.startswith("index") else ():
            there = [*self.results, *(self.known or [])]
            assert self.known is None or any(index is tensor for tensor in there), f"{name} by a list"
            self.indices.append(index)
        self.results += [leaf for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        return out


@pytest.mark.parametrize("kind", ["flat", "per_matrix"])
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float32, torch.bfloat16)], ids=["one_dtype", "two_dtypes"])
def test_list_ops_over_a_layout_do_not_wait_for_the_device(kind, dtypes):
    """Once the layout's indices are there; rows of tensors of two dtypes, one after the other, are not side by side."""
    shapes = [(40, 20), (3,), (30, 50), (7,), (64, 16), (20, 40)]
    tensors = [torch.empty(shape, dtype=dtypes[i % len(dtypes)], device="meta") for i, shape in enumerate(shapes)]
    layout = Layout.of([(f"p{i}", tensor) for i, tensor in enumerate(tensors)], kind, 2)
    bases = torch.empty(3, 2, layout.size, device="meta")

    def step():
        c = layout.project(tensors, bases)
        layout.gram(bases[0], tensors)
        layout.edit_(tensors, bases, c, torch.ones(layout.T, device="meta"))
        q = torch.empty(layout.T, 2, 3, device="meta")
        layout.rotate_(bases[0], tensors, q)
        layout.edit_rotate_(tensors, bases, c, 1, q)

    with Watch() as before:
        step()
    with Watch(before.indices):
        step()


def test_the_watch_sees_a_list_as_an_index():
    mix, index = torch.empty(4, 2, device="meta"), torch.tensor([0, 2], device="meta")
    with Watch([index]):
        mix[index]
        with pytest.raises(AssertionError, match="index by a list"):
            mix[[0, 2]]
