"""The sending side of a tcp transport: one connection to a peer's listener, and the posts that go over it.

Long because a connection's whole life stands here, from the first dial to the fence after its loss.

A post is cut into parts, one a link; a part is a row of frames that the owner answers once, when it has placed the
last byte of the last one. What is truth when a connection breaks with parts unanswered: their bytes may lie in the
owner's socket and land any time, so their post is UNKNOWN. It is drained once the owner has welcomed a later
connection of the same link, for it has ended the earlier one by then and places nothing of it any more; or once the
owner's process has ended, or has told us that it closed.

A Link belongs to its lane's thread. Posts are shared between the lanes of their parts and have a lock.
"""

from __future__ import annotations

import errno
import logging
import math
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from tensorferry.backends import _tcp_wire as wire
from tensorferry.backends._process import ProcessWatch
from tensorferry.backends._tcp_harbor import keep_honest
from tensorferry.backends._tcp_lane import READ, WRITE, Lane
from tensorferry.core.memory import Memory
from tensorferry.core.transport import Status

log = logging.getLogger("tensorferry.backends.tcp")

PIECE_BYTES = 4 << 20
"""Longest payload of one frame that we send: what is cancelled goes on to the end of its frame."""

CHUNK_BYTES = 1 << 20
"""Most bytes given to the kernel at once."""

TURNS = 16
"""Chunks that one link may send before the others of its lane have their turn."""

MAX_BUFFERS = 64

FIRST_RETRY_S = 0.02
LAST_RETRY_S = 5.0

WIND_DOWN_S = 1.0
"""While the transport closes, a peer that takes nothing for so long is not waited for any more."""

Piece = tuple[int, int, int, int, int]
"""(region, generation, offset in it, source address, bytes)"""


def transmit(connection: socket.socket, buffers: Sequence[memoryview | bytes]) -> int:
    """A name of its own, so that a test can hold bytes back."""
    return connection.sendmsg(buffers, (), socket.MSG_NOSIGNAL)


class Post:
    """What one handle stands for: how many of its parts are on the way, and how the others went."""

    __slots__ = ("_failed", "_keep", "_lock", "_lost", "_parts", "_wake", "cancelled", "drained", "route", "status")

    def __init__(self, route: Route, parts: int, keep: Sequence[object], wake: Callable[[], None]) -> None:
        self.route: Route | None = route
        self.status = Status.PENDING
        self.drained = False
        self.cancelled = False
        self._parts = parts
        self._lost = 0
        self._failed = False
        self._keep = keep
        self._wake = wake
        self._lock = threading.Lock()

    def part_ended(self, placed: bool) -> None:
        """A part is placed, or is not and never will be."""
        with self._lock:
            self._failed |= not placed
            self._parts -= 1
            changed = self._look()
        if changed:
            self._wake()

    def part_lost(self) -> None:
        """What became of a part cannot be told any more, and its bytes may still land."""
        with self._lock:
            self._parts -= 1
            self._lost += 1
            changed = self.status is Status.PENDING
            self.status = Status.UNKNOWN
            self._look()
        if changed:
            self._wake()

    def part_fenced(self) -> None:
        """A part that was lost cannot land any more."""
        with self._lock:
            self._lost -= 1
            changed = self._look()
        if changed:
            self._wake()

    def _look(self) -> bool:
        if self._parts:
            return False
        self._keep = ()  # nothing is read from the sources any more
        if self._lost:
            return False
        self.route = None  # its watch on the peer is a file
        self.drained = True  # before the status: who sees DONE may release the handle
        if self.status is Status.PENDING:
            self.status = Status.FAILED if self._failed else Status.DONE
        return True

    @property
    def source_free(self) -> bool:
        """No part is still to be sent: what the socket has taken it has copied."""
        return not self._parts

    def give_up(self) -> None:
        """The transport is closed and a thread of it did not end: what it does is not known any more."""
        with self._lock:
            if self.status is Status.PENDING:
                self.status = Status.UNKNOWN


class Part:
    """The share of a post that goes over one link."""

    __slots__ = ("begun", "nbytes", "number", "pieces", "post")

    def __init__(self, post: Post, pieces: list[Piece]) -> None:
        self.post = post
        self.pieces = deque(pieces)
        self.nbytes = sum(piece[4] for piece in pieces)
        self.number = 0
        self.begun = False


