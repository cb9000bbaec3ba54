"""Pages say what is there: links and anchors, files they name, code that runs, versions that occur twice, and the site itself."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from html import unescape
from pathlib import Path
from textwrap import dedent
from urllib.parse import unquote

import pytest
import torch
import typer
import yaml
from carerl_kernels import CapabilityGuard, cli

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(DOCS.glob("*.md"))]
FENCED = re.compile(r"^ *```.*?^ *```", flags=re.DOTALL | re.MULTILINE)
PACKAGE = ROOT / "python" / "carerl_kernels"
# where the pages mean by `box.py` or `guard/box.py`
PLACES = (
    ROOT,
    PACKAGE,
    ROOT / "csrc",
    ROOT / "csrc/kernels/cpu",
    ROOT / "csrc/kernels/cuda",
    ROOT / "triton_kernels",
    ROOT / "csrc/ops",
    ROOT / "tests",
    ROOT / "tests/ops",
    ROOT / "tests/guard",
    ROOT / "tests/grpo",
)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)\s#]*)(?:#([^)\s]*))?\)", FENCED.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name}: expected a file, found a link to {target}"
        if anchor:
            assert anchor in anchors(path), f"{page.name}: expected a heading of {path.name}, found a link to #{anchor}"


def test_files_that_the_map_names_exist():
    text = (DOCS / "architecture.md").read_text()
    named = set(re.findall(r"`([\w./]+\.(?:py|cpp|h|cuh?))`", text)) - {"json_keys.py"}  # the walk writes that one
    assert len(named) > 50
    named.discard("command.py")  # of every room that has commands
    missing = [name for name in sorted(named) if not any((place / name).is_file() for place in PLACES)]
    assert not missing, f"expected files of the repository, found {', '.join(missing)}"


def test_sections_that_docstrings_cite_exist():
    heads = [head.lower() for head in re.findall(r"^## (.*)$", (DOCS / "math.md").read_text(), flags=re.MULTILINE)]
    cited = {
        (path.name, re.sub(r"\s+", " ", section))
        for path in PACKAGE.rglob("*.py")
        for section in re.findall(r'docs/math\.md, "([^"]*)"', path.read_text())
    }
    for name, section in sorted(cited):
        assert any(head.startswith(section.lower()) for head in heads), f"{name}: no section {section!r} in math.md"


def python_of(page: str) -> list[tuple[bool, str]]:
    """(whether it is marked no-run, its text) of every block of Python."""
    blocks = re.findall(
        r"^ *```python( no-run)?\n(.*?)^ *```", (DOCS / page).read_text(), flags=re.DOTALL | re.MULTILINE
    )
    return [(bool(marked), dedent(block)) for marked, block in blocks]


def surroundings(page: str) -> dict[str, object]:
    """What the code of a page takes as given."""
    if page == "training.md":  # a shorter run
        small = Path(shutil.copytree(ROOT / "examples/recipes", "examples/recipes"), "small.yaml")
        small.write_text(re.sub(r"steps: \d+", "steps: 2", small.read_text()))
    if page not in ("guard.md", "bases.md"):
        return {}
    model = torch.nn.Sequential(torch.nn.Linear(13, 11), torch.nn.Tanh(), torch.nn.Linear(11, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    batches = list(torch.randn(4, 8, 13))

    def train() -> None:
        for batch in batches:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()

    return {
        "CapabilityGuard": CapabilityGuard,
        "model": model,
        "optimizer": optimizer,
        "batches": batches,
        "train": train,
        "loss_on_stored_prompts": lambda name: model(batches[0]).square().mean(),
    }


ELSEWHERE = {  # pages whose code needs more around it
    "integrations.md": "tests/integrations/test_integrations_trl.py",
    "monitor.md": "tests/monitor/test_monitor.py",
    "rewards.md": "tests/rewards/test_rewards_judge.py",
}


@pytest.mark.parametrize("page", [path.name for path in PAGES if path.parent == DOCS and python_of(path.name)])
def test_code_of_pages_runs(page, tmp_path, monkeypatch):
    if page in ELSEWHERE:
        assert f'DOCS / "{page}"' in (ROOT / ELSEWHERE[page]).read_text()
        return
    monkeypatch.chdir(tmp_path)
    space = surroundings(page)
    for number, (marked, block) in enumerate(python_of(page)):
        code = compile(block, f"{page} block {number}", "exec")
        if not marked:
            exec(code, space)


def test_commands_of_pages_exist():
    """Every `carerl ...` of a page: its subcommand and its options."""
    root = typer.main.get_command(cli.app)
    seen = 0
    for page in PAGES:
        for line in re.findall(r"(?:^|`)(carerl [^`\n#|]*)", page.read_text(), flags=re.MULTILINE):
            command, words = root, line.split()[1:]
            while words and (found := getattr(command, "commands", {}).get(words[0])):
                command, words = found, words[1:]
            options = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
            named = {word.partition("=")[0] for word in words if word.startswith("--")} - {"--help"}
            assert not hasattr(command, "commands") or not words or words[0].startswith("-"), f"{page.name}: {line}"
            assert named <= options, f"{page.name}: {line}: no option {named - options}"
            seen += 1
    assert seen > 50


def test_workflows_and_forms_are_yaml_of_their_kind():
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        workflow = yaml.safe_load(path.read_text())
        assert workflow[True] and workflow["permissions"] == {"contents": "read"}, (
            path.name
        )  # YAML reads the key `on` as true
        for name, job in workflow["jobs"].items():
            assert job["runs-on"] and job["timeout-minutes"], f"{path.name}: {name}"
            for step in job["steps"]:
                assert ("uses" in step) != ("run" in step), f"{path.name}: {name}"
                assert "@" in step.get("uses", "@"), f"{path.name}: {name}: expected an action with its version"
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for used in re.findall(r"run: make ([\w-]+)", (ROOT / ".github/workflows/ci.yml").read_text()):
        assert used in targets, f"ci.yml: expected a target of the Makefile, found {used}"
    for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml"):
        form = yaml.safe_load(path.read_text())
        assert form["name"] and form["description"] and all("type" in part for part in form["body"]), path.name
    for path in (ROOT / "CITATION.cff", ROOT / ".github/dependabot.yml", ROOT / ".github/ISSUE_TEMPLATE/config.yml"):
        assert yaml.safe_load(path.read_text())


def test_versions_that_are_said_twice_agree():
    makefile = (ROOT / "Makefile").read_text()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    for repository in hooks:
        tool = "ruff" if "ruff" in repository["repo"] else "clang-format"
        assert f"{tool}=={repository['rev'].removeprefix('v')}" in makefile, tool
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    oldest = next(text for text in project["project"]["dependencies"] if text.startswith("torch"))
    assert oldest.removeprefix("torch>=") + ".0" in (ROOT / ".github/workflows/ci.yml").read_text()
    version = re.search(r'__version__ = "(.*)"', (PACKAGE / "__init__.py").read_text())
    assert version is not None
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version[1]
    assert f"[{version[1]}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    for page in site.rglob("*.html"):
        for link in re.findall(r'(?:href|src)="([^"#?]+)', page.read_text()):
            if not re.match(r"[a-z]+:|/", link):
                target = (page.parent / unquote(unescape(link))).resolve()
                assert target.is_file() or (target / "index.html").is_file(), f"{page.relative_to(site)}: {link}"
    guard = (site / "api/guard/index.html").read_text()
    assert "CapabilityGuard" in guard and "protect" in guard
    formulas = (site / "math/index.html").read_text()
    assert "<math" in formulas and "arithmatex" not in formulas
    assert (site / "source/python/carerl_kernels/guard/box.py/index.html").is_file()
