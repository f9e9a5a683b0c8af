"""One peer of a shm transport, from the writer's side: its memory as mapped here, and posts that wait for it.

A Link belongs to two threads. The endpoint's thread calls `submit`, `learn` and `watch`; everything else
runs on the courier's thread, which does the talking, so that a peer that hangs delays nobody but the
posts to itself.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import math
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec

from tensorferry.backends import _shm_wire as wire
from tensorferry.backends._copier import Batch
from tensorferry.backends._mapping import MADV_DONTFORK, Mapping
from tensorferry.backends._process import ProcessWatch, watch_connected
from tensorferry.core.errors import TransportError
from tensorferry.core.transport import Status

if TYPE_CHECKING:
    from tensorferry.backends._shm_courier import Courier

log = logging.getLogger("tensorferry.backends.shm")

FIRST_RETRY_S = 0.01
LAST_RETRY_S = 1.0

Plan = list[tuple[Any, int, int, int]]
"""(region key, offset in it, source address, bytes)"""


class Link:
    """`watch`: the proof of the peer's end, as far as there is one. `closed`: it told us that it closed, drained."""

    def __init__(self, courier: Courier, told: wire.Descriptor, watch: ProcessWatch | None, patience_s: float) -> None:
        self.watch = watch
        self.closed = False
        self._courier = courier
        self._instance = told.instance
        self._name = b"\0" + told.socket
        self._uid = told.uid
        self._patience_s = patience_s
        # Shared by both threads, under the lock.
        self._lock = threading.Lock()
        self._dead = ""
        self._wanted: dict[wire.Key, int] = {}
        self._mapped: dict[wire.Key, Mapping] = {}
        self._waiting: list[tuple[Batch, Plan]] = []
        # The courier's alone.
        self._connection: socket.socket | None = None
        self._welcomed = False
        self._asked: set[wire.Key] = set()
        self._refused: set[wire.Key] = set()
        self._give_up_at: float | None = None
        self._try_again_at = math.inf
        self._retry_at = 0.0
        self._pause_s = FIRST_RETRY_S

    # ---- the endpoint's thread ---------------------------------------------------------------------------

    def submit(self, batch: Batch, plan: Plan) -> None:
        """Copy now, or as soon as the peer's memory is mapped; FAILED if it cannot be within the patience.

        Raises TransportError where it is known already that it cannot be.
        """
        with self._lock:
            if self._dead:
                raise TransportError(self._dead, transport="shm")
            ready = self._resolve(batch, plan)
            if not ready:
                self._waiting.append((batch, plan))
        if ready:
            self._courier.copier.submit(batch)
        else:
            self._courier.call(self.kick)

    def learn(self, regions: dict[wire.Key, int]) -> None:
        """The peer's live regions are these."""
        with self._lock:
            self._wanted = regions
        self._courier.call(self.kick)

    # ---- the courier's thread ----------------------------------------------------------------------------

    def kick(self) -> None:
        """There is something to do: try for `patience_s` seconds."""
        now = time.monotonic()
        if self._give_up_at is None and not self._dead:  # else posts to a peer that hangs put off their own end
            self._give_up_at = now + self._patience_s
            self._try_again_at = math.inf
            self._retry_at = now
            self._pause_s = FIRST_RETRY_S
        self.step(now)

    def next_time(self) -> float:
        if self._give_up_at is None:
            return self._try_again_at
        return self._give_up_at if self._connection is not None else min(self._give_up_at, self._retry_at)

    def step(self, now: float) -> None:
        """Settle what can be settled, then connect, ask, or give up."""
        if self._dead:
            return
        self.settle()
        if now >= self._try_again_at:
            self.kick()
            return
        if self._give_up_at is None:
            return
        missing = [key for key in self._wanted if key not in self._mapped and key not in self._refused]
        if self._welcomed and not missing:
            self._give_up_at = None
        elif now >= self._give_up_at:
            self._hang_up()
            self._give_up_at = None
            # Nobody may ever post to this peer again, and yet it has to be known when it closes.
            self._try_again_at = now + self._patience_s
            self._fail_waiting(f"the peer did not hand over its memory within {self._patience_s:g} s")
        elif self._connection is None:
            if now >= self._retry_at:
                self._open(now)
        elif not self._asked and self._welcomed:
            self._ask(missing[: wire.MAX_ASKED])

    def end(self, cause: str) -> None:
        """Nothing more will come of this link: posts that wait are FAILED, later ones are refused with `cause`."""
        with self._lock:
            self._dead = self._dead or cause
        self._hang_up()
        self._give_up_at = None
        self._try_again_at = math.inf
        self._fail_waiting(cause)
        with self._lock:
            mapped, self._mapped = self._mapped, {}
        del mapped  # unmaps here, unless a batch is still being copied

    def _open(self, now: float) -> None:
        self._retry_at = now + self._pause_s
        self._pause_s = min(2 * self._pause_s, LAST_RETRY_S)
        connection = None
        try:
            connection = wire.new_socket()
            connection.connect(self._name)
            uid = wire.peer_uid(connection)
        except ConnectionRefusedError:
            # The name was bound before the descriptor was written; once it is gone it never comes back.
            if connection is not None:
                connection.close()
            self.end("the peer's shm transport is gone")
            return
        except OSError as error:  # EAGAIN: its queue is full (it hangs); EMFILE and the like: later, perhaps
            if connection is not None:
                connection.close()
            log.debug("cannot connect to the peer yet: %s", error)
            return
        if uid != self._uid:
            connection.close()
            self.end(f"user {uid} answers at the peer's socket, not user {self._uid}")
            return
        self._connection = connection
        self._courier.listen_to(connection, self.read, self.end)
        # The kernel's word on who listens there replaces what the descriptor claimed.
        self.watch = watch_connected(connection) or self.watch
        self._ask([])

    def _ask(self, keys: list[wire.Key]) -> None:
        assert self._connection is not None
        self._asked = set(keys)
        try:
            self._connection.send(
                wire.encode(wire.Ask(wire.SOCKET_VERSION, self._instance, list(self._asked))),
                socket.MSG_NOSIGNAL,
            )
        except OSError as error:  # also a full buffer: then the peer has not read for a long time
            log.debug("cannot ask the peer: %s", error)
            self._lost()

    def read(self) -> None:
        """One packet from the peer."""
        if self._connection is None:  # hung up since the selector saw it
            return
        try:
            try:
                data, fds = wire.receive(self._connection)
            except ConnectionResetError:
                # The peer closed with a question of ours unread; what it had sent before is still to be had.
                data, fds = wire.receive(self._connection)
        except BlockingIOError:
            return
        except (OSError, ValueError) as error:
            log.debug("lost the connection to the peer: %s", error)
            self._lost()
            return
        try:
            if not data:
                self._lost()
            else:
                self._take(wire.decode_answer(data), fds)
        except (msgspec.MsgspecError, ValueError) as error:
            self.end(f"the peer's shm transport answered with garbage: {error}")
        finally:
            for fd in fds:
                os.close(fd)

    def _take(self, answer: wire.Answer, fds: list[int]) -> None:
        if isinstance(answer, wire.Welcome | wire.Closed) and answer.instance != self._instance:
            raise ValueError("another instance answers")
        if isinstance(answer, wire.Closed):
            # Sent by the process whose user the kernel vouched for, which knows the instance: as good as
            # its end.
            self.closed = True
            self.end("the peer closed its shm transport")
            return
        if isinstance(answer, wire.Welcome):
            self._welcomed = True
        else:
            key = answer.region
            if key not in self._asked:
                raise ValueError(f"an answer about region {key} that nobody asked for")
            self._asked.discard(key)
            if isinstance(answer, wire.Refuse) or not self._map(key, answer.nbytes, fds):
                self._refused.add(key)
        self.step(time.monotonic())

    def _map(self, key: wire.Key, nbytes: int, fds: list[int]) -> bool:
        wanted = self._wanted.get(key)
        if wanted is None:  # retired meanwhile
            return False
        if len(fds) != 1 or nbytes != wanted or os.fstat(fds[0]).st_size != wanted:
            raise ValueError(f"region {key} is not what the descriptor said")
        try:
            # Without the seal the owner could cut the file short, and our next write would be a SIGBUS.
            if not fcntl.fcntl(fds[0], fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise ValueError(f"region {key} is not sealed")
            mapping = Mapping(wanted, fds[0])
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise ValueError(f"region {key} is not a memfd") from error
            log.warning("cannot map a region of the peer: %s", error)
            return False
        mapping.advise(MADV_DONTFORK)  # the end of this process is the end of its writes, children or not
        with self._lock:
            self._mapped[key] = mapping
        self._courier.fill(mapping)
        return True

    def _resolve(self, batch: Batch, plan: Plan) -> bool:
        """Under the lock: turn the plan into addresses. False: something is not mapped yet.

        A mapping counts only at the size that the newest descriptor gave, against which the plan was checked: a
        peer that gives a region another size gets no write past the old one's end.
        """
        mappings = {key: self._mapped.get(key) for key in {step[0] for step in plan}}
        addresses = {
            key: mapping.address
            for key, mapping in mappings.items()
            if mapping is not None and mapping.nbytes == self._wanted.get(key)
        }
        if len(addresses) < len(mappings):
            return False
        batch.segments = [(addresses[key] + offset, source, nbytes) for key, offset, source, nbytes in plan]
        batch.keep = [*batch.keep, *mappings.values()]
        return True

    def _hopeless(self, key: wire.Key, offset: int, _source: int, nbytes: int) -> bool:
        """Under the lock: the region went, is not given to us, or has shrunk since the copy was checked."""
        return key in self._refused or offset + nbytes > self._wanted.get(key, 0)

    def settle(self) -> None:
        """Start the posts whose memory has come, fail those whose memory never will, unmap what was retired."""
        ready, failed, still = [], [], []
        with self._lock:
            changed = [key for key, mapping in self._mapped.items() if self._wanted.get(key) != mapping.nbytes]
            retired = [self._mapped.pop(key) for key in changed]
            self._refused &= self._wanted.keys()
            for batch, plan in self._waiting:
                if batch.cancelled or any(self._hopeless(*step) for step in plan):
                    failed.append(batch)
                elif self._resolve(batch, plan):
                    ready.append(batch)
                else:
                    still.append((batch, plan))
            self._waiting = still
        del retired
        for batch in ready:
            self._courier.copier.submit(batch)
        for batch in failed:
            self._courier.copier.finish(batch, Status.FAILED)

    def _fail_waiting(self, cause: str) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
        if waiting:
            log.warning("%d posts failed before a byte moved: %s", len(waiting), cause)
        for batch, _ in waiting:
            self._courier.copier.finish(batch, Status.FAILED)

    def _lost(self) -> None:
        """The connection ended. That proves nothing about the peer; try again for a while."""
        welcomed = self._welcomed
        self._hang_up()
        now = time.monotonic()
        if welcomed and self._give_up_at is None and not self._dead:
            self._give_up_at = now + self._patience_s
        self._retry_at = now + self._pause_s
        self.step(now)

    def drop_files(self) -> None:
        """In a forked child: close what it inherited."""
        if self._connection is not None:
            self._connection.close()

    def _hang_up(self) -> None:
        connection, self._connection = self._connection, None
        self._welcomed = False
        self._asked.clear()
        if connection is not None:
            self._courier.forget(connection)