class Route:
    """What the links to one peer share: where it is, and what is known of its end."""

    def __init__(
        self, told: wire.Descriptor, addresses: list[str], watch: ProcessWatch | None, writer: bytes, limits: Limits
    ) -> None:
        self.addresses = addresses
        self.port = told.port
        self.token = told.token
        self.owner = told.instance
        self.writer = writer
        self.watch = watch
        self.limits = limits
        self._watch_lock = threading.Lock()
        self.closed = False
        """The peer said so, with nothing of its own on the way."""

    def over(self) -> str:
        """Why nothing lands at the peer any more, as far as it is proved; else empty."""
        if self.closed:
            return "the peer closed its tcp transport"
        if self.watch is not None:
            with self._watch_lock:  # a poll object serves one thread at a time
                if self.watch.ended():
                    return "the peer's process has ended"
        return ""


class Limits:
    """Time-outs in seconds: `connect` for one address to greet, `io` without progress."""

    def __init__(self, connect: float, io: float) -> None:
        self.connect = connect
        self.io = io


class Link:
    """`keep_up`: connect without a post, to hear of the peer's end."""

    def __init__(self, lane: Lane, route: Route, number: int, keep_up: bool) -> None:
        self.given = 0
        """Bytes of all parts that it was given: the endpoint's thread counts them."""
        self._taken = 0
        self.lane = lane
        self.up = False
        self._route = route
        self._number = number
        self._keep_up = keep_up
        self.forgotten = False
        """Over: no post will come and none is on the way."""
        self._released = False
        self._incarnation = 0
        self._dead = ""
        self._connection: socket.socket | None = None
        self._waits_for_room = False
        # Dialing.
        self._untried: list[str] = []
        self._deadline = math.inf
        self._round_ends = 0.0
        self._again = False
        self._cause = ""
        self._retry_at = 0.0
        self._pause_s = FIRST_RETRY_S
        # Writing.
        self._waiting: deque[Part] = deque()
        self._current: Part | None = None
        self._unanswered: deque[Part] = deque()
        self._lost: list[Part] = []
        self._parts = 0
        self._out: deque[memoryview] = deque()
        self._replies = bytearray()
        self._progress = 0.0
        self.winding = False
        """The transport closes: nothing more is begun. Set by any thread, before the lane gets to `wind_down`."""

    # ---- commands ----------------------------------------------------------------------------------------

    def begin(self) -> None:
        self.lane.time(self)
        self._settle(time.monotonic())

    def submit(self, part: Part) -> None:
        if self._dead or self.winding:
            self._end_part(part, placed=False)
            return
        self._waiting.append(part)
        if self.up:
            self._pump()
        else:
            self._retry_at = 0.0  # a post does not wait for the next try of those before it
            self._settle(time.monotonic())

    def sweep(self) -> None:
        """Some posts were cancelled: those that have not begun end here."""
        cancelled = [part for part in self._waiting if part.post.cancelled]
        self._waiting = deque(part for part in self._waiting if not part.post.cancelled)
        for part in cancelled:
            self._end_part(part, placed=False)

    def let_go(self) -> None:
        """The peer was disconnected: hang up once every part has ended. What is lost by then stays UNKNOWN."""
        self._keep_up, self._released = False, True
        self._settle(time.monotonic())
        self.forgotten = self.drained  # else it is forgotten with the transport

    def wind_down(self) -> None:
        """The transport closes: begin nothing more, and wait for the answers to what has begun."""
        self.winding = True
        self._keep_up = False
        self._progress = max(self._progress, time.monotonic())
        waiting, self._waiting = self._waiting, deque()
        for part in waiting:
            self._end_part(part, placed=False)
        if self.up:
            self._pump()
        self.lane.time(self)

    @property
    def load(self) -> int:
        """Bytes that wait or are on the way. Any thread."""
        return self.given - self._taken

    @property
    def busy(self) -> bool:
        """A part is on the way."""
        return self._current is not None or bool(self._unanswered)

    @property
    def drained(self) -> bool:
        return not (self.busy or self._waiting or self._lost)

    # ---- time --------------------------------------------------------------------------------------------

    def step(self, now: float) -> None:
        if self._connection is not None and not self.up and now >= self._deadline:
            self._next_address(f"no answer within {self._route.limits.connect:g} s")
        elif self.up and self.busy and now >= self._progress + self._patience():
            self._lose(f"no progress for {self._patience():g} s")
        self._settle(now)

    def next_time(self) -> float:
        if self._connection is None:
            return self._retry_at if self._wanted() else math.inf
        if not self.up:
            return self._deadline
        return self._progress + self._patience() if self.busy else math.inf

    def _patience(self) -> float:
        return min(WIND_DOWN_S, self._route.limits.io) if self.winding else self._route.limits.io

    def _wanted(self) -> bool:
        fence = self._lost and not (self.winding or self._released)  # nobody waits for the fence of a forgotten peer
        return not self._dead and bool(self._keep_up or self._waiting or fence)

    def _settle(self, now: float) -> None:
        """Dial if there is reason to; hang up if there is none left."""
        if self._dead:
            return
        if self._connection is None:
            if cause := self._route.over():
                self.end(cause)
            elif self._wanted():
                if now < self._retry_at:
                    self.lane.time(self)
                elif self._untried:
                    self._dial()
                else:
                    self._new_round(now)
            else:
                self.lane.untime(self)
        elif self._released and self.drained:
            self._hang_up()
            self.lane.untime(self)

    # ---- dialing -----------------------------------------------------------------------------------------

    def _new_round(self, now: float) -> None:
        self._round_ends = now + self._route.limits.connect
        self._untried = list(self._route.addresses)
        self._again = False
        self._cause = ""
        self._dial()

    def _dial(self) -> None:
        """Try the next address. A failure comes as an event, or here."""
        while self._untried:
            address = self._untried.pop(0)
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            try:
                connection = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            except OSError as error:
                self._cause = f"{address}: {error}"
                continue
            code = connection.connect_ex((address, self._route.port))
            if code not in (0, errno.EINPROGRESS):
                connection.close()
                self._cause = f"{address}: {errno.errorcode.get(code, code)}"
                continue
            self._connection = connection
            self._deadline = time.monotonic() + self._route.limits.connect
            self._waits_for_room = True
            self.lane.serve(connection, self, WRITE)
            self.lane.time(self)
            return
        now = time.monotonic()
        if self._again and now < self._round_ends:
            # Somebody took the connection and closed it without a word: a crowd at the peer's door, or another host.
            self._untried = list(self._route.addresses)
            self._again = False
            self._retry_later(now)
            return
        self._retry_later(now)
        self._fail_waiting(self._cause or "it has no address")

    def _retry_later(self, now: float) -> None:
        self._retry_at = now + self._pause_s
        self._pause_s = min(2 * self._pause_s, LAST_RETRY_S)
        self.lane.time(self)

    def _next_address(self, cause: str) -> None:
        self._cause = cause
        self._hang_up()
        self._dial()

    def _greet(self) -> None:
        assert self._connection is not None
        code = self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._next_address(errno.errorcode.get(code, str(code)))
            return
        keep_honest(self._connection)
        limit = min(int(self._route.limits.io * 1000), (1 << 31) - 1)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit)
        self._incarnation += 1
        route = self._route
        hello = wire.pack_hello(wire.Hello(route.token, route.writer, self._number, self._incarnation))
        self._connection.send(hello, socket.MSG_NOSIGNAL)  # the first bytes of a connection find room
        self._wait_for_room(False)

    def _wait_for_room(self, wait: bool) -> None:
        if wait is not self._waits_for_room:
            assert self._connection is not None
            self._waits_for_room = wait
            self.lane.listen_for(self._connection, self, READ | WRITE if wait else READ)

    # ---- events ------------------------------------------------------------------------------------------

    def on_event(self, mask: int) -> None:
        try:
            if not self.up and mask & WRITE:
                self._greet()
                return
            if mask & READ and not self._listen():
                return
            if mask & WRITE and self.up:
                self._pump()
        except BlockingIOError:
            return
        except OSError as error:
            self._broken(str(error))

    def _listen(self) -> bool:
        """Read replies. False: the connection is gone."""
        assert self._connection is not None
        data = self._connection.recv(4096)
        if not data:
            self._broken("the peer hung up")
            return False
        self._replies += data
        whole = len(self._replies) // wire.REPLY_BYTES * wire.REPLY_BYTES
        replies = bytes(self._replies[:whole])
        del self._replies[:whole]
        connection = self._connection
        for start in range(0, whole, wire.REPLY_BYTES):
            try:
                self._hear(wire.unpack_reply(replies[start : start + wire.REPLY_BYTES]))
            except ValueError as error:
                self._broken(f"the peer does not speak our language: {error}")
            if self._connection is not connection:
                return False
        self._settle(time.monotonic())
        return self._connection is not None

    def _hear(self, reply: wire.Reply) -> None:
        if reply.instance != self._route.owner:
            raise ValueError("another instance answers")
        if reply.word == wire.Word.WELCOME and not self.up:
            self._welcomed()
        elif not self.up:
            raise ValueError("no welcome")
        elif reply.word == wire.Word.CLOSED:
            self._route.closed = True
            self.end(self._route.over())
        elif self._unanswered and self._unanswered[0].number == reply.part and reply.word != wire.Word.WELCOME:
            self._progress = time.monotonic()
            self._end_part(self._unanswered.popleft(), placed=reply.word == wire.Word.PLACED)
        else:
            raise ValueError("an answer to what was not asked")

    def _welcomed(self) -> None:
        """The owner has ended every earlier connection of this link, so nothing of them can land any more."""
        self.up = True
        self._pause_s = FIRST_RETRY_S
        self._progress = time.monotonic()
        lost, self._lost = self._lost, []
        for part in lost:
            part.post.part_fenced()
        self._pump()

    # ---- sending -----------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Give the kernel what it takes."""
        assert self._connection is not None
        try:
            for _ in range(TURNS):
                buffers = self._buffers()
                if not buffers:
                    self._wait_for_room(False)
                    break
                sent = transmit(self._connection, buffers)
                del buffers
                self._progress = time.monotonic()
                self._sent(sent)
            else:
                self._wait_for_room(True)
        except BlockingIOError:
            self._wait_for_room(True)
        except OSError as error:
            self._broken(str(error))
            return
        self.lane.time(self)

    def _buffers(self) -> list[memoryview]:
        """What to send next: at most CHUNK_BYTES, and no frame is begun that could not be ended."""
        buffers: list[memoryview] = []
        room = CHUNK_BYTES + wire.FRAME_BYTES
        position = 0
        while room and len(buffers) < MAX_BUFFERS:
            if position == len(self._out) and not self._begin_frame():
                break
            view = self._out[position]
            buffers.append(view if len(view) <= room else view[:room])
            room -= len(buffers[-1])
            position += 1
        return buffers

    def _begin_frame(self) -> bool:
        part = self._current
        while part is None:
            if not self._waiting or self.winding:
                return False
            part = self._waiting.popleft()
            if part.post.cancelled:
                self._end_part(part, placed=False)
                part = None
        self._current = part
        if not part.begun:
            self._parts += 1
            part.number, part.begun = self._parts, True
        elif part.post.cancelled or self.winding:
            part.pieces.clear()
            self._out.append(memoryview(wire.pack_frame(wire.Frame(wire.Kind.ABORT, True, part.number, 0, 0, 0, 0))))
        if part.pieces:
            region, generation, offset, source, nbytes = part.pieces.popleft()
            frame = wire.Frame(wire.Kind.PIECE, not part.pieces, part.number, region, generation, offset, nbytes)
            self._out.append(memoryview(wire.pack_frame(frame)))
            self._out.append(Memory(source, nbytes).view())
        if not part.pieces:
            self._unanswered.append(part)
            self._current = None
        return True

    def _sent(self, nbytes: int) -> None:
        while nbytes:
            view = self._out[0]
            if nbytes < len(view):
                self._out[0] = view[nbytes:]
                return
            nbytes -= len(view)
            self._out.popleft()

    # ---- ends --------------------------------------------------------------------------------------------

    def _end_part(self, part: Part, placed: bool) -> None:
        self._taken += part.nbytes
        part.post.part_ended(placed)

    def _fail_waiting(self, cause: str) -> None:
        waiting, self._waiting = self._waiting, deque()
        if waiting:
            log.warning("tcp: %d posts failed before a byte moved: %s", len(waiting), cause)
        for part in waiting:
            self._end_part(part, placed=False)

    def _broken(self, cause: str) -> None:
        if self.up:
            self._lose(cause)
            self._settle(time.monotonic())
        elif self._connection is not None:
            self._again = True
            self._next_address(cause)

    def _lose(self, cause: str) -> None:
        """The connection is of no use any more; what it carried may still land."""
        self._hang_up()
        parts = [*self._unanswered, *([self._current] if self._current is not None else [])]
        self._unanswered.clear()
        self._current = None
        if parts:
            log.warning("tcp: the outcome of %d posts is unknown: %s", len(parts), cause)
        self._retry_at = 0.0
        for part in parts:
            self._lost.append(part)
            self._taken += part.nbytes
            part.post.part_lost()

    def end(self, cause: str) -> None:
        """Nothing lands at the peer any more, and it is proved. Without proof: `fail`."""
        if self._dead:
            return
        self._dead = cause
        heard = self._route.closed and self.up  # it has answered, before its last word, all that it had placed
        parts = [*self._unanswered, *([self._current] if self._current is not None else [])]
        if heard:
            self._unanswered.clear()
            self._current = None
            for part in parts:
                self._end_part(part, placed=False)
        self._lose(cause)
        lost, self._lost = self._lost, []
        for part in lost:
            part.post.part_fenced()
        self._fail_waiting(cause)
        self.lane.untime(self)

    def fail(self, cause: str) -> None:
        """Give up: what is on the way stays unknown."""
        if not self._dead:
            self._lose(cause)
            self._dead = cause
            self._fail_waiting(cause)
            self.lane.untime(self)

    def _hang_up(self) -> None:
        connection, self._connection = self._connection, None
        self.up = False
        self._out.clear()
        self._replies.clear()
        if connection is not None:
            self.lane.hang_up(connection)
