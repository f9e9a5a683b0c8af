"""The embedding side: carries out what the sender machine decides.

The caller's rows are read where they lie if the transport can; a grant becomes posts of the transport's preferred
size, packed components go through staging, and each finished post is one Done with its digests.

Long because what one thread does for the sender stands in one file; posts are in posting.py.
"""

from __future__ import annotations

import logging
import secrets
import struct
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from tensorferry.core import effects as fx
from tensorferry.core import messages as m
from tensorferry.core.arguments import INT64, int64s, integer, names, sixteen_bytes
from tensorferry.core.carriers import Reach
from tensorferry.core.endpoint import Endpoint, closed_error
from tensorferry.core.errors import (
    BadCall,
    BadTensor,
    DeadlineExceeded,
    DeviceError,
    FerryError,
    PeerLost,
)
from tensorferry.core.handles import SendTransfer
from tensorferry.core.layout import AUX_WORDS, Geometry, Layout, slab_plan
from tensorferry.core.memory import HOST
from tensorferry.core.policy import SenderPolicy
from tensorferry.core.posting import Poster, Target
from tensorferry.core.selection import Verdict
from tensorferry.core.sender import SenderMachine
from tensorferry.core.sender_state import Slot
from tensorferry.core.settings import Settings
from tensorferry.core.source import Source, on_a_gpu
from tensorferry.core.staging import Stagings
from tensorferry.core.timing import Troubles
from tensorferry.core.transfer import Facts
from tensorferry.core.transport import Transport

if TYPE_CHECKING:
    import torch

log = logging.getLogger("tensorferry.sender")

ABANDON_SECONDS = 60.0
"""How long writes of unknown outcome to a receiver that is lost are kept in mind: a process that was only stopped may
have gone on by then. After that it never hears of them again, and replaces the memory that they may land in."""

PREFER_AGAIN_SECONDS = 30.0
"""How long the next best transport carries before the best one has another chance."""

_AUX = struct.Struct(f"<{AUX_WORDS}q")


