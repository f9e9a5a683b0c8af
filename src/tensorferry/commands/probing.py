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
from dataclasses import asdict
from typing import IO

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


def _probe(name: str, seconds: float, debug: bool) -> Probe:
    with subprocess.Popen(
        [sys.executable, "-P", "-m", __spec__.name, name],  # -P: nothing is imported from the working directory
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=None if debug else subprocess.DEVNULL,
        start_new_session=True,
    ) as child:
        try:
            answer, _ = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return Probe(
                Readiness.BROKEN,
                f"its probe gave no answer within {seconds:g} s",
                "`tensorferry transports --debug` shows what it prints; `--timeout` waits longer",
            )
        finally:
            _end(child)
    if child.returncode == 0:
        return _parse(answer)
    how = f"ended with status {child.returncode}"
    if child.returncode < 0:
        how = f"was ended by {signal.Signals(-child.returncode).name}"
    return Probe(Readiness.BROKEN, f"its probe {how}", "`tensorferry transports --debug` shows what it prints")


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child and whatever it has started in its session. Without an effect where all have ended."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _parse(answer: bytes) -> Probe:
    try:
        told = json.loads(answer)
        return Probe(Readiness(told["readiness"]), told["reason"], told["hint"], told["facts"], told["path"])
    except (ValueError, KeyError, TypeError):
        return Probe(Readiness.BROKEN, f"its probe answered {answer[:80]!r}")


def main() -> int:
    own = reserve_stdout()
    from tensorferry.plugins import registry

    answer = registry.probe(sys.argv[1])
    facts = {str(key): str(value) for key, value in answer.facts.items()}
    json.dump(asdict(answer) | {"facts": facts}, own)
    own.flush()
    os._exit(0)  # an engine's threads or destructors cannot change the answer any more


if __name__ == "__main__":
    sys.exit(main())
