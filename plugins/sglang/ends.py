"""SGLang's sender and receiver of one request, over one room.

A scheduler's loop serves all requests and guards few of its calls. So what goes wrong with a request is its own: `poll`
says Failed, and `failure_exception` raises why. Only calls in an impossible order raise by themselves (BadCall).
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from tensorferry.core.arguments import integer
from tensorferry.core.errors import BadCall, BadTensor, Cancelled, DeadlineExceeded, FerryError, Unsupported
from tensorferry.core.handles import ReceiveTransfer, SendTransfer
from tensorferry.plugins.sglang.buffers import Lease, cancel
from tensorferry.plugins.sglang.manager import FerryKVManager
from tensorferry.plugins.sglang.polls import POLL_OF, KVPoll

log = logging.getLogger("tensorferry.sglang")


@dataclass
class KVTransferMetric:
    """As SGLang's: None where it is not measured."""

    transfer_latency_s: float | None = None
    alloc_latency_s: float | None = None
    transfer_total_bytes: int | None = None


class FailedElsewhere(Cancelled):
    """The request has not failed here, but at another rank of the framework's, which knows and logs why."""

    is_from_another_rank = True
    """SGLang's loops look for it, and log such an error for debugging only."""


class _End(ABC):
    """What both have in common. `_transfer` is the room, once it is open; `_ended` the last word, once that is said."""

    def __init__(self, mgr: FerryKVManager, bootstrap_addr: str, bootstrap_room: int | None) -> None:
        self.kv_mgr = mgr
        self.bootstrap_addr = bootstrap_addr
        self.bootstrap_room = integer(bootstrap_room, "bootstrap_room")
        self._transfer: SendTransfer | ReceiveTransfer | None = None
        self._ended: KVPoll | None = None
        self._error: FerryError | None = None

    def poll(self) -> KVPoll:
        """Where the request stands. Reads what the endpoint's thread has published: never blocks, has no effect."""
        if self._ended is not None:
            return self._ended
        return self._before() if self._transfer is None else POLL_OF[self._transfer.status]

    @property
    def conclude_state(self) -> KVPoll | None:
        """Success or Failed, once it is one of them."""
        state = self.poll()
        return state if state in (KVPoll.Success, KVPoll.Failed) else None

    def failure_exception(self) -> None:
        """Raises the error that the request failed with: a tensorferry.errors.FerryError. Where it has not failed here,
        another rank of the framework's has: then the request ends here too, on both sides, and what is raised is
        FailedElsewhere, which is Cancelled. SGLang's loops call nothing else after a failure. Failed from here on."""
        error = self._reason() or FailedElsewhere(
            "another rank says that the request has failed", room=self.bootstrap_room
        )
        self._end_with(error)
        self._ended, self._error = KVPoll.Failed, error  # and where every row had arrived
        raise error

    def abort(self) -> None:
        """Ends the request on both sides. Failed from here on, unless it has ended already.

        A receiver that does not know its sender's address, or whose process has not met this sender before, cannot tell
        it: it goes on waiting for somebody to open the room, until its transfer_deadline.
        """
        self._end_with(Cancelled("the scheduler aborted the request", room=self.bootstrap_room))

    def clear(self) -> None:
        """Forgets the room; a request that has not ended is aborted. `poll` keeps to the last word. Rows are the
        lease's, and stay until that is freed."""
        self.abort()
        if self._transfer is not None:
            self._ended, self._error = self.poll(), self._reason()
            self._transfer = None

    def _reason(self) -> FerryError | None:
        """Why it failed: the end's own reason first, for the room's is then no more than that it was cancelled."""
        self.poll()  # which finds out
        return self._error or (self._transfer.error if self._transfer is not None else None)

    @abstractmethod
    def _before(self) -> KVPoll:
        """Where the request stands while its room is not open."""

    @abstractmethod
    def _open_to_cancel(self) -> SendTransfer | ReceiveTransfer | None:
        """The room, opened for no other purpose than to tell the other side that nothing will come of it; None where
        nobody can be told. Raises FerryError."""

    def _end_with(self, error: FerryError) -> None:
        if self.conclude_state is not None:
            return
        try:
            transfer = self._transfer or self._open_to_cancel()
        except FerryError as problem:
            transfer = None
            log.warning("room %d: the other side cannot be told that it is over: %s", self.bootstrap_room, problem)
        if transfer is not None:
            cancel(transfer)
        if self.poll() is not KVPoll.Success:  # it may have come to its end just before
            self._ended, self._error = KVPoll.Failed, error


