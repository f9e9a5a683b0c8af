"""Messages that can never have an effect again, judged on the machine that they would reach.

Every message stays deliverable for ever, so a state would grow with each one. A message is left out once its handler
does nothing with it now and, because what the handler looks at only moves one way (epochs, incarnations, tombstones,
votes, ends), never will. `REPLY`: all it does is to call forth an answer; the answer is judged in turn. The rules are
checked by exploring with and without them: what processes, pools and memory can become is the same.
"""

from __future__ import annotations

from enum import Enum

from tensorferry.conformance.explore.machines import Machine, Mail
from tensorferry.conformance.explore.setup import Setup
from tensorferry.core import messages as m
from tensorferry.core.ledger import Ranges
from tensorferry.core.receiver import ReceiverMachine
from tensorferry.core.sender import SenderMachine
from tensorferry.core.sender_state import Binding, Slot
from tensorferry.core.transfer import Phase


class Late(Enum):
    NO = 0
    YES = 1
    REPLY = 2


def _if(dead: bool) -> Late:
    return Late.YES if dead else Late.NO


def judge(machine: Machine, mail: Mail, setup: Setup) -> Late:
    if isinstance(machine, ReceiverMachine):
        return _at_receiver(machine, mail.route, mail.message, setup)
    return _at_sender(machine, mail.message)


# ---- at the receiver --------------------------------------------------------------------------------------------


def _at_receiver(r: ReceiverMachine, route: str, msg: m.Message, setup: Setup) -> Late:
    if isinstance(msg, m.Query):
        return Late.NO if setup.faults.re else _query(r, msg)
    if msg.dst < r.inc:
        return Late.YES
    if isinstance(msg, m.Hello):
        peer = r.peers.get(route)
        if peer is None or setup.faults.ps:
            return Late.NO
        known = (msg.src, msg.revision) <= (peer.inc, peer.revision) and msg.ack <= peer.ack
        return _if(msg.src < peer.inc or known)
    if isinstance(msg, m.Pong):
        return _if(r.group.leads or msg.src <= r.leader_inc)
    if isinstance(msg, m.Verdict):
        t = r.transfers.get(msg.xfer)
        return Late.NO if msg.src > r.leader_inc or (t is not None and t.live) else Late.REPLY
    if not isinstance(msg, m.OfTransfer):
        return Late.NO
    t = r.transfers.get(msg.xfer)
    if t is None:
        return Late.YES if isinstance(msg, (m.Closed, m.Refused, m.Fenced)) else Late.REPLY
    peer = r.peers[t.route]
    if isinstance(msg, m.Fenced):
        mine = [q for q in r.pool.quarantined.values() if (q.xfer, q.sender) == (msg.xfer, msg.src)]
        mine += [tenant for _, tenant, _ in t.gathering.values()]
        if any(q.sender == msg.src and q.epoch <= msg.upto for q in mine):
            return Late.NO
        if t.sender != msg.src:
            return _if(msg.src < max(t.sender, peer.inc))
        return _if(not t.live or t.epoch > msg.upto)
    if t.sender != msg.src:
        return _if(msg.src < max(t.sender, peer.inc))
    match msg:
        case m.Closed():
            return _if(t.closed)
        case _ if not t.live:
            return Late.YES
        case m.Announce() if t.announced and t.facts is not None:
            if t.error is not None:
                return Late.REPLY
            return _if(msg.ready <= t.ready)
        case m.Done():
            if msg.epoch != t.epoch:
                return _if(msg.epoch < t.epoch)
            said = [index for index, _ in m.unpack_done(msg.runs, msg.digests)]
            return _if(t.phase is Phase.VOTED or all(i in t.have or i in t.gathering for i in said))
        case m.Trouble():
            return _if(msg.epoch < t.epoch or t.phase is Phase.VOTED)
        case m.Refused():
            return _if(t.announced)
    return Late.NO


def _query(r: ReceiverMachine, msg: m.Query) -> Late:
    """Judged where each room is used once: elsewhere a question may be taken for one about the next use."""
    asker = (msg.src, msg.xfer)
    inc, over = r.decisions.over.get(msg.rank, (0, Ranges()))
    if msg.src < inc or (msg.src == inc and msg.xfer in over and not msg.heard):
        return Late.REPLY
    for xfer, use in r.decisions.uses.items():
        bound = use.bound.get(msg.rank)
        if (bound is None and use.room == msg.room) or (bound is not None and bound[1:] == asker):
            t = r.transfers.get(xfer)
            settled = bound is not None and (msg.rank in use.heard if msg.heard else True)
            return Late.NO if not settled or (msg.code and t is not None and t.live) else Late.REPLY
    return _if(msg.src == inc and msg.xfer in over) if msg.heard else Late.REPLY


# ---- at the sender ----------------------------------------------------------------------------------------------


def _at_sender(s: SenderMachine, msg: m.Message) -> Late:
    if isinstance(msg, m.Hello):
        if msg.dst not in (0, s.inc):
            return Late.REPLY
        if s.newest.get(msg.name, 0) > msg.src:
            return Late.YES
        known = s.receivers.get(msg.src)
        if known is None or msg.revision > known.hello.revision or msg.min_live > known.min_live:
            return Late.NO
        return Late.REPLY
    if msg.dst < s.inc:
        return Late.REPLY
    r = s.receivers.get(msg.src)
    if r is None or s.contested:
        return Late.NO
    if isinstance(msg, m.Ping):
        return Late.REPLY
    if not isinstance(msg, m.ToSender):
        return Late.YES
    if msg.min_live > r.min_live:
        return Late.NO
    if r.gone or s.newest.get(r.name, 0) > msg.src:
        return Late.REPLY if isinstance(msg, (m.Revoke, m.Close)) else Late.YES
    key = (msg.src, msg.xfer)
    over = msg.xfer < r.min_live or msg.xfer in r.closed
    slot = s.slots.get(s.where.get(key, -1))
    binding = None if slot is None else next(b for b in slot.bindings.values() if b.key == key)
    if isinstance(msg, m.Revoke):
        if binding is not None:
            return _reply_if(binding.revoked >= msg.upto and not (binding.pending and binding.epoch <= msg.upto))
        return _reply_if(over or r.revoked.get(msg.xfer, 0) >= msg.upto)
    if isinstance(msg, m.Close):
        return _reply_if(over if binding is None else binding.closed is not None)
    if over:
        return Late.REPLY
    if slot is None or binding is None:
        return Late.NO
    if isinstance(msg, m.Open):
        return Late.REPLY
    if binding.closed is not None:
        return Late.YES
    return _to_binding(s, slot, binding, msg)


def _reply_if(settled: bool) -> Late:
    return Late.REPLY if settled else Late.NO


def _to_binding(s: SenderMachine, slot: Slot, b: Binding, msg: m.ToSender) -> Late:
    match msg:
        case m.Admitted():
            return _if(slot.admitted or b.rank != 0)
        case m.Complete():
            return _reply_if(b.vote is not None)
        case m.Grant():
            if msg.epoch <= b.revoked or msg.epoch < b.epoch or (msg.epoch == b.epoch and b.trouble is not None):
                return Late.YES
            if msg.epoch > b.epoch or slot.offer is None or any(i < msg.prefix for i in b.done):
                return Late.NO
            named = [first + k for first, _, count, _ in m.unpack_grant(msg.runs) for k in range(count)]
            return _if(all(i in b.posted or i >= slot.offer.facts.total for i in named))
    return Late.NO
