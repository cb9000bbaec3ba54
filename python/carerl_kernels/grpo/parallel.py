"""Several processes that train one model: FSDP2, shares of the work, sums over them, whole tensors from shards.

Every process runs the same program. What decides a run (prompts, seeds, rewards, advantages) is the same everywhere; only
completions and their losses are split: process r of W takes prompts r, r + W, ... of a step. A single process is W = 1 and
communicates nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._errors import PlainError
from ..subspace.shards import is_sharded_type, local

Precision = Literal["fp32", "bf16"]
T = TypeVar("T")


class PeerError(PlainError):
    """Something failed in another process; its own message says what."""


class Ranks:
    """The processes that share a model, and this one's place among them.

    Args:
        group: Process group; None: this process alone.
        device: Where numbers to be summed live (a GPU for NCCL).
    """

    def __init__(self, group: Any = None, device: torch.device | None = None) -> None:
        self.group, self.device = group, device or torch.device("cpu")
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1

    @classmethod
    def of(cls, model: nn.Module) -> Ranks:
        """Those over which `fully_shard` spread a model; this process alone for a model of plain tensors.

        Raises:
            ValueError: It is spread over a mesh of several dimensions.
        """
        for parameter in model.parameters():
            if is_sharded_type(parameter):
                mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
                if mesh.ndim != 1:
                    raise ValueError(
                        f"expected a model spread over a mesh of one dimension (carerl_kernels.grpo.parallel.shard(model)), "
                        f"found one of {tuple(mesh.shape)} processes"
                    )
                return cls(mesh.get_group(), parameter.device)
        return cls()

    @classmethod
    def training(cls, model: nn.Module) -> Ranks:
        """Those that train a model together.

        Raises:
            ValueError: There are several processes, and each has the whole model, bare or in `DistributedDataParallel`.
        """
        ranks = cls.of(model)
        grouped = dist.is_available() and dist.is_initialized()
        world = dist.get_world_size() if grouped else int(os.environ.get("WORLD_SIZE", "1"))
        if ranks.size == 1 and world > 1:
            raise ValueError(
                f"expected a model that is spread over the {world} processes, found all of it in this one: each would train by "
                "itself and write the same files. Call carerl_kernels.grpo.parallel.shard(model) before guard and optimizer "
                "are built, inside process_group(); or start one process"
            )
        return ranks

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files, judges and speaks."""
        return self.rank == 0

    def share(self, n: int) -> list[int]:
        """Which of n things are this process's."""
        return list(range(self.rank, n, self.size))

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the processes, in float64."""
        if self.size == 1:
            return [float(v) for v in values]
        total = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.group)
        return total.tolist()

    def most(self, value: int) -> int:
        """The largest of the processes' values."""
        if self.size == 1:
            return value
        most = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.group)
        return int(most)

    def gather(self, value: T) -> list[T]:
        """Every process's value, everywhere, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def merge(self, values: Sequence[T], n: int) -> list[T]:
        """The n things of which every process holds its `share`, everywhere, in order."""
        parts = [iter(part) for part in self.gather(list(values))]
        return [next(parts[i % self.size]) for i in range(n)]

    def on_first(self, work: Callable[[], T]) -> T:
        """What `work()` returns in the first process, everywhere; an error there is a PeerError in the others."""
        if self.size == 1:
            return work()
        answer: list[Any] = [None, None]
        error: Exception | None = None
        if self.first:
            try:
                answer[0] = work()
            except Exception as e:
                error = e
                answer[1] = f"{type(e).__name__}: {e}"
        dist.broadcast_object_list(answer, src=dist.get_global_rank(self.group, 0), group=self.group)
        if error is not None:
            raise error
        if answer[1] is not None:
            raise PeerError(f"process 0 failed with {answer[1]}")
        return answer[0]


@contextmanager
def process_group() -> Iterator[None]:
    """The process group that `torchrun` describes in the environment (NCCL on GPUs, gloo otherwise), inside.

    Without torchrun none is set up; one that `shard` makes inside for a single process ends there, too.
    """
    if dist.is_initialized():
        yield
        return
    if "WORLD_SIZE" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def shard(model: nn.Module, precision: Precision = "fp32", device: str | None = None) -> nn.Module:
    """Spreads a model over all processes with FSDP2, in place; build guard and optimizer afterwards.

    The optimizer updates the parameters in the dtype they have (float32 as a rule). With precision "bf16" forward and backward
    run on bfloat16 copies of them and gradients are summed in float32, also on a single process.

    Args:
        model: Each of its repeated layers becomes a unit that is gathered on its own.
        device: "cuda" moves each layer to this process's GPU as it is split; None: where the model is.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    kind = device or next(model.parameters()).device.type
    if not dist.is_initialized():
        backend = "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(kind, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def layers(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a transformer: those its class names, else the children of its longest module list."""
    names = {n for m in model.modules() for n in (getattr(m, "_no_split_modules", None) or ())}
    named = [m for m in model.modules() if type(m).__name__ in names]
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    return named or max(lists, key=len, default=[])


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, every process has the whole parameters, so that forward passes communicate nothing.

    Processes may then run different numbers of them: completions end at different lengths. For passes without gradient.
    """
    from torch.distributed.fsdp import FSDPModule

    units = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            # the root keeps its parameters until its backward, which begins with them
            unit.set_reshard_after_forward(unit is not model, recurse=False)


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor (a collective call), or the tensor itself."""
    return tensor.detach().full_tensor() if is_sharded_type(tensor) else tensor.detach()  # type: ignore[attr-defined]


def placed(value: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that lives in this process, split as `like` is; no communication."""
    if not is_sharded_type(like):
        return value
    return local(_spread(value, like))


def _spread(value: Tensor, like: Any) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def gather_state(state: Any, ranks: Ranks) -> Any:
    """A nested state with whole tensors in main memory; collective. Processes but the first get None for what was sharded."""
    if isinstance(state, Mapping):
        return {k: gather_state(v, ranks) for k, v in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(gather_state(v, ranks) for v in state)
    if isinstance(state, Tensor) and is_sharded_type(state):
        value = whole(state)
        return value.cpu() if ranks.first else None
    return state


def spread_state(state: Any, like: Any) -> Any:
    """Inverse of `gather_state` where `like` is a state of the same structure whose sharded tensors say how to split."""
    if isinstance(state, Mapping):
        return {k: spread_state(v, like.get(k) if isinstance(like, Mapping) else None) for k, v in state.items()}
    if isinstance(state, (list, tuple)):
        known = like if isinstance(like, (list, tuple)) and len(like) == len(state) else [None] * len(state)
        return type(state)(spread_state(v, t) for v, t in zip(state, known, strict=True))
    if isinstance(state, Tensor) and isinstance(like, Tensor) and is_sharded_type(like):
        return _spread(state, like)
    return state


def spread_optimizer(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's gathered state, its tensors of a parameter's shape split as the parameter is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    out: dict[int, dict[str, Any]] = {}
    for number, entries in state["state"].items():
        p = parameters[number]
        fits = {k: isinstance(v, Tensor) and v.shape == p.shape and is_sharded_type(p) for k, v in entries.items()}
        out[number] = {k: _spread(v, p) if fits[k] else v for k, v in entries.items()}
    return {**state, "state": out}
