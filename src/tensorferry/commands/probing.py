"""Running a module of ours in a child process, to ask what an engine is needed for.

An engine that crashes or hangs while it is imported, probed or opened is then an answer like any other, and nothing
that it prints, forks or leaves behind stays with the command that asks.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import IO, Any, TypeVar

from tensorferry.commands.interrupts import all_as_interrupt
from tensorferry.commands.output import MissingExtra
from tensorferry.core.children import end_in_words, nameless_file
from tensorferry.core.errors import FerryError, from_code
from tensorferry.core.setting_values import seconds as seconds_of
from tensorferry.core.transport import Probe, Readiness

DEFAULT_SECONDS = 30.0
"""Longest wait for one answer. Importing an engine takes seconds; a probe itself must not take long."""

LONGEST_SECONDS = 3600.0

AT_ONCE = 4

NOT_STARTED = "It is no transport's fault: look at the limits of processes and memory (`ulimit -a`)"
"""What helps where a child could not be started."""

_PR_SET_PDEATHSIG = 1
"""From <linux/prctl.h>."""

Answer = TypeVar("Answer")


def add_timeout(parser: argparse.ArgumentParser, what: str) -> None:
    """The flag that bounds each answer."""
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=DEFAULT_SECONDS,
        metavar="SECONDS",
        help=f"{what} (default %(default)g)",
    )


def _seconds(given: str) -> float:
    try:
        value = seconds_of(given)
    except ValueError:
        value = 0.0
    if not 0 < value <= LONGEST_SECONDS:
        raise argparse.ArgumentTypeError(f"{given!r} is not a time between 0 and {LONGEST_SECONDS:g} seconds")
    return value


# ---- in the command ----------------------------------------------------------------------------------------------


def ask_each(names: Iterable[str], ask: Callable[[str], Answer]) -> dict[str, Answer]:
    """`ask` of each name, several at a time; one after the other where no thread can be had. An interrupt ends all the
    children at once. Raises what `ask` raises."""
    asked = list(dict.fromkeys(names))
    waiting = deque(asked)
    answers: dict[str, Answer] = {}
    raised: list[Exception] = []

    def work() -> None:
        while waiting and not raised:
            try:
                name = waiting.popleft()
            except IndexError:  # another one was quicker
                return
            try:
                answers[name] = ask(name)
            except Exception as error:  # noqa: BLE001 - it is raised where all of this was asked for
                raised.append(error)

    helpers = []
    with all_as_interrupt():
        try:
            for _ in range(min(AT_ONCE, os.cpu_count() or 1, len(asked)) - 1):
                helper = threading.Thread(target=work, name="tensorferry-asking", daemon=True)
                try:
                    helper.start()
                except RuntimeError:  # the limit of processes and threads is reached: those that there are do it
                    break
                helpers.append(helper)
            work()
            for helper in helpers:
                helper.join()
        except BaseException:
            waiting.clear()
            for child in list(_running):
                _end(child)
            raise
    if raised:
        raise raised[0]
    return {name: answers[name] for name in asked}


@dataclass(frozen=True)
class Ended:
    """What became of a child: all that it said, and `how` it ended, if not well."""

    said: bytes
    how: str = ""
    last_words: str = ""
    """The last line that it, or an engine in it, wrote to standard error; not where that is shown anyway."""
    started: bool = True


_running: set[subprocess.Popen[bytes]] = set()


def run_child(module: str, *args: str, seconds: float, debug: bool = False) -> Ended:
    """Run a module in a process of its own for at most so long. Nothing of it is left afterwards, also where the
    command is interrupted; and where the command is killed, the kernel ends the child. Never raises but for that."""
    try:
        return _run_child(module, *args, seconds=seconds, debug=debug)
    except OSError as error:  # no more processes, no memory, an interpreter that this user may not run
        return Ended(b"", f"could not be started: {error}", started=False)


def _run_child(module: str, *args: str, seconds: float, debug: bool) -> Ended:
    with (
        all_as_interrupt(),
        nameless_file() as words,
        subprocess.Popen(
            # -P: nothing is imported from the working directory
            [sys.executable, "-P", "-m", module, str(os.getpid()), *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=None if debug else words,
            start_new_session=True,
        ) as child,
    ):
        how = ""
        _running.add(child)
        try:
            said, _ = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired as late:
            said, how = late.output or b"", f"gave no answer within {seconds:g} s"
        finally:
            _end(child)
            _running.discard(child)
        if not how and child.returncode:
            how = end_in_words(child.returncode)
        return Ended(said, how, _last_line(words))


def _last_line(file: IO[bytes]) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 4096))
    lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child and whatever it has started in its session. Without an effect where all have ended."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def parse(answer: bytes) -> Probe:
    try:
        told = json.loads(answer)
        facts = {one_line(name): one_line(value) for name, value in told["facts"].items()}
        reason, hint, path = (one_line(told[name]) for name in ("reason", "hint", "path"))
        return Probe(Readiness(told["readiness"]), reason, hint, facts, path)
    except (ValueError, KeyError, TypeError, AttributeError):
        return Probe(Readiness.BROKEN, f"its probe answered {answer[:80]!r}")


def error_of(told: Mapping[str, Any]) -> FerryError:
    """An error that a child has told by its `as_dict`, as its own class again."""
    error: FerryError
    if told["code"] == MissingExtra.code:
        error = MissingExtra(told["cause"])
    else:
        error = from_code(told["code"], told["cause"], room=told["room"], peer=told["peer"])
    error.hint, error.transport = told["hint"], told["transport"]
    error.memory_reusable = told["memory_reusable"]
    return error


def one_line(words: str) -> str:
    """What an engine says may have lines, and colours; a row of a table has not."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(words.split()))


# ---- in the child ------------------------------------------------------------------------------------------------


def begin() -> tuple[IO[str], list[str]]:
    """What a child that `run_child` has started does first: it lives no longer than the command, and standard output is
    its own. The way to answer, and the arguments."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(sys.argv[1]):  # the command has ended before that held
        os._exit(1)
    return reserve_stdout(), sys.argv[2:]


def reserve_stdout() -> IO[str]:
    """Keep standard output for this process's own words, and send what others print there to standard error."""
    own = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return own


def told(answer: Probe) -> dict[str, Any]:
    """An answer as `parse` reads it."""
    return asdict(answer) | {"facts": {str(key): str(value) for key, value in answer.facts.items()}}
