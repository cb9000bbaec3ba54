"""A guard's state beside a trainer's checkpoint: one file, or a folder that all processes of a sharded model write."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from .._files import write_atomically
from ..guard import CapabilityGuard


def state_path(guard: CapabilityGuard, folder: Path) -> Path:
    """Where the state lies in the folder of a checkpoint."""
    return folder / ("guard" if guard.layout.shards.sharded else "guard.pt")


def save_state(guard: CapabilityGuard, folder: Path, writes: bool) -> None:
    """Writes the state; every process calls it.

    Args:
        writes: Whether this process is the one that writes where the state is the same in all of them.
    """
    state, path = guard.state_dict(), state_path(guard, folder)
    if guard.layout.shards.sharded:
        dcp.save({"guard": state}, checkpoint_id=path)
    elif writes:
        write_atomically(path, lambda temporary: torch.save(state, temporary))


def load_state(guard: CapabilityGuard, folder: Path) -> None:
    """Goes on from what :func:`save_state` wrote."""
    path = state_path(guard, folder)
    if not path.exists():
        raise FileNotFoundError(
            f"resuming: expected the guard's state in {path}, found none; resume from a checkpoint of this output_dir that "
            "was written with the guard, with save_only_model=False"
        )
    if guard.layout.shards.sharded:
        state = {"guard": guard.state_dict()}
        dcp.load(state, checkpoint_id=path)
        guard.load_state_dict(state["guard"])
    else:
        guard.load_state_dict(torch.load(path, map_location=guard.device, weights_only=True))
