"""One sender by several of its addresses: 127.0.0.1 and 127.0.0.2 stand for an IP and a name, or two IPs of a host."""

from __future__ import annotations

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
