"""Who may import whom: arrows between the rooms of the package point downwards, and no two modules import each other. And
which files an op has.

Imports inside functions count. Those under `TYPE_CHECKING` count as arrows between rooms but close no circle of modules: nothing
is imported at run time.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import carerl_kernels
from carerl_kernels import _ops, reference
from places import ROOT

PACKAGE = Path(carerl_kernels.__file__).parent
NAME = PACKAGE.name

LEAVES = {
    "_clock", "_command", "_errors", "_files", "_http", "_json", "_load", "_loop", "_ops", "_rows", "_wrapped",
    "info", "linalg", "logprobs", "reference", "reference_matrices", "reference_policy", "task", "text", "thin",
}  # fmt: skip
"""Modules without a room, which every room may use and which use each other only."""
COMMANDS = {"__main__", "basis_command", "basis_record", "cli", "confine_command", "report_command"}
"""And every module named `command`."""

BELOW = {
    "subspace": set(),
    "guard": {"subspace"},
    "rewards": set(),
    "grpo": {"guard", "subspace"},
    "tasks": {"grpo", "rewards", "guard", "subspace"},
    "monitor": {"grpo", "guard", "subspace"},
    "integrations": {"monitor", "grpo", "guard", "subspace"},
    "train": {"tasks", "monitor", "grpo", "rewards", "guard", "subspace"},
    "study": {"train", "tasks", "monitor", "grpo", "rewards", "guard", "subspace"},
    "bench": {"tasks", "grpo", "rewards", "guard", "subspace"},
    "package": {"guard", "subspace"},
}
"""Rooms, and the rooms that each may import from, besides the leaves. Commands, the top, may import from all."""


@dataclass(frozen=True)
class Arrow:
    """An import: where it stands, and the modules at its ends."""

    file: Path
    line: int
    source: str
    target: str
    runtime: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(PACKAGE)}, line {self.line}: {room(self.source)} imports {self.target}"


def modules() -> dict[str, Path]:
    out = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = (NAME, *path.relative_to(PACKAGE).with_suffix("").parts)
        out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return out


def room(module: str) -> str:
    first = module.split(".")[1] if "." in module else "package"
    if first in COMMANDS or module.endswith(".command"):
        return "commands"
    return "leaves" if first in LEAVES else first


@cache
def arrows() -> tuple[Arrow, ...]:
    return tuple(found())


def found() -> Iterator[Arrow]:
    known = modules()
    for source, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        types_only = {
            id(node)
            for branch in ast.walk(tree)
            if isinstance(branch, ast.If) and ast.unparse(branch.test).endswith("TYPE_CHECKING")
            for statement in branch.body
            for node in ast.walk(statement)
        }
        for node in ast.walk(tree):
            for target in targets(node, source, path, known):
                if target.split(".")[0] == NAME and target != source:
                    yield Arrow(path, node.lineno, source, target, id(node) not in types_only)


def targets(node: ast.AST, source: str, path: Path, known: dict[str, Path]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        package = source.split(".") if path.name == "__init__.py" else source.split(".")[:-1]
        above = package[: len(package) - node.level + 1]
        base = ".".join([*above, node.module] if node.module else above)
    return [full if (full := f"{base}.{alias.name}") in known else base for alias in node.names]


def test_arrows_between_rooms_point_downwards():
    wrong = []
    for arrow in arrows():
        source, target = room(arrow.source), room(arrow.target)
        allowed = {source, "leaves"} | BELOW.get(source, set())
        if source != "commands" and target not in allowed and arrow.target != NAME:
            wrong.append(f"{arrow}; {source} may import from {', '.join(sorted(allowed))}")
    assert not wrong, "expected imports from the rooms below alone, found\n" + "\n".join(wrong)


def test_every_module_stands_in_a_room():
    unknown = {room(name) for name in modules()} - set(BELOW) - {"leaves", "commands"}
    assert not unknown, f"expected every module in a room of this file, found {', '.join(sorted(unknown))}"


def test_rooms_have_an_order():
    done: list[str] = ["leaves", "commands"]
    while len(done) < len(BELOW) + 2:
        ready = [name for name, below in BELOW.items() if name not in done and below <= set(done)]
        assert ready, f"expected an order of rooms, found a circle among {', '.join(set(BELOW) - set(done))}"
        done += ready


def test_no_modules_import_each_other():
    leads: dict[str, dict[str, Arrow]] = {}
    for arrow in arrows():
        if arrow.runtime:
            leads.setdefault(arrow.source, {})[arrow.target] = arrow
    path: list[Arrow] = []
    state: dict[str, str] = {}

    def visit(module: str) -> None:
        state[module] = "open"
        for target, arrow in leads.get(module, {}).items():
            path.append(arrow)
            if state.get(target) == "open":
                start = next(i for i, step in enumerate(path) if step.source == target)
                raise AssertionError("expected no circle of imports, found\n" + "\n".join(map(str, path[start:])))
            if target not in state:
                visit(target)
            path.pop()
        state[module] = "done"

    for module in modules():
        if module not in state:
            visit(module)


# -------------------------------------------------------------------------------------------------------------- ops

COLUMNS = {"CPU": "csrc/kernels/cpu", "CUDA": "csrc/kernels/cuda", "Triton": "triton_kernels"}
FILE = re.compile(r"`(\w+\.\w+)`")


def table_of_ops() -> list[dict[str, str]]:
    """The rows of docs/architecture.md, "Where an op is", by column."""
    section = (ROOT / "docs/architecture.md").read_text().split("## Where an op is")[1].split("\n## ")[0]
    head, _, *rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line[:1] == "|"
    ]
    return [dict(zip(head, row, strict=True)) for row in rows]


def carries(stem: str, op: str) -> bool:
    """Whether a file of this name says that it serves the op: the op's words and more, or some at one of its ends."""
    name = op.removesuffix("_")
    return stem == name or stem.startswith(f"{name}_") or name.startswith(f"{stem}_") or name.endswith(f"_{stem}")


