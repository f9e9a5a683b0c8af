"""The thread that calls the engine: it keeps a window of submits under way and polls each to its end.

One thread for all peers of a transport, round-robin between them, one submit at a time.

How a post ends. DONE: every submit of it was acknowledged. FAILED: some of it was never submitted (the peer could not
be reached, it was cancelled, the transport closed) and all that was submitted is done, so nothing is under way.
UNKNOWN: a submit failed, or was not over in time. The engine says -1 for a refusal, a lost peer and a time-out alike,
and after a time-out the bytes that it had sent lie in the peer's kernel and land when the peer goes on. So only the
end of the peer's process drains such a post, and its source is kept until then.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from tensorferry.backends._engine_thread import POLL_S, WATCH_S, Bell, EngineThread
from tensorferry.backends._mooncake_contact import Contact
from tensorferry.backends._mooncake_engine import Engine
from tensorferry.backends._mooncake_jobs import Job, Submit, Target
from tensorferry.backends._mooncake_trial import Trial
from tensorferry.core.transport import Status

log = logging.getLogger("tensorferry.backends.mooncake")

LOOK_AT_ALL_S = 0.005
"""Between two looks at all that is under way, instead of at the oldest that is not over."""

COOLDOWN_S = 1.1
"""After a failure the engine connects to a peer again only after 1 s."""

GRACE_S = 0.5
"""Beyond its own time-out, for an attempt at contact to end: one that hangs in the resolver does not."""

PART_S = 0.5
"""How long the end waits for all attempts at contact together. Each has been cut off by then."""


@dataclass(frozen=True, slots=True)
class Limits:
    window: int
    contact_s: float
    transfer_s: float
    lanes: int
    """The engine's connections to one peer."""


