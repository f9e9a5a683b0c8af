"""Messages, inputs and outputs as JSON, and back. Bytes are hex, sets of indices are runs [first, count]."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tensorferry.core import effects as fx
from tensorferry.core import messages as m
from tensorferry.core.errors import from_code
from tensorferry.core.ledger import runs_of
from tensorferry.core.receiver import ReceiverMachine
from tensorferry.core.sender import SenderMachine
from tensorferry.core.transfer import Facts
from tensorferry.core.wire import decode, encode

Json = dict[str, Any]
Machine = ReceiverMachine | SenderMachine

SENDER = "tcp://sender"
LEADER = "tcp://leader"


def runs(indices: Iterable[int]) -> list[list[int]]:
    return [list(run) for run in runs_of(sorted(indices))]


def indices(given: list[list[int]]) -> list[int]:
    return [first + k for first, count in given for k in range(count)]


# ---- messages ---------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, m.Offer):
        return {name: _plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def message_json(message: m.Message) -> Json:
    """Type, fields and frame; `unpacked` says what packed lists hold."""
    told: Json = {
        "type": type(message).__name__,
        "fields": {name: _plain(getattr(message, name)) for name in message.__struct_fields__},
    }
    if isinstance(message, m.Grant):
        told["unpacked"] = {"runs": [list(run) for run in m.unpack_grant(message.runs)]}
    elif isinstance(message, m.Done):
        said = m.unpack_done(message.runs, message.digests)
        told["unpacked"] = {"runs": runs(i for i, _ in said), "digests": [f"{value:016x}" for _, value in said]}
    elif isinstance(message, m.Hello) and message.generations:
        told["unpacked"] = {"generations": m.unpack_generations(message.generations)}
    told["frame"] = encode(message).hex()
    return told


def message_of(told: Json) -> m.Message:
    """The message of a frame. Raises BadFrame, or ValueError where the fields say something else than the frame."""
    message = decode(bytes.fromhex(told["frame"]))
    again = message_json(message)
    if again != told:
        raise ValueError(f"the frame is {again}, the transcript says {told}")
    return message


# ---- inputs -----------------------------------------------------------------------------------------------------


def apply(machine: Machine, told: Json) -> list[fx.Effect]:
    """Do to `machine` what an input says."""
    if "message" in told:
        return machine.on_message(told["from"], message_of(told["message"]))
    given = {name: value for name, value in told.items() if name != "event"}
    if isinstance(machine, ReceiverMachine):
        return _to_receiver(machine, told["event"], given)
    return _to_sender(machine, told["event"], given)


def _to_receiver(r: ReceiverMachine, event: str, given: Json) -> list[fx.Effect]:
    error = from_code(given["code"], given.get("cause", "")) if "code" in given else None
    match event:
        case "receive":
            return r.receive(given["room"], given["sender"], dummy=given["dummy"])[1]
        case "cancel" if error is not None:
            return r.cancel(given["xfer"], error)
        case "fail" if error is not None:
            return r.fail(given["xfer"], error)
        case "suspect" if error is not None:
            return r.suspect(given["xfer"], error)
        case "connected":
            return r.connected(given["peer"], error)
        case "gathered":
            return r.gathered(given["xfer"], indices(given["indices"]))
        case "corrupt":
            return r.corrupt(given["xfer"], indices(given["indices"]))
        case "peer_gone":
            return r.peer_gone(given["incarnation"])
        case "fence_overdue":
            return r.fence_overdue(given["incarnation"])
        case "slab_replaced":
            return r.slab_replaced(given["slab"])
        case "resend":
            return r.resend(given["xfer"])
        case "heartbeat":
            return r.heartbeat(given["peer"])
    raise ValueError(f"a receiver has no input {event}")


def _to_sender(s: SenderMachine, event: str, given: Json) -> list[fx.Effect]:
    error = from_code(given["code"], given.get("cause", "")) if "code" in given else None
    write = tuple(given.get("write", ()))
    match event:
        case "offer":
            facts = Facts(
                given["total"], bytes.fromhex(given["content_id"]), given["present"], bytes.fromhex(given["aux"]),
                given["integrity"],
            )  # fmt: skip
            return s.offer(given["room"], facts, given["ready"])[1]
        case "extend":
            return s.extend(given["offer"], given["ready"])
        case "cancel" if error is not None:
            return s.cancel(given["offer"], error)
        case "connected":
            return s.connected(given["receiver"], error, given["via"], given["path"])
        case "write_done":
            digests = {int(index): int(value, 16) for index, value in given["digests"].items()}
            return s.write_done(write, digests)
        case "write_failed" if error is not None:
            return s.write_failed(write, set(indices(given["indices"])), error)
        case "write_unknown" if error is not None:
            return s.write_unknown(write, error)
        case "write_drained":
            return s.write_drained(write, set(indices(given["indices"])))
        case "resend":
            return s.resend(given["slot"])
    raise ValueError(f"a sender has no input {event}")


# ---- outputs ----------------------------------------------------------------------------------------------------


def output_json(effect: fx.Effect) -> Json | None:
    """None for what only people look at."""
    match effect:
        case fx.Send(route, message):
            return {"send": message_json(message), "to": route}
        case fx.Connect(route, hello):
            return {"do": "connect", "peer": route, "incarnation": hello.src, "revision": hello.revision}
        case fx.Reserve(xfer):
            return {"do": "reserve", "xfer": xfer}
        case fx.Drop(xfer):
            return {"do": "drop", "xfer": xfer}
        case fx.Gather(xfer, epoch, items):
            listed = [[index, block, f"{digest:016x}"] for index, block, digest in items]
            return {"do": "gather", "xfer": xfer, "epoch": epoch, "items": listed}
        case fx.ReplaceSlab(slab):
            return {"do": "replace_slab", "slab": slab}
        case fx.PostWrite():
            return {
                "do": "post_write", "write": list(effect.write), "offer": effect.serial, "to": effect.route,
                "receiver": effect.receiver, "xfer": effect.xfer, "content_id": effect.content_id.hex(),
                "runs": [list(run) for run in effect.runs],
            }  # fmt: skip
        case fx.ReleaseSource(serial):
            return {"do": "release_source", "offer": serial}
        case fx.Ended(key, error):
            return {"do": "ended", "key": key, "outcome": "delivered" if error is None else error.code}
    return None
