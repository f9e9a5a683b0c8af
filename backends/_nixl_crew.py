"""The threads of one nixl transport, and the agent that they share."""

from __future__ import annotations

import logging
import os
import threading
import time

from tensorferry.backends import _engine_thread
from tensorferry.backends._nixl_engine import Agent
from tensorferry.backends._nixl_jobs import Bell, Job, Target
from tensorferry.backends._nixl_poster import Limits, Worker
from tensorferry.backends._nixl_wireup import Wireup
from tensorferry.core.transport import Status

log = logging.getLogger("tensorferry.backends.nixl")


class Crew:
    """The threads of one transport, and the agent that they share: the last one to end destroys it."""

    def __init__(self, agent: Agent, limits: Limits, workers: int) -> None:
        self.agent = agent
        self.limits = limits
        self.bell: _engine_thread.Bell = Bell(log)
        self._pid = os.getpid()
        # Reentrant: `stop` may be called by the garbage collector in the middle of another call.
        self._lock = threading.RLock()
        self._stopping = False
        self._assigned = 0
        self._left = workers
        self.workers = [Worker(self) for _ in range(workers)]
        for worker in self.workers:
            worker.thread.start()

    # ---- called by the transport -------------------------------------------------------------------------

    def write(self, job: Job) -> None:
        """Queue a post. It is FAILED at once after `stop`, so that none is left behind by a race with it, and where the
        peer's thread does not come back from the engine."""
        with self._lock:
            if not self._stopping:
                worker = self._worker(job.target)
                if not worker.hangs():
                    worker.hand(job)
                    return
                worker.abandon()  # where this is the only thread no other one has looked
        self.bell.finish(job, Status.FAILED)

    def forget(self, target: Target) -> None:
        """The peer was disconnected: what is posted goes on to its end, and then the engine may drop it."""
        with self._lock:
            if not self._stopping:
                self._worker(target).inbox.put(target)

    def nudge(self) -> None:
        for worker in self.workers:
            worker.inbox.put(None)

    def stuck(self) -> bool:
        """A thread does not come back from the engine: no call that waits for all of them may be made."""
        return any(worker.hangs() for worker in self.workers)

    def stop(self) -> None:
        """Ask the threads to end, and the agent with them."""
        if os.getpid() != self._pid:  # a forked child drops us; the threads do not exist there
            return
        with self._lock:
            self._stopping = True
        self.nudge()

    def close(self, timeout_s: float) -> bool:
        """`stop`, and wait for it. False: a thread has not come back from the engine; what was with it is UNKNOWN."""
        self.stop()
        deadline = time.monotonic() + timeout_s
        for worker in self.workers:
            worker.thread.join(max(0.0, deadline - time.monotonic()))
        self.bell.wake = None
        hung = [worker for worker in self.workers if worker.thread.is_alive()]
        if hung:
            self.agent.abandon()
            for worker in hung:
                worker.abandon()
        return not hung

    # ---- called by the threads ---------------------------------------------------------------------------

    @property
    def stopping(self) -> bool:
        return self._stopping

    def _worker(self, target: Target) -> Worker:
        if target.place < 0:
            target.place = self._assigned % len(self.workers)
            self._assigned += 1
        return self.workers[target.place]

    def complete(self, target: Target, worker: Worker) -> list[Wireup]:
        """Have the threads other than `worker` complete their connections to a peer."""
        until = time.monotonic() + self.limits.contact_s
        made = []
        for other in self.workers:
            if other is not worker:
                made.append(Wireup(target, until, lambda: worker.inbox.put(None)))
                other.inbox.put(made[-1])
        return made

    def leave(self) -> None:
        """A thread ends. After the last of them the agent is destroyed, and only then is no source read any more: where
        it was abandoned UCX reads on, whatever has become of the threads."""
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last and self.agent.close():
            for worker in self.workers:
                worker.free_sources()

    def look_around(self) -> None:
        """Give up the posts of a thread that does not come back from the engine."""
        for worker in self.workers:
            if worker.hangs():
                worker.abandon()
