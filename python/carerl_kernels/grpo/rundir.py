"""A run's directory: configuration, metrics as JSON lines, checkpoints that are complete or absent.

config.json                    settings, stages, domains
metrics.jsonl                  one object per step (step 0: the evaluation before training)
bases/NAME.safetensors         written by the guard at the end of each stage
bases/NAME/DOMAIN.safetensors  of a mixed stage where the guard acts on each domain's part (and NAME.before: see .views)
checkpoints/step-00000040/     model.safetensors, state.pt
references/step-00000040.safetensors    that step's weights, for a KL term or interpolated stages, while a checkpoint needs them
model/                         the trained model in transformers' format
accuracy.png, training.png

With several processes the first one writes; sharded tensors are gathered first, so files look the same for any number of them.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .._errors import PlainError
from .._files import check_writable, json_line, lines_up_to, write_atomically, write_bytes_atomically, write_json
from .._json import nested_tuples
from ..subspace.shards import local
from .parallel import Ranks, gather_state, placed, whole


class CheckpointError(PlainError):
    """A checkpoint or run directory does not belong to this run, or is damaged."""


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters (tied ones once) and persistent buffers by name."""
    persistent = model.state_dict().keys()
    tensors = {n: p.detach() for n, p in model.named_parameters()}
    return tensors | {n: b.detach() for n, b in model.named_buffers(remove_duplicate=False) if n in persistent}


def save_weights(path: Path, model: nn.Module) -> None:
    """Write a model's tensors as safetensors, atomically."""
    save_tensors(path, model_tensors(model), Ranks.of(model))


def load_weights(path: Path, model: nn.Module) -> None:
    """Inverse of `save_weights`; see `load_tensors`."""
    load_tensors(path, model_tensors(model))


