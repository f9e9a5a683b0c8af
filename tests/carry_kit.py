"""Running `tensorferry send` and the command that it prints, as two shells would."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
import warm
from command_kit import environment, tensorferry
from safetensors.torch import save_file

PATIENCE = 60
"""Seconds. A bound on a hang; no step waits for it."""

SLOW = "--pool-blocks 1 --first-grant 8"
"""With blocks of 8 tokens and `long_file`: 25,000 rounds, which take seconds. What a test does meanwhile is in time."""


def shell_environment() -> dict[str, str]:
    """As `environment`, with the `tensorferry` command of this interpreter first in PATH."""
    env = environment()
    return {**env, "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}


def paste(command: str, folder: Path) -> subprocess.CompletedProcess:
    """Run a command line to its end, with the words that a shell makes of it."""
    words = shell_words(command)
    return tensorferry(*words[1:], env=shell_environment(), cwd=folder, popen=warm.Popen)


def shell_words(command: str) -> list[str]:
    done = subprocess.run(["sh", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True)
    words = done.stdout.split("\0")[:-1]
    assert words[0] == "tensorferry"
    return words


def paste_into_a_shell(command: str, folder: Path) -> subprocess.CompletedProcess:
    """Run a command line in a shell, which finds the console script, to its end."""
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
    """A `tensorferry send` that has said what to paste. `said`: the lines of standard output so far."""

    def __init__(self, process: subprocess.Popen, command: str, said: list[str]) -> None:
        self.process = process
        self.command = command
        self.address = command.split()[5]
        self.said = said

    def until(self, words: str) -> None:
        """Read on to a line with these words."""
        read_until(self.process, self.process.stdout, words, self.said)

    def end(self) -> tuple[int, str, str]:
        """Exit status, all of standard output, the rest of standard error."""
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, "\n".join([*self.said, out]), err


def read_until(process: subprocess.Popen, stream: IO[str], words: str, said: list[str]) -> str:
    """Read a stream to a line with these words; its lines go to `said`."""
    for line in iter(stream.readline, ""):
        said.append(line.rstrip("\n"))
        if words in line:
            return said[-1]
    raise AssertionError(f"ended without {words!r}: {said} {process.communicate(timeout=PATIENCE)}")


@contextmanager
def started(words: list[str], folder: Path, popen: type) -> Iterator[subprocess.Popen]:
    with popen(
        words, cwd=folder, env=shell_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def sending(file: Path, *args: str, popen: type = warm.Popen) -> Iterator[Sending]:
    """`tensorferry send FILE --room 17`, once it has printed the other side's command."""
    words = [sys.executable, "-m", "tensorferry", "send", file.name, "--room", "17", *args]
    with started(words, file.parent, popen) as process:
        said: list[str] = []
        as_json = "json" in args
        stream = process.stderr if as_json else process.stdout
        command = read_until(process, stream, "tensorferry receive", said)
        yield Sending(process, command, [] if as_json else said)


@contextmanager
def receiving(command: str, folder: Path, until: str, popen: type = warm.Popen) -> Iterator[subprocess.Popen]:
    """A command line as a process of its own (signals reach it, and no shell), once it has said `until`."""
    with started([sys.executable, "-m", *shell_words(command)], folder, popen) as process:
        read_until(process, process.stdout, until, [])
        yield process


def small_file(path: Path, tokens: int = 300) -> Path:
    save_file({"x": torch.arange(tokens * 4, dtype=torch.float32).view(tokens, 4)}, path)
    return path


def long_file(path: Path) -> Path:
    save_file({"x": torch.arange(200_000, dtype=torch.int32)}, path)
    return path


def listing(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))
