"""How the demo's processes talk: JSON lines, orders in through standard input, events out through standard output.

Standard input is also the lifeline: it ends when the demo ends, however that came about, and the side ends with it.
An engine that prints to standard output cannot disturb the events: they go through a copy of it, and the original is
pointed at standard error.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from typing import IO, Any

from tensorferry.commands.probing import reserve_stdout

GRACE_SECONDS = 3.0
"""A side whose lifeline has ended gets this long to close what it holds, then it exits where it stands."""


class LifelineEnded(Exception):
    """The demo has ended, or has said that this side may go."""


class Line:
    """A side's end of the line to the demo."""

    def __init__(self, source: IO[str], sink: IO[str]) -> None:
        self._source = source
        self._sink = sink
        self._orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._ended = threading.Event()
        threading.Thread(target=self._listen, name="tensorferry-demo-lifeline", daemon=True).start()

    @classmethod
    def of_this_process(cls) -> Line:
        return cls(sys.stdin, reserve_stdout())

    def _listen(self) -> None:
        for text in self._source:
            self._orders.put(json.loads(text))
        self._ended.set()
        self._orders.put({})
        threading.Event().wait(GRACE_SECONDS)
        os._exit(1)

    def tell(self, event: str, **facts: Any) -> None:
        """Send one event. Raises LifelineEnded where nobody listens any more."""
        try:
            self._sink.write(json.dumps({"event": event, **facts}) + "\n")
            self._sink.flush()
        except BrokenPipeError:
            raise LifelineEnded from None

    def order(self) -> dict[str, Any]:
        """Wait for the next order. Raises LifelineEnded."""
        order = self._orders.get()
        if not order:
            raise LifelineEnded
        return order

    def check(self) -> None:
        """Raises LifelineEnded once the demo has ended. Cheap: called at every tick."""
        if self._ended.is_set():
            raise LifelineEnded
