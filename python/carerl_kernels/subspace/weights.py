"""Weights on disk: the safetensors files of a transformers model, of an adapter, or by themselves.

Read one tensor, or some rows of it, at a time; a changed copy appears whole under its name, or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .saving import bytes_of

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MODEL, ADAPTER = "model.safetensors", "adapter_model.safetensors"
_OTHER_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".distcp",
    ".npz",
)


@dataclass(frozen=True)
class Entry:
    """A tensor of a file."""

    file: Path
    dtype: torch.dtype | None  # None where it is no floating-point number of 16, 32 or 64 bits
    kind: str  # the dtype's name in the file
    shape: tuple[int, ...]
    offset: int


class Weights:
    """The tensors of a directory with safetensors files, or of one such file.

    Args:
        path: directory of a transformers model (one file, or several with an index) or of a PEFT adapter; or a file.

    Raises:
        FileNotFoundError: there is nothing, or a file of the index is missing.
        ValueError: no safetensors files, or damaged ones.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.folder = self.path if self.path.is_dir() else self.path.parent
        self.files, wanted = self._find()
        found = {name: entry for file in self.files for name, entry in _entries(file)}
        for name, file in wanted.items():
            if name not in found or found[name].file != file:
                raise ValueError(f"{self.path}: expected {name} in {file.name}, as its index says, found none there")
        self.entries: dict[str, Entry] = found  # file by file, in the order of their bytes
        self._open: dict[Path, Any] = {}

    def _find(self) -> tuple[list[Path], dict[str, Path]]:
        if self.path.is_file():
            return [self.path], {}
        if not self.path.is_dir():
            raise FileNotFoundError(
                f"{self.path}: expected a directory with safetensors files or one such file, found none"
            )
        for single in (MODEL, ADAPTER):
            if (self.path / single).is_file():
                return [self.path / single], {}
        index = self.path / f"{MODEL}.index.json"
        if index.is_file():
            where = json.loads(index.read_text())["weight_map"]
            wanted = {name: self.path / file for name, file in where.items()}
            files = sorted(set(wanted.values()))
            for file in files:
                if not file.is_file():
                    raise FileNotFoundError(f"{self.path}: expected {file.name}, as its index says, found no such file")
            return files, wanted
        files = sorted(self.path.glob("*.safetensors"))
        if len(files) != 1:
            others = [f.name for f in sorted(self.path.iterdir()) if f.suffix in _OTHER_WEIGHTS][:3]
            raise ValueError(
                f"{self.path}: expected {MODEL}, {MODEL}.index.json or {ADAPTER}, found {', '.join(others) or 'no weights'}; "
                "save the model with transformers' save_pretrained"
            )
        return files, {}

    @property
    def config(self) -> dict[str, Any]:
        """What stands in `config.json` or, beside an adapter, `adapter_config.json`; nothing where there is none."""
        if self.path.is_dir():
            for name in ("adapter_config.json", "config.json") if self.is_adapter else ("config.json",):
                if (self.folder / name).is_file():
                    return json.loads((self.folder / name).read_text())
        return {}

    @property
    def is_adapter(self) -> bool:
        return self.files[0].name == ADAPTER

    def read(self, name: str, at: int | None = None, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """A tensor as stored; or slice `at` of a stack of matrices, some rows or columns of a matrix."""
        entry = self.entries[name]
        if entry.file not in self._open:
            self._open[entry.file] = safe_open(entry.file, framework="pt")
        file = self._open[entry.file]
        if at is not None:
            return file.get_slice(name)[at : at + 1, rows, columns][0]
        if rows == columns == slice(None):
            return file.get_tensor(name)
        return file.get_slice(name)[rows] if columns == slice(None) else file.get_slice(name)[rows, columns]


def _entries(file: Path) -> list[tuple[str, Entry]]:
    try:
        with safe_open(file, framework="pt"):
            pass  # checks that offsets and sizes fit
        with open(file, "rb") as raw:
            (size,) = struct.unpack("<Q", raw.read(8))
            header = json.loads(raw.read(size))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise ValueError(f"{file}: expected a safetensors file, found a damaged or truncated one ({error})") from error
    header.pop("__metadata__", None)
    entries = [
        (name, Entry(file, DTYPES.get(e["dtype"]), e["dtype"], tuple(e["shape"]), 8 + size + e["data_offsets"][0]))
        for name, e in header.items()
    ]
    return sorted(entries, key=lambda item: item[1].offset)


class Copy:
    """A copy of some weights under way, whose tensors may be changed. Made by :func:`copied`."""

    def __init__(self, template: Weights, folder: Path):
        self._template, self._folder = template, folder
        self._file: tuple[Path, BinaryIO] | None = None

    def write(
        self, name: str, values: Tensor, at: int | None = None, rows: slice = slice(None), columns: slice = slice(None)
    ) -> None:
        """Puts numbers of the tensor's own dtype where :meth:`Weights.read` finds them."""
        entry = self._template.entries[name]
        file, size = self._handle(entry.file), values.element_size()
        whole, inner = flattened(entry.shape if at is None else entry.shape[1:])
        first, last, _ = rows.indices(whole)
        left, right, _ = columns.indices(inner)
        start = entry.offset + size * ((at or 0) * whole * inner + first * inner + left)
        if right - left == inner:
            file.seek(start)
            file.write(bytes_of(values.cpu()))
            return
        for row, numbers in enumerate(values.cpu().reshape(last - first, right - left)):
            file.seek(start + size * row * inner)
            file.write(bytes_of(numbers))

    def _handle(self, path: Path) -> BinaryIO:
        if self._file is None or self._file[0] != path:
            self.close()
            self._file = path, open(self._folder / path.name, "rb+")  # noqa: SIM115
        return self._file[1]

    def close(self) -> None:
        """Writes out what is under way."""
        if self._file is not None:
            (_, file), self._file = self._file, None
            with file:
                file.flush()
                os.fsync(file.fileno())


def flattened(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor, flattened to `[shape[0], rest]`."""
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


@contextmanager
def copied(template: Weights, out: Path | str) -> Iterator[tuple[Copy, list[str]]]:
    """A directory like the template's: its weights, to be changed inside the context, and all other files but foreign weights.

    It is made beside `out` under a temporary name and renamed at the end; an error leaves nothing behind.

    Yields:
        The copy, and the names of files that were left out because they may hold weights of another format.

    Raises:
        FileExistsError: `out` is there and not empty.
        OSError: the directory or the disk refuses, with what to do.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(
            f"{out}: expected a new or empty directory, found one with files in it; choose another --out"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(".tmp", f".{out.name}.", out.parent, ignore_cleanup_errors=True) as temporary:
            folder = Path(temporary) / "copy"
            folder.mkdir()
            for file in template.files:
                shutil.copyfile(file, folder / file.name)
            copy, left_out = Copy(template, folder), _copy_others(template, folder)
            yield copy, left_out
            copy.close()
            folder.replace(out)
    except OSError as error:
        message = f"could not write {out}: {error}; nothing was left behind; free space or choose another directory"
        raise OSError(message) from error


def _copy_others(template: Weights, folder: Path) -> list[str]:
    if not template.path.is_dir():
        return []
    ours, left_out = {file.name for file in template.files}, []
    for path in sorted(template.folder.iterdir()):
        if path.name in ours:
            continue
        files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
        if any(f.suffix in _OTHER_WEIGHTS for f in files):
            left_out.append(path.name)
        elif path.is_file():
            shutil.copyfile(path, folder / path.name)
        else:
            shutil.copytree(path, folder / path.name)
    return left_out


def check_same(start: Weights, end: Weights, same: Mapping[str, str]) -> None:
    """Refuses two checkpoints whose tensors differ in names or shapes, naming the first difference.

    Args:
        same: names of tied tensors, each with that of another that is equal to it by the model's configuration.
    """
    for name in [*start.entries, *end.entries]:
        found = [w.entries.get(name) or w.entries.get(same.get(name, "")) for w in (start, end)]
        if any(e is None for e in found) or found[0].shape != found[1].shape:  # type: ignore[union-attr]
            a, b = ("absent" if e is None else str(list(e.shape)) for e in found)
            raise ValueError(
                f"{end.path}: expected the tensors of {start.path}, found {name} {b} where that has {a}; both have to be "
                "checkpoints of one model, saved the same way"
            )
