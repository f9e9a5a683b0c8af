"""A side in another process, for tests: asks it, stops it, kills it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import warm

PROGRAM = Path(__file__).with_name("side_process.py")

PATIENCE_S = 60


class Failed(Exception):
    """The other process answered with an error; `code` is a FerryError's code, or the exception's name."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code


class Side:
    def __init__(self, role: str, **settings: Any) -> None:
        told = json.dumps({"role": role, "transport": "shm", **settings})
        self._process = warm.Popen(
            [sys.executable, str(PROGRAM), told],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(PROGRAM.parent.parent)},
        )

    def tell(self, verb: str, **arguments: Any) -> None:
        """Ask without waiting for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([verb, arguments]) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE_S)
        assert ready, "no answer"
        answer = json.loads(self._process.stdout.readline())
        if "error" in answer:
            raise Failed(answer["error"], answer["text"])
        return answer["value"]

    def ask(self, verb: str, **arguments: Any) -> Any:
        self.tell(verb, **arguments)
        return self.answer()

    @property
    def address(self) -> str:
        return str(self.ask("address"))

    def signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(PATIENCE_S)

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
        self._process.wait(PATIENCE_S)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
