"""`carerl basis record`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ._command import Json, plain_errors, show_json, size
from ._rows import read_rows


def record(
    model: Annotated[Path, typer.Argument(help="Folder of the model (transformers), with its tokenizer.")],
    prompts: Annotated[
        Path,
        typer.Option(
            help='JSON lines with "prompt": chat messages, or a text, which a user says where there is a chat template.'
        ),
    ],
    domain: Annotated[str, typer.Option(help="Name of the domain.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
    answers: Annotated[
        Literal["model", "given", "none"],
        typer.Option(help="What follows a prompt: the model's own sample, the row's answer, nothing."),
    ] = "model",
    answer_field: Annotated[str, typer.Option(help="Where a row has its answer.")] = "answer",
    max_length: Annotated[
        int, typer.Option(min=2, help="Tokens of prompt and answer; the end of longer ones is cut.")
    ] = 512,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer of the model's own.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 8,
    r: Annotated[int, typer.Option(min=1, help="Directions per weight matrix, at most.")] = 32,
    energy: Annotated[float, typer.Option(help="Of them as few as hold this share of the inputs' energy.")] = 0.9,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the model.")] = "float32",
    device: Annotated[str, typer.Option(help="Where the model runs.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of the model's own answers.")] = 0,
    as_json: Json = False,
) -> None:
    """Record the input directions of a domain from a finished model: shown prompts, it needs no training."""
    with plain_errors("basis record", "train"):
        import torch

        from .grpo.sampling import sample
        from .subspace import MatrixLayout, observe
        from .subspace.batches import prepared
        from .subspace.sites import guess_sides
        from .text import encode_prompts, special_tokens

        if not domain.strip():
            raise ValueError(f"--domain: expected a name, found {domain!r}")
        if not 0 < energy <= 1:
            raise ValueError(f"--energy: expected 0 < energy <= 1, found {energy}")
        if not out.absolute().parent.is_dir():
            raise FileNotFoundError(
                f"--out {out}: expected a folder to write into, found none at {out.absolute().parent}"
            )
        check = partial(_check_answer, field=answer_field) if answers == "given" else None
        rows = list(read_rows(prompts, ("prompt",), check))
        if not rows:
            raise ValueError(f"prompts {prompts}: expected at least one row, found none")
        network, tokenizer = load(model, dtype, device)
        asked = [row["prompt"] for row in rows]
        if getattr(tokenizer, "chat_template", None):
            asked = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in asked]
        shown = encode_prompts(tokenizer, asked)
        if answers == "given":
            end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            shown = [
                ids + tokenizer(row[answer_field], add_special_tokens=False)["input_ids"] + end
                for ids, row in zip(shown, rows, strict=True)
            ]
        elif answers == "model":
            torch.manual_seed(seed)
            tokens, begun = special_tokens(tokenizer, network), [ids[: max_length - 1] for ids in shown]
            shown = []
            for at in range(0, len(begun), batch_size):
                part = begun[at : at + batch_size]
                length = min(max_new_tokens, max_length - min(map(len, part)))
                written = sample(network, part, tokens, max_new_tokens=length).completions()
                shown += [ids + answer for ids, answer in zip(part, written, strict=True)]
        shown = [ids[:max_length] for ids in shown]
        named = list(network.named_parameters())
        parameters = [p.detach() for _, p in named]
        layout = MatrixLayout.of(named, "input", r, None, guess_sides(network, named))
        moments = observe(network, list(prepared(({"input_ids": ids} for ids in shown), tokenizer, batch_size)), layout)
        layout = moments.layout(layout, parameters)
        basis = moments.basis(layout, domain, energy=energy, architecture=type(network).__name__, parameters=parameters)
        basis.save(out)
    ranks = [int((values > 0).sum()) for values in basis.values.values()]
    found = {
        "prompts": len(rows),
        "tokens": sum(map(len, shown)),
        "matrices": len(ranks),
        "idle": ranks.count(0),
        "covered": layout.covered / layout.parameters,
        "mean_rank": sum(ranks) / len(ranks),
        "energy": basis.info.gradient_capture,
    }
    if as_json:
        return show_json(found)
    typer.echo(
        f"{out}: domain {domain}, {size(out.stat().st_size)}, from {found['prompts']} prompts ({found['tokens']:,} tokens)"
    )
    typer.echo(
        f"  covers {found['covered']:.1%} of the parameters in {found['matrices']} matrices; {found['mean_rank']:.1f} directions "
        f"each (at most {r}) hold {found['energy']:.1%} of the inputs' energy"
    )
    if found["idle"]:
        typer.echo(f"  {found['idle']} experts had no token routed to them: nothing protects them")


def _check_answer(row: dict[str, Any], field: str) -> None:
    if not isinstance(row.get(field), str):
        raise ValueError(
            f"expected a text in {field!r}, found {row.get(field)!r}; name the field with --answer-field, or choose "
            "--answers model"
        )


def load(folder: Path, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """Model, without dropout, and tokenizer of a folder.

    Raises:
        FileNotFoundError, ValueError: There is none that loads, or no such device; says so under the option's name.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"model {folder}: expected a folder of transformers' with a config.json, found none")
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: expected a device that is there, found {device!r} ({error})") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=dtype)
    except Exception as error:  # whatever a damaged folder makes transformers raise
        raise ValueError(f"model {folder}: expected a model and a tokenizer that load, found {error}") from error
    return model.to(where).eval(), tokenizer
