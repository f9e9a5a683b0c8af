"""Frames and messages that nobody should send: the decoder refuses them, the machines stay whole.

Structure-aware: valid messages are built from the schema of the message types with values at their bounds, then bent
(bits, lengths, types, nesting, surplus and missing fields) with the checksum put right, so that the damage gets past
it. The machines are brought to a state that occurs, by a golden transcript, and then spoken to by a peer that lies.

`python -m tensorferry.conformance.protocol.fuzz --seconds 600 --seed 1` runs for as long as told.
"""

from __future__ import annotations

import argparse
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any, get_args

import msgspec
from msgspec import inspect as schema
from msgspec.structs import replace

from tensorferry.conformance.explore.views import look
from tensorferry.conformance.protocol.transcripts.recorder import new_machine
from tensorferry.conformance.protocol.transcripts.replay import shipped
from tensorferry.conformance.protocol.transcripts.values import SENDER, Json, Machine, apply
from tensorferry.core import effects as fx
from tensorferry.core import messages as m
from tensorferry.core.errors import FerryError, TransportError
from tensorferry.core.receiver import ReceiverMachine
from tensorferry.core.sender import SenderMachine
from tensorferry.core.wire import FRAME_VERSION, MAGIC, BadFrame, decode, encode

KINDS: tuple[type[m.Message], ...] = get_args(m.AnyMessage)
_FIELDS = {kind: {field.name: field.type for field in schema.type_info(kind).fields} for kind in KINDS}  # type: ignore[attr-defined]

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, (1 << 31), (1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63),
    1.5, float("nan"), float("inf"), "", "x" * 129, "x" * 2000, "\0", b"", b"\xff" * 15, bytes(17), bytes(70_000), [],
    [[]], [[[[[[]]]]]], {}, {"a": 1}, [0] * 500,
)  # fmt: skip


class Broken(Exception):
    """A rule that the fuzz has broken. The text begins with its name."""


def value(kind: schema.Type, rng: Random) -> Any:
    """A value that the schema allows, often at its bounds."""
    if isinstance(kind, schema.IntType):
        low = kind.ge if kind.ge is not None else 0
        high = kind.le if kind.le is not None else (kind.lt if kind.lt is not None else 1 << 63) - 1
        return rng.choice(
            (low, high, min(low + 1, high), rng.randint(low, min(high, low + 20)), rng.randint(low, high))
        )
    if isinstance(kind, schema.BoolType):
        return rng.random() < 0.5
    if isinstance(kind, schema.BytesType):
        low, high = kind.min_length or 0, kind.max_length if kind.max_length is not None else 64
        return rng.randbytes(rng.choice((low, min(high, low + 16), rng.randint(low, min(high, low + 4096)))))
    if isinstance(kind, schema.StrType):
        low, high = kind.min_length or 0, kind.max_length if kind.max_length is not None else 64
        letters = "ab\u00e9\u4e2d" if kind.pattern is None else "ab~!"
        return "".join(rng.choice(letters) for _ in range(rng.randint(low, min(high, 40))))
    if isinstance(kind, schema.VarTupleType) and isinstance(kind.item_type, schema.StructType):
        item = kind.item_type
        made = (item.cls(*(value(field.type, rng) for field in item.fields)) for _ in range(rng.randint(0, 3)))
        return tuple(made)
    raise TypeError(f"no values for {kind}")


def message(rng: Random, kind: type[m.Message] | None = None) -> m.Message:
    kind = kind or rng.choice(KINDS)
    return kind(**{name: value(type_, rng) for name, type_ in _FIELDS[kind].items()})


def frame(payload: bytes) -> bytes:
    """A frame whose checksum is right, whatever the payload is."""
    return MAGIC + bytes([FRAME_VERSION]) + bytes(3) + struct.pack("<I", zlib.crc32(payload)) + payload


# ---- the decoder ------------------------------------------------------------------------------------------------


def bent(rng: Random) -> bytes:
    """A payload that is nearly right."""
    payload = encode(message(rng))[12:]
    how = rng.randrange(6)
    if how == 0:
        raw = bytearray(payload)
        for _ in range(rng.choice((1, 1, 2, 8))):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        return bytes(raw)
    if how == 1:
        at = rng.randrange(len(payload))
        return payload[:at] + rng.randbytes(rng.randint(0, 9)) + payload[at + rng.randint(0, 9) :]
    form = msgspec.msgpack.decode(payload)
    if how == 2:
        form[rng.randrange(len(form))] = rng.choice(ODD)
    elif how == 3:
        del form[rng.randrange(len(form)) :]
        form += [rng.choice(ODD) for _ in range(rng.randint(0, 3))]
    elif how == 4:
        form.insert(rng.randrange(len(form) + 1), rng.choice(ODD))
    else:
        depth = rng.choice((1, 10, 1000, 60_000))
        return b"\x91" * depth + msgspec.msgpack.encode(form)
    return _packed(form)


