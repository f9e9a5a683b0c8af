"""Sides that do not fit together, and addresses where nobody is: a typed error soon, and nobody else is disturbed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from scenario_kit import PATIENCE, SMALL, Quay, assert_clean, assert_same, eventually, rows

import tensorferry as tf
from tensorferry import errors

QUICK: dict[str, object] = {"heartbeat": 0.1, "peer_timeout": 0.8}
DEADLINE: dict[str, object] = {"transfer_deadline": 0.8}
SIZES: dict[str, Any] = {"layout": SMALL, "block_size": 16, "pool_blocks": 8, "first_grant": 64}


def another_version(end: Any, offers: bool = False) -> None:
    def change() -> None:
        hello = end.machine.hello
        if offers:
            offer = msgspec.structs.replace(hello.offers[0], contract=99)
            end.machine.hello = msgspec.structs.replace(hello, offers=(offer,))
            end.carriers.offers = lambda slabs=(): (offer,)  # and whenever it describes itself again
        else:
            end.machine.hello = msgspec.structs.replace(hello, version=99)

    end._call(change)


ODD: dict[str, tuple[Callable[[Quay], Any], type[errors.FerryError]]] = {
    "layout": (lambda quay: quay.add_receiver(layout=tf.embedding_layout(8, "float32")), errors.LayoutMismatch),
    "block size": (lambda quay: quay.add_receiver(block_size=32), errors.GeometryMismatch),
    "transport": (
        lambda quay: quay.add_receiver(transport="shm" if quay.kind == "memory" else "memory"),
        errors.TransportMismatch,
    ),
}


@pytest.mark.parametrize("what", ODD)
def test_a_receiver_that_does_not_fit_is_told_what_and_the_others_go_on(kind: str, what: str) -> None:
    make, error = ODD[what]
    with Quay(kind, **SIZES, sender_settings=DEADLINE) as quay:
        odd = make(quay)
        sending = quay.sender.send(1, **rows(100, layout=SMALL))
        refused = odd.receive(1, quay.sender.address)
        quay.carry(1000, room=2)
        with pytest.raises(error) as raised:
            refused.wait(PATIENCE)
        assert raised.value.hint
        assert odd.free_blocks == odd.pool_blocks
        with pytest.raises(errors.DeadlineExceeded, match="No receiver opened the room"):
            sending.wait(PATIENCE)


@pytest.mark.parametrize("offers", [False, True], ids=["protocol", "transport contract"])
def test_another_version_is_told_so(kind: str, offers: bool) -> None:
    with Quay(kind, **SIZES, sender_settings=DEADLINE) as quay:
        another_version(quay.sender, offers)
        sending, receiving = quay.sender.send(1, **rows(100, layout=SMALL)), quay.receive(1)
        with pytest.raises(errors.VersionMismatch):
            receiving.wait(PATIENCE)
        with pytest.raises(errors.DeadlineExceeded):
            sending.wait(PATIENCE)


def test_nobody_at_the_address_is_peer_unreachable_and_costs_no_block(kind: str) -> None:
    with Quay(kind, **SIZES, **QUICK) as quay:
        nobody = quay.receiver.receive(1, "tcp://127.0.0.1:9")
        quay.carry(1000, room=2)
        assert quay.receiver.free_blocks == 8
        with pytest.raises(errors.PeerUnreachable) as raised:
            nobody.wait(PATIENCE)
        assert raised.value.peer == "tcp://127.0.0.1:9"
        assert raised.value.retryable


@pytest.mark.parametrize("address", ["", "nonsense", "tcp://127.0.0.1:99999", "tcp://", "http://127.0.0.1:80"])
def test_what_is_no_address_is_refused_at_once(address: str) -> None:
    with Quay(**SIZES) as quay:
        with pytest.raises(errors.ConfigError):
            quay.receiver.receive(1, address)
        quay.carry(10)


def test_a_receiver_behind_the_address_is_no_sender(kind: str) -> None:
    with Quay(kind, **SIZES, **QUICK, ranks=2) as quay:
        confused = quay.add_receiver().receive(1, quay.receiver.leader_address)
        with pytest.raises(errors.PeerUnreachable):
            confused.wait(PATIENCE)


def test_a_room_in_use_is_refused_locally_and_the_first_goes_on(kind: str) -> None:
    with Quay(kind, **SIZES) as quay:
        sending, receiving = quay.sender.announce(1, 100), quay.receive(1)
        with pytest.raises(errors.RoomInUse):
            quay.sender.announce(1, 5)
        with pytest.raises(errors.RoomInUse):
            quay.receive(1)
        given = rows(100, layout=SMALL)
        sending.put(0, **given)
        assert_same(receiving.result(PATIENCE), given)
        sending.wait(PATIENCE)
        quay.carry(50, room=1)


def test_the_most_rooms_at_once_is_a_setting(kind: str) -> None:
    with Quay(kind, **SIZES, max_rooms=2) as quay:
        live = [quay.receive(room) for room in range(2)]
        with pytest.raises(errors.Overloaded):
            quay.receive(2)
        offers = [quay.sender.send(room, **rows(10, layout=SMALL)) for room in range(2)]
        for transfer in [*live, *offers]:
            transfer.wait(PATIENCE)
        assert_clean(quay.receiver, quay.sender)
        quay.carry(10, room=2)


def test_a_peer_that_says_the_same_thing_differently_later_is_caught(kind: str) -> None:
    """The length is said once (ID-5)."""
    with Quay(kind, **SIZES) as quay:
        sending, receiving = quay.sender.announce(1, 100), quay.receive(1)
        eventually(lambda: receiving.total_tokens == 100)

        def lie() -> None:
            slot = next(iter(quay.sender.machine.slots.values()))
            assert slot.offer is not None
            slot.offer.facts = replace(slot.offer.facts, total=101)
            slot.touched += 1

        quay.sender._call(lie)
        for transfer in (receiving, sending):
            with pytest.raises(errors.ProtocolViolation):
                transfer.wait(PATIENCE)
