"""Asking a transport about this machine in a child process: `python -m tensorferry.commands.probing NAME`.

An engine that crashes or hangs while it is imported or probed is then an answer like any other, and nothing that it
prints, forks or leaves behind stays with the command that asks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import IO, Any

from tensorferry.core.children import end_in_words, nameless_file
from tensorferry.core.transport import Probe, Readiness

DEFAULT_SECONDS = 30.0
"""Longest wait for one answer. Importing an engine takes seconds; a probe itself must not take long."""

AT_ONCE = 4


def reserve_stdout() -> IO[str]:
    """Keep standard output for this process's own words, and send what others print there to standard error."""
    own = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return own


def probe_each(names: Iterable[str], seconds: float = DEFAULT_SECONDS, *, debug: bool = False) -> dict[str, Probe]:
    """What each transport answers. Never raises for what a transport does."""
    asked = list(dict.fromkeys(names))
    with ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1)) as pool:
        return dict(zip(asked, pool.map(lambda name: _probe(name, seconds, debug), asked), strict=True))


@dataclass(frozen=True)
class Ended:
    """What became of a child: all that it said, and `how` it ended, if not well."""

    said: bytes
    how: str = ""
    last_words: str = ""
    """The last line that it, or an engine in it, wrote to standard error; not where that is shown anyway."""


def run_child(module: str, *args: str, seconds: float, debug: bool = False) -> Ended:
    """Run a module in a process of its own for at most so long. Nothing of it is left afterwards. Never raises."""
    try:
        return _run_child(module, *args, seconds=seconds, debug=debug)
    except OSError as error:  # no more processes, no memory, an interpreter that this user may not run
        return Ended(b"", f"could not be started: {error}")


def _run_child(module: str, *args: str, seconds: float, debug: bool) -> Ended:
    with (
        nameless_file() as words,
        subprocess.Popen(
            [sys.executable, "-P", "-m", module, *args],  # -P: nothing is imported from the working directory
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=None if debug else words,
            start_new_session=True,
        ) as child,
    ):
        how = ""
        try:
            said, _ = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired as late:
            said, how = late.output or b"", f"gave no answer within {seconds:g} s"
        finally:
            _end(child)
        if not how and child.returncode:
            how = end_in_words(child.returncode)
        return Ended(said, how, _last_line(words))


def _last_line(file: IO[bytes]) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 4096))
    lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def _probe(name: str, seconds: float, debug: bool) -> Probe:
    ended = run_child(__spec__.name, name, seconds=seconds, debug=debug)
    if not ended.how:
        return parse(ended.said)
    more = "; `--timeout` waits longer" if "no answer" in ended.how else ""
    return Probe(
        Readiness.BROKEN, f"its probe {ended.how}", f"`tensorferry transports --debug` shows what it prints{more}"
    )


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


def one_line(words: str) -> str:
    """What an engine says may have lines, and colours; a row of a table has not."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(words.split()))


def told(answer: Probe) -> dict[str, Any]:
    """An answer as `parse` reads it."""
    return asdict(answer) | {"facts": {str(key): str(value) for key, value in answer.facts.items()}}


def main() -> int:
    own = reserve_stdout()
    from tensorferry.plugins import registry

    json.dump(told(registry.probe(sys.argv[1])), own)
    own.flush()
    os._exit(0)  # an engine's threads or destructors cannot change the answer any more


if __name__ == "__main__":
    sys.exit(main())
