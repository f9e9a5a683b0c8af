"""A real etcd for tests: one member, on ports of its own, with its data in a folder that goes with the test."""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import tensorferry as tf
from tensorferry import errors

PATIENCE = 30.0
"""Seconds. A bound on a hang; no step waits for it."""


def program() -> str:
    """scripts/setup puts it beside the interpreter where it is not installed."""
    found = shutil.which("etcd") or shutil.which("etcd", path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip("needs etcd: the server is not installed (Debian: etcd-server)")
    return found


def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)


def free_port() -> int:
    """Not one that outgoing connections are given: it has to be free again for a restart."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class Etcd:
    """`start` returns when it answers; `kill` is SIGKILL. `wipe` between the two forgets everything."""

    def __init__(self, folder: Path, *flags: str, scheme: str = "http") -> None:
        self.folder = folder
        self.flags = flags
        self.scheme = scheme
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"etcd://127.0.0.1:{self.port}"

    def start(self) -> None:
        for _ in range(5):
            self.port = self.port or free_port()
            self._start()
            if self._answers():
                return
            self.kill()
            self.port = 0
        raise AssertionError(f"etcd does not start: {(self.folder / 'log').read_text()[-2000:]}")

    def _start(self) -> None:
        client, peer = f"{self.scheme}://127.0.0.1:{self.port}", "http://127.0.0.1:0"
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    program(), "--data-dir", str(self.folder / "data"), "--unsafe-no-fsync",
                    "--heartbeat-interval", "50", "--election-timeout", "500",
                    "--listen-client-urls", client, "--advertise-client-urls", client,
                    "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
                    "--initial-cluster", f"default={peer}", *self.flags,
                ],
                stdout=log, stderr=log,
            )  # fmt: skip

    def _answers(self) -> bool:
        """False where it has ended instead."""
        assert self._process is not None
        end = time.monotonic() + PATIENCE
        while self._process.poll() is None and time.monotonic() < end:
            try:
                with socket.create_connection(("127.0.0.1", self.port), 1):
                    pass
                if self.scheme == "https":
                    return True
                with tf.open_directory(self.url) as directory:
                    directory.lookup("is-there-a-leader")
            except (OSError, errors.DirectoryUnavailable):
                time.sleep(0.05)
            except errors.UnknownName:
                return True
        return False

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def wipe(self) -> None:
        shutil.rmtree(self.folder / "data")
