"""What all commands share: errors as one line, JSON, and sizes as people read them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any

import typer

from ._errors import PlainError

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@contextmanager
def plain_errors(command: str, extra: str, *also: type[Exception], stopped: str | None = None) -> Iterator[None]:
    """Inside, an error that tells the user what to do becomes one line and exit status 1; a bug keeps its traceback.

    Args:
        command: The command's name after `carerl`, for the line.
        extra: The extra of this package that brings what the command imports.
        also: Further types of errors that become one line.
        stopped: What is said when the user interrupts the command; None lets the interruption through.
    """
    plain: tuple[type[Exception], ...] = (ImportError, ValueError, OSError, FloatingPointError, PlainError, *also)
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == __package__:
            raise  # a module of this package is missing: a bug
        message = f"{error.name} is not installed: pip install 'carerl-kernels[{extra}]'"
    except plain as error:
        message = str(error)
    except KeyboardInterrupt:
        if stopped is None:
            raise
        message = stopped
    else:
        return
    typer.secho(f"carerl {command}: {message}", err=True, fg=typer.colors.RED)
    raise typer.Exit(1)


def show_json(data: Any) -> None:
    """Prints what a command found, dataclasses too, for other programs."""
    typer.echo(json.dumps(data, indent=2, default=asdict))


def size(n: int) -> str:
    """A number of bytes as people read it."""
    for unit, whole in (("GB", 1e9), ("MB", 1e6)):
        if n >= whole / 10:
            return f"{n / whole:.2f} {unit}"
    return f"{n / 1e3:.1f} kB"
