"""`make gpu-check`: is this package right and fast on my GPU? Tests on the device, then the benchmark, then one report.

`python -m carerl_kernels.bench.gpu_check` does the same. Without a GPU it says so and exits with 2, with failing tests or
wrong results with 1. The file gpu-check.json holds everything; `--show FILE` prints one again.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .._files import write_json
from .gpu import NoGpu, device_or_raise, run_gpu

NO_GPU, FAILED = 2, 1
ON_DEVICE = re.compile(r"pytest\.mark\.gpu|def test_\w+\(op\b")
WORKERS = 8  # test processes beside each other on one GPU


def run_tests(directory: Path) -> dict[str, Any]:
    """Those tests of the checkout that run on a GPU (emulation is not its business): numbers and names of what failed."""
    files = [str(path) for path in sorted(directory.rglob("test_*.py")) if ON_DEVICE.search(path.read_text())]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-k", "not emulat", "-q", "-rfE", "-p", "no:cacheprovider"]
    command += ["-n", str(min(os.cpu_count() or 1, WORKERS))] if importlib.util.find_spec("xdist") else []
    child = subprocess.run([*command, *files], capture_output=True, text=True, cwd=directory.parent)
    return {"exit": child.returncode, **summary(child.stdout)}


def summary(output: str) -> dict[str, Any]:
    """Counts and failed tests from what pytest printed."""
    last = next((line for line in reversed(output.splitlines()) if re.search(r"\d+ (passed|failed|error)", line)), "")
    counts = {
        name: int(found.group(1)) if (found := re.search(rf"(\d+) {name.rstrip('s')}", last)) else 0
        for name in ("passed", "failed", "errors", "skipped")
    }
    failed = [line.split()[1] for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return {**counts, "failures": failed}


def run_backend(backend: str, competing: bool) -> dict[str, Any]:
    """The benchmark in a process of its own, with one backend forced; `competing`: others are timed, too."""
    code = "import json, sys; from carerl_kernels.bench.gpu import run_gpu\n"
    code += "say = lambda text: print(text, file=sys.stderr, flush=True)\n"
    code += f"json.dump(run_gpu(say=say, competing={competing}), sys.stdout)"
    environment = os.environ | {"CARERL_BACKEND": backend}
    child = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    if child.returncode:
        return {"error": f"the benchmark of {backend} exited with {child.returncode}"}
    return json.loads(child.stdout)


def problems(report: Mapping[str, Any]) -> list[str]:
    """What is wrong with a report; empty if nothing is."""
    found = []
    tests = report["tests"]
    if tests is None:
        found.append("the tests were not run")
    elif tests["exit"] != 0 or tests["failed"] or tests["errors"] or not tests["passed"]:
        found.append(f"tests: {tests['passed']} passed, {tests['failed']} failed, {tests['errors']} errors")
    for backend, run in report["runs"].items():
        if "error" in run:
            found.append(run["error"])
        found += [f"{backend}: {result['wrong']}" for result in run.get("results", ()) if result["wrong"]]
    return found


def render(report: Mapping[str, Any]) -> str:
    """A report as Markdown, for a terminal or an issue."""
    lines = ["# GPU check", ""]
    tests = report["tests"]
    if tests is None:
        lines.append("Tests: not run (no checkout).")
    else:
        lines.append(
            f"Tests on the device: {tests['passed']} passed, {tests['failed']} failed, {tests['errors']} errors, "
            f"{tests['skipped']} skipped."
        )
        lines += [f"- {name}" for name in tests["failures"]]
    for backend, run in report["runs"].items():
        lines += ["", f"## {backend}", ""]
        if "error" in run:
            lines.append(run["error"])
            continue
        device, rates = run["device"], run["bandwidth"]
        versions = ", ".join(
            f"{name} {device[name]}" for name in ("torch", "cuda", "hip", "triton") if device.get(name)
        )
        lines += [
            f"{device['name']} (capability {device['capability']}), {versions}; copy {rates['copy_gbps']:.0f} GB/s, "
            f"read {rates['read_gbps']:.0f} GB/s.",
            "",
            "| case | served by | ms [quartiles] | GB/s | % of copy | predicted ms | by data sheet | fastest other |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [_row(result, run["serves"]) for result in run["results"]]
    wrong = problems(report)
    lines += ["", "Nothing is wrong." if not wrong else "Wrong:", *(f"- {problem}" for problem in wrong)]
    return "\n".join(lines)


def _row(result: Mapping[str, Any], serves: Mapping[str, str]) -> str:
    if result["wrong"]:
        return f"| {result['case']} | {serves[result['op']]} | WRONG | | | | |"
    low, median, high = result["ms"]
    sheet = "" if result["data_sheet_ms"] is None else f"{result['data_sheet_ms']:.3g}"
    took = {name: ms for name, ms in result.get("others", {}).items() if isinstance(ms, float)}
    other = min(took, key=took.__getitem__, default="")
    rival = f"{other} {took[other]:.3g} ms, {took[other] / median:.1f} x" if other else ""
    return (
        f"| {result['case']} | {serves[result['op']]} | {median:.3g} [{low:.3g}, {high:.3g}] | {result['gbps']:.0f} "
        f"| {result['percent_of_copy']:.0f} | {result['predicted_ms']:.3g} | {sheet} | {rival} |"
    )


def check(
    json_path: Annotated[Path, typer.Option("--json", help="File to attach to a report.")] = Path("gpu-check.json"),
    tests: Annotated[Path | None, typer.Option(help="Directory of the tests; without it they are not run.")] = None,
    show: Annotated[Path | None, typer.Option(help="Print an earlier gpu-check.json and measure nothing.")] = None,
) -> None:
    """Tests and benchmark of the ops on this machine's GPU, against what their bytes predict."""
    if show is not None:
        report = json.loads(show.read_text())
    else:
        try:
            device_or_raise()
        except NoGpu as error:
            typer.secho(f"gpu-check: {error}. Nothing was tested or measured.", err=True, fg=typer.colors.RED)
            raise typer.Exit(NO_GPU) from None
        report = {"tests": None if tests is None else run_tests(tests.resolve()), "runs": _runs()}
        write_json(json_path, report)
    typer.echo(render(report))
    if problems(report):
        raise typer.Exit(FAILED)


def _runs() -> dict[str, Any]:
    """Every backend that can serve GPU tensors here, competitors beside the first; the reference where none can."""
    from .. import _load

    can = {name: _load.BACKENDS[name].available for name in ("cuda", "triton")}
    # Beside a CUDA library Triton is not loaded, unless it is asked for as here.
    can["triton"] |= can["cuda"] and importlib.util.find_spec("triton") is not None
    names = [name for name, there in can.items() if there]
    return {name: run_backend(name, name == names[0]) for name in names} or {"reference": run_gpu(say=typer.echo)}


app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
app.command()(check)

if __name__ == "__main__":
    app()
