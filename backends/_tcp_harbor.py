"""The receiving side of a tcp transport: its regions, who may come in, and the connections that bring bytes.

The owner of the memory places every byte itself, so it is the owner who checks: region, generation, bounds and
whether the region still lives, before each stretch that it takes off the wire. `Berth` makes `retire` a fence.
Whoever connects has to present our token before anything is done for it; what is wrong with a connection ends that
connection, and nothing else.

Long because all that is done about bytes from outside stands here, from the listener to the region.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import logging
import math
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

from tensorferry.backends import _tcp_wire as wire
from tensorferry.backends._tcp_lane import FAREWELL_S, READ, WRITE, Lane
from tensorferry.core.memory import Memory

log = logging.getLogger("tensorferry.backends.tcp")

BACKLOG = 1024
"""Connections that the kernel holds for us: a flood must not make it turn writers away."""

ACCEPTS = 128
"""Most connections accepted before the other business of the lane has its turn."""

MAX_GUESTS = 64
"""Most connections that have not said who they are. The next one takes the place of the one that is silent longest:
a writer greets at once, so it is gone from here before its turn comes."""

GREETING_TIMEOUT_S = 2.0
MAX_INLETS = 4096
"""Most connections with our token: a file descriptor each."""

MAX_BARRED = 4096
ACCEPT_PAUSE_S = 0.2
"""How long no connection is accepted after accept has failed (out of file descriptors, say)."""

CHUNK_BYTES = 1 << 20
"""Most bytes taken off the wire at once: how long `retire` may have to wait, well under a millisecond."""

TURNS = 16
"""Chunks that one connection may take before the others of its lane have their turn."""

MAX_UNSENT_BYTES = 1 << 20
"""A writer that reads no replies is cut off at so many bytes of them."""

Key = tuple[int, int]
"""(id, generation) of a region."""


def receive(connection: socket.socket, view: memoryview) -> int:
    """A name of its own, so that a test can stop in the middle of it."""
    return connection.recv_into(view)


class Berth:
    """A region that peers may write to, and its gate: one lock a lane, which that lane holds while it places a chunk.

    Placing never blocks (the sockets do not), so neither does a lock stay taken.
    """

    __slots__ = ("_live", "_locks", "_view", "nbytes")

    def __init__(self, memory: Memory, lanes: int) -> None:
        self.nbytes = memory.nbytes
        self._view: memoryview | None = memory.view()
        self._live = True
        self._locks = [threading.Lock() for _ in range(lanes)]

    def place(self, lane: int, connection: socket.socket, offset: int, most: int) -> int:
        """Take up to `most` bytes off the connection to `offset`. How many; 0 at its end, -1 once the gate is shut."""
        if not self._live:  # without it a busy lane could take the lock again and again before `shut` gets it
            return -1
        with self._locks[lane]:
            if self._view is None or not self._live:
                return -1
            return receive(connection, self._view[offset : offset + most])

    def shut(self, timeout_s: float) -> bool:
        """After it has answered True no byte is placed here any more."""
        self._live = False
        deadline = time.monotonic() + timeout_s
        for lock in self._locks:
            if not lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
                return False
            lock.release()
        self._view = None  # lets go of the memory
        return True


class Harbor:
    """What all lanes of a transport share of its receiving side. Takes over `listener`."""

    def __init__(self, instance: bytes, token: bytes, lanes: Sequence[Lane], listener: socket.socket) -> None:
        self.instance = instance
        self.token = token
        self.berths: dict[Key, Berth] = {}
        self.dropped = 0
        """Connections that were ended before they had presented our token."""
        self._lanes = lanes
        self._inlets: list[dict[tuple[bytes, int], Inlet]] = [{} for _ in lanes]
        self._guests: OrderedDict[Guest, None] = OrderedDict()
        self._door = Door(self, lanes[0], listener)
        self._barred: OrderedDict[bytes, None] = OrderedDict()
        self._bar_lock = threading.Lock()
        self._leaving: dict[int, float] = {}
        lanes[0].suggest(self._door.open)

    # ---- the endpoint's thread ---------------------------------------------------------------------------

    def publish(self, key: Key, memory: Memory) -> None:
        self.berths[key] = Berth(memory, len(self._lanes))

    def withdraw(self, key: Key, timeout_s: float) -> bool:
        """True: nothing lands in this region any more."""
        berth = self.berths.pop(key, None)
        return berth is None or berth.shut(timeout_s)

    def bar(self, instance: bytes, done: Callable[[], None]) -> None:
        """End every connection of this writer, let no later one in, then call `done`: nothing of it lands any more.

        Needed although its process has ended or its transport is closed: what it had sent may still wait in our
        sockets, or in a connection that we have not accepted yet.
        """
        with self._bar_lock:
            self._barred[instance] = None
            if len(self._barred) > MAX_BARRED:  # a connection waits to be accepted for far less long than that
                self._barred.popitem(last=False)
        left = {lane.index for lane in self._lanes}

        def drop(lane: Lane) -> None:
            for (writer, _), inlet in list(self._inlets[lane.index].items()):
                if writer == instance:
                    inlet.fail("its writer has ended")
            with self._bar_lock:
                left.discard(lane.index)
                last = not left
            if last:
                done()

        for lane in self._lanes:
            if not lane.suggest(partial(drop, lane)):  # then its connections are closed
                drop(lane)

    # ---- lanes -------------------------------------------------------------------------------------------

    def invite(self, connection: socket.socket) -> None:
        """Lane 0: somebody has connected."""
        while len(self._guests) >= MAX_GUESTS:
            next(iter(self._guests)).fail("too many say nothing")
        guest = Guest(self, self._lanes[0], connection)
        self._guests[guest] = None
        guest.begin()

    def dismiss(self, guest: Guest, cause: str) -> None:
        self.forget(guest)
        self.dropped += 1
        if self.dropped & (self.dropped - 1) == 0:  # at 1, 2, 4, 8 ...: nobody can fill our log
            log.warning("tcp: dropped a connection that did not present our token (%s); %d so far", cause, self.dropped)

    def forget(self, guest: Guest) -> None:
        self._guests.pop(guest, None)

    def admit(self, connection: socket.socket, hello: wire.Hello) -> None:
        """Lane 0: it has our token. From here on its lane serves it, which every connection of this link belongs to."""
        lane = self._lanes[hello.link % len(self._lanes)]
        lane.sockets.add(connection)
        if not lane.suggest(partial(self._adopt, lane, connection, hello)):
            lane.hang_up(connection)

    def _adopt(self, lane: Lane, connection: socket.socket, hello: wire.Hello) -> None:
        inlets = self._inlets[lane.index]
        key = (hello.instance, hello.link)
        old = inlets.get(key)
        late = old is not None and old.incarnation >= hello.incarnation
        if late or hello.instance in self._barred or len(inlets) >= MAX_INLETS or lane.index in self._leaving:
            lane.hang_up(connection)
            return
        if old is not None:
            old.fail("its writer has connected again")
        inlets[key] = Inlet(self, lane, connection, hello)
        inlets[key].begin()

    def discard(self, inlet: Inlet) -> None:
        inlets = self._inlets[inlet.lane.index]
        if inlets.get(inlet.key) is inlet:
            del inlets[inlet.key]

    def leave(self, lane: Lane, say_closed: bool) -> bool:
        """End this lane's part. Asked again until it answers True: everybody has read our last word, or had the time.

        `say_closed`: the berths are shut, and nothing that this instance posted can land any more.
        """
        inlets = self._inlets[lane.index]
        if lane.index not in self._leaving:
            self._leaving[lane.index] = time.monotonic() + FAREWELL_S
            if lane.index == 0:
                self._door.close()
                for guest in list(self._guests):
                    guest.fail("the transport is closed")
            for inlet in list(inlets.values()):
                if say_closed:
                    inlet.say_closed()
                else:
                    inlet.fail("the transport is closed")
        elif time.monotonic() >= self._leaving[lane.index]:
            for inlet in list(inlets.values()):
                inlet.fail("it did not read our last word")
        return not inlets


class Door:
    """The listening socket."""

    def __init__(self, harbor: Harbor, lane: Lane, listener: socket.socket) -> None:
        self._harbor = harbor
        self._lane = lane
        self._listener = listener
        self._again_at = math.inf
        listener.setblocking(False)
        lane.sockets.add(listener)

    def open(self) -> None:
        self._lane.serve(self._listener, self, READ)

    def close(self) -> None:
        self._lane.untime(self)
        self._lane.hang_up(self._listener)

    def on_event(self, mask: int) -> None:
        for _ in range(ACCEPTS):
            try:
                connection, _address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.ECONNABORTED, errno.EINTR, errno.EPROTO):
                    continue  # that one's trouble, not ours
                # Out of file descriptors, say: the listener would stay readable and the loop would spin.
                log.warning("tcp: cannot accept a peer, trying again in %g s: %s", ACCEPT_PAUSE_S, error)
                self._pause()
                return
            connection.setblocking(False)
            self._harbor.invite(connection)

    def _pause(self) -> None:
        self._lane.leave(self._listener)
        self._lane.sockets.add(self._listener)
        self._again_at = time.monotonic() + ACCEPT_PAUSE_S
        self._lane.time(self)

    def step(self, now: float) -> None:
        self._again_at = math.inf
        self._lane.untime(self)
        self.open()

    def next_time(self) -> float:
        return self._again_at

    def fail(self, cause: str) -> None:
        log.error("tcp: the listener failed: %s", cause)


class Guest:
    """Somebody who has connected and not said who it is: one greeting of fixed length, within a bounded time."""

    def __init__(self, harbor: Harbor, lane: Lane, connection: socket.socket) -> None:
        self._harbor = harbor
        self._lane = lane
        self._connection = connection
        self._deadline = time.monotonic() + GREETING_TIMEOUT_S
        self._said = bytearray()

    def begin(self) -> None:
        self._lane.serve(self._connection, self, READ)
        self._lane.time(self)
        self.on_event(READ)

    def on_event(self, mask: int) -> None:
        try:
            data = self._connection.recv(wire.HELLO_BYTES - len(self._said))
        except BlockingIOError:
            return
        except OSError as error:
            self.fail(str(error))
            return
        self._said += data
        if not data:
            self.fail("it hung up")
        elif len(self._said) == wire.HELLO_BYTES:
            self._judge()

    def _judge(self) -> None:
        try:
            hello = wire.unpack_hello(self._said)
        except ValueError as error:
            self.fail(str(error))
            return
        if not hmac.compare_digest(hello.token, self._harbor.token):
            self.fail("another token")
            return
        self._lane.untime(self)
        self._harbor.forget(self)
        self._lane.leave(self._connection)
        self._harbor.admit(self._connection, hello)

    def step(self, now: float) -> None:
        if now >= self._deadline:
            self.fail("it said nothing for too long")

    def next_time(self) -> float:
        return self._deadline

    def fail(self, cause: str) -> None:
        self._lane.untime(self)
        self._lane.hang_up(self._connection)
        self._harbor.dismiss(self, cause)


class Inlet:
    """A writer's connection: frames come in, replies go out."""

    def __init__(self, harbor: Harbor, lane: Lane, connection: socket.socket, hello: wire.Hello) -> None:
        self.lane = lane
        self.key = (hello.instance, hello.link)
        self.incarnation = hello.incarnation
        self._harbor = harbor
        self._connection = connection
        self._header = bytearray(wire.FRAME_BYTES)
        self._header_view = memoryview(self._header)
        self._filled = 0
        self._out = bytearray()
        self._waits_for_room = False
        self._over = False  # our last word is said
        # The part that is under way.
        self._part: int | None = None
        self._refused = False
        # The piece that is under way.
        self._last = False
        self._berth: Berth | None = None
        self._offset = 0
        self._left = 0

    def begin(self) -> None:
        keep_honest(self._connection)
        self.lane.serve(self._connection, self, READ)
        self._reply(wire.Word.WELCOME, 0)

    def on_event(self, mask: int) -> None:
        try:
            if mask & WRITE:
                self._flush()
            if mask & READ:
                for _ in range(TURNS):
                    if not self._take():
                        self.fail("its writer hung up")
                        return
        except BlockingIOError:
            return
        except (OSError, ValueError) as error:
            self.fail(str(error))

    def _take(self) -> bool:
        """The next stretch off the wire. False: there is no more. Raises BlockingIOError: there is none yet."""
        if not self._left:
            got = receive(self._connection, self._header_view[self._filled :])
            self._filled += got
            if self._filled == wire.FRAME_BYTES:
                self._filled = 0
                self._begin_piece(wire.unpack_frame(self._header))
            return got > 0
        got = -1
        if self._berth is not None:
            got = self._berth.place(self.lane.index, self._connection, self._offset, min(self._left, CHUNK_BYTES))
        if got < 0:  # refused, or its region was retired just now: what is left of the piece goes nowhere
            self._berth, self._refused = None, True
            got = self._connection.recv_into(_nowhere, min(self._left, len(_nowhere)))
        self._offset += got
        self._left -= got
        if not self._left:
            self._berth = None
            self._end_piece()
        return got > 0

    def _begin_piece(self, frame: wire.Frame) -> None:
        if self._part is not None and frame.part != self._part:
            raise ValueError("a part within another")
        self._part, self._last = frame.part, frame.last
        if frame.kind == wire.Kind.ABORT:
            self._refused = True
            self._end_piece()
            return
        berth = self._harbor.berths.get((frame.region, frame.generation))
        if berth is None or frame.offset + frame.length > berth.nbytes:
            if berth is not None:
                log.warning("tcp: refused %d bytes at %d of a region of %d", frame.length, frame.offset, berth.nbytes)
            berth, self._refused = None, True
        self._berth, self._offset, self._left = berth, frame.offset, frame.length

    def _end_piece(self) -> None:
        if self._last:
            assert self._part is not None
            self._reply(wire.Word.REFUSED if self._refused else wire.Word.PLACED, self._part)
            self._part, self._refused = None, False

    def _reply(self, word: wire.Word, part: int) -> None:
        if self._over:
            return
        self._out += wire.pack_reply(word, part, self._harbor.instance)
        if len(self._out) > MAX_UNSENT_BYTES:
            raise ValueError("it does not read what we reply")
        self._flush()

    def _flush(self) -> None:
        if self._out:
            with contextlib.suppress(BlockingIOError):  # the rest goes when there is room
                del self._out[: self._connection.send(self._out, socket.MSG_NOSIGNAL)]
            if bool(self._out) is not self._waits_for_room:
                self._waits_for_room = bool(self._out)
                self.lane.listen_for(self._connection, self, READ | WRITE if self._out else READ)
        if self._over and not self._out:
            self._connection.shutdown(socket.SHUT_WR)

    def say_closed(self) -> None:
        """Our last word. What comes in after it is read and goes nowhere, until the writer has hung up."""
        try:
            self._reply(wire.Word.CLOSED, 0)
            self._over = True
            self._flush()
        except (OSError, ValueError) as error:
            self.fail(str(error))

    def step(self, now: float) -> None:
        pass

    def next_time(self) -> float:
        return math.inf

    def fail(self, cause: str) -> None:
        log.debug("tcp: ended a writer's connection: %s", cause)
        self._berth = None
        self._harbor.discard(self)
        self.lane.hang_up(self._connection)


_nowhere = bytearray(64 << 10)
"""Where refused bytes go. Nobody reads it."""


def keep_honest(connection: socket.socket) -> None:
    """No waiting to fill packets; and let the kernel notice a host that has vanished."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
