"""One safetensors file out of the parts that several processes hold, without any of them holding the whole."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from .._files import write_atomically
from .fingerprint import INT_OF, wrapped
from .shards import Shards

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
}


@dataclass(frozen=True)
class Part:
    """What this process holds of one tensor of a file."""

    shape: tuple[int, ...]  # of the whole tensor
    dtype: torch.dtype
    dim: int  # along which it is split, 0 or 1
    pieces: Sequence[tuple[Tensor, slice]]  # tensors, and where they belong along it
    replicated: bool = False  # every process holds all of it

    @classmethod
    def whole(cls, tensor: Tensor) -> Part:
        """A tensor that every process holds."""
        size = tensor.shape[0] if tensor.dim() else 1
        return cls(tuple(tensor.shape), tensor.dtype, 0, [(tensor, slice(0, size))], replicated=True)

    def checksum(self) -> int:
        """Of the pieces here; checksums of pieces add up to that of the whole, in 64 bits."""
        return sum(checksum(tensor, where.start if self.dim == 0 else 0) for tensor, where in self.pieces)


def checksum(tensor: Tensor, first: int = 0) -> int:
    """Tells flipped bits and exchanged rows: the sum of every row's bits as integers, times 2 i + 1 for row i. No protection
    against forgery; one pass at the speed of memory."""
    if not tensor.numel():
        return 0
    rows = tensor.detach().reshape(tensor.shape[0] if tensor.dim() else 1, -1).contiguous()
    bits = rows.view(INT_OF[rows.element_size()])
    sums = bits.sum(1, dtype=torch.int64)
    factors = 2 * torch.arange(first, first + sums.numel(), device=sums.device) + 1
    return int((sums * factors).sum())


def save_parts(path: Path | str, parts: Mapping[str, Part], metadata: dict[str, str], shards: Shards | None) -> None:
    """Writes a file atomically; a collective call where the parts are spread over processes: the first of them writes.
    OSError, in every process: it could not."""
    metadata = {**metadata, "checksum": _checksums(parts, shards)}
    if shards is None or not shards.sharded:
        whole = {name: part.pieces[0][0].detach().contiguous().cpu() for name, part in parts.items()}
        write_atomically(path, lambda temporary: save_file(whole, temporary, metadata))
        return
    failure: list[str | None] = [None]
    gathered = _gathered(parts, shards)
    if shards.rank == 0:
        try:
            write_atomically(path, lambda temporary: _write(temporary, parts, metadata, gathered))
        except OSError as error:
            failure[0] = str(error)
    for _ in gathered:  # the other processes send everything, whatever happened in the one that writes
        pass
    dist.broadcast_object_list(failure, group=shards.group, group_src=0)
    if failure[0] is not None:
        raise OSError(failure[0])


def _checksums(parts: Mapping[str, Part], shards: Shards | None) -> str:
    numbers = torch.tensor([wrapped(part.checksum()) for part in parts.values()], dtype=torch.int64)
    if shards is not None and shards.sharded:
        replicated = torch.tensor([part.replicated for part in parts.values()])
        mine = torch.where(replicated & (shards.rank > 0), 0, numbers)
        device = next(iter(parts.values())).pieces[0][0].device
        numbers = shards.sum_(mine.to(device)).cpu()
    return json.dumps({name: int(n) for name, n in zip(parts, numbers, strict=True)})


def check_sums(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of whole tensors whose bits are not those that were saved; files without checksums have none."""
    saved = json.loads(metadata.get("checksum", "{}"))
    return [name for name, t in tensors.items() if name in saved and wrapped(checksum(t)) != saved[name]]


def _gathered(parts: Mapping[str, Part], shards: Shards) -> Iterator[tuple[str, Tensor, slice]]:
    """Pieces of all processes, one at a time, in an order that all of them know: `(tensor name, piece, where)`."""
    for name, part in parts.items():
        if part.replicated:
            yield name, part.pieces[0][0].detach().cpu(), part.pieces[0][1]
            continue
        for tensor, where in part.pieces:
            received: list[Any] | None = [None] * shards.world if shards.rank == 0 else None
            dist.gather_object((tensor.detach().cpu(), where), received, group=shards.group, group_dst=0)
            for piece, place in received or ():
                if piece.numel():
                    yield name, piece, place


def _write(
    path: Path, parts: Mapping[str, Part], metadata: dict[str, str], gathered: Iterator[tuple[str, Tensor, slice]]
) -> None:
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, part in parts.items():
        size = prod(part.shape) * part.dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[part.dtype], "shape": list(part.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        file.truncate(start + end)
        for name, piece, where in gathered:
            part = parts[name]
            base, inner = start + header[name]["data_offsets"][0], prod(part.shape[1:])
            if part.dim == 0:
                file.seek(base + where.start * inner * part.dtype.itemsize)
                file.write(bytes_of(piece))
                continue
            for row in range(part.shape[0]):
                file.seek(base + (row * inner + where.start) * part.dtype.itemsize)
                file.write(bytes_of(piece[row]))


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor on the CPU as it stands in a file."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
