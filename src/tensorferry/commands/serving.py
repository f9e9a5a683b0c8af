"""The embedding side of `tensorferry send`: one room, offered again and again until enough receivers have it.

What a receiver does wrong, or what happens to it, ends its own transfer and nothing else; nor does a defect of either
side's, for what a receiver says of itself comes by the wire. Two rooms are on offer at any time: the rows, and the
receipt, by which a receiver says that its file is written.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tensorferry.commands.carry_view import View, in_bytes
from tensorferry.commands.carrying import RECEIPTS, Note
from tensorferry.commands.table import told
from tensorferry.commands.token_file import BadFile, TokenFile
from tensorferry.core.errors import DeadlineExceeded, FerryError, RoomInUse
from tensorferry.core.settings import Settings
from tensorferry.reachable import reachable

if TYPE_CHECKING:
    from tensorferry import Sender, SendTransfer
    from tensorferry.plugins.rendezvous import Publication

TICK_SECONDS = 0.01

PAUSE_SECONDS = 0.5
"""From an offer that failed to the next: what fails each of them at once is not to become a hot loop."""

MOST_KEPT = 100
"""Deliveries, and failed ones, that the report lists: a sender may run for weeks."""


WRITING_SECONDS = 60.0
"""How long a receiver that has all rows may take to write them, where nothing else is to be done but to wait for it."""


class Serving:
    """One run of `tensorferry send`, and what is known of it so far."""

    def __init__(self, file: TokenFile, room: int, count: int, *, receipts: bool, publish: str = "") -> None:
        self.file = file
        self.publish = publish
        """The name to be found under; empty: by the address alone."""
        self.room = room
        self.count = count
        self.address = ""
        self.addresses: list[str] = []
        """Where receivers can find it, best first."""
        self.only_here = False
        self.command = ""
        self.metadata_carried = True
        self.transport: str | None = None
        self.deliveries: deque[dict[str, Any]] = deque(maxlen=MOST_KEPT)
        self.failures: deque[FerryError] = deque(maxlen=MOST_KEPT)
        self.served = 0
        self._publication: Publication | None = None
        self._lost = ""  # the directory's last complaint that was shown
        self._receipts = receipts
        self._arrived: list[float] = []  # seconds of each transfer whose receipt is out
        self._last_arrival = 0.0
        self._offer: SendTransfer | None = None
        self._receipt: SendTransfer | None = None
        self._pause_ends = 0.0
        self._taken = False  # the room cannot be offered: what its last receiver opened is not over
        self._looked = 0.0  # when this offer was last seen without a receiver
        self._began = 0.0  # the same, once it has one: never later than the receiver came

    def run(
        self,
        settings: Settings,
        view: View,
        *,
        bind: str,
        options: Mapping[str, str],
        timeout: float | None,
        announce: Callable[[Serving], None],
    ) -> None:
        """Until `count` receivers are served. Raises DeadlineExceeded after `timeout` seconds, unless any number will
        do; BadFile where the file changes; and whatever keeps the endpoint from being opened."""
        import tensorferry as tf

        self.transport = settings.transport
        given = settings.as_dict()
        with tf.Sender(self.file.table.layout, bind=bind, options=options, name=self.publish, **given) as sender:
            self.address = sender.address
            self.addresses, self.only_here = reachable(sender.address)
            self._keep_on_offer(sender)
            if self.publish:
                self._publication = sender.publish()
            announce(self)  # not before: whoever pastes the command at once finds the room
            last = None if timeout is None else time.monotonic() + timeout
            while not self.count or self.served < self.count:
                self._keep_on_offer(sender)
                if last is not None and time.monotonic() > last:
                    if not self.count:
                        return
                    raise DeadlineExceeded(
                        f"served {self.served} of {self.count} receivers within --timeout ({timeout:g} s)",
                        room=self.room,
                        hint="Was the printed command run? Failed deliveries do not count",
                    )
                sender.poll()
                time.sleep(TICK_SECONDS)
                self._look(view)

    def _keep_on_offer(self, sender: Sender) -> None:
        file, now = self.file, time.monotonic()
        if now < self._pause_ends:
            return
        if self._offer is None and not self._winding_up():
            note = Note(file.digest, RECEIPTS | self.room if self._receipts else 0)
            try:
                self._offer = sender.send(self.room, content_id=file.digest, aux=note.words(), **file.components)
                self._began, self._looked, self._taken = 0.0, now, False
            except RoomInUse:  # a receiver of several ranks has ended, and not all of them have been heard of
                self._taken = True
        if self._receipts and self._receipt is None:
            with suppress(RoomInUse):  # the same: the next tick tries again
                self._receipt = sender.announce(RECEIPTS | self.room, 0, content_id=file.digest)

    def _winding_up(self) -> bool:
        """Whether the file has changed and a receiver is still writing what it was. Raises BadFile once none is."""
        try:
            self.file.check_unchanged()
        except BadFile:
            if self._arrived and time.monotonic() - self._last_arrival < WRITING_SECONDS:
                return True
            raise
        return False

    def _look(self, view: View) -> None:
        problem = self._publication.error if self._publication is not None else None
        if (code := problem.code if problem is not None else "") != self._lost:
            self._lost = code
            view.line(f"found as {self.publish} again" if problem is None else f"not found by name: {problem.cause}")
        offer, receipt = self._offer, self._receipt
        if offer is not None:
            if offer.status == "BOOTSTRAPPING":
                self._looked = time.monotonic()
            elif not self._began:
                self._began = self._looked
            if offer.done:
                self._offer = None
                self._ended(offer, view)
            elif self._began and offer.sent_tokens:
                view.progress(offer.sent_tokens, self.file.tokens, self.file.table.layout.token_bytes)
            elif self._began:
                view.wait(f"a receiver has opened room {self.room}")
            elif self._arrived:
                view.wait("the rows have arrived; the receiver writes its file")
            else:
                view.wait(f"room {self.room} is open at {self.addresses[0]}, waiting for a receiver")
        elif self._taken:
            view.wait(f"room {self.room} is in use until every rank of its last receiver is heard of or given up")
        if receipt is not None and receipt.done:
            self._receipt = None
            if receipt.error is None:
                self._count(view)
            else:
                self._pause_ends = time.monotonic() + PAUSE_SECONDS

    def _ended(self, offer: SendTransfer, view: View) -> None:
        self.transport = offer.transport or self.transport
        if offer.error is None:
            self._last_arrival = time.monotonic()
            self._arrived.append(self._last_arrival - (self._began or self._looked))
            if not self._receipts:
                self._count(view)
            return
        if offer.error.code == "deadline" and not self._began:
            return  # nobody came within transfer_deadline: the next offer has another one
        self._pause_ends = time.monotonic() + PAUSE_SECONDS
        self.failures.append(offer.error)
        view.line(f"not delivered: {offer.error.cause} ({offer.error.code}); the room stays open")

    def _count(self, view: View) -> None:
        # A receiver that was killed gives no receipt, so the one that does is the last whose rows arrived.
        spent = self._arrived[-1] if self._arrived else 0.0
        self._arrived.clear()
        self.served += 1
        rate = self.file.nbytes / spent if spent else 0.0
        self.deliveries.append({"seconds": spent, "goodput_bytes_per_s": rate, "receipt": self._receipts})
        written = "written and verified" if self._receipts else "arrived"
        of = f" of {self.count}" if self.count else ""
        view.line(f"receiver {self.served}{of}: {written}, {in_bytes(self.file.nbytes)} in {spent:.3f} s")

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        return {
            "address": self.address or None,
            "command": self.command or None,
            "transport": self.transport,
            "total_tokens": self.file.tokens,
            "bytes": self.file.nbytes,
            "digest": told(self.file.digest),
            "served": self.served,
            "metadata_carried": self.metadata_carried,
            "deliveries": list(self.deliveries),
            "failed_deliveries": [error.as_dict() for error in self.failures],
        }
