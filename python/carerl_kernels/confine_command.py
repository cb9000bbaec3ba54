"""`carerl confine` and `carerl merge`: the guard on finished checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from ._command import Json, plain_errors, show_json

if TYPE_CHECKING:
    from .guard.changes import Confined

Out = Annotated[Path, typer.Option(help="Directory to write; new, or empty.")]
Room = Annotated[
    float, typer.Option(help="Directions a matrix has at most, all domains together, as a share of its inputs.")
]
Device = Annotated[str, typer.Option(help="That computes: cpu, cuda, cuda:1.")]
START = "Model (a transformers directory, or a safetensors file) before training."


class Several(TyperCommand):
    """Lists of files in one option: `--bases A B` is `--bases A --bases B`; arguments come before such an option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        lists = {name for p in self.params if getattr(p, "multiple", False) for name in p.opts}
        out: list[str] = []
        under: str | None = None  # the list that values belong to
        for text in args:
            if text.startswith("-"):
                under = text if text in lists else None
            elif under is not None and out[-1] != under:
                out.append(under)
            out.append(text)
        return super().parse_args(ctx, out)


def confine(
    start: Annotated[Path, typer.Argument(help=START)],
    end: Annotated[Path, typer.Argument(help="The same after training, or a LoRA adapter of it.")],
    protect: Annotated[list[Path], typer.Option(help="Input bases of the domains to protect.")],
    out: Out,
    bound: Annotated[
        float, typer.Option(help="How far rows may move along a domain, against its recorded stage; 0 where none was.")
    ] = 0.1,
    room: Room = 0.5,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Take out of a finished training run what it changed along protected directions; any trainer, no access to it."""
    with plain_errors("confine", "train"):
        from .guard.checkpoints import confine as confined
        from .subspace import StoredBasis

        result = confined(start, end, [StoredBasis.load(path) for path in protect], out, bound, room, device)
    if as_json:
        return show_json(result)
    typer.echo(
        f"{out}: {end} confined in {result.seconds:.1f} s; {len(result.corrected)} tensors corrected, {result.kept} as they were"
    )
    _show(result)
    _warn(result.left_out, result.warnings)


def merge(
    start: Annotated[Path, typer.Argument(help=START)],
    experts: Annotated[list[str], typer.Argument(help="NAME=END: the same after training on domain NAME.")],
    bases: Annotated[list[Path], typer.Option(help="Input bases of the domains.")],
    out: Out,
    scale: Annotated[float, typer.Option(help="Of the changes that are added.")] = 1.0,
    room: Room = 0.5,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Add up what experts of one start have learned, each change confined off the other domains' directions."""
    with plain_errors("merge", "train"):
        from .guard.checkpoints import merge as merged
        from .subspace import StoredBasis

        result = merged(start, _pairs(experts), [StoredBasis.load(path) for path in bases], out, scale, room, device)
    if as_json:
        return show_json(result)
    typer.echo(f"{out}: {len(result.experts)} experts of {start} merged in {result.seconds:.1f} s")
    for name, part in result.experts.items():
        typer.echo(f"{name} ({part.out})")
        _show(part)
    _warn(result.left_out, result.warnings)


def _pairs(experts: list[str]) -> Mapping[str, Path]:
    out: dict[str, Path] = {}
    for text in experts:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise ValueError(f"experts: expected NAME=END, found {text!r}")
        if name in out:
            raise ValueError(f"experts: expected one checkpoint per domain, found {name!r} twice")
        out[name] = Path(path)
    return out


def _show(part: Confined) -> None:
    from .subspace.matrices import some

    typer.echo(f"  change: norm {part.norm:.4g}, of whose energy {part.remained:.1%} remained")
    for name, share in part.domains.items():
        typer.echo(
            f"  along {name}: {share.before:.2%} of the change before, {share.after:.2%} now; taken out: norm {share.norm:.4g}"
        )
    if part.free:
        typer.echo(
            f"  not covered, moved freely: {part.free:.2%} of the change: {some(['vectors', *part.uncovered], 6)}"
        )


def _warn(left_out: list[str], warnings: list[str]) -> None:
    if left_out:
        warnings = [
            *warnings,
            f"not copied, because they may hold weights, which were not confined: {', '.join(left_out)}",
        ]
    for text in warnings:
        typer.secho(f"warning: {text}", err=True, fg=typer.colors.YELLOW)