def test_files_of_an_op_carry_its_name():
    rows = table_of_ops()
    listed = [op for row in rows for op in re.findall(r"`(\w+)`", row["op"])]
    assert sorted(listed) == sorted(_ops.OP_NAMES), "expected a row of docs/architecture.md for every op"
    for column, folder in COLUMNS.items():
        named = set()
        for row in rows:
            ops, files = re.findall(r"`(\w+)`", row["op"]), FILE.findall(row[column])
            named.update(files)
            for file in files:
                assert (ROOT / folder / file).is_file(), f"{folder}: expected {file}, found none"
                wrong = [op for op in ops if not carries(Path(file).stem, op)]
                assert not wrong or any(carries(Path(file).stem.split("_")[0], op) for op in ops), f"{file} for {wrong}"
            elsewhere = column != "CPU" and set(ops) <= set(_ops.CPU_ONLY)
            assert bool(row[column]) != (elsewhere or ops == ["group_advantages"]), f"{row['op']}, {column}: {files}"
        for path in (ROOT / folder).iterdir():
            owners = [op for op in _ops.OP_NAMES if path.stem == op.removesuffix("_")]
            assert not owners or path.name in named, f"{path.name}: expected in the row of {owners[0]}, found in none"


def test_the_reference_and_the_tests_of_an_op_are_where_the_table_says():
    for row in table_of_ops():
        (test,) = [path for path in (ROOT / "tests").rglob("test_*.py") if path.name in FILE.findall(row["tests"])]
        for op in re.findall(r"`(\w+)`", row["op"]):
            module = reference.KERNELS[op].__module__.rpartition(".")[2]
            assert row["reference"] == f"`{module}.py`", f"{op}: expected {module}.py, found {row['reference']}"
            assert re.search(rf"\b{op}", test.read_text()), f"{op}: expected in {test.name}"
