"""Who may call the engine while somebody else is inside it.

The engine guards an agent by a lock: posting and looking hold it shared, registering, learning of a peer and forgetting
one alone. Its binding keeps the GIL in some of the latter. So one post that does not come back (a copy into memory
whose page fault nobody serves) would hold whoever registers next, for ever, or with the GIL the whole process. Here
that one waits in Python, for a bounded time, and only goes in when nobody is inside.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

ALONE_S = 2.0
"""How long who wants to be alone waits for those inside. A post is over within milliseconds; whoever has been inside
for longer already is not waited for."""


class Held(Exception):
    """Somebody inside does not come back. Nothing was done."""


class Gate:
    """Many may be inside, or one alone. Whoever wants to be alone goes before those that come after."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._among: dict[object, float] = {}  # since when each is inside, by `time.monotonic`
        self._alone = math.inf  # since when somebody is; infinite: nobody
        self._wanted = 0  # how many are or want to be alone

    @contextmanager
    def among(self) -> Iterator[None]:
        """Inside with others. Waits for whoever is or wants to be alone."""
        me = object()
        with self._changed:
            while self._wanted:
                self._changed.wait()
            self._among[me] = time.monotonic()
        try:
            yield
        finally:
            with self._changed:
                del self._among[me]
                self._changed.notify_all()

    @contextmanager
    def alone(self, *, patient: bool = False) -> Iterator[None]:
        """Inside with nobody else. Raises Held where somebody has been inside for `ALONE_S`. `patient`: not if that one
        is alone: to pin much memory may take long, and comes to its end."""
        with self._changed:
            self._wanted += 1
            try:
                self._await_nobody(patient)
            except BaseException:
                self._wanted -= 1
                self._changed.notify_all()
                raise
            self._alone = time.monotonic()
        try:
            yield
        finally:
            with self._changed:
                self._alone = math.inf
                self._wanted -= 1
                self._changed.notify_all()

    def _await_nobody(self, patient: bool) -> None:
        while self._among or self._alone < math.inf:
            since = min(self._among.values(), default=math.inf)
            since = since if patient else min(since, self._alone)
            took = time.monotonic() - since
            if took >= ALONE_S:
                raise Held(f"a call of NIXL's does not come back, it has taken {took:.1f} s so far")
            self._changed.wait(ALONE_S - took if since < math.inf else None)
