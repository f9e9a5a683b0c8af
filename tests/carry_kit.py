"""Running `tensorferry send` and the command that it prints, as two shells would."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from command_kit import environment
from safetensors.torch import save_file

PATIENCE = 60
"""Seconds. A bound on a hang; no step waits for it."""

SLOW = ("--pool-blocks", "1", "--first-grant", "8")
"""With blocks of 8 tokens and `long_file`: 25,000 rounds, which take seconds. What a test does meanwhile is in time."""


def shell_environment() -> dict[str, str]:
    """As `environment`, with the `tensorferry` command of this interpreter first in PATH."""
    env = environment()
    return {**env, "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}


def paste(command: str, folder: Path) -> subprocess.CompletedProcess:
    """Run a command line in a shell, to its end."""
    return subprocess.run(
        ["sh", "-c", command],
        cwd=folder,
        env=shell_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )


class Sending:
    """A `tensorferry send` that has said what to paste."""

    def __init__(self, process: subprocess.Popen, said: list[str]) -> None:
        self.process = process
        self.command = next(line for line in said if line.startswith("tensorferry receive"))
        self.address = self.command.split()[5]
        self.said = said

    def until(self, words: str) -> None:
        """Read on to a line with these words."""
        stream = self.process.stdout
        for line in iter(stream.readline, ""):
            self.said.append(line.rstrip("\n"))
            if words in line:
                return
        raise AssertionError(f"ended without {words!r}: {self.said} {self.process.stderr.read()}")

    def end(self) -> tuple[int, str, str]:
        """Exit status, all of standard output, standard error."""
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, "\n".join([*self.said, out]), err


@contextmanager
def sending(file: Path, *args: str, room: int = 17) -> Iterator[Sending]:
    as_json = "json" in args
    with subprocess.Popen(
        [sys.executable, "-m", "tensorferry", "send", file.name, "--room", str(room), *args],
        cwd=file.parent,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            said = []
            for line in process.stderr if as_json else process.stdout:
                said.append(line.rstrip("\n"))
                if line.startswith("tensorferry receive"):
                    break
            else:
                raise AssertionError(f"no command was printed: {said} {process.communicate()}")
            yield Sending(process, [] if as_json else said) if not as_json else _quiet(process, said)
        finally:
            process.kill()


def _quiet(process: subprocess.Popen, said: list[str]) -> Sending:
    found = Sending(process, said)
    found.said = []
    return found


@contextmanager
def receiving(command: str, folder: Path, until: str) -> Iterator[subprocess.Popen]:
    """The printed command as a process of its own (signals reach it, and no shell), once it has said `until`."""
    with subprocess.Popen(
        ["sh", "-c", f"exec {command}"],
        cwd=folder,
        env=shell_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            said = []
            for line in process.stdout:
                said.append(line)
                if until in line:
                    break
            else:
                raise AssertionError(f"ended without {until!r}: {said} {process.stderr.read()}")
            yield process
        finally:
            process.kill()


def small_file(path: Path, tokens: int = 300) -> Path:
    save_file({"x": torch.arange(tokens * 4, dtype=torch.float32).view(tokens, 4)}, path)
    return path


def long_file(path: Path) -> Path:
    save_file({"x": torch.arange(200_000, dtype=torch.int32)}, path)
    return path


def listing(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))
