"""`tensorferry transports --peer`: what would carry, by the settings that hold here, whatever a transport does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_kit import environment, tensorferry
from foreign_kit import COMMON, Foreign, foreign

from tensorferry import cli
from tensorferry.commands import probing

__all__ = ["foreign"]  # a fixture

ASIDE = (
    COMMON
    + """
from tensorferry.backends.tcp import TcpTransport

class Aside(TcpTransport):
    name = "aside"
    contract_version = 1
    @classmethod
    def probe(cls):
        return Probe(Readiness.DEGRADED, "works less well", path="tcp")

class Aborts(Foreign):
    name = "aborts"
    @classmethod
    def probe(cls):
        os.abort()

class Hangs(Foreign):
    name = "hangs"
    @classmethod
    def probe(cls):
        threading.Event().wait()
"""
)

SENDER = """
import sys, tensorferry as tf, torch
with tf.Sender(tf.embedding_layout(hidden_size=4, dtype=torch.float32), transport=sys.argv[1]) as sender:
    print(sender.address, flush=True)
    sys.stdin.read()
"""

Sending = Callable[..., str]


@pytest.fixture
def sending() -> Iterator[Sending]:
    """Starts a sender with one transport; the answer is its address."""
    started: list[subprocess.Popen[str]] = []

    def start(transport: str, env: dict[str, str] | None = None) -> str:
        process = subprocess.Popen(
            [sys.executable, "-c", SENDER, transport],
            env=env or environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        return process.stdout.readline().strip()

    yield start
    for process in started:
        process.communicate("", timeout=60)


# ---- by the settings that hold here ------------------------------------------------------------------------------


def test_the_transport_of_the_settings_is_what_answers(foreign: Foreign, sending: Sending) -> None:
    env = foreign(ASIDE, aside="Aside")
    address = sending("aside", env)
    done = tensorferry("transports", "--peer", address, "--format", "json", env=env)
    auto = json.loads(done.stdout)["peer"]
    assert (done.returncode, auto["chosen"]) == (3, None), "it is taken only where it is named"
    assert "transport=auto" in auto["error"]["hint"]
    done = tensorferry("transports", "--peer", address, env=env)
    assert "hint: Name the same transport on both sides" in done.stdout
    for args, more in (["--transport", "aside"], {}), ([], {"TENSORFERRY_TRANSPORT": "aside"}):
        done = tensorferry("transports", "--peer", address, "--format", "json", *args, env=env | more)
        assert (done.returncode, json.loads(done.stdout)["peer"]["chosen"]) == (0, "aside"), done.stdout


def test_require_of_the_settings_holds_and_the_remedy_is_printed(sending: Sending) -> None:
    address = sending("tcp")
    done = tensorferry("transports", "--peer", address, env=environment(TENSORFERRY_REQUIRE="rdma", MC_FORCE_TCP="1"))
    assert done.returncode == 3
    assert "rdma is required" in done.stdout + done.stderr
    assert "tensorferry doctor" in done.stderr


def test_settings_that_an_endpoint_refuses_are_refused(sending: Sending) -> None:
    done = tensorferry("transports", "--peer", "tcp://127.0.0.1:1", env=environment(TENSORFERRY_BOGUS="1"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "TENSORFERRY_BOGUS" in done.stderr


# ---- whatever a transport does -----------------------------------------------------------------------------------


def test_a_transport_that_aborts_in_an_endpoint_is_told_and_the_table_is_there(
    foreign: Foreign, sending: Sending
) -> None:
    env = foreign(ASIDE, aborts="Aborts")
    address = sending("tcp")
    done = tensorferry("transports", "--peer", address, env=env)
    assert done.returncode == 3
    assert "shm" in done.stdout
    assert "SIGABRT" in done.stderr
    assert "--transport" in done.stderr
    done = tensorferry("transports", "--peer", address, "--transport", "tcp", "--format", "json", env=env)
    assert (done.returncode, json.loads(done.stdout)["peer"]["chosen"]) == (0, "tcp")


def test_a_transport_that_hangs_in_an_endpoint_is_told_in_time(foreign: Foreign, sending: Sending) -> None:
    env = foreign(ASIDE, hangs="Hangs")
    done = tensorferry("transports", "--peer", sending("tcp"), "--timeout", "3", "--format", "json", env=env)
    told = json.loads(done.stdout)
    assert done.returncode == 3
    assert "tcp" in {one["name"] for one in told["transports"]}
    assert "gave no answer within" in told["peer"]["error"]["cause"]


IMPORTED = """
import os, threading
def __getattr__(name):
    if name == "Aborts": os.abort()
    if name == "Hangs": threading.Event().wait()
    from tensorferry.backends.memory import MemoryTransport
    from tensorferry.core.transport import EngineVariable
    variable = EngineVariable("ACME_LEVEL", "3", "it is loud")
    return type("Well", (MemoryTransport,), {"name": "well", "contract_version": 1, "sets": (variable,)})
"""


def test_an_import_that_aborts_or_hangs_leaves_the_variables_of_the_others(
    foreign: Foreign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    env = foreign(IMPORTED, aborts="Aborts", hangs="Hangs", well="Well")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", env["PYTHONPATH"])
    monkeypatch.setattr(probing, "DEFAULT_SECONDS", 3.0)
    assert cli.main(["config", "show", "--origin", "--format", "json"]) == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)["engine_variables"]}
    assert found["ACME_LEVEL"]["value"] == "3"
    assert found["ACME_LEVEL"]["origin"] == "tensorferry, for well"
    assert "MC_LOG_LEVEL" in found


# ---- what cannot be asked ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ["--peer", "foo"],
        ["--peer", "http://x:1"],
        ["--peer", "127.0.0.1:99999"],
        ["--peer", "127.0.0.1:0"],
        ["--peer", "ipc:///tmp/x"],
        ["--peer", "inproc://x"],
        ["--peer", "tcp://127.0.0.1:1", "--require", "magic"],
        ["--transport", "tcp"],
        ["--timeout", "99999999999", "--peer", "tcp://127.0.0.1:1"],
    ],
)
def test_what_cannot_be_asked_is_wrong_usage_at_once(args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "run_child", None)  # nothing is asked
    try:
        status = cli.main(["transports", *args])
    except SystemExit as ended:
        status = int(str(ended.code))
    assert status == 2
