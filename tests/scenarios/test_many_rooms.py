"""Many rooms at once in a pool that holds a few of them, and what a pool's order of blocks must not matter to."""

from __future__ import annotations

import random
from typing import Any

import pytest
from scenario_kit import CHOOSERS, KINDS, PATIENCE, SMALL, Quay, assert_same, eventually, rows

from tensorferry import errors

ROOMS = 300
LONG = 4 * PATIENCE
POOL: dict[str, Any] = {"block_size": 64, "pool_blocks": 32}
"""2,048 tokens: two rooms of a mean length, and one of the longest. The time goes by blocks."""


def lengths(seed: int) -> list[int]:
    dice = random.Random(seed)
    return [1, 2000, *(dice.randint(1, 2000) for _ in range(ROOMS - 2))]


@pytest.mark.parametrize(
    ("kind", "chooser", "window"),
    [("memory", "highest-first", "rounds"), ("memory", "random", "auto")]
    + [(kind, "random", "rounds") for kind in KINDS],
)
def test_300_rooms_at_once_all_arrive_and_leave_nothing(kind: str, chooser: str, window: str) -> None:
    """With the default first grant of the whole pool, offers and wishes in different orders, half of them early."""
    with Quay(kind, layout=SMALL, **POOL, choose=CHOOSERS[chooser], window=window) as quay:
        dice = random.Random(1)
        order = list(range(ROOMS))
        sizes = lengths(2)
        given = {room: rows(sizes[room], seed=room, layout=SMALL) for room in order}
        sending, receiving = {}, {}
        for room in dice.sample(order, ROOMS // 2):
            sending[room] = quay.sender.send(room, **given[room])
        for room in dice.sample(order, ROOMS):
            receiving[room] = quay.receive(room)
        for room in dice.sample(order, ROOMS):
            if room not in sending:
                sending[room] = quay.sender.send(room, **given[room])
        for room in order:
            assert_same(receiving[room].result(LONG), given[room])
            assert list(receiving[room].history) == sorted(receiving[room].history)
            assert sum(r.tokens for r in receiving[room].rounds) == sizes[room]
            sending[room].wait(LONG)


def test_300_rooms_of_which_every_third_is_cancelled_somewhere(kind: str) -> None:
    with Quay(kind, layout=SMALL, **POOL, choose=CHOOSERS["random"]) as quay:
        sizes = lengths(3)
        given = {room: rows(sizes[room], seed=room, layout=SMALL) for room in range(ROOMS)}
        receiving = {room: quay.receive(room) for room in given}
        sending = {room: quay.sender.send(room, **tensors) for room, tensors in given.items()}
        for room in range(0, ROOMS, 3):
            (receiving if room % 2 else sending)[room].cancel()
        for room in given:
            ends: list[Any] = []
            for transfer in (receiving[room], sending[room]):
                try:
                    ends.append(transfer.wait(LONG))
                except errors.Cancelled as error:
                    ends.append(error)
            if room % 3:
                assert ends == [None, None]
            if ends[0] is None:
                assert_same(receiving[room].result(), given[room])
            else:
                assert ends[1] is not None, "what the receiver did not get counts as sent"


def test_the_first_grant_of_one_room_may_be_the_whole_pool_and_nobody_waits_for_ever(kind: str) -> None:
    """Loans to rooms that are never announced come back when somebody with rows needs them."""
    with Quay(kind, layout=SMALL) as quay:
        idle = [quay.receive(room) for room in range(100, 110)]
        eventually(lambda: quay.receiver.free_blocks == 0)
        quay.carry(20_000)
        for transfer in idle:
            assert not transfer.done
            transfer.cancel()


def test_rooms_are_used_again_as_soon_as_they_have_ended(kind: str) -> None:
    with Quay(kind, layout=SMALL, block_size=16, pool_blocks=4) as quay:
        for use in range(40):
            quay.carry(use * 7, room=5, seed=use)


@pytest.mark.parametrize("kind", KINDS)
def test_two_halves_of_the_pool_that_both_want_more_both_get_it(kind: str) -> None:
    with Quay(kind, layout=SMALL, pool_blocks=8, first_grant=4 * 128) as quay:
        given = {room: rows(3000, seed=room, layout=SMALL) for room in (1, 2)}
        receiving = {room: quay.receive(room) for room in given}
        eventually(lambda: quay.receiver.free_blocks == 0)
        for room, tensors in given.items():
            quay.sender.send(room, **tensors)
        for room, transfer in receiving.items():
            assert_same(transfer.result(PATIENCE), given[room])
