"""One sender by several of its addresses: 127.0.0.1 and 127.0.0.2 stand for an IP and a name, or two IPs of a host."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest
from scenario_kit import PATIENCE, PROTOCOL, SMALL, Quay, assert_same, eventually, rows

from tensorferry import errors

SIZES: dict[str, Any] = {"layout": SMALL, "block_size": 16, "pool_blocks": 8, "first_grant": 64}
EVERYWHERE: dict[str, Any] = {**SIZES, "sender_settings": {"bind": "tcp://0.0.0.0:0"}}

pytestmark = PROTOCOL


def spellings(quay: Quay) -> tuple[str, str]:
    port = quay.sender.address.rpartition(":")[2]
    return f"tcp://127.0.0.1:{port}", f"tcp://127.0.0.2:{port}"


def ignored(quay: Quay) -> dict[str, int]:
    """What was said by the wrong way, or under the wrong name."""
    found = [counted for end in (quay.receiver, quay.sender) for counted in (end.machine.ignored, end._control.dropped)]
    reasons = ("not from its sender", "identity")
    return {reason: counted[reason] for counted in found for reason in reasons if reason in counted}


def test_rooms_in_flight_over_two_addresses_of_one_sender_all_arrive(kind: str) -> None:
    """Both rooms have rows there and rows to come at every moment, in a pool that neither fits in."""
    with Quay(kind, **EVERYWHERE) as quay:
        total, step = 640, 80
        given = {room: rows(total, room, SMALL) for room in (1, 2)}
        sending = {room: quay.sender.announce(room, total, components=list(given[room])) for room in given}
        receiving = {room: quay.receiver.receive(room, at) for room, at in zip(given, spellings(quay), strict=True)}
        for start in range(0, total, step):
            for room in given:
                piece = {name: tensor[start : start + step] for name, tensor in given[room].items()}
                sending[room].put(start, **piece)
            for room in given:
                eventually(lambda room=room, start=start: receiving[room].sent_tokens >= start + step - 16)
        for room in given:
            assert_same(receiving[room].result(PATIENCE), given[room])
            sending[room].wait(PATIENCE)
        assert len(quay.sender.machine.receivers) == 1  # the same receiver, whichever way it comes
        assert ignored(quay) == {}


def test_the_addresses_of_one_sender_can_be_used_in_turn(kind: str) -> None:
    with Quay(kind, **EVERYWHERE) as quay:
        one, two = spellings(quay)
        for room, at in enumerate([one, two, one, one, two, two, one]):
            given = rows(300, room, SMALL)
            sending = quay.sender.send(room, **given)
            assert_same(quay.receiver.receive(room, at).result(PATIENCE), given)
            sending.wait(PATIENCE)
        assert ignored(quay) == {}


def test_what_ends_at_one_address_goes_on_at_the_other(kind: str) -> None:
    """Cancelled at one, on either side, in the middle of its rows; then the sender ends for both."""
    with Quay(kind, **EVERYWHERE, clean=False) as quay:
        one, two = spellings(quay)
        given = rows(400, 9, SMALL)
        sending = {room: quay.sender.announce(room, 400, components=list(given)) for room in (1, 2, 3)}
        receiving = {room: quay.receiver.receive(room, at) for room, at in ((1, one), (2, two), (3, one))}
        for room in sending:
            sending[room].put(0, **{name: tensor[:50] for name, tensor in given.items()})
            eventually(lambda room=room: receiving[room].sent_tokens)
        receiving[1].cancel()
        sending[3].cancel()
        for transfer in (sending[1], receiving[3]):
            with pytest.raises(errors.FerryError):
                transfer.wait(PATIENCE)
        sending[2].put(50, **{name: tensor[50:] for name, tensor in given.items()})
        assert_same(receiving[2].result(PATIENCE), given)
        sending[2].wait(PATIENCE)
        for room, at in ((4, one), (5, two)):
            receiving[room] = quay.receiver.receive(room, at)
            eventually(lambda room=room: quay.receiver.machine.transfers[receiving[room]._xfer].sender)
        quay.sender.close()
        for room in (4, 5):
            receiving[room].cancel()
        eventually(lambda: quay.receiver.free_blocks == 8)


def test_a_successor_of_the_sender_is_met_by_both_addresses(kind: str) -> None:
    with Quay(kind, **EVERYWHERE, clean=False) as quay:
        both = spellings(quay)
        for room, at in enumerate(both):
            sending = quay.sender.send(room, **rows(100, room, SMALL))
            quay.receiver.receive(room, at).wait(PATIENCE)
            sending.wait(PATIENCE)
        where = quay.sender.address
        quay.sender.close()
        quay.sender = quay.add_sender(bind=where)
        given = {room: rows(300, room, SMALL) for room in (5, 6)}
        sending = {room: quay.sender.send(room, **given[room]) for room in given}
        receiving = {room: quay.receiver.receive(room, at) for room, at in zip(given, both, strict=True)}
        for room in given:
            assert_same(receiving[room].result(PATIENCE), given[room])
            sending[room].wait(PATIENCE)
        eventually(lambda: quay.receiver.free_blocks == 8)


def test_a_name_service_that_does_not_answer_stops_no_other_room(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answer, real = threading.Event(), threading.Event(), socket.getaddrinfo

    def slow(host: Any, *rest: Any, **more: Any) -> Any:
        if host not in (b"slow.example", b"none.example"):
            return real(host, *rest, **more)
        asked.set()
        assert answer.wait(2 * PATIENCE)
        if host == b"none.example":
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return real("127.0.0.1", *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with Quay(kind, **SIZES) as quay:
        late = rows(300, 1, SMALL)
        sending = quay.sender.send(1, **late)
        port = quay.sender.address.rpartition(":")[2]
        nowhere = quay.receiver.receive(2, f"tcp://none.example:{port}")
        waiting = quay.receiver.receive(1, f"tcp://slow.example:{port}")
        try:
            eventually(asked.is_set)
            for room in range(100, 105):
                quay.carry(300, room=room, seed=room)
            assert not waiting.done
            assert not nowhere.done
        finally:
            answer.set()
        assert_same(waiting.result(PATIENCE), late)
        nowhere.cancel()
        sending.wait(PATIENCE)


def test_a_name_that_is_not_found_is_a_typed_error_in_time(kind: str) -> None:
    with Quay(kind, **SIZES, heartbeat=0.1, peer_timeout=2.0) as quay:
        nowhere = quay.receiver.receive(1, "tcp://a..b:5555")
        quay.carry(100, room=2)
        with pytest.raises(errors.PeerUnreachable, match="its host is not found"):
            nowhere.wait(PATIENCE)
