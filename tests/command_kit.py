"""Running the `tensorferry` command as its users do: as a process, with or without a terminal.

`popen=warm.Popen` saves a process that moves rows its imports (see warm.py). The interpreter itself, and the console
script, are what the other tests run.
"""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path


def environment(**more: str) -> dict[str, str]:
    """This process's, without settings, engine variables and anything that speaks for or against colour."""
    others = ("TENSORFERRY_", "SGLANG_", "MC_", "UCX_", "NIXL_")
    ours = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    for name in ("NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE", "COLUMNS"):
        ours.pop(name, None)
    return {**ours, "TENSORFERRY_CONFIG": os.devnull, **more}


def tensorferry(
    *args: str, env: dict[str, str] | None = None, cwd: Path | None = None, popen: type = subprocess.Popen
) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "tensorferry", *args]
    with popen(
        words, env=env or environment(), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            out, err = process.communicate(timeout=100)
        finally:
            process.kill()
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def on_a_terminal(*args: str, env: dict[str, str] | None = None, popen: type = subprocess.Popen) -> tuple[int, str]:
    """Run with standard output on a pseudo-terminal."""
    ours, theirs = pty.openpty()
    with popen(
        [sys.executable, "-m", "tensorferry", *args], env=env or environment(TERM="xterm-256color"), stdout=theirs
    ) as process:
        os.close(theirs)
        said = b""
        while True:
            try:
                more = os.read(ours, 65536)
            except OSError:  # Linux: the other end was closed
                break
            if not more:
                break
            said += more
    os.close(ours)
    return process.returncode, said.decode()
