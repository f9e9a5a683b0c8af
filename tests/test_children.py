"""Processes that are started here: nothing of it needs a folder to write to, and every end has a name."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_kit import environment, tensorferry

from tensorferry.core.children import end_in_words, nameless_file


@pytest.fixture
def no_temporary_folder(tmp_path: Path) -> dict[str, str]:
    """An environment as of a container whose file system is read-only: Python finds no folder for temporary files."""
    (tmp_path / "sitecustomize.py").write_text(
        "import errno, tempfile\n"
        "def none_found():\n"
        "    raise FileNotFoundError(errno.ENOENT, 'No usable temporary directory found')\n"
        "tempfile._get_default_tempdir = none_found\n"
    )
    return environment(PYTHONPATH=str(tmp_path), MC_FORCE_TCP="1")


def test_transports_work_without_a_folder_for_temporary_files(no_temporary_folder: dict[str, str]) -> None:
    done = tensorferry("transports", "--format", "json", env=no_temporary_folder)
    found = {one["name"]: one for one in json.loads(done.stdout)["transports"]}
    assert (done.returncode, found["shm"]["status"], found["tcp"]["status"]) == (0, "ready", "ready")


def test_mooncake_opens_without_a_folder_for_temporary_files(no_temporary_folder: dict[str, str]) -> None:
    if not _installed("mooncake"):
        pytest.skip("needs mooncake: it is not installed")
    done = tensorferry("doctor", "mooncake", "--format", "json", env=no_temporary_folder)
    (one,) = json.loads(done.stdout)["transports"]
    assert one["opened"], one


def test_the_demo_runs_without_a_folder_for_temporary_files(no_temporary_folder: dict[str, str]) -> None:
    done = tensorferry("demo", "--synthetic", "--hidden-size", "4", "--tokens", "300", env=no_temporary_folder)
    assert done.returncode == 0, done.stderr
    assert "verified" in done.stdout


def test_the_conformance_suite_runs_without_a_folder_for_temporary_files(no_temporary_folder: dict[str, str]) -> None:
    done = tensorferry("conformance", "run", "shm", "--rules", "LIF-1", env=no_temporary_folder)
    assert done.returncode == 0, done.stdout + done.stderr


def _installed(name: str) -> bool:
    done = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, check=False)
    return done.returncode == 0


def test_what_a_child_says_can_be_read_back() -> None:
    with nameless_file() as words:
        subprocess.run([sys.executable, "-c", "import os; os.write(2, b'last words')"], stderr=words, check=True)
        words.seek(0)
        assert words.read() == b"last words"


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (7, "ended with status 7"),
        (-signal.SIGABRT, "was ended by SIGABRT"),
        (-(signal.SIGRTMIN + 6), f"was ended by signal {signal.SIGRTMIN + 6}"),
    ],
)
def test_every_end_has_words(status: int, words: str) -> None:
    assert end_in_words(status) == words