class Poster(EngineThread[Target, Job]):
    """Owns the engine: its thread is the only one that submits and polls, and the one that destroys it at its end."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self.bell = Bell(log)
        super().__init__("tensorferry-mooncake-poster", limits.window, self.bell, log)
        self._engine = engine
        self._limits = limits
        self._pid = os.getpid()
        # Reentrant: `stop` may be called by the garbage collector in the middle of another call.
        self._lock = threading.RLock()
        self._stopping = False
        self._left_reading: list[Trial] = []  # what they read nobody waits for any more
        self._opening: Target | None = None
        self.engine_ended = False
        """Nothing is read and nothing placed any more."""
        self.thread.start()

    # ---- called by the transport -------------------------------------------------------------------------

    @property
    def stopping(self) -> bool:
        return self._stopping

    def write(self, job: Job) -> None:
        """Queue a post. After `stop`, or once the thread ends by whatever else, it is FAILED at once, so that none is
        left behind by a race with it."""
        with self._lock:
            if not self._stopping:
                self.inbox.put(job)
                return
        self.bell.finish(job, Status.FAILED)

    def nudge(self) -> None:
        """Look again: something was cancelled, or a peer has answered."""
        self.inbox.put(None)

    def stop(self) -> None:
        """Ask the thread to end, and the engine with it."""
        if os.getpid() != self._pid:  # a forked child drops us; the thread does not exist there
            return
        with self._lock:
            self._stopping = True
        opening = self._opening
        if opening is not None:  # the thread may sit in a handshake that would take a minute
            self._engine.rescue(opening.told.address, opening.told.port)
        self.nudge()

    def close(self, timeout_s: float) -> bool:
        """`stop`, and wait for it. False: the engine has not ended within `timeout_s` seconds."""
        self.stop()
        self.thread.join(timeout_s)
        self.bell.wake = None
        return not self.thread.is_alive()

    def give_up_on(self, job: Job) -> None:
        """After `close`: nothing stays PENDING, also where the thread does not come back from the engine. What the
        engine may have is UNKNOWN then; what it has not, it never gets."""
        if job.status is Status.PENDING:
            job.status = Status.UNKNOWN if job.begun else Status.FAILED

    # ---- the thread --------------------------------------------------------------------------------------

    def _take(self, what: Job | None) -> None:
        if what is not None:
            what.target.jobs.append(what)
            if what.target not in self._targets:
                self._targets.append(what.target)

    def _pause(self) -> float | None:
        under_way = [submit.job for target in self._targets for submit in target.under_way.values()]
        reading = any(target.trial is not None and target.trial.reading for target in self._targets)
        if reading or any(job.status is Status.PENDING for job in under_way):
            return POLL_S
        watched = under_way or self._left_reading or any(job.target.watch is not None for job in self._lost)
        waits = [WATCH_S] if watched else []
        now = time.monotonic()
        for target in self._targets:
            if target.trial is not None:
                waits.append(target.trial.pause(now))
            elif target.jobs and not target.ready:  # else its window is full, with what is looked at anyway
                waits.append(self._deadline(target, target.jobs[0]) - now)
                if target.contact is None:
                    waits.append(target.not_before - now)
        return max(0.0, min(waits)) if waits else None

    def _deadline(self, target: Target, job: Job) -> float:
        """When a job that waits for a peer to answer has waited long enough."""
        return max(job.queued_at, target.not_before) + self._limits.contact_s + GRACE_S

    def _step(self, now: float) -> None:
        for target in self._targets:
            self._poll(target, now)
            self._prepare(target, now)
        while self._submit_one_each():
            pass
        self._targets = [t for t in self._targets if t.jobs or t.under_way or t.contact or t.trial]
        self._watch_lost()
        self._left_reading = [one for one in self._left_reading if self._engine.status(one.reading) not in (1, -1)]

    # ---- what is under way -------------------------------------------------------------------------------

    def _poll(self, target: Target, now: float) -> None:
        all_of_them = now - target.looked_at_all > LOOK_AT_ALL_S
        if all_of_them:
            target.looked_at_all = now
        for batch, submit in list(target.under_way.items()):
            code, age = self._engine.status(batch), now - submit.since
            if code == 0 and target.ended():
                self._lose(submit.job, "its process has ended")  # over RDMA the engine would wait for minutes
            elif code == 0 and not all_of_them:
                return  # they end about in order, and each look may cost a wait for the GIL
            if code in (1, -1):
                del target.under_way[batch]
                submit.job.under_way -= 1
                target.opened = target.opened or code == 1
                if code == -1:
                    self._suspect(target)
                    self._lose(submit.job, "a submit of it failed")
                self._settle(submit.job)
            elif age > self._limits.transfer_s + submit.nbytes / 1e9 and submit.job.status is Status.PENDING:
                # It is polled on: the engine still reads its source.
                self._suspect(target)
                self._lose(submit.job, f"a submit of it is not over after {age:.1f} s")
            elif age > self._limits.contact_s and not target.opened:
                target.opened = True  # once: over RDMA the engine's own threads shake hands, after the submit
                self._engine.rescue(target.told.address, target.told.port)

    def _suspect(self, target: Target) -> None:
        """Submit no more to it before it has answered again."""
        target.ready = False
        self._end_trial(target)
        target.not_before = time.monotonic() + COOLDOWN_S

    # ---- what waits --------------------------------------------------------------------------------------

    def _prepare(self, target: Target, now: float) -> None:
        """Whom to submit to: cancelled jobs leave, peers that are not known to answer are asked first."""
        self._drop_cancelled(target)
        contact = target.contact
        if contact is not None and contact.over:
            contact.join()
            target.contact = None
            if contact.error is None and self._engine.protocol == "tcp":
                limits = self._limits
                target.trial = Trial(self._engine, target.told.token, limits.lanes, limits.contact_s)
            elif contact.error is None:
                target.ready = True
            else:
                target.not_before = now + COOLDOWN_S
                # Those that came while it was under way are asked for anew: a peer may go on, or come back.
                self._give_up(target, contact.error.cause, lambda job: job.queued_at <= contact.began)
        if not target.jobs:
            self._end_trial(target)
        elif target.ended():
            self._give_up(target, "its process has ended")
        elif target.ready:
            return
        elif target.trial is not None:
            self._try_out(target, target.trial)
        elif now > self._deadline(target, target.jobs[0]):
            late = f"it did not answer within {self._limits.contact_s:g} s"
            self._give_up(target, late, lambda job: now > self._deadline(target, job))
        elif target.contact is None and now >= target.not_before:
            target.contact = Contact(target.told, self._limits.contact_s, self.nudge)

    def _try_out(self, target: Target, trial: Trial) -> None:
        there, nbytes = target.told.doorstep, len(target.told.token)
        trial.step(lambda into: self._begin(target, lambda session: self._engine.read(session, into, there, nbytes)))
        if trial.works:
            target.ready, target.trial = True, None
        elif trial.error:
            target.not_before = time.monotonic() + COOLDOWN_S
            self._give_up(target, trial.error)

    def _end_trial(self, target: Target) -> None:
        """Nobody waits for it, or what it says holds no more. A read under way ends as it does."""
        if target.trial is not None and target.trial.reading:
            self._left_reading.append(target.trial)
        target.trial = None

    def _submit(self, target: Target) -> None:
        job = target.jobs[0]
        if job.cancelled:
            self._drop(job)
            return
        with self._lock:
            if self._stopping:
                return  # it counts as one that never began
            job.begun = True
        source, there, nbytes = job.parts.popleft()
        try:
            batch = self._begin(target, lambda session: self._engine.submit(session, source, there, nbytes))
        except Exception as error:  # noqa: BLE001 - nothing says how far it came
            self._suspect(target)
            self._lose(job, f"a submit of it raised {error!r}")
            return
        if batch:
            job.under_way += 1
            target.under_way[batch] = Submit(job, nbytes, time.monotonic())
            if not job.parts:
                target.jobs.popleft()
            return
        # Refused. Over TCP the engine's source says that nothing was begun: no segment, or no transport for it. Over
        # RDMA a submit of very many slices posts the first before it may find that it cannot go on.
        self._suspect(target)
        if self._engine.protocol == "tcp":
            self._drop(job)
        else:
            self._lose(job, "the engine refused to go on with it")

    def _begin(self, target: Target, begin: Callable[[str], int]) -> int:
        """Have the engine begin a transfer with this session; its id, or 0."""
        if target.opened:
            return begin(target.session)
        # The engine asks the peer once more, for up to 60 s if it has stopped since it answered us, and meanwhile no
        # submit to any peer gets through. So this question is cut off after as long as ours.
        told = target.told
        target.session = target.session or self._engine.session(told.address, told.port, told.instance)
        rescue = threading.Timer(self._limits.contact_s, self._engine.rescue, (told.address, told.port))
        rescue.daemon = True
        self._opening = target
        rescue.start()
        try:
            batch = begin(target.session)
        finally:
            self._opening = None
            rescue.cancel()
            rescue.join()
        target.opened = bool(batch) and self._engine.protocol == "tcp"
        return batch

    # ---- the end -----------------------------------------------------------------------------------------

    def _wind_up(self) -> None:
        """Fail what never began, wait a little for what has begun, destroy the engine where that does not take long."""
        with self._lock:
            self._stopping = True  # also where an error ends the thread: nobody else takes what comes now
        self._take_all()
        for target in self._targets:
            self._give_up(target, "the transport closes")
        contacts = [target.contact for target in self._targets if target.contact is not None]
        for contact in contacts:
            contact.abandon()
        until = time.monotonic() + PART_S
        for contact in contacts:
            contact.join(max(0.0, until - time.monotonic()))
        self._linger()
        left = [submit.job for target in self._targets for submit in target.under_way.values()]
        if left and self._engine.protocol != "tcp":
            log.warning("%d writes do not end: the engine is left as it is until the process ends", len(left))
            self._engine.abandon()
        else:
            self._engine.close()
            self.engine_ended = True
        for job in left:
            self._lose(job, "the transport closes")
