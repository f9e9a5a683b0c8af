"""Machines and worlds with one mechanism taken out: the search has to find out, by the invariant it is meant for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from msgspec.structs import replace as with_fields

from tensorferry.conformance.explore.configurations import by_name
from tensorferry.conformance.explore.setup import Faults, Setup
from tensorferry.core import messages as m
from tensorferry.core.allocator import Tenant
from tensorferry.core.effects import Effect
from tensorferry.core.errors import FerryError, from_code
from tensorferry.core.ledger import Ranges
from tensorferry.core.receiver import ReceiverMachine
from tensorferry.core.sender import SenderMachine
from tensorferry.core.sender_state import Binding, Receiver, Slot
from tensorferry.core.transfer import Facts, Peer, Phase, Transfer


class FreeOnCancel(ReceiverMachine):
    """A cancelled transfer's blocks are free at once."""

    freeing = False

    def _end(self, t: Transfer, error: FerryError | None) -> None:
        self.freeing = True
        super()._end(t, error)
        self.freeing = False

    def _quarantine(self, block: int, tenant: Tenant) -> None:
        if self.freeing:
            self.pool.free(block, tenant)
        else:
            super()._quarantine(block, tenant)


class FreeOnBump(FreeOnCancel):
    """A resume returns what was granted at once."""

    def _new_epoch(self, t: Transfer) -> None:
        self.freeing = True
        super()._new_epoch(t)
        self.freeing = False


class AnyEpochDone(ReceiverMachine):
    """Done of an older epoch is accepted."""

    def _on_transfer_message(self, route: str, message: m.OfTransfer) -> None:
        t = self.transfers.get(message.xfer)
        if isinstance(message, m.Done) and t is not None:
            message = with_fields(message, epoch=t.epoch)
        super()._on_transfer_message(route, message)


class SameContent(ReceiverMachine):
    """A restarted sender's other content does not start over."""

    def _on_announce(self, t: Transfer, a: m.Announce) -> None:
        super()._on_announce(t, with_fields(a, content_id=t.facts.content_id) if t.facts is not None else a)


class SuccessorVouches(ReceiverMachine):
    """A restarted sender fences for its dead predecessor."""

    def _on_transfer_message(self, route: str, message: m.OfTransfer) -> None:
        if isinstance(message, m.Fenced):
            for sender in {q.sender for q in self.pool.quarantined.values() if q.sender < message.src}:
                self.pool.fenced(message.xfer, sender, message.upto)
        super()._on_transfer_message(route, message)


class HoldAndWait(ReceiverMachine):
    """A loan is kept while its transfer waits for a destination."""

    def _reclaim(self, t: Transfer) -> None:
        return


class NeverReclaims(ReceiverMachine):
    """Loans do not come back when somebody with a destination starves."""

    def _relieve(self) -> None:
        return


class SilentReceiver(ReceiverMachine):
    """Nothing is ever said twice."""

    def resend(self, xfer: int) -> list[Effect]:
        return []


class LeaderAlone(ReceiverMachine):
    """The leader delivers as soon as its own rows are here."""

    def _check_complete(self, t: Transfer) -> None:
        super()._check_complete(t)
        if self.group.leads and t.phase is Phase.VOTED and t.error is None:
            self._end(t, None)


class FollowerAlone(ReceiverMachine):
    """A follower drops rows that it has promised."""

    def _give_up(self, t: Transfer, error: FerryError) -> None:
        self._end(t, error)


class ForgetsProofs(ReceiverMachine):
    """That a sender is gone is forgotten before its blocks come into quarantine."""

    def _recall_gone(self) -> None:
        self.gone.clear()


class VotesForAnything(ReceiverMachine):
    """A vote for rows of the old content is given to the sender of the new."""

    def _send_vote(self, t: Transfer) -> None:
        announced, t.announced = t.announced, True
        super()._send_vote(t)
        t.announced = announced


