"""The threads that call the engine: each serves some of the peers, and none waits for another.

A thread of its own per peer would be too many, one for all would let each hold up the rest: so a few, and a peer
belongs to one of them for good. The engine copies within the call that posts (between processes of one host), or it
takes the request and has to be asked how it goes. It has no time-out of its own, so the clock is here.

How a post ends. DONE: every request of it ended well, which the engine says when the peer has acknowledged it or the
copy is made. FAILED: some of it was never submitted (the peer did not answer, it was cancelled, the transport closed)
and what was submitted ended well. UNKNOWN: a request raised, or came to no end in time. Then the connection is cut: it
is what ends the engine's reading of the source. What the peer's kernel holds lands when the peer goes on, so only the
end of its process drains such a post.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from tensorferry.backends._engine_thread import POLL_S, WATCH_S, Bell, EngineThread
from tensorferry.backends._host import this_host
from tensorferry.backends._nixl_engine import Agent
from tensorferry.backends._nixl_gate import Held
from tensorferry.backends._nixl_jobs import Job, Submit, Target
from tensorferry.backends._nixl_sockets import own_addresses
from tensorferry.backends._nixl_wireup import Wireup, Wireups
from tensorferry.core.transport import Status

log = logging.getLogger("tensorferry.backends.nixl")

COOLDOWN_S = 0.2
"""After an attempt at contact that failed, until the next one."""

GLANCE_S = 2.0
"""How long a thread sleeps at most: it looks whether another one is stuck in the engine."""

STUCK_S = 10.0
"""A call of the engine that takes longer, beyond the progress time-out, does not come back."""


@dataclass(frozen=True, slots=True)
class Limits:
    window: int
    contact_s: float
    progress_s: float


class Mates(Protocol):
    """What a worker asks of the crew that it belongs to."""

    agent: Agent
    limits: Limits
    bell: Bell

    @property
    def stopping(self) -> bool: ...

    def leave(self) -> None: ...

    def look_around(self) -> None: ...

    def complete(self, target: Target, worker: Worker) -> list[Wireup]: ...


class Worker(EngineThread[Target, Job]):
    """One thread, and the peers that it serves."""

    def __init__(self, crew: Mates) -> None:
        super().__init__("tensorferry-nixl-worker", crew.limits.window, crew.bell, log)
        self.called_at = 0.0
        """Since when it is inside the engine; 0: it is not."""
        self._crew = crew
        self._agent = crew.agent
        self._limits = crew.limits
        self._host = this_host()
        self._wireups = Wireups(self._agent)
        self._handed: list[Job] = []
        """What was queued and not taken."""

    @property
    def stopping(self) -> bool:
        return self._crew.stopping

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Around every call of the engine: any may not come back, or wait for one that does not."""
        before = self.called_at
        self.called_at = before or time.monotonic()
        try:
            yield
        finally:
            self.called_at = before

    # ---- called by other threads -------------------------------------------------------------------------

    def hand(self, job: Job) -> None:
        """Queue a post."""
        self._handed.append(job)
        self.inbox.put(job)

    def hangs(self) -> bool:
        """It does not come back from the engine."""
        return 0 < self.called_at < time.monotonic() - self._limits.progress_s - STUCK_S

    def abandon(self) -> None:
        """This thread does not come back. What it has taken may still land, or not; what it has not is FAILED."""
        taken = [job for target in list(self._targets) for job in [*target.jobs, *[s.job for s in target.under_way]]]
        given_up = [job for job in [*list(self._handed), *taken] if job.give_up()]
        if given_up:
            self._bell.ring()

    # ---- the thread --------------------------------------------------------------------------------------

    def _take(self, what: Job | Target | Wireup | None) -> None:
        if what is None:
            return
        if isinstance(what, Wireup):
            self._wireups.add(what)
            return
        if isinstance(what, Job):
            self._handed.remove(what)
            if not what.take():
                return
        target = what if isinstance(what, Target) else what.target
        target.unwanted = isinstance(what, Target)  # a post after it has been disconnected: it is wanted again
        if isinstance(what, Job):
            target.jobs.append(what)
        if target not in self._targets:
            self._targets.append(target)

    def _pause(self) -> float:
        if self._wireups:
            return POLL_S
        waits = [GLANCE_S]
        now = time.monotonic()
        for target in self._targets:
            waits += [wireup.until - now for wireup in target.wireups or () if target.unwanted and not wireup.over]
            if target.knock is not None or (target.under_way and not target.cut):
                return POLL_S
            if target.under_way:
                waits.append(WATCH_S / 10)
            if target.jobs and not target.cut:
                waits.append(target.not_before - now)
        if any(job.target.watch is not None for job in self._lost):
            waits.append(WATCH_S)
        return max(0.0, min(waits))

    def _step(self, now: float) -> None:
        for target in self._targets:
            self._poll(target, now)
            self._prepare(target, now)
        while self._submit_one_each():
            pass
        for target in [t for t in self._targets if not (t.jobs or t.under_way or t.knock)]:
            if not target.unwanted or self._has_left(target, now):
                self._targets.remove(target)
        if self._wireups:
            with self._inside():
                self._wireups.step()
        self._watch_lost()
        self._crew.look_around()

    # ---- what is under way -------------------------------------------------------------------------------

    def _poll(self, target: Target, now: float) -> None:
        for submit in list(target.under_way):
            try:
                with self._inside():
                    done = self._agent.look(submit.request)
            except Exception as error:  # noqa: BLE001 - whatever it is, the request is over
                self._lose(submit.job, f"a write failed: {error}")
                self._end(target, submit)
                self._suspect(target)
                continue
            if done:
                self._end(target, submit)
        if not target.under_way:
            if target.cut:
                self._forget(target)
        elif target.cut:
            self._cut_stalled(target, now)
        elif target.ended() or now - target.moved_at > self._limits.progress_s:
            late = "its process has ended" if target.ended() else f"no progress for {self._limits.progress_s:g} s"
            for submit in target.under_way:
                self._lose(submit.job, late)
            self._suspect(target)

    def _end(self, target: Target, submit: Submit) -> None:
        target.under_way.remove(submit)
        target.moved_at = time.monotonic()
        submit.job.under_way -= 1
        with self._inside():
            self._agent.release(submit.request)
        if submit.job.quiet:
            submit.job.keep = ()
        self._settle(submit.job)

    def _suspect(self, target: Target) -> None:
        """The pair is spoilt: end its connections, and begin anew when nothing is under way on them any more."""
        target.ready = False
        target.cut = True
        self._cut(target)
        if not target.under_way:
            self._forget(target)

    def _forget(self, target: Target) -> None:
        with self._inside():
            if target.knock is not None:
                self._agent.release(target.knock)  # should its byte still come, it comes to the doorstep
                target.knock = None
            self._agent.forget(target.told.agent)
        self._cut(target)  # else the engine keeps them for as long as the peer does
        target.learnt, target.ready, target.cut, target.wireups, target.stalled = -1, False, False, None, None

    def _cut(self, target: Target) -> None:
        self._agent.cut(target.told.agent, target.told.ports, self._addresses(target))

    def _cut_stalled(self, target: Target, now: float) -> None:
        """Where the peer wrote to us first UCX sends by a connection that the peer has dialled."""
        if not target.told.ports or now - target.looked_at < WATCH_S:
            return
        target.looked_at = now
        if target.stalled is None:
            target.stalled = self._agent.stalled(self._addresses(target))
        target.stalled.cut(now, self._limits.progress_s)

    def _addresses(self, target: Target) -> set[str]:
        """Where connections to it lead. Loopback leads to it where it shares our network."""
        told = target.told
        return {*told.found_at, *(own_addresses() if self._host.shares_network(told.host) else ())}

    def _has_left(self, target: Target, now: float) -> bool:
        """Forget a peer that is not wanted any more; False while its connections are being completed for that."""
        if target.ready and target.told.ports and not target.ended():
            if target.wireups is None:
                target.wireups = self._crew.complete(target, self)
            if any(not wireup.over and now < wireup.until for wireup in target.wireups):
                return False
        if target.learnt >= 0:
            self._forget(target)
        return True

    # ---- first contact, and contact after a failure ------------------------------------------------------

    def _prepare(self, target: Target, now: float) -> None:
        """Cancelled jobs leave. A peer that is not known to answer gets a byte on its doorstep first: until that has
        arrived, nothing is under way that could land later."""
        self._drop_cancelled(target)
        if target.knock is not None:
            self._await_answer(target, now)
        if not target.jobs or target.knock is not None:
            return
        if target.ended():
            self._give_up(target, "its process has ended")
        elif target.cut:  # what was under way has not ended yet
            late = now - self._limits.contact_s
            self._give_up(target, "its connection does not end", lambda job: job.queued_at < late)
        elif target.ready:
            if target.learnt != target.told.revision:
                self._learn(target)
        elif now >= target.not_before:
            self._knock(target, now)

    def _learn(self, target: Target) -> bool:
        told = target.told
        try:
            with self._inside():
                self._agent.learn(told.agent, told.metadata)
        except Held as held:  # nothing is wrong with the pair
            self._give_up(target, str(held))
            return False
        except Exception as error:  # noqa: BLE001 - whatever the engine raises is the reason
            self._give_up(target, str(error))
            if target.learnt >= 0 or target.under_way:
                self._suspect(target)
            else:  # nothing was connected: by these ports and addresses are somebody else's connections, if any
                with self._inside():
                    self._agent.forget(target.told.agent)
            target.not_before = time.monotonic() + COOLDOWN_S
            return False
        target.learnt = told.revision
        return True

    def _knock(self, target: Target, now: float) -> None:
        if not self._learn(target):
            return
        target.asked_at = now
        try:
            with self._inside():
                request = self._agent.prepare(target.told.agent, [(self._agent.doorstep, target.told.doorstep, 1)])
                target.knock = request
                answered = self._agent.knock(request)
            if answered:
                self._answered(target)
        except Exception as error:  # noqa: BLE001 - whatever the engine raises is the reason
            self._refused(target, f"it cannot be written to: {error}")

    def _await_answer(self, target: Target, now: float) -> None:
        assert target.knock is not None
        try:
            with self._inside():
                there = self._agent.look(target.knock)
            if there:
                self._answered(target)
            elif target.ended():
                self._refused(target, "its process has ended")
            elif now - target.asked_at > self._limits.contact_s:
                self._refused(target, f"it did not answer within {self._limits.contact_s:g} s")
        except Exception as error:  # noqa: BLE001 - whatever the engine raises is the reason
            self._refused(target, f"it cannot be written to: {error}")

    def _answered(self, target: Target) -> None:
        if target.knock is not None:
            with self._inside():
                self._agent.release(target.knock)
            target.knock = None
        target.ready = True

    def _refused(self, target: Target, why: str) -> None:
        # Those that came while it was asked are asked for anew: a peer may go on, or come back.
        self._give_up(target, why, lambda job: job.queued_at <= target.asked_at or target.ended())
        self._forget(target)
        target.not_before = time.monotonic() + COOLDOWN_S

    # ---- submitting --------------------------------------------------------------------------------------

    def _submit(self, target: Target) -> None:
        if target.learnt != target.told.revision and not self._learn(target):
            return
        job = target.jobs[0]
        if job.cancelled:
            self._drop(job)
            return
        batch = job.parts.popleft()
        try:
            with self._inside():
                request = self._agent.prepare(target.told.agent, batch[1], batch[0])
        except Exception as error:  # noqa: BLE001 - it knows no such memory, or has forgotten the peer by itself
            target.ready, target.learnt = False, -1
            if job.retried:
                self._give_up(target, f"the engine refuses it: {error}", lambda one: one is job)
            else:
                job.parts.appendleft(batch)
                job.retried = True
            return
        submit = Submit(job, request)
        target.moved_at = time.monotonic() if not target.under_way else target.moved_at
        job.under_way += 1
        target.under_way.append(submit)
        if not job.parts:
            target.jobs.popleft()
        try:
            with self._inside():
                done = self._agent.submit(request)
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing says how far it came
            self._lose(job, f"a write failed: {error}")
            self._end(target, submit)
            self._suspect(target)
            return
        if done:
            self._end(target, submit)
        else:
            target.at_once = False

    # ---- the end -----------------------------------------------------------------------------------------

    def _wind_up(self) -> None:
        try:
            self._end_all()
        finally:
            self._crew.leave()

    def _end_all(self) -> None:
        """Fail what never began, and wait a little for what has begun."""
        self._take_all()
        for target in self._targets:
            self._give_up(target, "the transport closes")
            if target.knock is not None:
                self._forget(target)
        self._linger()
        for target in self._targets:
            for submit in list(target.under_way):
                self._lose(submit.job, "the transport closes")

    def free_sources(self) -> None:
        """After the end of this thread and of the agent: what was under way is read no more."""
        for target in self._targets:
            for submit in target.under_way:
                submit.job.under_way -= 1
                if submit.job.quiet:
                    submit.job.keep = ()
            target.under_way.clear()
        for job in self._lost:
            self._bell.finish(job, Status.UNKNOWN)
