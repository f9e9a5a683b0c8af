"""docs/sglang.md says what the adapter does: its example runs, and its tables are the code's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tensorferry.core.settings import descriptions
from tensorferry.plugins.sglang import POLL_OF

DOC = (Path(__file__).parents[2] / "docs" / "sglang.md").read_text(encoding="utf-8")


def test_the_example_runs() -> None:
    example = re.findall(r"```python\n(.*?)```", DOC, flags=re.DOTALL)[0]
    run = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[0] == "Success"
    assert "12000" in run.stdout


def test_the_table_of_polls_is_the_codes() -> None:
    table = dict(re.findall(r"^\| `([A-Z_]+)` \| `(\w+` = \d)", DOC, flags=re.MULTILINE))
    assert table == {str(status): f"{poll.name}` = {int(poll)}" for status, poll in POLL_OF.items()}


def test_the_table_of_names_is_the_settings() -> None:
    table = dict(re.findall(r"^\| `(SGLANG_\w+)` \| `(\w+)` \|", DOC, flags=re.MULTILINE))
    assert table == {alias: about.name for about in descriptions() for alias in about.aliases}