class FerryKVSender(_End):
    """The embedding side of one request. WaitingForInput from the start: rows may be there before anybody wants them.

    `bootstrap_addr`, `req_has_disagg_prefill_dp_rank`, and of other releases `dest_tp_ranks` and `pp_rank`, change
    nothing: receivers find this side, each with its own rank. Raises BadCall for a room that is no number.
    """

    def __init__(
        self,
        mgr: FerryKVManager,
        bootstrap_addr: str,
        bootstrap_room: int,
        req_has_disagg_prefill_dp_rank: bool = False,
        *,
        dest_tp_ranks: Sequence[int] = (),
        pp_rank: int = 0,
    ) -> None:
        super().__init__(mgr, bootstrap_addr, bootstrap_room)
        self._total: int | None = None
        self._handed = 0
        self._token_bytes = 0

    def init(self, num_kv_indices: int, aux_index: int | None = None) -> None:
        """The request has `num_kv_indices` tokens. `aux_index` means nothing here: the aux record travels with the
        announcement."""
        self._total = integer(num_kv_indices, "num_kv_indices")

    def send(
        self, kv_indices: Lease, state_indices: Sequence[object] | None = None, num_kv_tokens: int | None = None
    ) -> None:
        """Hand over the rows that `set_buf` has put into the lease and that were not handed over yet, or the next
        `num_kv_tokens` of them. The first call opens the room; the request is complete with its last token.

        Raises BadCall before `init`, for what is no lease, and for more tokens than the lease has. Any other failure,
        of the rows or of the room, is this request's: Failed.
        """
        if self._total is None:
            raise BadCall("init says how many tokens there are, and comes before send", room=self.bootstrap_room)
        lease = _lease_of(kv_indices, self.bootstrap_room)
        if self.conclude_state is not None:
            return
        if lease.problem is not None:
            self._end_with(lease.problem)
            return
        rows, start = lease.rows, self._handed
        held = max((len(tensor) for tensor in rows.values()), default=0)
        stop = held if num_kv_tokens is None else start + integer(num_kv_tokens, "num_kv_tokens")
        if stop > held:
            raise BadCall(
                f"{stop} tokens of {held} cannot be handed over", room=self.bootstrap_room, hint="set_buf comes first"
            )
        try:
            if state_indices:
                raise Unsupported("the state of a model does not travel with an embedding", room=self.bootstrap_room)
            if not rows:
                raise BadTensor("there is nothing in the lease", room=self.bootstrap_room, hint="set_buf comes first")
            self._put(lease, self._total, start, stop)
        except FerryError as problem:
            self._end_with(problem)
            return
        self._handed = stop

    def should_send_kv_chunk(self, num_pages: int, last_chunk: bool) -> bool:
        """Whether `send` has anything to do: with no tokens, too, for it is what opens the room."""
        return num_pages > 0 or last_chunk

    def pop_decode_prefix_len(self) -> int:
        """0: every token travels."""
        return 0

    def get_max_transfer_tokens(self) -> int | None:
        """None: any number of tokens may be handed over at once."""
        return None

    def get_transfer_metric(self) -> KVTransferMetric:
        """The bytes of the rows that were handed over, as one receiver gets them."""
        return KVTransferMetric(transfer_total_bytes=self._handed * self._token_bytes)

    def _put(self, lease: Lease, total: int, start: int, stop: int) -> None:
        sender = self.kv_mgr.sender
        if self._transfer is None:
            self._transfer = lease.transfer = sender.announce(
                self.bootstrap_room, total, content_id=lease.content_id, mrope_delta=lease.mrope_delta,
                components=tuple(lease.rows),
            )  # fmt: skip
            self._token_bytes = sum(sender.layout[name].token_bytes for name in lease.rows)
        assert isinstance(self._transfer, SendTransfer)
        self._transfer.put(start, **{name: tensor[start:stop] for name, tensor in lease.rows.items()})

    def _before(self) -> KVPoll:
        return KVPoll.WaitingForInput

    def _open_to_cancel(self) -> SendTransfer | None:
        # One token that never comes: with none, the other side would have a whole result before it hears of the end.
        return self.kv_mgr.sender.announce(self.bootstrap_room, 1)


