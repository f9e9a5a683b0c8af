"""What threads that call an engine have in common: their round, and how posts end.

How a peer is met, what is submitted at a time and what is done about a failure differ between engines, and are theirs.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from tensorferry.backends._engine_jobs import Job, Target
from tensorferry.backends._inbox import Inbox
from tensorferry.backends._waking import wake_owner
from tensorferry.core.transport import Status

POLL_S = 0.0005
"""Between two looks at what is under way. Looking costs the GIL: a spin here would take a core from the application."""

WATCH_S = 0.1
"""Between two looks at peers of whom a post's outcome is not known."""

LINGER_S = 0.5
"""How long the end waits for what is under way. What takes longer is with peers that do not answer."""


class Bell:
    """Wakes the owner of a transport when a handle's status has changed."""

    def __init__(self, log: logging.Logger) -> None:
        self.wake: Callable[[], None] | None = None
        self.log = log

    def ring(self) -> None:
        wake_owner(self.wake, self.log)

    def finish(self, job: Job[Any, Any], status: Status) -> None:
        """The last status of a job of which nothing is under way any more, and nothing will be."""
        job.status = status
        job.keep = ()
        self.ring()


T = TypeVar("T", bound=Target)
J = TypeVar("J", bound=Job[Any, Any])


class EngineThread(ABC, Generic[T, J]):
    """One thread, and the peers that it serves: round-robin between them, one submit at a time."""

    def __init__(self, name: str, window: int, bell: Bell, log: logging.Logger) -> None:
        """`window`: most submits under way to one peer. The subclass starts `thread`."""
        self.inbox: Inbox[Any] = Inbox()
        """None ends a wait."""
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._bell = bell
        self.log = log
        self._window = window
        self._targets: list[T] = []
        self._turn = 0
        self._lost: list[J] = []

    # ---- what differs ------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def stopping(self) -> bool:
        """The transport closes."""

    @abstractmethod
    def _take(self, what: Any) -> None:
        """Take in what lay in the inbox."""

    @abstractmethod
    def _pause(self) -> float | None:
        """Seconds until there is something to do; None: not before something comes."""

    @abstractmethod
    def _step(self, now: float) -> None:
        """Look at what is under way and submit what can be."""

    @abstractmethod
    def _poll(self, target: T, now: float) -> None:
        """Look at what is under way to one peer."""

    @abstractmethod
    def _submit(self, target: T) -> None:
        """Hand the next part of the next job to the engine."""

    @abstractmethod
    def _wind_up(self) -> None:
        """The last thing that this thread does."""

    # ---- the round ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self.stopping:
                try:
                    self._take_all(self._pause())
                    self._step(time.monotonic())
                except Exception:  # one peer's trouble must not end the thread that serves others
                    self.log.exception("%s met an error of its own", self.thread.name)
                    time.sleep(WATCH_S)
        finally:
            self._wind_up()

    def _take_all(self, timeout: float | None = 0.0) -> None:
        """Take in what came, or comes within `timeout` seconds."""
        for what in self.inbox.take(timeout):
            self._take(what)

    def _submit_one_each(self) -> bool:
        """One submit for each peer that has room. False: none had any."""
        some = False
        count = len(self._targets)
        for n in range(count):
            target = self._targets[(self._turn + n) % count]
            if target.ready and target.jobs and len(target.under_way) < self._window and not self.stopping:
                self._submit(target)
                some = True
        self._turn += 1
        return some

    def _linger(self) -> None:
        """At the end: wait a little for what is under way."""
        until = time.monotonic() + LINGER_S
        while any(target.under_way for target in self._targets) and time.monotonic() < until:
            for target in self._targets:
                self._poll(target, time.monotonic())
            time.sleep(POLL_S)

    # ---- how posts end -----------------------------------------------------------------------------------

    def _give_up(self, target: T, why: str, which: Callable[[J], bool] = lambda job: True) -> None:
        """Submit no more of the jobs that wait."""
        jobs = [job for job in target.jobs if which(job)]
        if jobs:
            self.log.warning("%d posts to %s fail: %s", len(jobs), target.name, why)
        for job in jobs:
            self._drop(job)

    def _drop_cancelled(self, target: T) -> None:
        for job in [job for job in target.jobs if job.cancelled]:
            self._drop(job)

    def _drop(self, job: J) -> None:
        """Submit no more of a job."""
        job.target.jobs.remove(job)
        job.parts.clear()
        job.dropped = True
        self._settle(job)

    def _lose(self, job: J, why: str) -> None:
        """Nobody knows what has landed of it. What of it is under way ends as it does."""
        if job.status is not Status.UNKNOWN:
            self.log.warning("the outcome of a post to %s is not known: %s", job.target.name, why)
            job.parts.clear()
            if job in job.target.jobs:
                job.target.jobs.remove(job)
            self._lost.append(job)
            job.status = Status.UNKNOWN
            self._bell.ring()

    def _settle(self, job: J) -> None:
        """Give a job that is over its last status. A lost one has its own."""
        if job.quiet and job.status is Status.PENDING:
            self._bell.finish(job, Status.FAILED if job.dropped else Status.DONE)
        elif job.quiet:
            self._bell.ring()  # its source is free

    def _watch_lost(self) -> None:
        """Wake the owner when the death of a peer drains what was not known of."""
        for job in [job for job in self._lost if job.drained]:
            self._lost.remove(job)
            if job.quiet:
                job.keep = ()
            self._bell.ring()