def _packed(form: Any) -> bytes:
    """Some odd values are too odd for the encoder."""
    try:
        return msgspec.msgpack.encode(form)
    except (OverflowError, msgspec.MsgspecError):
        return msgspec.msgpack.encode([str(item) for item in form])


def fuzz_decoder(rng: Random, counts: Counter[str]) -> None:
    """One frame. BadFrame, or a message that survives the way back. Raises Broken."""
    data = frame(bent(rng))
    try:
        got = decode(data)
    except BadFrame as refused:
        counts[f"refused: {refused.reason}"] += 1
        return
    except Exception as problem:
        raise Broken(f"MSG-4 decode raised {type(problem).__name__}: {problem}: {data.hex()[:400]}") from problem
    counts["accepted"] += 1
    again = decode(encode(got))
    if again != got:
        raise Broken(f"ID-1 a message does not survive the wire: {got} became {again}")


# ---- the machines -----------------------------------------------------------------------------------------------

MOST_ENTRIES = 4096


class Hostage:
    """A machine in a state that a transcript leads to, whose driver does what it is asked."""

    def __init__(self, transcript: Json, side: str, steps: int) -> None:
        told = transcript["sides"][side]
        self.machine: Machine = new_machine(told)
        self.heard: list[tuple[str, m.Message]] = []
        for step in [step for step in transcript["steps"] if step["at"] == side][:steps]:
            if "restart" in step:
                told = {**told, "incarnation": step["restart"]}
                self.machine = new_machine(told)
                continue
            if "message" in step["in"]:
                self.heard.append((step["in"]["from"], decode(bytes.fromhex(step["in"]["message"]["frame"]))))
            apply(self.machine, step["in"])

    def lie(self, rng: Random) -> tuple[str, m.Message]:
        """Something that a peer could send: what it has said, with a few fields changed; or anything at all."""
        if not self.heard or rng.random() < 0.2:
            route = rng.choice((SENDER, "receiver", "stranger", "rank1"))
            said = message(rng)
            if rng.random() < 0.7:
                said = replace(said, dst=self.machine.inc)
            return route, said
        route, said = rng.choice(self.heard)
        fields = _FIELDS[type(said)]
        changed: dict[str, Any] = {}
        for name in rng.sample(sorted(fields), rng.randint(0, min(3, len(fields)))):
            if name in ("src", "dst") and rng.random() < 0.8:
                continue
            changed[name] = value(fields[name], rng)
            if name == "runs":
                changed[name] = self._runs(type(said), rng)
        if isinstance(said, m.Done) and "runs" in changed and rng.random() < 0.8:
            blocks = sum(count for _, count in struct.iter_unpack("<II", changed["runs"]))
            changed["digests"] = bytes(8 * min(blocks, 4000))
        return (route if rng.random() < 0.9 else "stranger"), replace(said, **changed)

    @staticmethod
    def _runs(kind: type[m.Message], rng: Random) -> bytes:
        def small() -> int:
            return rng.choice((0, 1, 2, 3, rng.randint(0, 70), (1 << 32) - 1))

        if kind is m.Done:
            return m.pack_done([(small(), rng.randint(0, 5)) for _ in range(rng.randint(0, 4))])
        return m.pack_grant([(small(), small(), rng.randint(0, 9), small()) for _ in range(rng.randint(0, 4))])

    def hear(self, route: str, said: m.Message, rng: Random) -> None:
        machine = self.machine
        foreign = self._foreign(route, said)
        before = machine.snapshot() if foreign else None
        self._carry_out(self._run("on_message", route, said), rng)
        if foreign and machine.snapshot() != before:
            raise Broken(f"ID-2 a foreign message from {route} changed the machine: {said}")
        if isinstance(machine, ReceiverMachine):
            machine.pool.audit()
        wrong = look(machine, "rounds").wrong
        if wrong:
            raise Broken(f"{wrong} after {said} from {route}")

    def _foreign(self, route: str, said: m.Message) -> bool:
        """Not for this incarnation, or from nobody that it knows: it may be answered and must leave no trace."""
        if isinstance(self.machine, ReceiverMachine):
            known = route in self.machine.peers
            return not isinstance(said, m.Query | m.Verdict | m.Pong) and (not known or said.dst != self.machine.inc)
        if isinstance(said, m.Hello):
            return said.dst not in (0, self.machine.inc)
        return said.src not in self.machine.receivers or said.dst != self.machine.inc

    def _run(self, kind: str, *args: Any) -> list[fx.Effect]:
        try:
            done: list[fx.Effect] = getattr(self.machine, kind)(*args)
        except FerryError as refused:
            if refused.code == "internal":
                raise Broken(f"MSG-4 {kind}{args} raised {refused}") from refused
            return []
        except Exception as problem:
            raise Broken(f"MSG-4 {kind}{args} raised {type(problem).__name__}: {problem}") from problem
        return done

    def _carry_out(self, effects: list[fx.Effect], rng: Random) -> None:
        machine = self.machine
        for effect in effects:
            if isinstance(effect, fx.Send):
                decode(encode(effect.message))  # whatever it says fits a frame
            elif isinstance(effect, fx.Gather) and isinstance(machine, ReceiverMachine):
                good = [index for index, _, _ in effect.items]
                self._carry_out(self._run(rng.choice(("gathered", "corrupt")), effect.xfer, good), rng)
            elif isinstance(effect, fx.ReplaceSlab):
                self._carry_out(self._run("slab_replaced", effect.slab), rng)
            elif isinstance(effect, fx.Connect):
                key = effect.hello.src if isinstance(machine, SenderMachine) else effect.route
                error = TransportError("no way") if rng.random() < 0.2 else None
                self._carry_out(self._run("connected", key, error), rng)
            elif isinstance(effect, fx.PostWrite) and isinstance(machine, SenderMachine):
                self._check_write(machine, effect)
                if rng.random() < 0.7:
                    done = {first + k: 7 for first, _, count, _ in effect.runs for k in range(count)}
                    self._carry_out(self._run("write_done", effect.write, done), rng)

    def _check_write(self, machine: SenderMachine, effect: fx.PostWrite) -> None:
        hello = machine.receivers[effect.receiver].hello
        for _, block, count, _ in effect.runs:
            if block + count > hello.pool_blocks:
                raise Broken(f"R13 a write of {effect.runs} leaves the pool of {hello.pool_blocks} blocks")

    def check_size(self) -> None:
        """MSG-5: what strangers can make a machine remember is bounded."""
        machine = self.machine
        if isinstance(machine, ReceiverMachine):
            kept = {
                "transfers": len(machine.transfers),
                "peers": len(machine.peers),
                "uses": len(machine.decisions.uses),
            }
        else:
            kept = {"receivers": len(machine.receivers), "slots": len(machine.slots), "writes": len(machine.writes)}
            kept["revoked"] = max((len(r.revoked) for r in machine.receivers.values()), default=0)
        large = {name: count for name, count in kept.items() if count > MOST_ENTRIES}
        if large:
            raise Broken(f"MSG-5 {large}")


