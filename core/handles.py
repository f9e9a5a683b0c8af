"""Transfers as callers hold them: blocking, polled or awaited, all three over the same published state.

The I/O thread publishes; callers read. Nothing here decides anything, and no call has an effect on the protocol but
`cancel`, `put`, `resolve` and asking for rows early.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tensorferry.core.errors import BadCall, Cancelled, DeadlineExceeded, FerryError
from tensorferry.core.rounds import Round, RoundLog
from tensorferry.core.transfer import Status

if TYPE_CHECKING:
    import torch

    from tensorferry.core.buffers import Result
    from tensorferry.core.receiving import Receiver
    from tensorferry.core.selection import Verdict
    from tensorferry.core.sending import Sender

log = logging.getLogger("tensorferry.transfer")


class EndpointThread(threading.Thread):
    """The I/O thread of an endpoint. What it waits for may be its own to do, or that of another one who waits for it:
    nothing that blocks is for it, and finalizers (`__del__`) may run in it as in any thread."""


class Bells:
    """Those who wait for one thing to change, each with a lock of its own.

    There is no lock that both sides take, as a Condition has, and a Future: a signal's handler may run in a thread that
    waits, wherever it is, and wait in there for the I/O thread (`close`, `cancel`), which has to get on.
    """

    def __init__(self) -> None:
        self._hung: deque[threading.Lock] = deque()

    def ring(self) -> None:
        """By whoever has changed something, afterwards: all that wait look again."""
        for _ in range(len(self._hung)):  # and not those who come meanwhile: they have seen it
            try:
                bell = self._hung.popleft()
            except IndexError:  # its owner was quicker
                return
            bell.release()

    def wait(self, what: Callable[[], bool], timeout: float | None) -> bool:
        """Until `what()`, for `timeout` seconds at most (None: for ever). False: not in that time."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while not what():
            if (left := deadline - time.monotonic()) <= 0:
                return False
            bell = threading.Lock()
            bell.acquire()
            try:
                self._hung.append(bell)
                if not what():  # it may have changed before the bell hung there
                    bell.acquire(timeout=min(left, threading.TIMEOUT_MAX))
            finally:
                with suppress(ValueError):  # it has been rung
                    self._hung.remove(bell)
        return True


class Transfer:
    """What both sides' transfers have in common."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.status: Status = Status.BOOTSTRAPPING
        """BOOTSTRAPPING, WAITING_FOR_INPUT, TRANSFERRING, SUCCESS or FAILED. The last two are final."""
        self.error: FerryError | None = None
        """Why it failed; None otherwise."""
        self.transport = ""
        """The name of the transport that carries the rows; empty until the two sides have agreed on one."""
        self.path = ""
        """What carries the bytes, in a word ("rdma", "tcp", "memcpy"): as the two sides chose it, and where the engine
        said otherwise after a write, what it said. Empty until then."""
        self.verdicts: tuple[Verdict, ...] = ()
        """Every transport of either side, best first, each with the reason for its place or for not being used."""
        self._bells = Bells()
        self._waiters: deque[Callable[[], None]] = deque()
        self._pid = os.getpid()

    @property
    def done(self) -> bool:
        """SUCCESS or FAILED."""
        return self.status in (Status.SUCCESS, Status.FAILED)

    def _published(self) -> None:
        """By the I/O thread, after it has changed something."""
        self._bells.ring()
        while self.done and self._waiters:
            try:
                waiter = self._waiters.popleft()
            except IndexError:  # it has just given up
                return
            try:
                waiter()
            except Exception:  # a waiter's own trouble; the others wait as well
                log.exception("somebody who waits for room %d could not be told", self.room)

    def _check_process(self) -> None:
        """Raises BadCall in a forked child: nothing changes there any more, and who holds a lock may be left behind."""
        if os.getpid() != self._pid:
            raise BadCall(
                "a transfer does not go on in a forked child", room=self.room, hint="Use it in the process that made it"
            )

    def _wait_until(self, what: Callable[[], bool], timeout: float | None, since: float | None = None) -> None:
        """`timeout` seconds at most, of which the first were over at `since` (on the monotonic clock), if that is told.
        Raises DeadlineExceeded then, and BadCall where nobody may wait or for what is no time."""
        if timeout is not None and math.isnan(timeout):  # it would never be over
            raise BadCall("timeout is nan: give seconds, or None to wait for ever", room=self.room)
        if what():  # what has ended can be read in a forked child as well
            return
        self._check_process()
        if isinstance(threading.current_thread(), EndpointThread):
            raise BadCall("not finished, and this is an endpoint's own thread, which cannot wait", room=self.room)
        left = timeout if timeout is None or since is None else timeout - (time.monotonic() - since)
        if not self._bells.wait(what, left):
            raise DeadlineExceeded(
                f"not finished within {timeout:g} s ({self.status}); the transfer goes on",
                room=self.room,
                hint="Wait again, or cancel it",
            )

    def wait(self, timeout: float | None = None) -> None:
        """Block until the end. Raises the transfer's error if it failed; DeadlineExceeded after `timeout` seconds
        (the transfer goes on): at once for 0 or less, never for None or infinity; BadCall for nan."""
        self._wait_until(lambda: self.done, timeout)
        if self.error is not None:
            raise self.error

    def _outcome(self) -> Any:
        if self.error is not None:
            raise self.error
        return None

    def __await__(self) -> Generator[Any, None, Any]:
        """`await transfer`: as `wait`, for an event loop; a receiver's gives the result."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not future.done():
                future.set_result(None)

        def from_thread() -> None:
            with suppress(RuntimeError):  # the loop was closed: nobody waits there any more
                loop.call_soon_threadsafe(wake)

        if self.done:
            return self._outcome()
        self._check_process()
        self._waiters.append(from_thread)
        try:
            if not self.done:  # it may have ended before that
                yield from future
        finally:  # cancelled, perhaps: a caller that waits with a time-out, again and again, leaves nothing here
            with suppress(ValueError):
                self._waiters.remove(from_thread)
        return self._outcome()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} room {self.room} {self.status}>"