class FerryKVReceiver(_End):
    """The language side of one request: Bootstrapping until its sender's address is found, WaitingForInput until more
    than the first grant is under way, then Transferring. `prefill_dp_rank` here is where earlier releases gave it.

    Raises BadCall for a room that is no number.
    """

    dummy = False
    """Takes part in the group's decision and receives no rows."""
    supports_host_destination = False
    require_staging = False

    def __init__(
        self,
        mgr: FerryKVManager,
        bootstrap_addr: str,
        bootstrap_room: int | None = None,
        prefill_dp_rank: int | None = None,
    ) -> None:
        super().__init__(mgr, bootstrap_addr, bootstrap_room)
        self._found: Future[str] | None = None
        self._patience_ends = 0.0
        self._dp_rank = prefill_dp_rank

    def init(self, prefill_dp_rank: int | None = None) -> None:
        """Begin to find the address of the embedding side. Nothing is sent, and no memory taken, before
        `send_metadata`. An address that cannot be found is this request's failure, and so is one that has not been
        found within `announce_deadline` seconds."""
        rank = self._dp_rank if prefill_dp_rank is None else prefill_dp_rank
        self._patience_ends = time.monotonic() + self.kv_mgr.settings.announce_deadline
        self._found = self.kv_mgr.find(self.bootstrap_addr, rank or 0)

    def send_metadata(
        self,
        kv_indices: Lease,
        aux_index: int | None = None,
        state_indices: Sequence[object] | None = None,
        decode_prefix_len: int | None = None,
        destination: object = None,
    ) -> None:
        """Open the room: the embedding side is met, the first grant goes out, and so does all that follows it, without
        another call. The rows are found through the lease (`get_buf`).

        `aux_index` and `destination` change nothing: the aux record is part of the result, and the result's memory is
        tensorferry's own. Raises BadCall before the sender is found, a second time, and for what is no lease. Any other
        failure is this request's: Failed.
        """
        lease = _lease_of(kv_indices, self.bootstrap_room)
        if self._transfer is not None:
            raise BadCall("the room is open: every later grant is made without a call", room=self.bootstrap_room)
        if self.conclude_state is not None:
            return
        if not self._sender_address:
            raise BadCall(
                "init finds the sender, and comes before send_metadata",
                room=self.bootstrap_room,
                hint="It is found when poll says WaitingForInput",
            )
        try:
            if state_indices or decode_prefix_len:
                raise Unsupported(
                    "neither a model's state nor a part of the tokens can be asked for", room=self.bootstrap_room
                )
            self._transfer = lease.transfer = self._open(self.dummy or lease.fake)
        except FerryError as problem:
            self._end_with(problem)

    def is_abort_release_safe(self) -> bool:
        """Yes: nobody writes to memory of the caller's. Blocks of the pool wait until it is proved that no write to
        them is under way."""
        return True

    def _open(self, dummy: bool) -> ReceiveTransfer:
        return self.kv_mgr.receiver.receive(self.bootstrap_room, self._sender_address, dummy=dummy)

    @property
    def _sender_address(self) -> str:
        """Empty until it is found."""
        found = self._found
        return found.result() if found is not None and found.done() and found.exception() is None else ""

    def _before(self) -> KVPoll:
        problem: BaseException | None = None
        if self._found is not None and self._found.done():
            problem = self._found.exception()
        elif self._found is not None and time.monotonic() > self._patience_ends:
            problem = DeadlineExceeded(
                f"resolve has not found {self.bootstrap_addr} within {self.kv_mgr.settings.announce_deadline:g} s",
                room=self.bootstrap_room,
                hint="Does the directory answer that it asks? A call of it has to end by itself",
            )
        else:
            return KVPoll.Bootstrapping
        if problem is None:
            return KVPoll.WaitingForInput
        assert isinstance(problem, FerryError)  # `find` gives no other
        self._ended, self._error = KVPoll.Failed, problem
        return KVPoll.Failed

    def _open_to_cancel(self) -> ReceiveTransfer | None:
        return self._open(self.dummy) if self._sender_address else None


class FerryFakeReceiver(FerryKVReceiver):
    """A dummy rank's: the group counts its vote, and it receives no rows."""

    dummy = True


def _lease_of(given: object, room: int) -> Lease:
    if not isinstance(given, Lease):
        raise BadCall(
            f"what alloc gave is wanted here, not a {type(given).__name__}",
            room=room,
            hint="This carries embeddings; numbers of KV pages mean nothing to it",
        )
    if given.freed:
        raise BadCall(f"the lease of {given.req_id!r} has been freed", room=room)
    return given
