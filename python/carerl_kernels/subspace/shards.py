"""How parameters are spread over processes, and the sums over them, counted.

Sharded parameters are FSDP2's DTensors (`fully_shard`: split along dimension 0, on any number of processes, unevenly, some
parts empty) or plain lists of local parts with a process group. Replicated ones (DDP, one process) need no communication.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_sharded_type(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; asked by name, because importing its module takes a second."""
    return any(c.__name__ == "DTensor" for c in type(tensor).__mro__)


@dataclass(frozen=True)
class Piece:
    """The part of one parameter that lives in this process: elements `[start, stop)` of the flattened whole."""

    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Elements of the whole."""
        return torch.Size(self.shape).numel()

    @property
    def rows(self) -> slice:
        """Rows of the whole, where dimension 0 was split."""
        inner = self.numel // self.shape[0] if self.shape and self.shape[0] else 1
        return slice(self.start // max(inner, 1), self.stop // max(inner, 1))

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the part, where dimension 0 was split."""
        return (self.rows.stop - self.rows.start, *self.shape[1:]) if self.shape else ()


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lives in this process, sharing its memory."""
    if is_sharded_type(tensor):
        return tensor.detach().to_local()  # type: ignore[attr-defined]
    return tensor.detach()


def reshard(model: nn.Module) -> None:
    """Parameters are what this process holds again: a forward pass without a backward leaves whole copies in the place of FSDP2's
    root, which do not follow when the parameters are changed."""
    for module in model.modules():
        if hasattr(module, "set_reshard_after_forward"):  # asked by name, for the same reason
            module.reshard()  # type: ignore[operator]


class Shards:
    """Which part of every parameter lives here, and sums over the processes that hold the others.

    Args:
        group: over which parameters are sharded; None where every process holds all of them.
        mesh, placements: of the DTensors, to build others like them; None for plain tensors.
    """

    def __init__(
        self, pieces: Sequence[Piece], group: Any = None, mesh: Any = None, placements: Sequence[Any] | None = None
    ):
        self.pieces, self.group, self.mesh, self.placements = tuple(pieces), group, mesh, placements
        self.rank = dist.get_rank(group) if group is not None else 0
        self.world = dist.get_world_size(group) if group is not None else 1
        self.elements = self.calls = 0  # numbers summed over processes so far, and in how many all-reduces

    @classmethod
    def of(cls, named: Iterable[tuple[str, Tensor]], group: Any = None) -> Shards:
        """Finds out where the parameters are.

        Args:
            group: process group of plain local parts: every process holds a contiguous part of each flattened parameter, in
                the order of ranks.

        Raises:
            ValueError: DTensors that are not split along dimension 0 alone, or not all alike.
        """
        named = list(named)
        sharded = [is_sharded_type(p) for _, p in named]
        if not any(sharded):
            return cls._plain(named, group)
        if group is not None:
            raise ValueError("process_group belongs to plain local parts; DTensors bring their own, leave it out")
        from torch.distributed.tensor import Shard

        first: Any = named[sharded.index(True)][1]
        dims = [i for i, p in enumerate(first.placements) if not p.is_replicate()]
        for (name, tensor), here in zip(named, sharded, strict=True):
            p: Any = tensor
            if not here:
                raise ValueError(
                    f"parameter {name!r}: expected a DTensor like the other parameters, found a plain tensor; "
                    "call fully_shard on the whole model before building the guard"
                )
            if p.device_mesh != first.device_mesh or tuple(p.placements) != tuple(first.placements):
                raise ValueError(
                    f"parameter {name!r}: expected placements {tuple(first.placements)} on one mesh for all parameters, "
                    f"found {tuple(p.placements)} on {p.device_mesh}; guard each group of parameters by itself"
                )
        if len(dims) > 1 or any(type(first.placements[i]) is not Shard or first.placements[i].dim != 0 for i in dims):
            raise ValueError(
                f"parameter {named[0][0]!r}: expected FSDP2's sharding along dimension 0, found {tuple(first.placements)}; "
                "tensor-parallel and other placements are not supported"
            )
        mesh_group = first.device_mesh.get_group(dims[0]) if dims else None
        shards = cls((), mesh_group, first.device_mesh, first.placements)
        shards.pieces = tuple(_dim0_piece(tuple(p.shape), shards.rank, shards.world) for _, p in named)
        for (name, p), piece in zip(named, shards.pieces, strict=True):
            if local(p).numel() != piece.stop - piece.start:
                raise ValueError(
                    f"parameter {name!r}: expected {piece.stop - piece.start} local elements (dimension 0 in equal chunks), "
                    f"found {local(p).numel()}"
                )
        return shards

    @classmethod
    def _plain(cls, named: list[tuple[str, Tensor]], group: Any) -> Shards:
        if group is None:
            return cls([Piece(tuple(p.shape), 0, p.numel()) for _, p in named])
        sizes: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(sizes, [p.numel() for _, p in named], group=group)
        rank = dist.get_rank(group)
        pieces = []
        for i in range(len(named)):
            start = sum(s[i] for s in sizes[:rank])
            pieces.append(Piece((sum(s[i] for s in sizes),), start, start + sizes[rank][i]))
        return cls(pieces, group)

    @property
    def sharded(self) -> bool:
        return self.group is not None

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sums over the processes that hold the parts, in place; counted."""
        if self.group is not None:
            self.elements += tensor.numel()
            self.calls += 1
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def spread(self, index: int, part: Tensor, dim: int = 0) -> Tensor:
        """This process's part of something as large as a parameter along its dimension 0, here `dim`: a DTensor, so that
        torch.distributed.checkpoint can put it together and cut it for another number of processes. Itself, without DTensors.
        """
        if self.mesh is None or self.placements is None:
            return part
        from torch.distributed.tensor import DTensor, Shard

        shape = (*part.shape[:dim], self.pieces[index].shape[0], *part.shape[dim + 1 :])
        stride = torch.empty(shape, device="meta").stride()
        placements = [Shard(dim) if p.is_shard() else p for p in self.placements]
        return DTensor.from_local(part, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)

    def all(self, flag: Tensor) -> Tensor:
        """Whether a 0-d bool is true in every process: all of them then decide alike."""
        if self.group is None:
            return flag
        return self.sum_((~flag).to(torch.float32)) == 0


def _dim0_piece(shape: tuple[int, ...], rank: int, world: int) -> Piece:
    """Dimension 0 in equal chunks, the last ones smaller or empty: how DTensor and FSDP2 split."""
    size = shape[0] if shape else 1
    inner = torch.Size(shape[1:]).numel()
    chunk = -(-size // world)
    return Piece(shape, min(rank * chunk, size) * inner, min((rank + 1) * chunk, size) * inner)
