"""What follows contact: whether the engine reaches a peer that has answered us. Over TCP only.

The engine keeps a few connections to a peer, which may be dead without its knowledge; what meets such a one fails. And
when the last that was open is lost, or several are in one turn of the engine's thread (as by the progress time-out,
when the thread comes late), the engine fails whatever is submitted next, at once and however much later. It says -1
for all this as it does for a write of which nobody knows how far it came. So something is read before anything is
written: a read that fails has done nothing.

What is read is the peer's token: it says who answers. A process that was started anew can have the ports of the one
before it, and even its addresses; the engine's own handshake does not tell the two apart.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

from tensorferry.backends._mooncake_engine import Engine

READ_AGAIN_S = 0.1
"""Between two tries."""

HELD_BACK_S = 1.5
"""The engine holds a request back for 1 s after it has lost a peer, before it connects anew."""


class Trial:
    """One peer's. `works` or `error` say how it went, once it is over."""

    def __init__(self, engine: Engine, token: bytes, lanes: int, patience_s: float) -> None:
        """`token`: the peer's; `lanes`: the engine's connections to a peer; `patience_s`: how long the peer may take
        for its part."""
        self.works = False
        self.error = ""
        self.reading = 0
        """The engine's id of the read that is under way, or 0. This object has to live until it is over."""
        self._engine = engine
        self._token = token
        self._read = (ctypes.c_ubyte * len(token))()
        self._failures_left = lanes + 1  # each by a dead connection, and one by having none
        self._patience_s = patience_s + HELD_BACK_S
        self._since = self._not_before = time.monotonic()

    def pause(self, now: float) -> float:
        """Seconds until the next try."""
        return max(0.0, self._not_before - now)

    def step(self, begin: Callable[[int], int]) -> None:
        """`begin` has the engine read the token to this address."""
        now = time.monotonic()
        if self.reading:
            self._look(now)
        elif now >= self._not_before:
            self.reading = begin(ctypes.addressof(self._read))
            self._since = time.monotonic()
            if not self.reading:
                self.error = "it answered us, and then not the engine"

    def _look(self, now: float) -> None:
        code = self._engine.status(self.reading)
        if code in (1, -1):
            self.reading = 0
        self.works = code == 1 and bytes(self._read) == self._token
        if code == 1 and not self.works:
            self.error = "another engine has its ports by now"
        elif code == -1:
            self._not_before = now + READ_AGAIN_S
            self._failures_left -= 1
            if self._failures_left < 0:
                self.error = "it answers, and the engine cannot read its token"
        elif not self.works and now > self._since + self._patience_s:
            self.error = f"it answered, and the engine has not read its token within {now - self._since:.1f} s"
