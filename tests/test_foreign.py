"""Transports of others that crash, hang or are interrupted: the commands that ask them answer, and leave nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from command_kit import tensorferry
from foreign_kit import COMMON, Foreign, foreign

from tensorferry.commands import examining, probing
from tensorferry.core.transport import Readiness

__all__ = ["foreign"]  # a fixture

PATIENCE = 60
"""Seconds. A bound on a hang; no step waits for it."""

HANGS = (
    COMMON
    + """
class Hangs(Foreign):
    @classmethod
    def probe(cls):
        alive = os.open(os.environ["ALIVE"], os.O_WRONLY)  # held open by this process and by what it forks
        if os.environ.get("FORKS") and os.fork() == 0:
            threading.Event().wait()
        os.write(alive, b".")
        threading.Event().wait()

class One(Hangs):
    name = "one"

class Two(Hangs):
    name = "two"
"""
)


# ---- interrupted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "forks"),
    [(signal.SIGINT, "yes"), (signal.SIGTERM, "yes"), (signal.SIGHUP, "yes"), (signal.SIGKILL, "")],
)
@pytest.mark.parametrize("command", ["doctor", "transports"])
def test_a_command_that_is_ended_while_probes_hang_ends_at_once_and_leaves_nothing(
    foreign: Foreign, tmp_path: Path, command: str, number: int, forks: str
) -> None:
    env = foreign(HANGS, one="One", two="Two")
    alive = tmp_path / "alive"
    os.mkfifo(alive)
    env |= {"ALIVE": str(alive), "FORKS": forks}
    words = [sys.executable, "-m", "tensorferry", command, *(["one", "two"] if command == "doctor" else [])]
    with subprocess.Popen(
        [*words, "--timeout", "3600"], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        with alive.open("rb", buffering=0) as living:
            assert living.read(1) == b"."
            if (os.cpu_count() or 1) > 1:
                assert living.read(1) == b".", "the other one is asked at the same time"
            process.send_signal(number)
            _, said = process.communicate(timeout=PATIENCE)
            assert living.read() in (b"", b"."), "the end is there when nobody holds the other end any more"
        assert process.returncode == (1 if number != signal.SIGKILL else -number)
        assert said == "" or "interrupted" in said


# ---- ended, and without threads ------------------------------------------------------------------------------------


def test_an_end_by_a_signal_without_a_name_is_a_row(foreign: Foreign) -> None:
    number = signal.SIGRTMIN + 6
    code = f"import os, threading\nos.kill(os.getpid(), {number})\nthreading.Event().wait()\n"
    done = tensorferry("transports", "--format", "json", env=foreign(code, odd="Odd"))
    found = {one["name"]: one for one in json.loads(done.stdout)["transports"]}
    assert f"was ended by signal {number}" in found["odd"]["reason"]
    assert done.returncode == 0


def test_without_threads_each_is_asked_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none_left)
    found = examining.examine_each(["memory", "tcp", "memory"])
    assert {name: one.opened for name, one in found.items()} == {"memory": True, "tcp": True}


def test_what_asking_raises_is_raised_where_it_was_asked_for() -> None:
    def ask(name: str) -> str:
        raise ValueError(name)

    with pytest.raises(ValueError, match=r"one|two"):
        probing.ask_each(["one", "two"], ask)


# ---- refused at opening --------------------------------------------------------------------------------------------

REFUSES = (
    COMMON
    + """
from tensorferry.core.errors import TransportUnavailable

class Refuses(Foreign):
    name = "refuses"
    def __init__(self, options):
        raise TransportUnavailable("no device eth9", hint="Set ACME_DEVICE to one that there is")

class Changes(Foreign):
    name = "changes"
    @classmethod
    def probe(cls):
        return Probe(Readiness.READY, "a card is there", path="rdma")
    def path(self, peer=None):
        return "tcp"
"""
)


def test_what_is_refused_at_opening_is_not_called_usable_and_the_path_is_that_of_the_open_one(foreign: Foreign) -> None:
    done = tensorferry("transports", "--format", "json", env=foreign(REFUSES, refuses="Refuses", changes="Changes"))
    found = {one["name"]: one for one in json.loads(done.stdout)["transports"]}
    assert (found["refuses"]["status"], found["refuses"]["usable"]) == ("broken", False)
    assert "no device eth9" in found["refuses"]["reason"]
    assert found["refuses"]["hint"] == "Set ACME_DEVICE to one that there is"
    assert found["changes"]["path"] == "tcp"
    assert Readiness(found["changes"]["status"]) is Readiness.READY
