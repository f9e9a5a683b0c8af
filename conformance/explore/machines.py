"""The workshop: production machines, run one event at a time on interned snapshots.

A machine is deterministic: the same event on the same snapshot gives the same snapshot and effects. So each pair is
run once, on the production class itself, and remembered; a state of the search names machines by small numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from tensorferry.core import effects as fx
from tensorferry.core import messages as m
from tensorferry.core.errors import (
    Cancelled,
    DeadlineExceeded,
    FerryError,
    InternalError,
    Overloaded,
    PeerLost,
    RoomInUse,
)
from tensorferry.core.receiver import ReceiverMachine
from tensorferry.core.sender import SenderMachine
from tensorferry.core.transfer import Facts

Machine = ReceiverMachine | SenderMachine
Event = tuple[Any, ...]
Todo = tuple[Any, ...]

LEADER = "leader"


class Mail(NamedTuple):
    """A message on its way: to process `to`, which sees it come from `route`."""

    to: int
    route: str
    message: m.Message


class Ran(NamedTuple):
    """What an event did: the machine's new number and what it asks for. `error`: the machine raised."""

    after: int
    todo: tuple[Todo, ...]
    error: str | None = None
    answer: int = 0  # what the call returned besides effects: an xfer, a serial


@dataclass(frozen=True)
class Build:
    """How the processes of a world are made. Processes 0..ranks-1 are receivers, the others senders."""

    ranks: int
    senders: int
    receiver: Callable[[int, int], ReceiverMachine]  # (rank, incarnation)
    sender: Callable[[int, int], SenderMachine]

    def name(self, process: int) -> str:
        return f"r{process}" if process < self.ranks else f"s{process - self.ranks}"

    def process(self, route: str) -> int:
        if route == LEADER:
            return 0
        return int(route[1:]) + (self.ranks if route[0] == "s" else 0)

    def seen_from(self, process: int, route: str) -> str:
        """The route under which the process that is reached by `route` sees `process`."""
        if process >= self.ranks:
            return self.name(process)
        return LEADER if route[0] == "r" else self.name(process)