class SendTransfer(Transfer):
    """A room on the embedding side. The rows given to it are read in place: they must not change before the end."""

    def __init__(self, sender: Sender, room: int, total_tokens: int) -> None:
        super().__init__(room)
        self.total_tokens = total_tokens
        self.sent_tokens = 0
        """How far the rows reach that the receiver has said to have: of the rank that is furthest behind."""
        self._sender = sender
        self._serial = 0

    def put(self, start: int, **components: torch.Tensor | None) -> None:
        """Hand over the rows from token `start` on, which must be the next ones: `[n, *shape]` of every announced
        component. Raises BadTensor or BadCall, changing nothing, or the transfer's error if it has ended."""
        if self.done:
            raise self.error or BadCall("the transfer has ended", room=self.room)
        self._check_process()
        try:
            self._sender._put(self, start, components)
        except BadCall:
            if self.error is not None:  # it has ended meanwhile, and that is what is wrong with the call
                raise self.error from None
            raise

    def cancel(self) -> None:
        """End the room on both sides. Nothing happens if it has ended already. May be called anywhere, in a finalizer
        and a signal's handler as well."""
        self._sender._cancel(self, Cancelled("the sender cancelled", room=self.room))


class ReceiveTransfer(Transfer):
    """A room on the language side."""

    def __init__(self, receiver: Receiver, room: int, sender: str) -> None:
        super().__init__(room)
        self.sender = sender
        self.total_tokens: int | None = None
        """Length in tokens, once announced."""
        self.sent_tokens = 0
        """Tokens that have arrived without a gap from the first. Never falls, whatever the sender does."""
        self.ready_tokens = 0
        """Rows [0, ready_tokens) can be consumed through `rows` now. As sent_tokens, but of the content that is being
        received: 0 again when the sender has restarted with another."""
        self.rows_complete = False
        """Every row of this rank is here; with several ranks the group's decision may still be out."""
        self._receiver = receiver
        self._xfer = 0
        self._result: Result | None = None
        self._log = RoundLog()
        self._block_size = receiver.settings.block_size

    @property
    def rounds(self) -> tuple[Round, ...]:
        """Grants that have wholly arrived: (round, start, tokens, blocks) each."""
        return self._log.finished(self._block_size, self.total_tokens or 0)

    @property
    def history(self) -> tuple[int, ...]:
        """sent_tokens after each of `rounds`."""
        return tuple(self._log.watermarks)

    def result(self, timeout: float | None = 0) -> Result:
        """The tensors: one `[total_tokens, *shape]` per component, None for an absent one, and `aux`. They are the
        caller's alone; on a GPU they are complete, and the calling thread's current stream may use them at once (for
        another stream, `record_stream`). Raises the transfer's error, or DeadlineExceeded if it is not done within
        `timeout` seconds (None: wait)."""
        self.wait(timeout)
        assert self._result is not None
        return self._result._claimed()

    def _outcome(self) -> Any:
        super()._outcome()
        return self._result._claimed() if self._result is not None else None

    def rows(self, timeout: float | None = None) -> Iterator[tuple[int, int, Mapping[str, torch.Tensor]]]:
        """(start, stop, views of the rows [start, stop) by component) as they arrive, in order, each row once.

        Views of the result to come; blocks between them. Raises the transfer's error where it fails, DeadlineExceeded
        if nothing new arrives within `timeout` seconds. From the first call on, a sender that restarts with other
        content makes the transfer fail (ContentChanged) instead of starting over.
        """
        self._receiver._expose(self)
        seen = 0
        while True:
            since = time.monotonic()
            self._wait_until(lambda seen=seen: self.done or self.ready_tokens > seen, timeout)  # type: ignore[misc]
            stop = self.ready_tokens
            if stop > seen:
                views = self._receiver._rows(self, seen, stop)
                if views is None:  # the result has them, or there will be none: it ends, and how is not decided yet
                    self._wait_until(lambda: self.done, timeout, since)
                    result = self._outcome()
                    views = {name: tensor[seen:stop] for name in result if (tensor := result[name]) is not None}
                yield seen, stop, views
                seen = stop
            elif self.done:
                self._outcome()
                return

    def cancel(self) -> None:
        """End the room on both sides (and for all ranks). Final here when it returns; nothing happens if it has ended.

        May be called anywhere, in a signal's handler as well, and in a finalizer: where that happens to run in an
        endpoint's own thread, this returns at once and is final a moment later.
        """
        self._receiver._cancel(self, Cancelled("the receiver cancelled", room=self.room))

    def resolve(self, verdict: str) -> None:
        """The framework's own broadcast of the leader's outcome: "run" or "drop" (for a follower without a leader's
        address). Raises BadCall for "run" before this rank has all its rows."""
        if verdict not in ("run", "drop"):
            raise BadCall(f"resolve({verdict!r}): say 'run' or 'drop'", room=self.room)
        self._receiver._resolve(self, verdict == "run")
