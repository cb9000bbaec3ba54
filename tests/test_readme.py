"""The README's Python blocks run as they stand, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_readme_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) >= 3
    namespace: dict = {}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"README.md block {number}", "exec"), namespace)
    assert (tmp_path / "math.safetensors").is_file()
    assert (tmp_path / "run" / "metrics.jsonl").is_file()
    assert namespace["guard"].history == ["math"]
    assert namespace["classes"].shape == (2, 3, 8)


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in (README.parent / "docs").glob("*.md"))])
def test_links_and_pictures_exist(page):
    path = README.parent / page
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target