class Workshop:
    def __init__(self, build: Build) -> None:
        self.build = build
        self.machines: dict[tuple[int, int], Machine] = {}
        self.numbers: dict[tuple[int, int, Any], int] = {}
        self.kept: list[tuple[int, int, Any]] = []  # (process, incarnation, snapshot) by number
        self.loaded: dict[tuple[int, int], int] = {}
        self.ran: dict[tuple[int, Event], Ran] = {}
        self.mail: list[Mail] = []
        self.mail_numbers: dict[Mail, int] = {}
        self.calls = 0

    # ---- numbers ------------------------------------------------------------------------------------------------

    def fresh(self, process: int, incarnation: int) -> int:
        build = self.build
        made: Machine = (
            build.receiver(process, incarnation)
            if process < build.ranks
            else build.sender(process - build.ranks, incarnation)
        )
        self.machines[process, incarnation] = made
        return self.intern(process, incarnation, made.snapshot())

    def intern(self, process: int, incarnation: int, snapshot: Any) -> int:
        key = (process, incarnation, snapshot)
        number = self.numbers.get(key)
        if number is None:
            number = self.numbers[key] = len(self.kept)
            self.kept.append(key)
        self.loaded[process, incarnation] = number
        return number

    def machine(self, number: int) -> Machine:
        """The production machine in that state. Look, do not touch."""
        process, incarnation, snapshot = self.kept[number]
        made = self.machines[process, incarnation]
        if self.loaded[process, incarnation] != number:
            made.restore(snapshot)
            self.loaded[process, incarnation] = number
        return made

    def post(self, sender: int, route: str, message: m.Message) -> int:
        """The number of a message. What is only for people to read is taken out: it decides nothing."""
        if getattr(message, "cause", ""):
            message = msgspec.structs.replace(message, cause="")
        mail = Mail(self.build.process(route), self.build.seen_from(sender, route), message)
        number = self.mail_numbers.get(mail)
        if number is None:
            number = self.mail_numbers[mail] = len(self.mail)
            self.mail.append(mail)
        return number

    # ---- running ------------------------------------------------------------------------------------------------

    def run(self, number: int, event: Event) -> Ran:
        ran = self.ran.get((number, event))
        if ran is None:
            ran = self.ran[number, event] = self._run(number, event)
        return ran

    def _run(self, number: int, event: Event) -> Ran:
        self.calls += 1
        process, incarnation, _ = self.kept[number]
        machine = self.machine(number)
        self.loaded[process, incarnation] = -1
        try:
            answer, effects = self._call(machine, event)
        except (RoomInUse, Overloaded) as refused:
            return Ran(number, (), f"refused: {refused.code}")
        except (InternalError, AssertionError, LookupError, TypeError, StopIteration, ValueError) as broken:
            return Ran(number, (), f"GR-4 the machine raised {type(broken).__name__}: {broken}")
        after = self.intern(process, incarnation, machine.snapshot())
        todo = [self._compile(process, incarnation, effect) for effect in effects]
        return Ran(after, tuple(t for t in todo if t), None, answer)

    def _call(self, machine: Machine, event: Event) -> tuple[int, list[fx.Effect]]:
        kind, *args = event
        if kind == "msg":
            mail = self.mail[args[0]]
            return 0, machine.on_message(mail.route, mail.message)
        if isinstance(machine, ReceiverMachine):
            return self._call_receiver(machine, kind, args)
        return self._call_sender(machine, kind, args)

    def _call_receiver(self, r: ReceiverMachine, kind: str, args: list[Any]) -> tuple[int, list[fx.Effect]]:
        match kind:
            case "receive":
                return r.receive(args[0], args[1], dummy=args[2])
            case "cancel":
                return 0, r.cancel(args[0], Cancelled("explored"))
            case "fail":
                return 0, r.fail(args[0], DeadlineExceeded("explored"))
            case "resolve":
                return 0, r.resolve(args[0], args[1])
            case "suspect":
                return 0, r.suspect(args[0], PeerLost("explored"))
            case "gathered":
                return 0, r.gathered(args[0], list(args[1]))
            case "corrupt":
                return 0, r.corrupt(args[0], list(args[1]))
            case "connected":
                return 0, r.connected(args[0], None)
            case "silent":
                return 0, r.peer_silent(args[0], PeerLost("explored"))
            case "gone":
                return 0, r.peer_gone(args[0])
            case "timer":  # only in a mutant: quarantine ends because time has passed
                for sender in {q.sender for q in r.pool.quarantined.values()}:
                    r.pool.gone(sender)
                return 0, r._step()
            case "overdue":
                return 0, r.fence_overdue(args[0])
            case "replaced":
                return 0, r.slab_replaced(args[0])
            case "resend":
                return 0, r.resend(args[0])
            case "heartbeat":
                return 0, r.heartbeat(args[0])
        raise TypeError(kind)

    def _call_sender(self, s: SenderMachine, kind: str, args: list[Any]) -> tuple[int, list[fx.Effect]]:
        match kind:
            case "offer":
                return s.offer(args[0], Facts(args[1], bytes([args[2]]) * 16, 1, bytes(128), "full"), args[3])
            case "extend":
                return 0, s.extend(args[0], args[1])
            case "cancel":
                return 0, s.cancel(args[0], Cancelled("explored"))
            case "force":
                return 0, s.force_end(args[0])
            case "connected":
                return 0, s.connected(args[0], None)
            case "done":
                return 0, s.write_done(args[0], {args[1]: args[2]})
            case "failed":
                return 0, s.write_failed(args[0], {args[1]}, FerryError("explored"))
            case "unknown":
                return 0, s.write_unknown(args[0], FerryError("explored"))
            case "drained":
                return 0, s.write_drained(args[0], {args[1]})
            case "lost":
                return 0, s.receiver_lost(args[0], PeerLost("explored"), gone=args[1])
            case "resend":
                return 0, s.resend(args[0])
        raise TypeError(kind)

    def _compile(self, process: int, incarnation: int, effect: fx.Effect) -> Todo:
        match effect:
            case fx.Send(route, message):
                return ("send", self.post(process, route, message))
            case fx.Connect(route, hello):
                return ("connect", route if process < self.build.ranks else hello.src)
            case fx.PostWrite():
                target = self.build.process(effect.route)
                return ("post", effect.write, effect.serial, target, effect.receiver, effect.xfer, effect.runs)
            case fx.Gather(xfer, _, items):
                return ("gather", xfer, items)
            case fx.Drop(xfer):
                return ("drop", xfer)
            case fx.ReplaceSlab(slab):
                return ("replace", slab)
            case fx.Ended(key, error):
                return ("ended", key, error.code if error is not None else "ok")
            case fx.ReleaseSource(serial):
                return ("release", serial)
        return ()