def save_tensors(path: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Write tensors as safetensors, atomically. Sharded ones are gathered: every process calls this."""
    gathered = gather_whole(tensors, ranks)
    ranks.on_first(lambda: write_atomically(path, lambda temporary: save_file(gathered, temporary)))


def gather_whole(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Whole tensors in main memory of the first process, one gathered at a time; empty in the others."""
    out = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if ranks.first:
            out[name] = full.contiguous().cpu()
    return out


@torch.no_grad()
def load_tensors(path: Path, own: Mapping[str, Tensor], put: Callable[[str, Tensor], Any] | None = None) -> None:
    """Copy stored tensors into `own` ones in place (optimizers keep pointing at the same parameters).

    Args:
        own: This run's tensors, by name; each process reads its parts of sharded ones.
        put: Called with name and value (this process's part) instead of copying.

    Raises:
        CheckpointError: Names, shapes or dtypes differ; nothing is copied then.
    """
    if not path.exists():
        raise CheckpointError(
            f"expected weights in {path}, found no such file; start the run anew in another directory"
        )
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        missing, extra = sorted(own.keys() - names), sorted(names - own.keys())
        odd = []
        for name in sorted(own.keys() & names):
            stored = file.get_tensor(name)
            if own[name].shape != stored.shape or own[name].dtype != stored.dtype:
                here, there = (f"{tuple(t.shape)} {t.dtype}" for t in (own[name], stored))
                odd.append(f"{name}: expected {here}, found {there}")
        if missing or extra or odd:
            raise CheckpointError(
                f"{path} belongs to another model: missing {missing[:3]}, unknown {extra[:3]}, differing {odd[:3]}; "
                "resume with the model that the run was started with"
            )
        for name, tensor in own.items():
            value = placed(file.get_tensor(name), tensor)
            if put is not None:
                put(name, value)
            else:
                local(tensor).copy_(value)


def rng_state() -> dict[str, Any]:
    """States of the global generators of Python, numpy and torch (all devices): verifiers and dropout may use them."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 (verifiers may use it)
    words = torch.from_numpy(np.asarray(keys).astype(np.int64))
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, words, int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Inverse of `rng_state`."""
    random.setstate(nested_tuples(state["python"]))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        # the checkpoint may come from a machine with more devices, or with fewer
        for device, kept in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(kept, device)


def _differences(expected: Any, found: Any, place: str = "") -> Iterator[str]:
    """Where two settings differ, each by its dotted place."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for name in sorted(expected.keys() | found.keys()):
            inside = f"{place}.{name}" if place else name
            yield from _differences(expected.get(name), found.get(name), inside)
    elif expected != found:
        yield f"{place}: expected {expected!r}, found {found!r}"


class RunDirectory:
    """Files of one run. See the module's text for the layout."""

    def __init__(self, path: Path | str, ranks: Ranks | None = None) -> None:
        self.path, self.ranks = Path(path), ranks or Ranks()
        self.metrics_path = self.path / "metrics.jsonl"
        self.config_path = self.path / "config.json"
        self.checkpoints_path = self.path / "checkpoints"
        self.references_path = self.path / "references"

    def start(self, config: Mapping[str, Any]) -> None:
        """Create the directory for a new run.

        Raises:
            CheckpointError: It holds a run already.
            OSError: Nothing can be written there.
        """
        self.ranks.on_first(lambda: self._start(config))

    def _start(self, config: Mapping[str, Any]) -> None:
        if self.config_path.exists() or self.metrics_path.exists():
            raise CheckpointError(
                f"{self.path} already holds a run; go on with it (--resume, in Python train(resume=True)) or choose another "
                "directory"
            )
        check_writable(self.config_path)
        (self.path / "bases").mkdir(exist_ok=True)
        write_json(self.config_path, config)
        self.metrics_path.touch()

    def check(self, settings: Mapping[str, Any], cosmetic: Collection[str]) -> None:
        """Compare settings with those the run was started with.

        Args:
            cosmetic: Names under "config" that may differ.

        Raises:
            CheckpointError: They differ, or the stored ones are unreadable.
        """
        try:
            stored = json.loads(self.config_path.read_text())
            theirs = {**stored.pop("config"), **stored}
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise CheckpointError(f"{self.config_path} is unreadable ({e}); cannot resume {self.path}") from e
        ours = json.loads(json.dumps(settings))  # tuples become lists, as they are when read back
        ours = {**ours.pop("config"), **ours}
        for name in cosmetic:
            ours.pop(name, None), theirs.pop(name, None)
        if listed := "; ".join(_differences(theirs, ours)):
            raise CheckpointError(
                f"cannot resume {self.path} exactly with other settings: {listed}; restore them, or start anew in "
                "another directory"
            )

    def append(self, line: Mapping[str, Any]) -> None:
        """Add one line of metrics; a non-finite number is written as null (JSON has none)."""
        if self.ranks.first:
            with open(self.metrics_path, "a") as f:
                f.write(json_line(line))

    def truncate(self, last_step: int) -> list[dict[str, Any]]:
        """Forget metrics after `last_step` (and a line cut short by the interruption); returns what remains.

        Raises:
            CheckpointError: Fewer lines than the checkpoint had seen.
        """
        return self.ranks.on_first(lambda: self._truncate(last_step))

    def _truncate(self, last_step: int) -> list[dict[str, Any]]:
        kept = lines_up_to(self.metrics_path, last_step)
        if [line["step"] for line in kept] != list(range(last_step + 1)):
            raise CheckpointError(
                f"{self.metrics_path}: expected lines for steps 0..{last_step} of the checkpoint, found {len(kept)}; "
                "the file was edited or lost"
            )
        write_bytes_atomically(self.metrics_path, "".join(map(json_line, kept)).encode())
        return kept

    def save_checkpoint(self, step: int, model: nn.Module, state: Mapping[str, Any], keep: int) -> None:
        """Write a checkpoint and drop the oldest beyond `keep`. Complete under its final name, or absent.

        `state["reference"]` and `state["stage_start"]` are steps whose weights the run still compares with, or None;
        references that no checkpoint needs any more go too.
        """
        weights = gather_whole(model_tensors(model), self.ranks)
        self.ranks.on_first(partial(self._save, step, weights, gather_state(dict(state), self.ranks), keep))

    def _save(self, step: int, weights: Mapping[str, Tensor], state: Mapping[str, Any], keep: int) -> None:
        final = self.checkpoints_path / f"step-{step:08d}"
        temporary = self.checkpoints_path / f".tmp-{uuid.uuid4().hex[:8]}"
        try:
            write_atomically(temporary / "model.safetensors", lambda path: save_file(dict(weights), path))
            write_atomically(temporary / "state.pt", lambda path: torch.save(dict(state), path))
            if final.exists():  # same step, saved before the interruption that we resumed from
                shutil.rmtree(final)
            os.replace(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for old in self.checkpoints()[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
        needed = {self.reference(step) for step in (state["reference"], state["stage_start"]) if step is not None}
        for older, newer in pairwise(sorted(self.references_path.glob("step-*.safetensors"))):
            # every checkpoint that is left was made after `newer` replaced it
            if newer.stem <= self.checkpoints()[0].name and older not in needed:
                older.unlink()

    def reference(self, step: int) -> Path:
        """The frozen weights taken at a step."""
        return self.references_path / f"step-{step:08d}.safetensors"

    def sweep(self) -> None:
        """Remove what a killed process left half-written."""
        if not self.ranks.first:
            return
        for folder in self.checkpoints_path.glob(".tmp-*"):
            shutil.rmtree(folder, ignore_errors=True)
        bases = self.path / "bases"
        for folder in (self.path, bases, *bases.glob("*/"), self.references_path):
            for file in folder.glob(".*.tmp"):
                file.unlink(missing_ok=True)

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(self.checkpoints_path.glob("step-*")) if self.checkpoints_path.exists() else []

    def load_checkpoint(self, model: nn.Module) -> dict[str, Any] | None:
        """Copy the latest checkpoint's weights into the model and return its state; None without a checkpoint.

        Raises:
            CheckpointError: Another model, or a damaged file.
        """
        paths = self.checkpoints()
        if not paths:
            return None
        try:
            state = torch.load(paths[-1] / "state.pt", map_location="cpu", weights_only=True, mmap=True)
            load_weights(paths[-1] / "model.safetensors", model)
        except CheckpointError:
            raise
        except Exception as e:
            raise CheckpointError(f"{paths[-1]} is damaged ({e}); delete it to resume from an earlier one") from e
        return dict(state)
