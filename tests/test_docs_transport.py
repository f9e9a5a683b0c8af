"""The transport that docs/write-a-transport.md builds: installed as anybody's would be, found, and used.

pip installs it from a copy into a folder of its own, so that neither the checkout nor the environment changes. The
processes here know it from that folder's metadata alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "docs" / "examples" / "ferry-file-transport"
GUIDE = ROOT / "docs" / "write-a-transport.md"


@pytest.fixture(scope="module")
def environ(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has the example installed and a directory for it."""
    work = tmp_path_factory.mktemp("example")
    shutil.copytree(EXAMPLE, work / "source")  # building leaves things behind
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    pip = {**os.environ, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        [*command, "--target", work / "site", work / "source"],
        env=pip,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (work / "shared").mkdir()
    return {**os.environ, "PYTHONPATH": str(work / "site"), "FERRY_FILE_DIRECTORY": str(work / "shared")}


def python(environ: dict[str, str], *arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**environ, **more},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        cwd=environ["FERRY_FILE_DIRECTORY"],
    )


def test_it_is_listed_and_says_that_it_works(environ: dict[str, str]) -> None:
    done = python(environ, "-m", "tensorferry", "transports", "--format", "json")
    assert done.returncode == 0, done.stderr
    assert "ferry-file-transport" in done.stdout
    answer = python(environ, "-c", "from tensorferry.plugins import registry; print(registry.probe('file'))")
    assert "READY" in answer.stdout, answer.stderr


@pytest.mark.parametrize(
    ("directory", "reason"), [("", "no directory"), ("/nowhere", "no directory that can"), ("/proc", "lies on proc")]
)
def test_its_probe_says_what_is_missing(environ: dict[str, str], directory: str, reason: str) -> None:
    code = "from tensorferry.plugins import registry; print(registry.probe('file'))"
    answer = python(environ, "-c", code, FERRY_FILE_DIRECTORY=directory).stdout
    assert "UNAVAILABLE" in answer
    assert reason in answer


def test_it_moves_a_room_between_two_processes(environ: dict[str, str]) -> None:
    arguments = ["--transport", "file", "--tokens", "3000", "--synthetic", "--hidden-size", "64", "--format", "json"]
    done = python(environ, "-m", "tensorferry", "demo", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert (told["status"], told["transport"], told["verified"]) == ("ok", "file", True)
    assert told["sent_tokens"][-1] == 3000
    assert os.listdir(environ["FERRY_FILE_DIRECTORY"]) == []


@pytest.mark.timeout(300)
def test_one_command_holds_it_to_the_rules(environ: dict[str, str]) -> None:
    arguments = ("conformance", "run", "file", "--tier", "quick", "--seed", "22", "--format", "json")
    done = python(environ, "-m", "tensorferry", *arguments)
    report = json.loads(done.stdout)
    assert [finding for finding in report["findings"] if finding["verdict"] == "fail"] == []
    assert report["defects"] == []
    assert (done.returncode, report["transport"]["distribution"]) == (0, "ferry-file-transport")
    assert report["summary"]["pass"] > 110
    assert os.listdir(environ["FERRY_FILE_DIRECTORY"]) == []


def test_every_rule_of_the_contract_has_its_place_in_the_guide() -> None:
    from tensorferry.core.transport import Capabilities, Fence, Status, Transport

    text = GUIDE.read_text(encoding="utf-8")
    verbs = {name for name in vars(Transport) if not name.startswith("_") and callable(getattr(Transport, name))}
    fields = set(Capabilities.__dataclass_fields__)
    words = set(re.findall(r"\w+", text))
    assert (verbs | fields | {f.name for f in Fence} | {s.name for s in Status}) - words == set()
