"""The worker thread that moves bytes for the transports whose engine is `memcpy`.

A batch is a list of (destination, source, length) whose bounds were checked before it came here. The
worker takes batches in the order in which they were submitted and copies in chunks: `ctypes.memmove`
releases the GIL, so nothing else waits for it, and between two chunks it looks whether it has to stop.
That bounds `close` by one chunk.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Protocol

from tensorferry.backends._waking import wake_owner
from tensorferry.core.transport import Status

log = logging.getLogger("tensorferry.backends.copier")

CHUNK_BYTES = 8 << 20
"""Longest stretch copied without a look at `stop` and `cancel`: about 1 ms at memory speed. Larger
chunks gain nothing (the call costs under a microsecond) and make `close` slower."""

memmove = ctypes.memmove
"""Releases the GIL. A name of its own, so that a test can hold a copy back."""

Segment = tuple[int, int, int]
"""(destination address, source address, bytes)"""


class Gate(Protocol):
    """Guards the destination of a batch: no chunk is copied unless `enter` has said yes."""

    def enter(self) -> bool: ...

    def leave(self) -> None: ...


class Batch:
    """One post: what to copy, what to keep alive meanwhile, and how it went.

    `status` is written under the copier's lock and read without it (one attribute, replaced whole).
    """

    __slots__ = ("cancelled", "gate", "keep", "segments", "status")

    def __init__(self, segments: Sequence[Segment], keep: Sequence[object], gate: Gate | None = None) -> None:
        self.segments = segments
        self.keep = keep
        self.gate = gate
        self.cancelled = False
        self.status = Status.PENDING

    @property
    def drained(self) -> bool:
        return self.status in (Status.DONE, Status.FAILED)


class Copier:
    """Copies batches first come, first served, on a thread of its own that starts with the first batch."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._pid = os.getpid()
        self._queue: SimpleQueue[Batch | None] = SimpleQueue()
        # Reentrant: `stop` may be called by the garbage collector in the middle of another call.
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._wake: Callable[[], None] | None = None

    def on_progress(self, wake: Callable[[], None]) -> None:
        """Call `wake` after a batch's status has changed, on whichever thread changed it."""
        with self._lock:
            self._wake = wake

    def submit(self, batch: Batch) -> None:
        """Queue a batch. After `stop` it is FAILED at once, so that no batch is left behind by a race with it."""
        with self._lock:
            if not self._stopping:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                    self._thread.start()
                self._queue.put(batch)
                return
        self.finish(batch, Status.FAILED)

    def finish(self, batch: Batch, status: Status) -> None:
        """Give a batch its last status, let go of its memory and wake the owner. The first status given stays."""
        with self._lock:
            if batch.drained:
                return
            batch.status = status
            released, batch.segments, batch.keep, batch.gate = batch.keep, (), (), None
            wake = self._wake
        del released  # outside the lock: the last reference to a mapping unmaps it
        wake_owner(wake, log)

    def stop(self) -> None:
        """Ask the worker to end after its current chunk; batches that are not finished by then are FAILED."""
        if os.getpid() != self._pid:  # a forked child drops us; the lock may have no owner there
            return
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
        self._queue.put(None)

    def close(self, timeout_s: float) -> bool:
        """`stop`, and wait for it. True: the worker has ended and nothing can land any more.

        False: it did not end within `timeout_s` seconds (a chunk that does not return: a page of the
        source that the kernel cannot bring in). Whatever it may still touch has to stay mapped, and its
        batch is UNKNOWN.
        """
        self.stop()
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
        with self._lock:
            self._wake = None
        return thread is None or not thread.is_alive()

    def give_up_on(self, batch: Batch) -> None:
        """After a `close` that answered False: an unfinished batch is UNKNOWN until the worker says otherwise."""
        with self._lock:
            if not batch.drained:
                batch.status = Status.UNKNOWN

    def _run(self) -> None:
        while (batch := self._queue.get()) is not None:
            try:
                status = self._copy(batch)
            except Exception:  # nothing of the batch can land: memmove has returned, or never began
                log.exception("a batch failed while it was being copied")
                status = Status.FAILED
            self.finish(batch, status)

    def _copy(self, batch: Batch) -> Status:
        gate = batch.gate
        for destination, source, nbytes in batch.segments:
            for start in range(0, nbytes, CHUNK_BYTES):
                if self._stopping or batch.cancelled or (gate is not None and not gate.enter()):
                    return Status.FAILED
                try:
                    memmove(destination + start, source + start, min(CHUNK_BYTES, nbytes - start))
                finally:
                    if gate is not None:
                        gate.leave()
        return Status.DONE
