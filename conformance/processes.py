"""The other process of a pair, as a check sees it: commands to it, and signals."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from tensorferry.conformance.model import NotApplicable, Violation
from tensorferry.conformance.patience import FACTOR
from tensorferry.conformance.target import Spec, child_environment
from tensorferry.core.errors import TransportMismatch, from_code

T = TypeVar("T")

ANSWER_S = 30.0 * FACTOR


class PeerProcess:
    """A transport in another process. `ask` runs a verb of `conformance.peer` there."""

    def __init__(self, spec: Spec) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "tensorferry.conformance.peer", msgspec.json.encode(spec).decode()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=child_environment(),
            start_new_session=True,
        )
        self._rest = b""

    def tell(self, verb: str, **arguments: object) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(json.dumps([verb, arguments]).encode() + b"\n")

    def hear(self, verb: str, within: float = ANSWER_S) -> Any:
        """The answer to the last `tell`. A FerryError that the verb raised there is raised here."""
        line = self._line(verb, time.monotonic() + within)
        answer = json.loads(line)
        if "ferry" in answer:
            raise from_code(answer["ferry"], answer["cause"])
        if "error" in answer:
            raise Violation(f"in the other process, {verb} raised {answer['error']}")
        return answer["value"]

    def ask(self, verb: str, within: float = ANSWER_S, **arguments: object) -> Any:
        self.tell(verb, **arguments)
        return self.hear(verb, within)

    def describe(self) -> bytes:
        return bytes.fromhex(self.ask("describe"))

    def _line(self, verb: str, deadline: float) -> bytes:
        assert self.popen.stdout is not None
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self.popen.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise Violation(f"the other process gave no answer to {verb} in time")
            piece = os.read(self.popen.stdout.fileno(), 1 << 16)
            if not piece:
                status = self.popen.wait()
                how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
                raise Violation(f"the other process was {how} while it did {verb}")
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def kill(self, *, reap: bool = True) -> None:
        """SIGKILL, and wait for the end. Not reaped, it stays a zombie until `end`, as in a container whose first
        process waits for nobody."""
        self.popen.kill()
        os.waitid(os.P_PID, self.popen.pid, os.WEXITED | os.WNOWAIT)
        if reap:
            self.popen.wait()

    def stop(self) -> None:
        """SIGSTOP, and wait until each of its threads has stopped."""
        os.kill(self.popen.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.popen.pid, os.WSTOPPED)

    def go_on(self) -> None:
        os.kill(self.popen.pid, signal.SIGCONT)

    def end(self) -> None:
        self.popen.kill()
        self.popen.wait()
        for stream in (self.popen.stdin, self.popen.stdout):
            if stream is not None:
                stream.close()


def joined(call: Callable[[], T]) -> T:
    """What `call` (a connect to another process) answers; not applicable where the transport joins no two processes."""
    try:
        return call()
    except TransportMismatch as error:
        raise NotApplicable(f"does not join two processes: {error.cause}") from error
