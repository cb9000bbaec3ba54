"""Hooks of mkdocs for the site (`make docs`): everything that GitHub shows of docs/ by itself and a site does not.

Pages of docs/ are written for GitHub. Links to source files become links to pages of the site that show these files, formulas
become MathML (no script, no font, no server of anybody else), and the API reference is made here, so that docs/ holds no page
that is empty on GitHub.
"""

from __future__ import annotations

import ast
import html
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGE = "carerl_kernels"
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
LANGUAGES = {
    ".py": "python",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".toml": "toml",
    ".cpp": "cpp",
    ".h": "cpp",
    ".json": "json",
}
PROJECT = {
    "README.md": "project/readme.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "SECURITY.md": "project/security.md",
}
"""Files of the repository that are pages of the site."""

API: dict[str, tuple[str, tuple[str, ...]]] = {
    "guard": (
        "Guard",
        (
            "guard.guard.CapabilityGuard",
            "guard.protection.Protection",
            "guard.settings.GuardOptions",
            "guard.settings.Settings",
            "guard.mixed.MixedGradient",
            "guard.report",
            "guard.rules",
            "guard.box",
            "guard.probes",
            "guard.editors",
            "guard.checkpoints",
            "guard.validate",
        ),
    ),
    "subspace": (
        "Directions",
        (
            "subspace.kinds",
            "subspace.observe",
            "subspace.store",
            "subspace.factored",
            "subspace.pca",
            "subspace.layout",
            "subspace.matrices",
            "subspace.merge",
            "linalg",
        ),
    ),
    "rewards": (
        "Rewards",
        (
            "rewards.verifiers",
            "rewards.verifiers.exact",
            "rewards.verifiers.math",
            "rewards.verifiers.code",
            "rewards.verifiers.instructions",
            "rewards.verifiers.gym",
            "rewards.verifiers.sandbox",
            "rewards.pa_grm.scorer",
            "rewards.pa_grm.endpoint",
            "rewards.pa_grm.local",
            "rewards.pa_grm.protocol",
            "rewards.compose",
            "rewards.information",
            "rewards.adapters",
        ),
    ),
    "training": (
        "Training",
        (
            "grpo.config",
            "grpo.Domain",
            "grpo.Example",
            "grpo.trainer",
            "grpo.losses",
            "grpo.sampling",
            "grpo.endpoint",
            "train.recipe",
            "train.run",
        ),
    ),
    "monitor": (
        "Monitor",
        (
            "monitor.monitor",
            "monitor.callback",
            "monitor.controller",
            "monitor.split",
            "monitor.sinks",
            "monitor.diagnose",
        ),
    ),
    "integrations": ("Integrations", ("integrations.transformers", "integrations.trl", "integrations.verl")),
}
"""Pages of the reference, with what stands in them."""


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made: the reference, the project's own files, and every source file that a page links to."""
    for name, (title, members) in API.items():
        text = f"# {title}\n\n" + "\n\n".join(f"::: {PACKAGE}.{member}" for member in members) + "\n"
        files.append(File.generated(config, f"api/{name}.md", content=text))
    files.append(File.generated(config, "api/ops.md", content=_ops_page()))
    linked = set()
    for source, page in PROJECT.items():
        text = (ROOT / source).read_text()
        linked |= _targets(text, source)
        files.append(File.generated(config, page, content=_moved(text, "", page)))
    for file in files.documentation_pages():
        if not file.src_uri.startswith(("project/", "api/")):
            linked |= _targets(file.content_string, _place(file.src_uri))
    for target in sorted(linked):
        files.append(File.generated(config, f"source/{target}.md", content=_source_page(target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Points links out of docs/ to the pages that show what they meant."""
    here = page.file.src_uri
    if here.startswith(("source/", "project/", "api/")):
        return markdown
    return _moved(markdown, posixpath.dirname(_place(here)), here)


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:
    """Formulas as MathML, and cross-references of docstrings as plain code."""
    content = re.sub(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', _formula, content, flags=re.DOTALL)
    return re.sub(r":(?:class|func|meth|mod|data|attr):<code>~?(?:[\w.]+\.)?(\w+)</code>", r"<code>\1</code>", content)


def _formula(match: re.Match[str]) -> str:
    display = "block" if match[2] == "[" else "inline"
    return convert(html.unescape(match[3]).strip(), display=display)


def _place(uri: str) -> str:
    """Where in the repository a page of the site lies."""
    return next((source for source, page in PROJECT.items() if page == uri), f"docs/{uri}")


def _inside(target: str, folder: str) -> str | None:
    """Path in the repository of what a page of a folder links to; None: a page or picture of docs/, or another site."""
    if re.match(r"[a-z]+:", target):
        return None
    path = posixpath.normpath(posixpath.join(folder, target))
    return None if path.startswith(("docs/", "../")) or not (ROOT / path).exists() else path


def _targets(text: str, here: str) -> set[str]:
    found = {_inside(match[2], posixpath.dirname(here)) for match in LINK.finditer(text)}
    return {target for target in found if target is not None and target not in PROJECT}


def _moved(text: str, folder: str, page: str) -> str:
    """The text of a file in `folder` of the repository as the text of a page of the site."""

    def link(match: re.Match[str]) -> str:
        before, target, anchor, after = match[1], match[2], match[3] or "", match[4]
        inside = _inside(target, folder)
        if inside is None:
            path = posixpath.normpath(posixpath.join(folder, target))
            if re.match(r"[a-z]+:", target) or not path.startswith("docs/"):
                return match[0]
            goal = path.removeprefix("docs/")
        else:
            goal = PROJECT.get(inside, f"source/{inside}.md")
        return f"{before}{posixpath.relpath(goal, posixpath.dirname(page) or '.')}{anchor}{after}"

    return LINK.sub(link, text)


def _source_page(target: str) -> str:
    path = ROOT / target
    head = f"---\nsearch:\n  exclude: true\nhide: [toc, navigation]\n---\n\n# {target}\n\n"
    if path.is_dir():
        return (
            head
            + "\n".join(f"- `{child.name}`" for child in sorted(path.iterdir()) if child.name[0] not in "_.")
            + "\n"
        )
    language = LANGUAGES.get(path.suffix, "text")
    return f'{head}``````{language} linenums="1"\n{path.read_text()}\n``````\n'


def _ops_page() -> str:
    """Schemas from `_ops.py` and what the reference says of each op; nothing is imported."""
    package = ROOT / "python" / PACKAGE
    schemas: dict[str, str] = {}
    for node in ast.parse((package / "_ops.py").read_text()).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "SCHEMAS":
            assert node.value is not None
            schemas = ast.literal_eval(node.value)
    references = [node for path in sorted(package.glob("reference*.py")) for node in ast.parse(path.read_text()).body]
    docs = {node.name: ast.get_docstring(node) for node in references if isinstance(node, ast.FunctionDef)}
    introduction = ast.get_docstring(ast.parse((package / "_ops.py").read_text())) or ""
    conventions = introduction.split("Conventions", 1)[-1]
    paragraphs = [f"{line.strip()}" for line in conventions.strip().splitlines()]
    text = (
        "# Ops\n\n`import carerl_kernels` registers them as `torch.ops.carerl.NAME`.\n\n" + "\n".join(paragraphs) + "\n"
    )
    for op in dict.fromkeys(name.split(".")[0] for name in schemas):
        text += f"\n## `{op}` {{ #{op} }}\n\n"
        overloads = [f"{name}{schema}" for name, schema in schemas.items() if name.split(".")[0] == op]
        text += "```text\n" + "\n".join(overloads) + "\n```\n"
        if docs.get(op):
            text += f"\n{_plain(docs[op] or '')}\n"
    return text


def _plain(docstring: str) -> str:
    """A Google-style docstring as Markdown: its sections as lists."""
    out = []
    for line in docstring.splitlines():
        section = re.match(r"(Args|Returns|Raises|Attributes):$", line)
        if section:
            out += ["", f"**{section[1]}**", ""]
        elif re.match(r"    \w[\w, ]*: ", line):
            name, rest = line.strip().split(": ", 1)
            out.append(f"- `{name}`: {rest}")
        else:
            out.append(line[4:] if line.startswith("    ") and not line.startswith("        ") else line.strip())
    return re.sub(r":(?:class|func|meth):`~?([\w.]+)`", r"`\1`", "\n".join(out))
