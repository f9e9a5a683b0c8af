"""What other threads hand to the one that waits for it.

Instead of `queue.SimpleQueue`, whose `get(timeout)` can wait for ever (seen on CPython 3.11 and 3.12): after a `put` it
takes its lock at once and works out how much of the time is left; where none is, because the system ran something else
meanwhile, the negative number that it goes on with means "no limit". With time-outs below a millisecond and a busy
machine that is a matter of minutes. `queue.Queue` is right, and its `put` is not reentrant.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Inbox(Generic[T]):
    """Any thread puts, one takes. `put` is reentrant: the garbage collector may call it in the middle of another."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._bell = threading.Lock()  # free: something has come since the last look
        self._bell.acquire()

    def put(self, item: T) -> None:
        try:
            self._items.append(item)
        finally:
            with contextlib.suppress(RuntimeError):  # it has been rung already
                self._bell.release()

    def take(self, timeout: float | None = 0.0) -> list[T]:
        """All that has come, in its order. Waits for the first of it, at most `timeout` seconds; None: for ever.

        Now and then it is empty before the time is over: what was put had been taken just before its bell was rung.
        """
        if not self._items:
            self._bell.acquire(timeout=-1 if timeout is None else max(0.0, timeout))
        taken = []
        while self._items:
            taken.append(self._items.popleft())
        return taken
