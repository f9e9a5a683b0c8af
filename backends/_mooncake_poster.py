"""The thread that calls the engine: cuts posts into submits, keeps a window of them under way, polls each to its end.

One thread for all peers of a transport, round-robin between them, one submit at a time. It takes the place of the
copier of the built-in transports and shares how batches end and wake with it.

How a post ends. DONE: every submit of it was acknowledged. FAILED: some of it was never submitted (the peer could not
be reached, it was cancelled, the transport closed) and all that was submitted is done, so nothing is under way.
UNKNOWN: a submit failed, or was not over in time. The engine says -1 for a refusal, a lost peer and a time-out alike,
and after a time-out the bytes that it had sent lie in the peer's kernel and land when the peer goes on. So only the
end of the peer's process drains such a post, and its source is kept until the engine has let go of it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from tensorferry.backends._copier import Batch, Copier
from tensorferry.backends._mooncake_contact import Contact
from tensorferry.backends._mooncake_engine import Engine
from tensorferry.backends._mooncake_wire import Descriptor
from tensorferry.backends._process import ProcessWatch
from tensorferry.core.transport import Status

log = logging.getLogger("tensorferry.backends.mooncake")

POLL_S = 0.0005
"""Between two looks at what is under way. Looking costs the GIL: a spin here would take a core from the application."""

WATCH_S = 0.1
"""Between two looks at peers of whom a post's outcome is not known."""

COOLDOWN_S = 1.1
"""After a failure the engine connects to a peer again only after 1 s, and whatever is submitted before that fails."""

LINGER_S = 0.5
"""How long the end waits for submits that are under way. Longer ones are with peers that do not answer."""

Piece = tuple[int, int, int]
"""(source address, target address, bytes)"""


@dataclass(frozen=True, slots=True)
class Limits:
    submit_bytes: int
    window: int
    contact_s: float
    transfer_s: float


@dataclass(eq=False, slots=True)
class Job:
    """One post."""

    batch: Batch
    target: Target
    pieces: deque[Piece]
    queued_at: float
    under_way: int = 0
    dropped: bool = False
    """Some of it was not submitted and will not be."""
    lost: bool = False
    """The fate of a submit of it is not known."""

    @property
    def quiet(self) -> bool:
        """The engine neither reads its source any more nor will."""
        return self.under_way == 0 and not self.pieces


@dataclass(slots=True)
class Submit:
    job: Job
    nbytes: int
    since: float
    late: bool = False


@dataclass(eq=False, slots=True)
class Target:
    """A peer's engine, as the poster's thread knows it."""

    told: Descriptor
    session: str
    watch: ProcessWatch | None
    jobs: deque[Job] = field(default_factory=deque)
    under_way: dict[int, Submit] = field(default_factory=dict)
    ready: bool = False
    """It has answered, and no submit has failed since."""
    opened: bool = False
    """The engine has its segment; no submit to it blocks."""
    contact: Contact | None = None
    not_before: float = 0.0
    """It is asked again only then; and a post waits for the answer from then on."""

    def ended(self) -> bool:
        return self.watch is not None and self.watch.ended()


def cut(segments: Sequence[tuple[object, object, int, int, int]], most: int) -> deque[Piece]:
    """Copies as pieces of at most `most` bytes; what is adjacent on both sides is joined first.

    A segment is (local memory, remote region, source address, target address, bytes). Nothing is joined across two
    registrations, however they lie: a submit has to lie in one on each side.
    """
    pieces: deque[Piece] = deque()
    ordered = sorted(segments, key=lambda segment: segment[3])
    at = 0
    while at < len(ordered):
        local, remote, source, target, nbytes = ordered[at]
        at += 1
        while at < len(ordered):
            after = ordered[at]
            if after[0] is not local or after[1] != remote or after[2:4] != (source + nbytes, target + nbytes):
                break
            nbytes += after[4]
            at += 1
        pieces.extend((source + n, target + n, min(most, nbytes - n)) for n in range(0, nbytes, most))
    return pieces


