"""Starting the demo's sides as processes, hearing what they say, and ending all of them, whatever happens to one.

A side that ends before it was told to, by a crash or by a signal, ends the demo with PeerLost. Every side ends with the
demo: its standard input is a pipe that closes when the demo ends, even when the demo is killed.
"""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from tensorferry.commands import probing
from tensorferry.commands.demo_plan import Plan
from tensorferry.commands.demo_view import View
from tensorferry.commands.demo_wire import GRACE_SECONDS
from tensorferry.core.children import end_in_words, nameless_file
from tensorferry.core.errors import DeadlineExceeded, PeerLost

START_SECONDS = 180.0
"""Longest start of a side: importing torch takes seconds, and many times that on a machine that is busy."""

MARGIN_SECONDS = 60.0
"""On top of transfer_deadline, within which each side ends by itself: for hashing, and for a side that is stopped."""

END_SECONDS = GRACE_SECONDS + 2.0
"""A side that has not ended this long after its lifeline is killed."""

_MODULE = "tensorferry.commands.demo_side"


class Side:
    """One process of the demo."""

    def __init__(self, name: str, plan: Plan, debug: bool, **order: Any) -> None:
        self.name = name
        self.words: IO[bytes] | None = None if debug else nameless_file()  # closed by release
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", _MODULE],  # -P: whatever lies in the working directory is not ours to import
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.words,
            start_new_session=True,  # Ctrl-C reaches the demo alone, which then ends its sides
        )
        self.listener: threading.Thread | None = None
        self.order(plan=plan.as_dict(), debug=debug, **order)

    def order(self, **order: Any) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # a side that has ended is noticed where its events end
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()

    def listen(self, events: queue.Queue[tuple[Side, dict[str, Any] | None]]) -> None:
        """Put every event of this side into the queue, and None at its end."""

        def run() -> None:
            assert self.process.stdout is not None
            for line in self.process.stdout:
                events.put((self, json.loads(line)))
            events.put((self, None))

        self.listener = threading.Thread(target=run, name=f"tensorferry-demo {self.name}", daemon=True)
        self.listener.start()

    def hang_up(self) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def last_words(self, most: int = 3) -> str:
        """The last lines of its standard error."""
        if self.words is None:
            return ""
        self.words.seek(0)
        return " | ".join(self.words.read().decode(errors="replace").strip().splitlines()[-most:])

    def lost(self) -> PeerLost:
        """The error that this side's unexpected end stands for."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS)
        status = self.process.returncode
        how = "closed its output" if status is None else end_in_words(status)
        said = self.last_words()
        return PeerLost(
            f"the {self.name} (process {self.process.pid}) {how} before every room was done",
            hint=f"It last said: {said}" if said else "Start the demo again; `--debug` shows what each side logs",
        )

    def release(self) -> None:
        """Close what this process holds of an ended side."""
        if self.listener is not None:
            self.listener.join()
        for stream in (self.process.stdout, self.words):
            if stream is not None:
                stream.close()


class Sides:
    """The embedding side and every language side of one run."""

    def __init__(self) -> None:
        self._events: queue.Queue[tuple[Side, dict[str, Any] | None]] = queue.Queue()
        self._all: list[Side] = []

    def start(self, plan: Plan, debug: bool) -> None:
        self.embedding = self._start("embedding side", plan, debug, side="embedding")
        self.language = [
            self._start(
                "language side" if plan.ranks == 1 else f"language side, rank {rank}",
                plan,
                debug,
                side="language",
                rank=rank,
            )
            for rank in range(plan.ranks)
        ]

    def _start(self, name: str, plan: Plan, debug: bool, **order: Any) -> Side:
        side = Side(name, plan, debug, **order)
        self._all.append(side)
        side.listen(self._events)
        return side

    def events(self, seconds: float, waiting_for: str) -> Iterator[tuple[Side, dict[str, Any]]]:
        """What the sides say, for `seconds` at most. Raises the error that a side reports, PeerLost for one that
        ends, DeadlineExceeded."""
        last = time.monotonic() + seconds
        while True:
            try:
                side, event = self._events.get(timeout=max(0.0, last - time.monotonic()))
            except queue.Empty:
                raise DeadlineExceeded(f"{waiting_for} took longer than {seconds:g} s") from None
            if event is None:
                raise side.lost()
            if event["event"] == "error":
                raise probing.error_of(event["error"])
            yield side, event

    def end(self) -> None:
        """End every side: those that are well by themselves, the others within END_SECONDS."""
        for side in self._all:
            side.hang_up()
        last = time.monotonic() + END_SECONDS
        try:
            for side in self._all:
                with suppress(subprocess.TimeoutExpired):
                    side.process.wait(max(0.0, last - time.monotonic()))
        finally:
            for side in self._all:
                side.process.kill()
                side.process.wait()
                side.release()


def run(plan: Plan, view: View, debug: bool) -> None:
    """Move what the plan says; everything that the sides report goes to the view. Raises the first error."""
    with _terminate_as_interrupt(), _sides(plan, debug) as sides:
        view.started(sides.embedding.process.pid, [side.process.pid for side in sides.language])
        view.ready(*_meet(sides, plan))
        working = {sides.embedding, *sides.language}
        for side, event in sides.events(plan.settings["transfer_deadline"] + MARGIN_SECONDS, "the transfer"):
            kind = event.pop("event")
            if kind == "round":
                view.round(event)
            elif kind == "room":
                view.room(event)
            elif kind == "done":
                view.done(None if side is sides.embedding else sides.language.index(side), event)
                working.remove(side)
            if not working:
                break
        for side in (sides.embedding, *sides.language):
            side.order(end=True)


def _meet(sides: Sides, plan: Plan) -> tuple[str, list[dict[str, Any]]]:
    """Let the sides find each other: followers the leader, and every language side the embedding side."""
    missing = {sides.embedding, *sides.language}
    address, digests = "", []
    for side, event in sides.events(START_SECONDS, "the start of both sides"):
        if side is sides.embedding:
            address, digests = event["address"], event["digests"]
        elif side is sides.language[0]:
            for follower in sides.language[1:]:
                follower.order(leader=event["leader"])
        missing.remove(side)
        if not missing:
            break
    for side in sides.language:
        side.order(sender=address)
    return address, digests


@contextmanager
def _sides(plan: Plan, debug: bool) -> Iterator[Sides]:
    sides = Sides()
    try:
        sides.start(plan, debug)
        yield sides
    finally:
        sides.end()


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """While the sides live, SIGTERM ends the demo as Ctrl-C does: sides first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
