"""The connections of a peer that no write has used, completed before they are ended.

The engine connects each of its workers to a peer, and a thread of ours writes through one of them. UCX numbers the
connections on both sides. Where one is ended before the peer has answered it, the numbers differ from then on: every
later one the peer answers by a connection of its own, of which this side does not know that it is that peer's, and
nobody ends it (seen: 14 to 64 sockets after 40 times connect and disconnect on a busy host, and none with one worker).
So before a living peer is forgotten a byte is written to its doorstep through each worker: then all are complete.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from tensorferry.backends._nixl_engine import Agent, Request
from tensorferry.backends._nixl_jobs import Target

log = logging.getLogger("tensorferry.backends.nixl")


@dataclass(eq=False, slots=True)
class Wireup:
    """One thread's part: the byte goes through the engine's worker that is the thread's."""

    target: Target
    until: float
    """When it is given up, by `time.monotonic`."""
    tell: Callable[[], None]
    """Called when it is over."""
    request: Request | None = None
    over: bool = False


class Wireups:
    """Those that one thread has to do."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._some: list[Wireup] = []

    def __bool__(self) -> bool:
        return bool(self._some)

    def add(self, wireup: Wireup) -> None:
        self._some.append(wireup)

    def step(self) -> None:
        for wireup in list(self._some):
            if self._over(wireup):
                if wireup.request is not None:
                    self._agent.release(wireup.request)
                wireup.over = True
                self._some.remove(wireup)
                wireup.tell()

    def _over(self, wireup: Wireup) -> bool:
        told = wireup.target.told
        try:
            if wireup.request is None:
                wireup.request = self._agent.prepare(told.agent, [(self._agent.doorstep, told.doorstep, 1)])
                return self._agent.knock(wireup.request) or wireup.target.ended()
            return self._agent.look(wireup.request) or wireup.target.ended() or time.monotonic() > wireup.until
        except Exception as error:  # noqa: BLE001 - it has failed, or it was forgotten meanwhile: nothing to complete
            log.debug("a connection to %s is not completed: %s", told.agent, error)
            return True
