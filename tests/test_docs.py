"""The documents say what the code does: the example runs, generated parts are up to date, links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_example_in_the_readme_runs() -> None:
    [example] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(example.strip().splitlines()) <= 20
    run = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    assert "tokens=8192" in run.stdout
    assert "20000" in run.stdout


def test_the_generated_parts_of_the_design_are_up_to_date() -> None:
    check = [sys.executable, str(ROOT / "scripts" / "write_design_doc.py"), "--check"]
    run = subprocess.run(check, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("doc", DOCS, ids=lambda path: path.name)
def test_links_lead_to_files_that_exist(doc: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", doc.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (doc.parent / target).exists()]
    assert not missing