class Sender(Endpoint):
    """Sends rooms from `bind` (a control address; port 0 for any free one, see `address`).

    `transports` (one, or several to choose from per receiver) are used by this endpoint alone and closed with it.
    Raises ConfigError for a bad address.
    """

    def __init__(
        self,
        layout: Layout,
        transports: Transport | Sequence[Transport],
        settings: Settings,
        *,
        bind: str = "tcp://127.0.0.1:0",
        name: str = "",
        passed_over: Sequence[Verdict] = (),
    ) -> None:
        """`passed_over`: transports that whoever opened these did not open, each with the reason."""
        super().__init__(layout, transports, settings, bind=bind, name=name, passed_over=passed_over)
        self.address = self._control.address
        self._transfers: dict[int, SendTransfer] = {}  # by serial, until the end
        self._arriving: dict[int, Source] = {}  # by serial: rows that a GPU is still computing
        self._carried_to: dict[int, int] = {}  # by serial, the receiver whose way its transfer shows
        self._heard: dict[int, float] = {}
        self._troubles = Troubles()
        try:
            staging = Stagings(self.carriers, settings.staging_bytes)
            self._undo.callback(staging.close)
            hello = m.Hello(
                src=self.incarnation, dst=0, min_live=1, version=m.PROTOCOL_VERSION, name=self.name,
                layout=layout.fingerprint, block_size=settings.block_size, pool_blocks=0, slabs=0, generations=b"",
                offers=self.carriers.offers(), revision=1, ack=0,
            )  # fmt: skip
            self.machine = SenderMachine(hello, SenderPolicy(max_rooms=settings.max_rooms))
            self._poster = Poster(
                layout, self.carriers, self.machine, self._do, staging=staging, block_size=settings.block_size
            )
            self._start()
        except BaseException:
            self._undo.close()
            raise

    # ---- what callers do ---------------------------------------------------------------------------------------

    def announce(
        self,
        room: int,
        total_tokens: int,
        *,
        content_id: bytes | None = None,
        aux: Sequence[int] = (),
        mrope_delta: int = 0,
        components: Iterable[str] | None = None,
    ) -> SendTransfer:
        """Say that `room` will have `total_tokens` tokens of `components` (default: all of the layout); `put` the rows.

        `content_id`: 16 bytes that whoever restarts this sender can reproduce (a hash of input and model revision,
        say): equal ids promise equal bytes, and a restarted sender resumes where it stopped. Default: random.
        `aux`: up to 14 int64 words of the caller's own, aux[2:] in the result; aux[0] is the length, aux[1]
        `mrope_delta`. Raises RoomInUse, BadCall, BadTensor (for components) or Overloaded. The room of a group that
        was given up is in use until each of its ranks has closed it, a moment longer than this side's transfer lives.
        """
        source = Source(self.layout, total_tokens, names(self.layout.names if components is None else components))
        return self._offer(room, source, content_id, aux, mrope_delta)

    def send(
        self,
        room: int,
        *,
        mrope_delta: int = 0,
        content_id: bytes | None = None,
        aux: Sequence[int] = (),
        **components: torch.Tensor | None,
    ) -> SendTransfer:
        """Announce and put in one: the rows of every component, `[n, *shape]`; None or left out means absent.

        Rows are read in place and must not change before the transfer's end. Rows on a GPU may still be computed, on
        the calling thread's current stream. See `announce` for the rest.
        """
        given = {name: tensor for name, tensor in components.items() if tensor is not None}
        lengths = {name: int(tensor.shape[0]) if getattr(tensor, "ndim", 0) else 0 for name, tensor in given.items()}
        if not given:
            raise BadTensor("nothing to send: give the layout's components as keyword arguments", room=room)
        source = Source(self.layout, max(lengths.values()), given)
        source.put(0, **given)
        return self._offer(room, source, content_id, aux, mrope_delta)

    @property
    def free_blocks(self) -> int:
        """The configured pool, less the blocks that are being written at this moment."""
        busy = self._call(lambda: sum(len(w.outstanding) for w in self.machine.writes.values()))
        return max(0, self.settings.pool_blocks - int(busy))

    @property
    def pool_blocks(self) -> int:
        return self.settings.pool_blocks

    def _offer(
        self, room: int, source: Source, content_id: bytes | None, aux: Sequence[int], mrope_delta: int
    ) -> SendTransfer:
        room = integer(room, "room")
        content_id = secrets.token_bytes(16) if content_id is None else sixteen_bytes(content_id, "content_id")
        words = [source.total_tokens, integer(mrope_delta, "mrope_delta", lowest=INT64)]
        words += int64s(aux, "aux", AUX_WORDS - 2)
        packed = _AUX.pack(*words, *[0] * (AUX_WORDS - len(words)))
        source.integrity = self.settings.integrity
        if source.integrity == "auto":  # hashing all of what lies on a GPU takes all of it through the host
            source.integrity = "full" if source.place == HOST else "sampled"
        facts = Facts(source.total_tokens, content_id, self.layout.presence(source.names), packed, source.integrity)
        self._check_staging(source.names, rows=source.place != HOST)
        transfer = SendTransfer(self, room, source.total_tokens)

        def start() -> None:
            serial, effects = self.machine.offer(room, facts, source.ready)
            transfer._serial = serial
            self._transfers[serial], self._poster.sources[serial] = transfer, source
            if source.arriving:
                self._arriving[serial] = source
            self._do(effects)

        self._call(start)
        return transfer

    def _check_staging(self, names: tuple[str, ...], *, rows: bool) -> None:
        """Raises ConfigError where a block does not fit: it would wait for ever. `rows`: all of it passes through."""
        plan = slab_plan(self.layout, Geometry(self.settings.block_size, 1, 1), 0)
        self._poster.staging.max_blocks(plan, names, rows=rows)

    def _put(self, transfer: SendTransfer, start: int, components: Mapping[str, torch.Tensor | None]) -> None:
        source = self._poster.sources.get(transfer._serial)
        if source is None:
            raise transfer.error or BadCall("the transfer has ended", room=transfer.room)
        if on_a_gpu(components.values()):
            self._check_staging(source.names, rows=True)
        self._check_caller()
        source.put(start, **components)
        self._call(lambda: self._extend(transfer._serial, source))

    def _extend(self, serial: int, source: Source) -> None:
        """Tell how far the rows are ready; of those that a GPU still computes, again when they are (R3: nothing is
        granted that would wait for it)."""
        try:
            self._do(self.machine.extend(serial, source.ready))
        except DeviceError as problem:
            self._arriving.pop(serial, None)
            self._do(self.machine.cancel(serial, problem))
            return
        if source.arriving:
            self._arriving[serial] = source
        else:
            self._arriving.pop(serial, None)

    def _cancel(self, transfer: SendTransfer, error: FerryError) -> None:
        if not transfer.done:
            self._call(lambda: self._do(self.machine.cancel(transfer._serial, error)), later=True)

    # ---- effects -----------------------------------------------------------------------------------------------

    def _on_message(self, route: str, message: m.Message, now: float) -> None:
        if isinstance(message, m.Hello):
            self.machine.described(self.carriers.news(self.machine.hello.offers, now))
        self._do(self.machine.on_message(route, message))
        if message.src in self.machine.receivers:
            self._heard[message.src] = now

    def _carry_out(self, effect: fx.Effect) -> None:
        match effect:
            case fx.Connect(_, hello):
                self._meet(hello)
            case fx.PostWrite():
                self._poster.put(effect)
            case fx.ReleaseSource(serial):
                self._poster.release(serial)
            case fx.Ended(serial, error):
                transfer = self._transfers.pop(serial)
                self._arriving.pop(serial, None)
                self._show_way(transfer, self._carried_to.pop(serial, 0))  # as the last write has left it
                offer_status = "SUCCESS" if error is None else "FAILED"
                transfer.error = error
                if error is None:
                    transfer.sent_tokens = transfer.total_tokens
                transfer.status = type(transfer.status)(offer_status)  # last: whoever polls reads the others then
                self._poster.end(serial)
                self._publish(transfer)
            case fx.Progressed(serial):
                slot = self.machine._slot_of(serial)
                live = self._transfers.get(serial)
                if slot is not None and slot.offer is not None and live is not None:
                    live.status = slot.offer.status
                    self._show_progress(live, slot)
                    self._publish(live)

    def _show_progress(self, transfer: SendTransfer, slot: Slot) -> None:
        reached = [b.prefix for b in slot.bindings.values() if not b.dummy]
        if reached:
            said = min(reached) * self.settings.block_size
            transfer.sent_tokens = max(transfer.sent_tokens, min(said, transfer.total_tokens))
        for binding in slot.bindings.values():
            if slot.offer is not None and binding.receiver in self._poster.targets:
                self._carried_to[slot.offer.serial] = binding.receiver
                self._show_way(transfer, binding.receiver)
                return

    def _show_way(self, transfer: SendTransfer, receiver: int) -> None:
        target = self._poster.targets.get(receiver)
        if target is not None:
            transfer.transport = target.reach.lane.transport.name
            transfer.path = target.reach.path
            transfer.verdicts = tuple(target.reach.verdicts)

    def _publish(self, transfer: SendTransfer) -> None:
        self._changed[transfer] = None
        transfer._published()

    def _meet(self, hello: m.Hello) -> None:
        """A receiver's incarnation, or its regions, are new."""
        error: FerryError | None = None
        way = ("", "")
        try:
            geometry = Geometry(hello.block_size, hello.pool_blocks, hello.slabs)
            generations = m.unpack_generations(hello.generations)
            if len(generations) != geometry.slab_count:
                raise BadCall(f"{len(generations)} generations for {geometry.slab_count} slabs")
            before = self._poster.targets.get(hello.src)
            reach = self.carriers.reach(hello, hello.name, before.reach if before else None)
            self._poster.targets[hello.src] = Target(reach, geometry, generations)
            way = reach.way
            if before is None:
                log.info("receiver %s is reached by %s", hello.name, "; ".join(map(str, reach.verdicts)))
        except FerryError as problem:
            log.warning("receiver %s cannot be used: %s", hello.name, problem)
            self.machine.refused = str(problem)
            error = problem
        self._do(self.machine.connected(hello.src, error, *way))

    def _progress(self) -> bool:
        for serial, source in list(self._arriving.items()):
            self._guard(partial(self._extend, serial, source))
        return self._poster.progress() or bool(self._arriving)

    @property
    def _copies(self) -> bool:
        return self._poster.copies or bool(self._arriving)

    # ---- time --------------------------------------------------------------------------------------------------

    def _tick(self, now: float) -> bool:
        machine, watches, s = self.machine, self._watches, self.settings
        keys: set[Any] = set()
        bound = {b.receiver for slot in machine.slots.values() for b in slot.bindings.values()}
        for receiver in bound:
            self._guard(partial(self._watch_receiver, receiver, now, keys))
        for receiver, target in list(self._poster.targets.items()):  # whoever came and went: keep none of its memory
            if receiver not in bound and target.reach.ended:
                ended = PeerLost("the receiver's process has ended")
                self._guard(partial(self._lose, receiver, ended, gone=True))
        for slot in list(machine.slots.values()):
            self._look_after(partial(self._watch_slot, slot, now, keys), partial(self._fail, slot))
        for receiver in {w.receiver for w in machine.writes.values()} - bound:
            self._guard(partial(self._watch_abandoned, receiver, now, keys))
        for receiver, target in list(self._poster.targets.items()):
            if target.reach.fallen:
                self._guard(partial(self._watch_fallen, receiver, target.reach, now, keys))
        for receiver in self._poster.targets.keys() - machine.receivers.keys():  # forgotten to make room for others
            self._poster.targets.pop(receiver).reach.disconnect()
        for receiver in self._heard.keys() - machine.receivers.keys():
            del self._heard[receiver]
        for room in machine.given_up.keys() | machine.withdrawn.keys():
            keys.add(("ended early", room))
            if watches.age(("ended early", room), now) > s.announce_deadline:
                machine.forget_ended(room)
        watches.keep_only(keys)
        return bool(machine.slots or self._poster.busy)

    def _watch_slot(self, slot: Slot, now: float, keys: set[Any]) -> None:
        machine, watches, s = self.machine, self._watches, self.settings
        keys.add(("slot", slot.id))
        if watches.repeat(("slot", slot.id), slot.touched, now):
            self._do(machine.resend(slot.id))
        if slot.offer is not None and not slot.offer.told:
            keys.add(("deadline", slot.id))
            lost = slot.lost if not slot.bindings else None
            if lost:  # and not merely unwanted so far: its successor has peer_timeout, from now on
                keys.add(("lost", slot.id))
            if watches.age(("deadline", slot.id), now) > s.transfer_deadline:
                self._expire(slot.offer.serial, bool(slot.bindings))
            elif lost and watches.age(("lost", slot.id), now) > s.peer_timeout:
                self._do(machine.cancel(slot.offer.serial, PeerLost(lost, room=slot.room)))
        elif slot.decision == "abort":
            keys.add(("abort", slot.id))
            if watches.age(("abort", slot.id), now) > s.announce_deadline:
                self._do(machine.force_end(slot.id))

    def _fail(self, slot: Slot, error: FerryError) -> None:
        if slot.offer is not None:
            self._do(self.machine.cancel(slot.offer.serial, error))

    def _expire(self, serial: int, bound: bool) -> None:
        cause = f"not delivered within transfer_deadline ({self.settings.transfer_deadline:g} s)"
        hint = "" if bound else f"No receiver opened the room. {self.machine.refused}".strip()
        self._do(self.machine.cancel(serial, DeadlineExceeded(cause, hint=hint)))

    def _watch_receiver(self, receiver: int, now: float, keys: set[Any]) -> None:
        key = ("receiver", receiver)
        keys.add(key)
        heard = self._heard.setdefault(receiver, now)
        target = self._poster.targets.get(receiver)
        if target is not None and target.reach.ended:
            self._lose(receiver, PeerLost("the receiver's process has ended"), gone=True)
        elif now - heard > self.settings.peer_timeout:
            self._lose(receiver, PeerLost(f"the receiver has been silent for {now - heard:.1f} s"), gone=False)
        elif self._watches.every(key, self.settings.heartbeat, now):
            self._do(self.machine.heartbeat(receiver))

    def _watch_abandoned(self, receiver: int, now: float, keys: set[Any]) -> None:
        """Writes to a receiver that no room is bound to any more: kept in mind for a while."""
        key = ("abandon", receiver)
        keys.add(key)
        if self._watches.age(key, now) <= ABANDON_SECONDS:
            return
        if not self.machine.may_abandon(receiver):
            if (more := self._troubles.worth_telling("abandoned", now)) is not None:
                log.error(
                    "writes to %d receivers that were lost are kept in mind, and those to others are waited for: "
                    "start this side anew before it has no room for new receivers%s",
                    len(self.machine.abandoned),
                    more,
                )
        elif self._poster.abandon(receiver):
            log.warning("writes to a receiver that was lost are not waited for any more")
            self._do(self.machine.abandon(receiver))

    def _watch_fallen(self, receiver: int, reach: Reach, now: float, keys: set[Any]) -> None:
        key = ("fallen", receiver)
        keys.add(key)
        if self._watches.age(key, now) > PREFER_AGAIN_SECONDS and reach.prefer_again():
            self._do(self.machine.connected(receiver, None, *reach.way))

    def _lose(self, receiver: int, error: FerryError, *, gone: bool) -> None:
        self._heard.pop(receiver, None)
        if gone:
            target = self._poster.targets.pop(receiver, None)
            if target is not None:
                target.reach.disconnect()
        self._do(self.machine.receiver_lost(receiver, error, gone=gone))

    # ---- the end -----------------------------------------------------------------------------------------------

    def _blame(self, message: m.Message, error: FerryError) -> None:
        if isinstance(message, m.ToSender):
            slot_id = self.machine.where.get((message.src, message.xfer))
            slot = self.machine.slots.get(slot_id) if slot_id is not None else None
            if slot is not None and slot.offer is not None:
                self._do(self.machine.cancel(slot.offer.serial, error))

    def _wind_down(self) -> bool:
        for serial, transfer in list(self._transfers.items()):
            self._do(self.machine.cancel(serial, closed_error(transfer.room)))
        return not self.machine.slots and not self._poster.busy

    def _release(self) -> None:
        for transfer in list(self._transfers.values()):
            transfer.error, transfer.status = closed_error(transfer.room), type(transfer.status)("FAILED")
            self._publish(transfer)
        self._poster.close()
        self._poster.staging.close()
        self.carriers.close()
        self._poster.sources.clear()  # not before: a transport may have been reading rows