class NeverRepeatsAdmitted(ReceiverMachine):
    """Admitted is not said again once this rank has voted."""

    def _admits(self, t: Transfer) -> bool:
        return super()._admits(t) and t.phase is not Phase.VOTED


class TakesLateQuestions(ReceiverMachine):
    """A follower's question that is over is taken for one about the next use of the room."""

    def _on_query(self, route: str, query: m.Query) -> None:
        self.decisions.over.clear()
        super()._on_query(route, query)


class IntroducedOnce(ReceiverMachine):
    """A transfer that is closing does not introduce itself to the sender's successor."""

    def _hello(self, peer: Peer) -> m.Hello:
        closing = all(not t.live for t in self.transfers.values()) and self.transfers
        return with_fields(super()._hello(peer), dst=1) if closing else super()._hello(peer)


class NeverForgets(ReceiverMachine):
    """A transfer that is over when its last gather ends is kept for ever."""

    def gathered(self, xfer: int, indices: list[int]) -> list[Effect]:
        closing = not self.transfers[xfer].live
        kept = self.transfers[xfer]
        effects = super().gathered(xfer, indices)
        if closing:
            self.transfers[xfer] = kept
        return effects


class ObeysAbort(ReceiverMachine):
    """A follower that has promised its rows drops them because the sender says so."""

    def _on_transfer_message(self, route: str, message: m.OfTransfer) -> None:
        t = self.transfers.get(message.xfer)
        if isinstance(message, m.Abort) and t is not None and t.live and t.sender == message.src:
            self._end(t, from_code(message.code, message.cause))
        else:
            super()._on_transfer_message(route, message)


class KeepsItsBudget(ReceiverMachine):
    """A leader whose sender falls silent keeps the destination that it had reserved."""

    losing = False

    def peer_silent(self, route: str, error: FerryError, xfer: int | None = None) -> list[Effect]:
        self.losing = True
        effects = super().peer_silent(route, error, xfer)
        self.losing = False
        return effects

    def _refund(self, t: Transfer) -> None:
        if not self.losing:
            super()._refund(t)


class LendsToWhoGaveUp(ReceiverMachine):
    """A rank that gave up before its sender's first answer is lent blocks when that comes."""

    def _open(self, t: Transfer, peer: Peer) -> None:
        super()._open(t, peer)
        if t.facts is None and not t.lent and not t.dummy and self.policy.optimistic:
            self.unlent[t.xfer] = None


class AsksTheDead(ReceiverMachine):
    """A room is opened with a sender that is proved gone, as long as no successor has spoken."""

    def receive(self, room: int, route: str, *, dummy: bool = False) -> tuple[int, list[Effect]]:
        peer = self.peers.setdefault(route, Peer())
        floor, peer.floor = peer.floor, 0
        try:
            return super().receive(room, route, dummy=dummy)
        finally:
            peer.floor = floor


class MuteReceiver(ReceiverMachine):
    """A sender that speaks of a forgotten transfer gets no answer."""

    def _on_transfer_message(self, route: str, message: m.OfTransfer) -> None:
        if message.xfer in self.transfers:
            super()._on_transfer_message(route, message)


class FencesEarly(SenderMachine):
    """Fenced is said while writes are still out."""

    def _is_drained(self, key: tuple[int, int], upto: int) -> bool:
        return True


class AnyEpochGrant(SenderMachine):
    """A late grant of an older epoch is used."""

    def _on_grant(self, r: Receiver, slot: Slot, b: Binding, grant: m.Grant) -> None:
        kept = b.epoch, b.revoked, b.posted
        if grant.epoch < b.epoch or grant.epoch <= b.revoked:
            b.epoch, b.revoked, b.posted = grant.epoch, grant.epoch - 1, Ranges()
            super()._on_grant(r, slot, b, grant)
            b.epoch, b.revoked, b.posted = kept
        else:
            super()._on_grant(r, slot, b, grant)


