"""One side in a process of its own, told what to do one JSON line at a time. Run as a program by the tests."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from scenario_kit import SMALL, assert_same, books, rows

import tensorferry as tf
from tensorferry.backends import _copier, _tcp_link
from tensorferry.backends._mooncake_engine import Engine
from tensorferry.backends._nixl_engine import Agent, Request


class Side:
    def __init__(self, role: str, **settings: Any) -> None:
        self.role = role
        self.end: Any = tf.Sender(SMALL, **settings) if role == "sender" else tf.Receiver(SMALL, **settings)
        self.transfers: dict[int, Any] = {}
        self.given: dict[int, Any] = {}
        self._brake = threading.Event()
        self._held = threading.Event()

    def address(self) -> str:
        return str(self.end.address)

    def send(self, room: int, total: int, seed: int = 0, content_id: str | None = None) -> None:
        named = bytes.fromhex(content_id) if content_id else None
        self.given[room] = rows(total, seed, SMALL)
        self.transfers[room] = self.end.send(room, content_id=named, **self.given[room])

    def announce(self, room: int, total: int, ready: int, seed: int = 0, content_id: str | None = None) -> None:
        """Announce all, put the first `ready` rows."""
        named = bytes.fromhex(content_id) if content_id else None
        self.given[room] = rows(total, seed, SMALL)
        self.transfers[room] = self.end.announce(room, total, content_id=named)
        self.transfers[room].put(0, **{name: tensor[:ready] for name, tensor in self.given[room].items()})

    def put(self, room: int, start: int) -> None:
        """The rest."""
        self.transfers[room].put(start, **{name: tensor[start:] for name, tensor in self.given[room].items()})

    def receive(self, room: int, sender: str) -> None:
        self.transfers[room] = self.end.receive(room, sender)

    def wait(self, room: int, timeout: float = 30) -> None:
        self.transfers[room].wait(timeout)

    def check(self, room: int, total: int, seed: int = 0) -> None:
        """Wait for the result and compare it with what `send` sends."""
        assert_same(self.transfers[room].result(30), rows(total, seed, SMALL))

    def sent_tokens(self, room: int, least: int) -> int:
        """Wait until at least so many have arrived."""
        deadline = time.monotonic() + 30
        while self.transfers[room].sent_tokens < least:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        return int(self.transfers[room].sent_tokens)

    def hold_copies(self) -> None:
        """From now on a copy stops before its first byte, and goes on with `let_go`."""
        move = _copier.memmove

        def held(destination: int, source: int, nbytes: int) -> object:
            self._held.set()
            assert self._brake.wait(60)
            return move(destination, source, nbytes)

        _copier.memmove = held  # type: ignore[assignment]
        submit = Engine.submit

        def held_submit(engine: Engine, session: str, source: int, target: int, nbytes: int) -> int:
            self._held.set()
            assert self._brake.wait(60)
            return submit(engine, session, source, target, nbytes)

        Engine.submit = held_submit  # type: ignore[method-assign]
        request = Agent.submit

        def held_request(agent: Agent, one: Request) -> bool:
            self._held.set()
            assert self._brake.wait(60)
            return request(agent, one)

        Agent.submit = held_request  # type: ignore[method-assign]
        transmit = _tcp_link.transmit

        def held_transmit(connection: socket.socket, buffers: Sequence[memoryview | bytes]) -> int:
            self._held.set()
            assert self._brake.wait(60)
            return transmit(connection, buffers)

        _tcp_link.transmit = held_transmit

    def until_held(self) -> None:
        assert self._held.wait(30), "no copy came"

    def let_go(self) -> None:
        self._brake.set()

    def books(self) -> dict[str, Any]:
        return books(self.end)

    def free_blocks(self) -> int:
        return int(self.end.free_blocks)

    def close(self) -> None:
        self.end.close()


def main() -> None:
    side = Side(**json.loads(sys.argv[1]))
    for line in sys.stdin:
        verb, arguments = json.loads(line)
        try:
            answer = {"value": getattr(side, verb)(**arguments)}
        except Exception as error:  # noqa: BLE001 - told to the test
            answer = {"error": getattr(error, "code", type(error).__name__), "text": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