def fuzz_machine(rng: Random, transcripts: dict[str, Json], counts: Counter[str], lies: int = 40) -> None:
    """One machine, at some point of some transcript, and a peer that lies. Raises Broken."""
    name = rng.choice(sorted(transcripts))
    side = rng.choice(sorted(transcripts[name]["sides"]))
    steps = rng.randint(1, sum(step["at"] == side for step in transcripts[name]["steps"]))
    hostage = Hostage(transcripts[name], side, steps)
    for _ in range(lies):
        route, said = hostage.lie(rng)
        counts[type(said).__name__] += 1
        hostage.hear(route, said, rng)
    machine = hostage.machine
    for key in list(machine.transfers if isinstance(machine, ReceiverMachine) else machine.slots):
        hostage._carry_out(hostage._run("resend", key), rng)
    hostage.check_size()


def fuzz(seed: int, transcripts: dict[str, Json], counts: Counter[str], *, frames: int = 200, lies: int = 40) -> None:
    """One seed: some frames and one machine. Raises Broken."""
    rng = Random(f"fuzz/{seed}")
    for _ in range(frames):
        fuzz_decoder(rng, counts)
    fuzz_machine(rng, transcripts, counts, lies)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tensorferry.conformance.protocol.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--seeds", type=int, default=0, metavar="N", help="so many seeds, instead of --seconds")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default: %(default)s)")
    asked = parser.parse_args(arguments)
    transcripts, counts = shipped(), Counter[str]()
    seed, began = asked.seed, time.monotonic()
    try:
        while seed < asked.seed + asked.seeds if asked.seeds else time.monotonic() - began < asked.seconds:
            fuzz(seed, transcripts, counts)
            seed += 1
    except Broken as broken:
        print(f"seed {seed}: {broken}")
        print(f"again: python -m tensorferry.conformance.protocol.fuzz --seed {seed} --seeds 1")
        return 1
    except KeyboardInterrupt:
        print("interrupted")
    told = ", ".join(f"{name} {count}" for name, count in counts.most_common())
    print(f"{seed - asked.seed} seeds in {time.monotonic() - began:.0f} s, nothing broken: {told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
