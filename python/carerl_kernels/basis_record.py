"""`carerl basis record`: the input directions of a domain, from a finished model that is shown its prompts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from ._rows import read_rows


def record(
    folder: Path,
    prompts: Path,
    domain: str,
    out: Path,
    *,
    answers: str,
    answer_field: str,
    max_length: int,
    max_new_tokens: int,
    batch_size: int,
    r: int,
    energy: float,
    dtype: str,
    device: str,
    seed: int,
) -> dict[str, Any]:
    """Writes the basis file; see the command for the arguments.

    Returns:
        Numbers of prompts, tokens, matrices and idle experts; shares covered and held; mean number of directions.

    Raises:
        ValueError, OSError: files that are not as expected, or cannot be read or written; nothing is left half-written.
    """
    from .grpo.sampling import sample
    from .subspace import MatrixLayout, observe
    from .subspace.batches import encode, prepared
    from .subspace.sites import guess_sides
    from .text import special_tokens

    if not domain.strip():
        raise ValueError(f"--domain: expected a name, found {domain!r}")
    if not 0 < energy <= 1:
        raise ValueError(f"--energy: expected 0 < energy <= 1, found {energy}")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {out}: expected a folder to write into, found none at {out.absolute().parent}")
    check = partial(_check_answer, field=answer_field) if answers == "given" else None
    rows = list(read_rows(prompts, ("prompt",), check))
    if not rows:
        raise ValueError(f"prompts {prompts}: expected at least one row, found none")
    model, tokenizer = _load(folder, dtype, device)
    shown = [encode(tokenizer, row["prompt"]) for row in rows]
    if answers == "given":
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        shown = [
            ids + tokenizer(row[answer_field], add_special_tokens=False)["input_ids"] + end
            for ids, row in zip(shown, rows, strict=True)
        ]
    elif answers == "model":
        torch.manual_seed(seed)
        tokens, asked = special_tokens(tokenizer, model), [ids[: max_length - 1] for ids in shown]
        shown = []
        for at in range(0, len(asked), batch_size):
            part = asked[at : at + batch_size]
            written = sample(model, part, tokens, max_new_tokens=min(max_new_tokens, max_length - min(map(len, part))))
            shown += [ids + answer for ids, answer in zip(part, written.completions(), strict=True)]
    shown = [ids[:max_length] for ids in shown]
    named = list(model.named_parameters())
    parameters = [p.detach() for _, p in named]
    layout = MatrixLayout.of(named, "input", r, None, guess_sides(model, named))
    batches = list(prepared(({"input_ids": ids} for ids in shown), tokenizer, batch_size))
    moments = observe(model, batches, layout)
    layout = moments.layout(layout, parameters)
    basis = moments.basis(layout, domain, energy=energy, architecture=type(model).__name__, parameters=parameters)
    basis.save(out)
    ranks = [int((values > 0).sum()) for values in basis.values.values()]
    return {
        "prompts": len(rows),
        "tokens": sum(map(len, shown)),
        "matrices": len(ranks),
        "idle": len(moments.idle),
        "covered": layout.covered / layout.parameters,
        "mean_rank": sum(ranks) / len(ranks),
        "energy": basis.info.gradient_capture,
    }


def _check_answer(row: dict[str, Any], field: str) -> None:
    if not isinstance(row.get(field), str):
        raise ValueError(
            f"expected a text in {field!r}, found {row.get(field)!r}; name the field with --answer-field, or choose "
            "--answers model"
        )


def _load(folder: Path, dtype: str, device: str) -> tuple[Any, Any]:
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
        model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=getattr(torch, dtype))
    except Exception as error:  # whatever a damaged folder makes transformers raise
        raise ValueError(f"model {folder}: expected a model and a tokenizer that load, found {error}") from error
    return model.to(where).eval(), tokenizer