class Poster(Copier):
    """Owns the engine: its thread is the only one that submits and polls, and the one that destroys it at its end."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        super().__init__("tensorferry-mooncake-poster")
        self._engine = engine
        self._limits = limits
        self._inbox: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._targets: list[Target] = []
        self._next = 0
        self._lost: dict[Batch, Job] = {}
        self._opening: Target | None = None
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    # ---- called by the transport -------------------------------------------------------------------------

    def write(self, target: Target, batch: Batch, pieces: deque[Piece]) -> None:
        job = Job(batch, target, pieces, time.monotonic())
        with self._lock:
            if not self._stopping:
                self._inbox.put(lambda: self._accept(job))
                return
        self.finish(batch, Status.FAILED)

    def nudge(self) -> None:
        self._inbox.put(_nothing)

    def stop(self) -> None:
        super().stop()
        if self._stopping:  # not in a forked child
            opening = self._opening
            if opening is not None:  # the thread may sit in a handshake that would take a minute
                self._engine.rescue(opening.told.address, opening.told.port)
            self._inbox.put(None)

    def drained(self, batch: Batch) -> bool:
        """Nothing of the batch can land, and its source is not read, any more."""
        if batch.drained:
            return True
        job = self._lost.get(batch)
        return job is not None and job.quiet and job.target.ended()

    def forget(self, batch: Batch) -> None:
        self._lost.pop(batch, None)

    # ---- the thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                try:
                    self._wait()
                    self._step(time.monotonic())
                except Exception:  # one peer's trouble must not end the thread that serves all
                    log.exception("mooncake's poster met an error of its own")
                    time.sleep(WATCH_S)
        finally:
            self._wind_up()

    def _wait(self) -> None:
        """Until there is something to do; takes in what came."""
        try:
            timeout = self._pause()
            call = self._inbox.get(timeout=timeout) if timeout is None or timeout > 0 else self._inbox.get_nowait()
            while call is not None:
                call()
                call = self._inbox.get_nowait()
        except Empty:
            return

    def _pause(self) -> float | None:
        if any(target.under_way for target in self._targets):
            return POLL_S
        waits = [WATCH_S] if any(job.batch.keep and job.target.watch for job in list(self._lost.values())) else []
        now = time.monotonic()
        for target in self._targets:
            if target.jobs:
                waits.append(self._deadline(target) - now)
                if target.contact is None:
                    waits.append(target.not_before - now)
        return max(0.0, min(waits)) if waits else None

    def _deadline(self, target: Target) -> float:
        """When the jobs that wait for a peer to answer have waited long enough."""
        return max(target.jobs[0].queued_at, target.not_before) + self._limits.contact_s

    def _accept(self, job: Job) -> None:
        if job.target not in self._targets:
            self._targets.append(job.target)
        job.target.jobs.append(job)

    def _step(self, now: float) -> None:
        for target in self._targets:
            self._poll(target, now)
            self._prepare(target, now)
        while self._submit_one_each():
            pass
        self._targets = [t for t in self._targets if t.jobs or t.under_way or t.contact is not None]
        self._watch_lost()

    # ---- what is under way -------------------------------------------------------------------------------

    def _poll(self, target: Target, now: float) -> None:
        for batch, submit in list(target.under_way.items()):
            code = self._engine.status(batch)
            if code in (1, -1):
                del target.under_way[batch]
                submit.job.under_way -= 1
                if code == 1:
                    target.opened = True
                else:
                    self._suspect(target, now)
                    self._lose(submit.job)
                self._settle(submit.job)
            elif not submit.late and now - submit.since > self._limits.transfer_s + submit.nbytes / 1e9:
                submit.late = True
                log.warning("a submit to %s is not over after %g s", target.session, now - submit.since)
                self._suspect(target, now)
                self._lose(submit.job)
            elif not target.opened and now - submit.since > self._limits.contact_s:
                target.opened = True  # once: over RDMA the engine's own threads shake hands, after the submit
                self._engine.rescue(target.told.address, target.told.port)

    def _suspect(self, target: Target, now: float) -> None:
        target.ready = False
        target.not_before = max(target.not_before, now + COOLDOWN_S)

    def _lose(self, job: Job) -> None:
        if not job.lost:
            job.lost = True
            job.pieces.clear()
            if job in job.target.jobs:
                job.target.jobs.remove(job)
            self._lost[job.batch] = job
            self.give_up_on(job.batch)
            self._tell()

    def _settle(self, job: Job) -> None:
        """Give a job that is over its last status. A lost one has its own."""
        if job.quiet and not job.lost:
            self.finish(job.batch, Status.FAILED if job.dropped else Status.DONE)

    def _tell(self) -> None:
        wake = self._wake
        if wake is not None:
            try:
                wake()
            except Exception:  # a bad call of the caller's must not end the thread that serves all rooms
                log.exception("the function given to on_progress failed")

    def _watch_lost(self) -> None:
        """Wake the owner when the death of a peer drains what was not known of."""
        for batch in list(self._lost):
            if batch.keep and self.drained(batch):
                batch.keep = ()
                self._tell()

    # ---- what waits --------------------------------------------------------------------------------------

    def _prepare(self, target: Target, now: float) -> None:
        """Whom to submit to: cancelled jobs leave, peers that are not known to answer are asked first."""
        for job in [job for job in target.jobs if job.batch.cancelled]:
            self._drop(job)
        contact = target.contact
        if contact is not None and contact.over:
            target.contact = None
            target.ready = contact.error is None
            if contact.error is not None:
                target.not_before = now + COOLDOWN_S
                self._give_up(target, contact.error.cause)
        if not target.jobs:
            return
        if target.ended():
            self._give_up(target, "its process has ended")
        elif target.ready:
            return
        elif now > self._deadline(target):
            self._give_up(target, f"it did not answer within {self._limits.contact_s:g} s")
            if target.contact is not None:
                target.contact.abandon()
                target.contact = None
                target.not_before = now + COOLDOWN_S
        elif target.contact is None and now >= target.not_before:
            target.contact = Contact(target.told, self._limits.contact_s, self.nudge)

    def _give_up(self, target: Target, why: str) -> None:
        if target.jobs:
            log.warning("%d posts to %s fail: %s", len(target.jobs), target.session, why)
        for job in list(target.jobs):
            self._drop(job)

    def _drop(self, job: Job) -> None:
        """Submit no more of a job."""
        job.target.jobs.remove(job)
        job.pieces.clear()
        job.dropped = True
        self._settle(job)

    def _submit_one_each(self) -> bool:
        """One submit for each peer that has room. False: none had any."""
        some = False
        count = len(self._targets)
        for n in range(count):
            target = self._targets[(self._next + n) % count]
            if target.ready and target.jobs and len(target.under_way) < self._limits.window and not self._stopping:
                self._submit(target)
                some = True
        self._next += 1
        return some

    def _submit(self, target: Target) -> None:
        job = target.jobs[0]
        if job.batch.cancelled:
            self._drop(job)
            return
        source, there, nbytes = job.pieces.popleft()
        batch = self._call_submit(target, source, there, nbytes)
        now = time.monotonic()
        if batch:
            job.under_way += 1
            target.under_way[batch] = Submit(job, nbytes, now)
            if not job.pieces:
                target.jobs.popleft()
            return
        # Refused. Over TCP the source says that nothing was begun: there is no segment, or no transport for it. Over
        # RDMA a submit of very many slices posts the first before it may find that it cannot go on.
        self._suspect(target, now)
        if self._engine.protocol == "tcp":
            self._drop(job)
        else:
            self._lose(job)

    def _call_submit(self, target: Target, source: int, there: int, nbytes: int) -> int:
        if target.opened:
            return self._engine.submit(target.session, source, there, nbytes)
        # The engine asks the peer once more, for up to 60 s if it has stopped since it answered us, and meanwhile no
        # submit to any peer gets through. So this question is cut off after as long as ours.
        rescue = threading.Timer(self._limits.contact_s, Engine.rescue, (target.told.address, target.told.port))
        rescue.daemon = True
        rescue.name = "tensorferry-mooncake-rescue"
        self._opening = target
        rescue.start()
        try:
            batch = self._engine.submit(target.session, source, there, nbytes)
        finally:
            rescue.cancel()
            self._opening = None
        if batch and self._engine.protocol == "tcp":
            target.opened = True
        return batch

    # ---- the end -----------------------------------------------------------------------------------------

    def _wind_up(self) -> None:
        """Fail what never began, wait a little for what has begun, destroy the engine."""
        try:
            while (call := self._inbox.get_nowait()) is not None or not self._inbox.empty():
                if call is not None:
                    call()
        except Empty:
            log.debug("mooncake's poster ends")
        for target in self._targets:
            if target.contact is not None:
                target.contact.abandon()
            for job in list(target.jobs):
                self._drop(job)
        until = time.monotonic() + LINGER_S
        while any(target.under_way for target in self._targets) and time.monotonic() < until:
            for target in self._targets:
                self._poll(target, time.monotonic())
            time.sleep(POLL_S)
        for target in self._targets:
            for submit in target.under_way.values():
                self._lose(submit.job)
        self._engine.close()
        for target in self._targets:  # the engine is gone: nothing reads these sources any more
            for submit in target.under_way.values():
                submit.job.under_way -= 1
            target.under_way.clear()


def _nothing() -> None:
    """Only to end a wait."""