class AnyReceiver(SenderMachine):
    """Grants carry no incarnation of the receiver: those of its predecessor are used."""

    def on_message(self, route: str, message: m.Message) -> list[Effect]:
        if isinstance(message, m.Grant) and route in self.newest:
            message = with_fields(message, src=self.newest[route])
        return super().on_message(route, message)


class NoRevokeTombstone(SenderMachine):
    """Revoke for a transfer that is not known yet is answered, and forgotten."""

    def _on_revoke(self, r: Receiver, key: tuple[int, int], upto: int, over: bool) -> None:
        super()._on_revoke(r, key, upto, over)
        r.revoked.clear()


class NoCloseTombstone(SenderMachine):
    """What is over is forgotten at once, so that a late Open begins it again."""

    def on_message(self, route: str, message: m.Message) -> list[Effect]:
        effects = super().on_message(route, message)
        for r in self.receivers.values():
            r.closed = Ranges()
        return effects


class BeginsForTheDead(SenderMachine):
    """A receiver that is gone or has a successor may open a room."""

    def _on_late(self, r: Receiver, message: m.ToSender) -> None:
        self._on_transfer_message(r, message)


class MuteOffer(SenderMachine):
    """An offer of a room that was given up before is not told so."""

    offering = False

    def offer(self, room: int, facts: Facts, ready: int = 0) -> tuple[int, list[Effect]]:
        self.offering = True
        done = super().offer(room, facts, ready)
        self.offering = False
        return done

    def _tell(self, slot: Slot, error: FerryError | None) -> None:
        if not self.offering:
            super()._tell(slot, error)


class SilentSender(SenderMachine):
    """Nothing is ever said twice."""

    def resend(self, slot_id: int) -> list[Effect]:
        return []


@dataclass(frozen=True)
class Mutant:
    """`dies_of`: how the text of the violation begins, after the phase. Several where any of them is the meaning."""

    name: str
    about: str
    setup: Setup
    dies_of: tuple[str, ...]
    searched: bool = True
    """False: what it takes is larger than the search's configurations; the simulation kills it."""

    def killed_by(self, violation: str | None) -> bool:
        """By what it was meant for, not by some accident."""
        return violation is not None and violation.removeprefix("after total loss: ").startswith(self.dies_of)


STALE = ("I2",)
WRONG = ("I3",)
STUCK = ("LV-1",)


def _mutant(
    name: str, about: str, dies_of: tuple[str, ...], setup: Setup | None = None, *world: str, **machines: Any
) -> Mutant:
    """`collect` only where the mutant leaves alone what the rules about late messages rest on."""
    machines.setdefault("collect", False)
    return Mutant(name, about, replace(setup or Setup(name), name=name, mutant=frozenset(world), **machines), dies_of)


def _simulated(
    name: str, about: str, dies_of: tuple[str, ...], setup: Setup, receiver_class: type[ReceiverMachine]
) -> Mutant:
    return replace(_mutant(name, about, dies_of, setup, receiver_class=receiver_class), searched=False)


def _two(**faults: int) -> Setup:
    return Setup("", faults=Faults(**faults))


