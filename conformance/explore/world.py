"""The world around the machines: processes that crash, a network that keeps every message, writes that land late.

A state is (processes, flights, memory, rows, wants, offers, proofs, gathers, net, budgets). Processes are numbers of
interned snapshots; `net` is a bit set of messages, each of which may be delivered at any time, in any order, any number
of times. A flight is one posted block; it may land at any time, also after its sender has crashed. Memory is a ghost:
for each block of each receiver, what was written there last. Nothing here depends on time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tensorferry.conformance.explore import happenings
from tensorferry.conformance.explore.late import Late, judge
from tensorferry.conformance.explore.machines import Workshop
from tensorferry.conformance.explore.search import Edge, State, Violation
from tensorferry.conformance.explore.setup import Setup
from tensorferry.conformance.explore.step import Flight, Offering, Parts, Step, Want
from tensorferry.conformance.explore.views import View, look
from tensorferry.core import messages as m


@dataclass(slots=True)
class Judged:
    """What has been found about messages at a machine in one state; each set of messages as bits."""

    known: int = 0
    keep: int = 0  # Late.NO
    late: int = 0  # Late.YES
    reply: int = 0  # Late.REPLY


class SearchWorld:
    """One configuration, as the search sees it."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.shop = Workshop(setup.build())
        self.seen: dict[int, View] = {}
        self.judged: dict[int, Judged] = {}
        self.addressed = [0] * (setup.ranks + setup.senders)  # process -> the messages to it, as bits
        self.posted = 0  # how many messages that covers
        self.answers: dict[tuple[int, int], int | None] = {}
        self.echoes: dict[tuple[int, int], int | None] = {}
        self.said: dict[int, int] = {}  # process number -> what its timers say, as bits

    # ---- looking ------------------------------------------------------------------------------------------------

    def view(self, number: int) -> View:
        view = self.seen.get(number)
        if view is None:
            view = self.seen[number] = look(self.shop.machine(number), self.setup.window)
        return view

    def incarnation(self, number: int) -> int:
        return self.shop.kept[number][1]

    # ---- beginning ----------------------------------------------------------------------------------------------

    def roots(self) -> list[State]:
        s = self.setup
        procs = [self.shop.fresh(k, 10 * (k + 1)) for k in range(s.ranks)]
        procs += [self.shop.fresh(s.ranks + k, 1000 * (k + 1)) for k in range(s.senders)]
        empty = Parts(
            tuple(procs), (), ((None,) * s.pool,) * s.ranks, (),
            (Want("", 0),) * (s.ranks * s.rooms), (Offering("", 0, k + 1, 0, False) for k in range(s.rooms)),
            (), (), 0, tuple(s.faults),
        )  # fmt: skip
        step = Step(self, (*empty[:5], tuple(empty.offers), *empty[6:]))
        for rank in range(s.ranks):
            for room in range(s.rooms):
                step.receive(rank, room)
        self._introduce(step)
        if not (s.late_offers or s.one_by_one):
            for room in range(s.rooms):
                step.offer(room)
        elif s.one_by_one:
            for room in range(1, s.rooms):
                step.offer(room)
        return [self.settle(step)]

    def _introduce(self, step: Step) -> None:
        """Hellos go through before the exploration begins."""
        known: set[int] = set()
        while True:
            hellos = [
                k for k, mail in enumerate(self.shop.mail)
                if step.net >> k & 1 and k not in known and isinstance(mail.message, m.Hello)
            ]  # fmt: skip
            if not hellos:
                return
            for k in hellos:
                known.add(k)
                step.run(self.shop.mail[k].to, ("msg", k))

    # ---- going on -----------------------------------------------------------------------------------------------

    def edges(self, state: State) -> list[Edge]:
        found = [edge for edge in happenings.normal(self, state) if edge.state != state]
        if not found:
            found = [edge for edge in happenings.patience(self, state) if edge.state != state]
        return found + [edge for edge in happenings.faults(self, state) if edge.state != state]

    def settle(self, step: Step) -> State:
        """The state after a step, without the messages that can never matter again."""
        net = step.net
        if self.setup.collect:
            net = self.collect(step.procs, net)
        return step.frozen(net)

    def collect(self, procs: list[int] | tuple[int, ...], net: int) -> int:
        mail, addressed = self.shop.mail, self.addressed
        while self.posted < len(mail):
            addressed[mail[self.posted].to] |= 1 << self.posted
            self.posted += 1
        keep = replies = 0
        for process, number in enumerate(procs):
            here = net & addressed[process]
            if here:
                judged = self._judged(number, here)
                keep |= here & judged.keep
                replies |= here & judged.reply
        while replies:
            bit = replies & -replies
            replies ^= bit
            if not self._answered(procs, bit.bit_length() - 1, keep):
                keep |= bit
        return keep

    def _judged(self, number: int, bits: int) -> Judged:
        """What is known at a machine, once these messages to it have been judged."""
        judged = self.judged.get(number)
        if judged is None:
            judged = self.judged[number] = Judged()
        rest = bits & ~judged.known
        while rest:
            bit = rest & -rest
            rest ^= bit
            late = judge(self.shop.machine(number), self.shop.mail[bit.bit_length() - 1], self.setup)
            judged.known |= bit
            if late is Late.NO:
                judged.keep |= bit
            elif late is Late.YES:
                judged.late |= bit
            else:
                judged.reply |= bit
        return judged

    def _answered(self, procs: list[int] | tuple[int, ...], mail: int, keep: int) -> bool:
        """All that the message does is to call forth replies, and those are under way or too late themselves."""
        key = (procs[self.shop.mail[mail].to], mail)
        if key not in self.answers:
            self.answers[key] = self._answer(*key)
        replies = self.answers[key]
        if replies is None:
            return False
        rest = replies & ~keep
        while rest:
            bit = rest & -rest
            rest ^= bit
            number = procs[self.shop.mail[bit.bit_length() - 1].to]
            if not self._judged(number, bit).late & bit:
                return False
        return True

    def _answer(self, number: int, mail: int) -> int | None:
        """The replies that a message calls forth, as bits. None: it does more than that, or may yet do so."""
        replies = self.echo(number, mail)
        # no reply at all: something holds it back (a write that is not drained, a rank that has not closed)
        return None if replies == 0 and not self._silent_for_good(mail) else replies

    def echo(self, number: int, mail: int) -> int | None:
        """What a machine sends when a message comes, as bits. None: it changes, or does anything else."""
        key = (number, mail)
        if key not in self.echoes:
            ran = self.shop.run(number, ("msg", mail))
            idle = ran.after == number and ran.error is None and all(todo[0] == "send" for todo in ran.todo)
            self.echoes[key] = sum({1 << todo[1] for todo in ran.todo}) if idle else None
        return self.echoes[key]

    def _silent_for_good(self, mail: int) -> bool:
        """Those who wait for a drain or for other ranks are told without being asked again."""
        return not isinstance(self.shop.mail[mail].message, m.Hello)

    # ---- loss and repetition ------------------------------------------------------------------------------------

    def repeated(self, procs: tuple[int, ...]) -> int:
        """Everything that timers say in this state."""
        net = 0
        for number in procs:
            bits = self.said.get(number)
            if bits is None:
                view, bits = self.view(number), 0
                for key in view.repeating or view.slots:
                    ran = self.shop.run(number, ("resend", key))
                    if ran.after != number or ran.error is not None:
                        raise Violation(f"MSG-3 repeating changes a machine: {key} {ran.error}")
                    for todo in ran.todo:
                        bits |= 1 << todo[1]
                self.said[number] = bits
            net |= bits
        return net

    def lose_everything(self, state: State) -> State:
        """Every message in flight is lost; then each timer speaks once. No more faults."""
        net = self.repeated(state[0])
        if self.setup.collect:
            net = self.collect(state[0], net)
        return (*state[:8], net, (0,) * len(state[9]))

    # ---- judging ------------------------------------------------------------------------------------------------

    def check(self, state: State) -> str | None:
        procs, flights = state[0], state[1]
        for number in procs:
            if self.view(number).wrong:
                return self.view(number).wrong
        for f in flights:
            wrong = self._flight(procs, f)
            if wrong:
                return wrong
        return None if "undrained_ok" in self.setup.mutant else self._write_tables(procs, flights)

    def _flight(self, procs: tuple[int, ...], f: Flight) -> str | None:
        """I2, WS-6: no outstanding write may ever be able to land in a block that is not its own."""
        number = procs[f.target]
        if self.incarnation(number) != f.write[0]:
            return None
        view = self.view(number)
        if view.generations[f.block // view.per_slab] != f.generation:
            return None
        _, xfer, epoch, _ = f.write
        tenant = view.granted.get(f.block)
        if tenant is not None:
            if tenant == (xfer, f.incarnation, epoch, f.at):
                return None
            return f"I2 a write of {self.tell(f)} may land in a block granted to {tuple(tenant)}"
        tenant = view.quarantined.get(f.block)
        if tenant is None:
            return f"I2 a write of {self.tell(f)} may land in a FREE block"
        if (tenant.xfer, tenant.sender) == (xfer, f.incarnation) and epoch <= tenant.epoch:
            return None
        return f"I2 a write of {self.tell(f)} may land in the quarantine of {tuple(tenant)}"

    def _write_tables(self, procs: tuple[int, ...], flights: tuple[Flight, ...]) -> str | None:
        """WS-3: fences are computed from the write table, so it has to be true."""
        out: dict[tuple[int, Any], set[int]] = {}
        for f in flights:
            if not f.placed and self.incarnation(procs[f.sender]) == f.incarnation:
                out.setdefault((f.sender, f.write), set()).add(f.at)
        for k in range(self.setup.ranks, len(procs)):
            for write, indices in self.view(procs[k]).writes.items():
                if out.pop((k, write), set()) != indices:
                    return f"WS-3 the write table says that {sorted(indices)} of {write} are outstanding"
        return f"WS-3 writes that no table knows: {sorted(out)}" if out else None

    def clean(self, state: State) -> str | None:
        p = Parts(*state)
        left = [f"{self.shop.build.name(k)}: {self.view(n).left}" for k, n in enumerate(p.procs) if self.view(n).left]
        if not self.setup.faults.cr:  # a rank that has crashed will never say that it has heard: a bounded memory
            left += [self.view(n).undecided for n in p.procs if self.view(n).undecided]
        left += [f"rank {k // self.setup.rooms} still waits for room {k % self.setup.rooms}"
                 for k, want in enumerate(p.wants) if want.end == "w"]  # fmt: skip
        left += [f"room {k} is still offered" for k, o in enumerate(p.offers) if o.end in ("", "w")]
        left += [f"the source of room {k} is not released" for k, o in enumerate(p.offers) if o.end and not o.released]
        left += [f"a write is still out: {self.tell(f)}" for f in p.flights]
        left += [f"a gather is still going on: {g}" for g in p.gathers]
        return "; ".join(left) or None

    # ---- telling ------------------------------------------------------------------------------------------------

    def tell(self, f: Flight) -> str:
        receiver, xfer, epoch, _ = f.write
        whose = f"receiver {receiver}, xfer {xfer}, sender {f.incarnation}, epoch {epoch}"
        return f"({whose}, index {f.at}) -> {f.block}"

    def say(self, label: tuple[Any, ...]) -> str:
        kind, *rest = label
        if kind == "deliver":
            mail = self.shop.mail[rest[0]]
            return f"{self.shop.build.name(mail.to)} <- {mail.route}: {_plain(mail.message)}"
        return " ".join([kind, *(self.tell(x) if isinstance(x, Flight) else str(x) for x in rest)])

    def describe(self, state: State) -> str:
        p = Parts(*state)
        lines = [f"{self.shop.build.name(k)}: {self.shop.kept[n][2]}" for k, n in enumerate(p.procs)]
        lines += [f"in flight: {self.tell(f)}" for f in p.flights]
        lines += [f"wants {list(p.wants)} offers {list(p.offers)}"]
        lines += [f"net: {self.say(('deliver', k))}" for k in range(len(self.shop.mail)) if p.net >> k & 1]
        return "\n          ".join(lines).replace("\\x00", "")


def _plain(message: m.Message) -> str:
    """A message without the fields that are the same for everybody."""
    hidden = {
        "version",
        "name",
        "layout",
        "block_size",
        "pool_blocks",
        "slabs",
        "offers",
        "aux",
        "integrity",
        "present",
    }
    fields = {name: getattr(message, name) for name in message.__struct_fields__ if name not in hidden}
    if "runs" in fields:
        if isinstance(message, m.Grant):
            fields["runs"] = m.unpack_grant(message.runs)
        elif isinstance(message, m.Done):
            fields["runs"] = [i for i, _ in m.unpack_done(message.runs, message.digests)]
            fields.pop("digests")
    if "content_id" in fields:
        fields["content_id"] = fields["content_id"][:1].hex()
    if "generations" in fields:
        fields["generations"] = m.unpack_generations(fields["generations"])
    return f"{type(message).__name__}({', '.join(f'{name}={value}' for name, value in fields.items())})"
