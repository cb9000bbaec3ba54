"""`carerl basis`: record, look at basis files, test them against a model, merge, quantise, and plan what a kind would cost."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer

from ._command import Json, plain_errors, show_json, size
from ._rows import read_rows
from .basis_record import load, record
from .subspace.layout import Kind, RowKind

basis = typer.Typer(
    help="Basis files: record, inspect, validate, merge, quantize; plan what a kind costs.", no_args_is_help=True
)

Storages = Literal["float32", "bfloat16", "float16", "int8", "float8_e4m3fn"]


@basis.command()
def inspect(files: Annotated[list[Path], typer.Argument(help="Basis files.")], as_json: Json = False) -> None:
    """What stands in basis files, and whether their stages chain: each starts where another ended."""
    with plain_errors("basis inspect", "train"):
        facts = [_facts(path) for path in files]
    ends = {fact["end_hash"] for fact in facts}
    for fact in facts:
        fact["follows"] = [f["domain"] for f in facts if f["end_hash"] == fact["start_hash"] and f is not fact]
        fact["chained"] = fact["start_hash"] in ends
    if as_json:
        return show_json(facts)
    for fact in facts:
        typer.echo(f"{fact['file']}: domain {fact['domain']}, {fact['kind']}, k = {fact['k']}, {fact['dtype']}")
        typer.echo(
            f"  {size(fact['bytes'])} over {fact['parameters']:,} parameters in {fact['tensors']} tensors of "
            f"{fact['architecture']}"
        )
        captured = fact["gradient_capture"]
        of = "inputs" if fact["kind"] == "input" else "gradients"
        energy = "" if captured is None else f"{captured:.1%} of the {of}' energy, "
        moved = fact["displacement_capture"]
        change = "no stage: shown prompts" if moved is None else f"{moved:.1%} of the stage's change"
        typer.echo(f"  holds {energy}{change}; {fact['steps']} {'batches' if moved is None else 'steps'} seen")
        typer.echo(f"  orthonormal to {fact['orthonormality']:.1e}")
        after = f", follows {', '.join(fact['follows'])}" if fact["follows"] else ""
        typer.echo(f"  start {fact['start_hash'] or '-'}, end {fact['end_hash'] or '-'}{after}")


def _facts(path: Path) -> dict[str, Any]:
    from .subspace import DomainBasis, StoredBasis

    stored = StoredBasis.load(path)
    info = asdict(stored.info)
    names, shapes = info.pop("names"), info.pop("shapes")
    if isinstance(stored, DomainBasis):
        dtype = str(stored.directions.dtype)
        error = _orthonormality(stored)
    else:
        factors = [*stored.left.values(), *stored.right.values()]
        dtype = str(factors[0].dtype)
        error = max(_deviation(f.double().mT @ f.double()) for f in factors)
    return {
        "file": str(path),
        **info,
        "dtype": dtype.removeprefix("torch."),
        "tensors": len(names),
        "parameters": sum(prod(s) for s in shapes),
        "bytes": path.stat().st_size,
        "orthonormality": error,
    }


def _deviation(gram: Any) -> float:
    """Largest deviation of Gram matrices from the identity, empty slots aside."""
    import torch

    present = torch.diag_embed((gram.diagonal(dim1=-2, dim2=-1) > 0.5).double())
    return float((gram - present).abs().max())


def _orthonormality(stored: Any) -> float:
    """Largest deviation of a flat basis from orthonormality: of `U U^T` over each row of coefficients, from the identity."""
    import torch

    from .subspace.merge import segments_of

    rows = stored.dequantized().directions
    T, k = stored.singular_values.shape[0], rows.shape[0]
    gram = torch.zeros(T, k, k, dtype=torch.float64)
    for row, columns in segments_of(stored):
        part = rows[:, columns].double()
        gram[row] += part @ part.mT
    return _deviation(gram)


@basis.command()
def quantize(
    file: Annotated[Path, typer.Argument(help="Basis file.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
) -> None:
    """Store a basis in fewer bytes: int8 blocks for flat and per-matrix ones, bfloat16 factors for block and input."""
    from .subspace import StoredBasis

    with plain_errors("basis quantize", "train"):
        StoredBasis.load(file).quantized().save(out)
        typer.echo(f"{out}: {size(out.stat().st_size)}, was {size(file.stat().st_size)}")


@basis.command()
def merge(
    files: Annotated[list[Path], typer.Argument(help="Basis files of one model and kind, oldest first.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
    domain: Annotated[str | None, typer.Option(help="Name of the result; the names joined by + by default.")] = None,
    k: Annotated[
        int | None, typer.Option(min=1, help="Directions, or rank; that of the first file by default.")
    ] = None,
) -> None:
    """Compress several domains into one basis. What is given up is printed: compressed history protects less."""
    from .subspace import StoredBasis
    from .subspace.merge import merge as merged

    with plain_errors("basis merge", "train"):
        bases = [StoredBasis.load(path) for path in files]
        result = merged(bases, domain or "+".join(b.info.domain for b in bases), k)
        result.save(out)
        moved = result.info.displacement_capture
        holds = "" if moved is None else f", holds {moved:.1%} of the stages' changes"
        typer.echo(f"{out}: domain {result.info.domain}, {size(out.stat().st_size)}{holds}")


@basis.command()
def validate(
    file: Annotated[Path, typer.Argument(help="Basis file.")],
    model: Annotated[Path, typer.Option(help="Folder of the model (transformers), with its tokenizer.")],
    prompts: Annotated[Path, typer.Option(help='JSON lines with "prompt" and "answer": the domain, fresh.')],
    batch: Annotated[int, typer.Option(min=1, help="Prompts per gradient.")] = 4,
    gradients: Annotated[int, typer.Option(min=3, help="Gradients to draw at most.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the random directions.")] = 0,
    as_json: Json = False,
) -> None:
    """Does a basis explain fresh gradients of its domain better than random directions? Similar is not functional."""
    with plain_errors("basis validate", "train"):
        from .guard.validate import validate as validated
        from .logprobs import answer_loss
        from .subspace import StoredBasis
        from .task import Example
        from .text import special_tokens

        stored = StoredBasis.load(file)
        rows = read_rows(prompts, ("prompt", "answer"))
        examples = [Example(row["prompt"], answer=str(row["answer"])) for row in rows]
        network, tokenizer = load(model)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in stored.info.names)
        tokens = special_tokens(tokenizer, network)
        batches = [examples[i : i + batch] for i in range(0, len(examples) - batch + 1, batch)][:gradients]
        losses = [partial(answer_loss, network, tokenizer, part, tokens) for part in batches]
        result = validated(stored, network, losses, seed)
    if as_json:
        return show_json(result)
    typer.echo(
        f"{file}: explains {result.explained:.2%} of {result.gradients} fresh gradients of {result.domain} "
        f"(95 % interval {result.low:.2%} to {result.high:.2%})"
    )
    typer.echo(f"  random directions of equal number: {result.random:.2%}; verdict: {result.verdict}")


basis.command()(record)


@basis.command()
def plan(
    config: Annotated[Path, typer.Argument(help="A transformers config.json, or a folder with one.")],
    kind: Annotated[Kind | None, typer.Option(help="Kind of basis; all of them by default.")] = None,
    domains: Annotated[int, typer.Option(min=1, help="Domains with history.")] = 3,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank of block and input bases; by default the guard's, 16 and 32.")
    ] = None,
    k: Annotated[
        int | None, typer.Option(min=1, help="Directions of flat and per-matrix bases; 64 by default, as the guard's.")
    ] = None,
    world_size: Annotated[int, typer.Option(min=1, help="GPUs that share the parameters (FSDP2).")] = 1,
    dtype: Annotated[Storages, typer.Option(help="Storage of flat and per-matrix directions.")] = "bfloat16",
    bandwidth: Annotated[float, typer.Option(min=1.0, help="Attained memory bandwidth per GPU, GB/s.")] = 2000.0,
    tflops: Annotated[float, typer.Option(min=0.001, help="Attained float32 matmul rate per GPU, TFLOP/s.")] = 30.0,
    as_json: Json = False,
) -> None:
    """Memory and time per GPU of a guard over full fine-tuning of a model, from its config alone, in seconds."""
    with plain_errors("basis plan", "train"):
        import torch

        from .subspace.kinds import KINDS
        from .subspace.plan import model_of
        from .subspace.plan import plan as planned

        network = model_of(config)
        asked = {"k": k, "r": rank}
        plans = [
            planned(
                network,
                one,
                asked[KINDS[one].rank] or KINDS[one].default,
                domains,
                world_size,
                getattr(torch, dtype),
                bandwidth=bandwidth * 1e9,
                flops=tflops * 1e12,
            )
            for one in (get_args(Kind) if kind is None else (kind,))
        ]
    if as_json:
        return show_json([p.as_dict() for p in plans])
    first = plans[0]
    typer.echo(
        f"{type(network).__name__}, {first.parameters / 1e9:.2f}e9 parameters; {domains} domains on {world_size} GPU"
        f"{'s' if world_size > 1 else ''}; per GPU:"
    )
    typer.echo(
        f"{'basis':<22}{'directions':>12}{'cores':>10}{'state':>10}{'recording':>11}{'total':>10}{'step':>10}"
        f"{'summed':>10}{'covered':>9}"
    )
    for p in plans:
        stored = f" {p.dtype}" if p.kind in get_args(RowKind) else ""
        typer.echo(
            f"{f'{p.kind} {p.k}{stored}':<22}{size(p.directions):>12}{size(p.cores):>10}{size(p.state):>10}"
            f"{size(p.recording):>11}{size(p.total):>10}{p.seconds * 1e3:>7.0f} ms{p.communicated:>10,}"
            f"{p.covered / p.parameters:>9.1%}"
        )
    typer.echo(
        "directions: of all domains. cores: overlaps and frames. state: rule memory. recording: on top, during a stage.\n"
        f"step: an acting step at {bandwidth:.0f} GB/s and {tflops:.0f} TFLOP/s. summed: numbers all-reduced by it. A stage "
        f"keeps {size(first.start)} per GPU on disk."
    )