MUTANTS = [
    _mutant("free_on_cancel", "a cancel returns blocks at once", STALE, _two(ca=1), receiver_class=FreeOnCancel),
    _mutant("free_on_bump", "a resume returns blocks at once", STALE, _two(bu=1), receiver_class=FreeOnBump),
    _mutant("timer_fence", "quarantine ends by a timer", STALE, _two(bu=1), "timer_fence"),
    _mutant("fence_early", "Fenced before the writes are drained", STALE, _two(bu=1), sender_class=FencesEarly),
    _mutant("undrained_ok", "done although a second attempt is out", STALE, Setup("", retry=True), "undrained_ok"),
    _mutant("no_flush", "out-of-band Done without a flush", STALE, Setup("", split=True), "no_flush"),
    _mutant("no_flush+no_digest", "and digests are off", WRONG, Setup("", split=True), "no_flush", "no_digest"),
    _mutant("no_epoch_D", "Done of an older epoch counts", STALE, _two(bu=1), receiver_class=AnyEpochDone),
    _mutant("no_epoch_D+no_digest", "and digests are off", WRONG, _two(bu=1), "no_digest",
            receiver_class=AnyEpochDone),
    _mutant("no_epoch_G", "a late grant of an older epoch is used", STALE, _two(bu=1), sender_class=AnyEpochGrant),
    _mutant("no_rinc", "grants carry no incarnation of the receiver", STALE, _two(cr=1), sender_class=AnyReceiver),
    _mutant("no_content", "other content does not start over", WRONG, _two(cs=1), receiver_class=SameContent),
    _mutant("new_inc_vouches", "a successor fences for its predecessor", STALE, _two(cs=1, bu=2),
            receiver_class=SuccessorVouches),
    _mutant("no_digest", "a corrupted landing counts", WRONG, _two(co=1), "no_digest"),
    _mutant("no_resend", "nothing is said twice", STUCK, Setup(""), receiver_class=SilentReceiver,
            sender_class=SilentSender),
    _mutant("hold_wait", "a loan is kept while waiting", ("AL-1", "LV-1"), by_name("O1"), receiver_class=HoldAndWait),
    _mutant("no_reclaim", "loans are never reclaimed", STUCK, by_name("O6"), receiver_class=NeverReclaims),
    _mutant("no_tombstone", "no trace of a Revoke for a transfer not yet seen", STALE, by_name("O4"),
            sender_class=NoRevokeTombstone),
    _mutant("no_closed", "no trace of what is over", STUCK, by_name("X8"), sender_class=NoCloseTombstone),
    _mutant("leader_alone", "the leader delivers on its own", ("TP-2",), by_name("R1"), receiver_class=LeaderAlone),
    _mutant("follower_alone", "a follower drops what it has promised", ("TP-2",), by_name("R8"),
            receiver_class=FollowerAlone),
    _mutant("forgets_proofs", "a proof that came early is forgotten", STUCK, by_name("P6"),
            receiver_class=ForgetsProofs),
    _mutant("old_vote", "a vote for other content counts", ("TP-2",), by_name("R5"), receiver_class=VotesForAnything,
            collect=True),
    _mutant("admitted_once", "Admitted is not said again after the vote", STUCK, by_name("R1"),
            receiver_class=NeverRepeatsAdmitted),
    _mutant("late_question", "a late question binds the next use", STUCK, by_name("R9"),
            receiver_class=TakesLateQuestions, collect=True),
    _mutant("introduced_once", "a closing transfer does not introduce itself", STUCK, by_name("O12"),
            receiver_class=IntroducedOnce, collect=True),
    _mutant("never_forgets", "a gather that ends late is not the end", STUCK, by_name("X15"),
            receiver_class=NeverForgets),
    _mutant("obeys_abort", "a promised follower obeys the sender", ("TP-2",), by_name("R13"),
            receiver_class=ObeysAbort),
    _mutant("mute_receiver", "no answer about forgotten transfers", STUCK, by_name("X7"),
            receiver_class=MuteReceiver),
    _simulated("keeps_budget", "a leader that loses its sender keeps its budget", ("R9",),
               Setup("", blocks=1, pool=1, ranks=2, budget=1), KeepsItsBudget),
    _simulated("lends_to_the_given_up", "a rank that gave up is lent blocks", ("AL-1",),
               by_name("R12"), LendsToWhoGaveUp),
    _simulated("asks_the_dead", "a room is opened with a sender proved gone", STUCK,
               Setup("", rooms=8, blocks=1, first_grant=1, one_sender=True), AsksTheDead),
    _mutant("begins_for_the_dead", "a dead receiver may open a room", STUCK, by_name("P7"),
            sender_class=BeginsForTheDead),
    _mutant("mute_offer", "an offer given up before is not told", ("WM-6", "LV-1"), by_name("R12"),
            sender_class=MuteOffer),
]  # fmt: skip
