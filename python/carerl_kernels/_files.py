"""Writing files so that a crash or a full disk never leaves half of one, and JSON that every reader takes."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def write_atomically(path: Path | str, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file beside `path`, flushes it to disk and renames it into place.

    Raises:
        OSError: with the path and what to do, when the directory or the disk refuses; an older file stays as it was.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~umask())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except Exception as error:
        # safetensors reports a full disk as its own exception type; users should see one kind of error.
        kept = "the file that was there is unchanged" if path.exists() else "no file was left behind"
        raise OSError(f"could not write {path}: {error}; {kept}; free space or choose another directory") from error


def check_writable(path: Path | str) -> None:
    """Makes the folder of a file that is written at the end of long work, and tries it.

    Raises:
        OSError: no file can be made there.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise OSError(
            f"{path}: expected a folder that can be written into, found {error}; choose another path"
        ) from error


def write_bytes_atomically(path: Path | str, data: bytes) -> None:
    """Replaces a file's content in one step: readers see the old or the new."""
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def write_json(
    path: Path | str, data: Any, default: Callable[[Any], Any] | None = None, indent: int | None = 2
) -> None:
    """Replaces a file by JSON; `default` and `indent` as for `json.dumps`."""
    write_bytes_atomically(path, (json.dumps(data, indent=indent, default=default) + "\n").encode())


def json_line(value: Any) -> str:
    """One line of JSON; a non-finite number is written as null (JSON has none)."""
    return json.dumps(_finite(value)) + "\n"


def lines_up_to(path: Path, step: int) -> list[dict[str, Any]]:
    """Lines of a metrics file up to a step, and up to one that an interruption cut short."""
    kept: list[dict[str, Any]] = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            break
        if line["step"] > step:
            break
        kept.append(line)
    return kept


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def umask() -> int:
    """The process's file mode creation mask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
