"""`carerl basis record`: the input directions of a domain, from a finished model that is shown its prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch


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
    from .subspace import MatrixLayout, observe
    from .subspace.batches import encode, prepared
    from .subspace.sites import guess_sides

    if not domain.strip():
        raise ValueError(f"--domain: expected a name, found {domain!r}")
    if not 0 < energy <= 1:
        raise ValueError(f"--energy: expected 0 < energy <= 1, found {energy}")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {out}: expected a folder to write into, found none at {out.absolute().parent}")
    rows = read_rows(prompts, answer_field if answers == "given" else None)
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
        shown = [
            answered
            for at in range(0, len(shown), batch_size)
            for answered in _answered(model, tokenizer, shown[at : at + batch_size], max_length, max_new_tokens)
        ]
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


def read_rows(path: Path, answer_field: str | None) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines, each with a prompt and, where asked for, an answer.

    Raises:
        FileNotFoundError, ValueError: names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"prompts {path}: expected a file of JSON lines, found none")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: expected a JSON object, found {line[:40]!r} ({error})") from error
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not prompt or not (isinstance(prompt, str) or _is_chat(prompt)):
            raise ValueError(
                f'{path}, line {number}: expected "prompt": a text, or messages with "role" and "content", found {prompt!r}'
            )
        if answer_field is not None and not isinstance(row.get(answer_field), str):
            raise ValueError(
                f"{path}, line {number}: expected a text in {answer_field!r}, found {row.get(answer_field)!r}; name the field "
                "with --answer-field, or choose --answers model"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"prompts {path}: expected at least one row, found none")
    return rows


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, list) and all(
        isinstance(message, dict) and {"role", "content"} <= set(message) for message in prompt
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


@torch.no_grad()
def _answered(
    model: Any, tokenizer: Any, rows: Sequence[list[int]], max_length: int, max_new_tokens: int
) -> Iterator[list[int]]:
    """Prompts with an answer that the model sampled at temperature 1 behind each."""
    room = max_length - 1
    rows = [ids[:room] for ids in rows]
    length = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=model.device)
    new = min(max_new_tokens, max_length - length)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": pad}
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max(new, 1), **options)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends, tokenizer.eos_token_id])
    for row, answer in zip(rows, out[:, length:].tolist(), strict=True):
        stop = next((i + 1 for i, token in enumerate(answer) if token in ends), len(answer))
        yield row + answer[:stop]
