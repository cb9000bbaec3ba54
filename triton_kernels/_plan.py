"""How the work of a call is cut into chunks, one program each (times groups of rows), for a batch or a list of tensors.

Why a table and not a launch per tensor: a launch costs the host 5 to 20 us, so 300 tensors would take longer to launch
than a step of LoRA takes to edit, and most of them are too small to fill a GPU. Nor are pointers passed as arguments
(every list length would be its own kernel). Instead one small int64 table goes to the device, a row for each chunk:
address, column in the bases, elements, group of coefficients. Parameters and their gradients usually stay where they
are, so tables are kept; a new one is copied from pinned memory without waiting for the device. A CUDA graph gets tables of its
own, kept for good: its replays copy them again, long after those of other calls may have gone.
"""

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from . import _blocks

TABLES = 32  # kept
_tables: OrderedDict[tuple, tuple[Tensor, Tensor, int, bool]] = OrderedDict()
_captured: list[tuple[Tensor, Tensor]] = []  # on the host and on the device
_lock = Lock()


@dataclass(frozen=True)
class Work:
    """Gradients as the kernels see them.

    Attributes:
        grads: the batch, or the first tensor of a list (which tells the kernels the dtype).
        batch, stride: gradients and the distance of their rows. n: columns of a batch.
        table: chunks of a list `[chunks, 4]`; any tensor for a batch.
        first: number of the first chunk of each tensor `[T + 1]`, per tensor only; any tensor otherwise.
        chunks: number of them. length: columns of each but the last one of a tensor.
        groups: sets of coefficients: T per tensor, else 1.
        is_list, per_tensor: the form. aligned: whether all addresses of a list are multiples of 16 bytes.
    """

    grads: Tensor
    batch: int
    stride: int
    n: int
    table: Tensor
    first: Tensor
    chunks: int
    length: int
    groups: int
    is_list: bool
    per_tensor: bool
    aligned: bool

    @property
    def sets(self) -> int:
        """Sets of K coefficients altogether."""
        return self.batch * self.groups

    @property
    def shape(self) -> tuple[int, ...]:
        """Leading shape of the coefficients."""
        if self.is_list:
            return (self.groups,) if self.per_tensor else ()
        return tuple(self.grads.shape[:-1])


def plan(grads: Tensor | Sequence[Tensor], offsets: Sequence[int], per_tensor: bool, outputs: int = 0) -> Work:
    """Cuts gradients into chunks.

    Args:
        grads: one tensor `[N]` or `[B, N]`, or a list.
        offsets: of a list, where each tensor begins in the bases.
        per_tensor: one set of coefficients for each tensor of a list.
        outputs: numbers that every chunk of a reduction writes; their memory limits the number of chunks.
    """
    most = max(min(_blocks.CHUNKS, _blocks.PARTIALS // (8 * max(outputs, 1))), 1)
    if isinstance(grads, Tensor):
        n = grads.shape[-1]
        length = _length(n, most)
        batch = grads.shape[0] if grads.dim() == 2 else 1
        stride = grads.stride(0) if batch > 1 else 0
        chunks = -(-n // length)
        return Work(grads, batch, stride, n, grads, grads, chunks, length, 1, False, False, False)
    sizes = tuple(grad.numel() for grad in grads)
    length = _length(sum(sizes), most)
    table, first, chunks, aligned = _table(grads, sizes, tuple(offsets), length, per_tensor)
    groups = len(grads) if per_tensor else 1
    return Work(grads[0], 1, 0, 0, table, first, chunks, length, groups, True, per_tensor, aligned)


def _length(n: int, most: int) -> int:
    unit = _blocks.UNIT
    return max(-(-n // (most * unit)), 1) * unit


def _table(
    grads: Sequence[Tensor], sizes: tuple[int, ...], offsets: tuple[int, ...], length: int, per_tensor: bool
) -> tuple[Tensor, Tensor, int, bool]:
    addresses = tuple(grad.data_ptr() for grad in grads)
    device = grads[0].device
    aligned = all(address % 16 == 0 for address, size in zip(addresses, sizes, strict=True) if size)
    content = addresses, sizes, offsets, length, per_tensor, grads[0].itemsize
    pinned = device.type == "cuda"
    if _capturing(device):
        host, chunks = _on_host(*content, pinned)
        both = host.to(device, non_blocking=True)
        _captured.append((host, both))
        return both, both[4 * chunks :], chunks, aligned
    stream = torch.cuda.current_stream(device).cuda_stream if pinned else 0
    key = (content, device, stream)
    with _lock:
        if key in _tables:
            _tables.move_to_end(key)
            return _tables[key]
        host, chunks = _on_host(*content, pinned)
        both = host.to(device, non_blocking=True)
        _tables[key] = both, both[4 * chunks :], chunks, aligned
        if len(_tables) > TABLES:
            _tables.popitem(last=False)
        return _tables[key]


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _on_host(
    addresses: tuple[int, ...], sizes: tuple[int, ...], offsets: tuple[int, ...], length: int, per_tensor: bool,
    itemsize: int, pinned: bool,
) -> tuple[Tensor, int]:  # fmt: skip
    """The table and behind it the first chunk of each tensor, `[4 chunks + T + 1]`, and the number of chunks."""
    count = np.array([-(-size // length) for size in sizes], dtype=np.int64)
    first = np.concatenate([[0], np.cumsum(count)])
    chunks = int(first[-1])
    tensor = np.repeat(np.arange(len(sizes)), count)
    start = (np.arange(chunks) - first[tensor]) * length
    host = torch.empty(4 * chunks + len(first), dtype=torch.int64, pin_memory=pinned)
    rows = host.numpy()[: 4 * chunks].reshape(chunks, 4)
    rows[:, 0] = np.array(addresses, dtype=np.int64)[tensor] + start * itemsize
    rows[:, 1] = np.array(offsets, dtype=np.int64)[tensor] + start
    rows[:, 2] = np.minimum(length, np.array(sizes, dtype=np.int64)[tensor] - start)
    rows[:, 3] = tensor if per_tensor else 0
    host.numpy()[4 * chunks :] = first
    return host, chunks


def addresses(matrices: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """Where every matrix lies, in the first column of a table on the device, and whether all at multiples of 16 bytes."""
    once, start = (1,) * len(matrices), (0,) * len(matrices)
    table, _, _, aligned = _table(matrices, once, start, 1, True)
    return table, aligned


def launch(kernel, grid: tuple[int, ...], like: Tensor, *args, threads: int = _blocks.THREADS) -> None:
    """Runs a kernel on the device of `like`; an empty grid is no launch."""
    if 0 not in grid:
        with torch.cuda.device(like.device) if like.device.type == "cuda" else nullcontext():
            kernel[grid](*args, **_blocks.options(threads, torch.version.hip is not None))
