"""`carerl score`."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .._command import plain_errors

VERIFIERS = ("exact", "math", "code", "instructions")


def score(
    source: Annotated[Path, typer.Option("--input", help='JSON lines with "prompt", "response" and maybe "answer".')],
    target: Annotated[Path, typer.Option("--output", help="The same rows with rewards; resumed if it is there.")],
    url: Annotated[str | None, typer.Option(help="Judge: OpenAI-compatible endpoint, up to and including /v1.")] = None,
    model: Annotated[str | None, typer.Option(help="Judge: name of the endpoint's model.")] = None,
    writer_model: Annotated[
        str | None, typer.Option(help="Model that writes protocols; the judge's by default.")
    ] = None,
    local: Annotated[str | None, typer.Option(help="Judge: transformers model (directory or name) run here.")] = None,
    verifier: Annotated[str | None, typer.Option(help="No judge but exact, math, code or instructions.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Protocols and verdicts; OUTPUT.judge.sqlite by default.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight, or rows at once.")] = 64,
    timeout: Annotated[float, typer.Option(help="Seconds for one request.")] = 120.0,
    scale: Annotated[int, typer.Option(min=1, max=9, help="Highest level of a criterion.")] = 4,
    calibration: Annotated[str, typer.Option(help="scale or anchors.")] = "scale",
    on_signs: Annotated[str, typer.Option(help="Attempts to steer the judge: lower, zero or note.")] = "lower",
    rejudge: Annotated[
        float, typer.Option(min=0, max=1, help="Share judged twice, to measure the judge's noise.")
    ] = 0.0,
    strip_reasoning: Annotated[bool, typer.Option(help="Score what stands after a reasoning trace.")] = True,
    price: Annotated[tuple[float, float], typer.Option(help="Per million prompt and completion tokens.")] = (0.0, 0.0),
    trace: Annotated[bool, typer.Option(help="Keep protocol and verdict in the output.")] = True,
) -> None:
    """Rewards for a file of prompts and responses. Stop it any time; the same command goes on where it was."""
    with plain_errors("score", "judge", RuntimeError, stopped="stopped; the same command goes on from here"):
        chosen = [name for name, value in (("--url", url), ("--local", local), ("--verifier", verifier)) if value]
        if len(chosen) != 1:
            raise ValueError(f"expected one of --url, --local and --verifier, found {' and '.join(chosen) or 'none'}")
        from .score import JudgeRows, RowScorer, VerifierRows, score_file

        rows: RowScorer
        if verifier:
            rows = VerifierRows(
                verifier,
                _verifier(verifier, strip_reasoning),
                threads=min(concurrency, 8),
                strip_reasoning=strip_reasoning,
            )
        else:
            from .pa_grm import Endpoint, Limits, LocalModel, Scorer

            judge: Any
            writer: Any = None
            if url:
                if not model:
                    raise ValueError("--url needs --model, the name under which the endpoint serves it")
                settings: dict[str, Any] = {"max_in_flight": concurrency, "timeout": timeout, "price": price}
                judge = Endpoint(url, model, **settings)
                writer = Endpoint(url, writer_model, **settings) if writer_model else None
            else:
                judge = LocalModel(*_local(str(local)), name=local, batch_size=min(concurrency, 8))
            rows = JudgeRows(
                Scorer(
                    judge,
                    writer=writer,
                    cache=str(cache or target.with_name(target.name + ".judge.sqlite")),
                    limits=Limits(scale=scale),
                    calibration=calibration,  # type: ignore[arg-type]
                    on_signs=on_signs,  # type: ignore[arg-type]
                    rejudge=rejudge,
                    strip_reasoning=strip_reasoning,
                ),
                trace,
            )
        report = _with_bar(lambda progress: score_file(source, target, rows, progress), rows)
    mean = "none with a reward" if math.isnan(report.mean) else f"mean reward {report.mean:.3f}"
    typer.echo(f"{report.rows} rows, {report.asked} scored now, {mean} -> {target}")
    for line in rows.summary():
        typer.echo(line)
    for reason, count in report.excluded.items():
        typer.echo(f"{count} without a reward: {reason}")


def _verifier(name: str, strip_reasoning: bool) -> Any:
    from . import verifiers

    if name == "exact":
        return partial(verifiers.exact_match, strip_reasoning=strip_reasoning)
    if name == "math":
        return verifiers.MathMatch(strip_reasoning=strip_reasoning)
    if name == "code":
        return verifiers.CodeTests(strip_reasoning=strip_reasoning)
    if name == "instructions":
        reward: Any = partial(verifiers.instructions_followed, strip_reasoning=strip_reasoning)
        reward.check = verifiers.instructions_followed.check  # type: ignore[attr-defined]
        return reward
    raise ValueError(f"expected --verifier {', '.join(VERIFIERS)}, found {name!r}")


def _local(name: str) -> tuple[Any, Any]:
    """Model and tokenizer from a directory or by name; "smollm2" is the one that installs as a package."""
    if name == "smollm2":
        from ..tasks.smollm2 import load_smollm2

        return load_smollm2()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)


def _with_bar(work: Any, rows: Any) -> Any:
    """Runs `work(progress)` under a progress bar with reward, exclusions and cost so far."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    rewards: list[float] = []
    excluded = 0
    with Progress(TextColumn("scoring"), *columns, transient=True) as bar:
        task = bar.add_task("score", total=None, note="")

        def progress(done: int, total: int, result: dict[str, Any]) -> None:
            nonlocal excluded
            if result["reward"] is None:
                excluded += 1
            else:
                rewards.append(result["reward"])
            note = f"reward {sum(rewards) / len(rewards):.3f}" if rewards else ""
            note += f"  {excluded} excluded" if excluded else ""
            scorer = getattr(rows, "scorer", None)
            note += f"  {scorer.usage()}" if scorer is not None else ""
            bar.update(task, completed=done, total=total, note=note)

        return work(progress)
