"""The table of scenarios: lengths around and far beyond the first grant and the pool, each with its rounds."""

from __future__ import annotations

from typing import Any

import pytest
from scenario_kit import CHOOSERS, KINDS, PATIENCE, SMALL, Quay, assert_same, eventually, rows

Rounds = list[tuple[int, int]]

# total tokens, first grant, pool, the rounds that must be seen: (tokens, blocks) each; blocks of 128 tokens
TABLE: list[tuple[int, int, int, Rounds]] = [
    (500, 1024, 64, [(500, 4)]),
    (1024, 1024, 64, [(1024, 8)]),
    (2000, 1024, 64, [(1024, 8), (976, 8)]),
    (10_000, 1024, 8, [(1024, 8)] * 9 + [(784, 7)]),
    (12_000, 8192, 64, [(8192, 64), (3808, 30)]),
    (50_000, 8192, 64, [(8192, 64)] * 6 + [(848, 7)]),
    (50_000, 8192, 400, [(8192, 64), (16384, 128), (25424, 199)]),
    (0, 128, 2, []),
    (1, 128, 2, [(1, 1)]),
    (127, 128, 2, [(127, 1)]),
    (128, 128, 2, [(128, 1)]),
    (129, 128, 2, [(128, 1), (1, 1)]),
    (1000, 300, 64, [(384, 3), (616, 5)]),
]
CASES = pytest.mark.parametrize(
    ("total", "first_grant", "pool", "rounds"), TABLE, ids=[f"{t}/{g}/{p}" for t, g, p, _ in TABLE]
)


def starts(rounds: Rounds) -> list[tuple[int, int, int, int]]:
    """(round, start, tokens, blocks) of rounds that follow each other."""
    full, at = [], 0
    for number, (tokens, blocks) in enumerate(rounds):
        full.append((number, at, tokens, blocks))
        at += tokens
    return full


def expected_statuses(rounds: Rounds) -> list[str]:
    resumed = ["TRANSFERRING"] if len(rounds) > 1 else []
    return ["BOOTSTRAPPING", "WAITING_FOR_INPUT", *resumed, "SUCCESS"]


@CASES
@pytest.mark.parametrize(
    ("kind", "chooser"),
    [
        *(("memory", name) for name in CHOOSERS),
        *((kind, how) for kind in ("mooncake", "nixl", "shm", "tcp") for how in ("best-fit", "random")),
    ],
)
def test_every_length_arrives_in_the_rounds_that_its_grants_allow(
    kind: str, chooser: str, total: int, first_grant: int, pool: int, rounds: Rounds, seen: Any
) -> None:
    with Quay(kind, first_grant=first_grant, pool_blocks=pool, choose=CHOOSERS[chooser]) as quay:
        given = rows_of(total)
        receiving = quay.receive()
        eventually(lambda: receiving.status == "WAITING_FOR_INPUT")  # the loan is out before the length is known
        sending = quay.sender.send(1, mrope_delta=-11, **given)
        result = receiving.result(PATIENCE)
        sending.wait(PATIENCE)
        assert_same(result, given)
        assert result.aux[:3] == (total, -11, 0)
        assert [tuple(r) for r in receiving.rounds] == starts(rounds)
        assert receiving.history == tuple(start + tokens for _, start, tokens, _ in starts(rounds))
        assert receiving.sent_tokens == receiving.total_tokens == total
        assert seen[receiving] == expected_statuses(rounds)
        eventually(lambda: seen[sending] == expected_statuses(rounds))  # `done` is seen before it is told


def rows_of(total: int) -> Any:
    return rows(total, seed=total)


@CASES
@pytest.mark.parametrize(
    ("kind", "window", "mode"),
    [
        *(
            (kind, window, mode)
            for kind in ("memory", "tcp")
            for window, mode in (("auto", "announced"), ("rounds", "announced"), (1, "announced"), (3, "optimistic"))
        ),
        *((kind, "auto", "optimistic") for kind in KINDS),
    ],
)
def test_every_length_arrives_whatever_the_window_and_the_first_grant(
    kind: str, mode: str, window: str | int, total: int, first_grant: int, pool: int, rounds: Rounds
) -> None:
    settings = {"first_grant": first_grant, "pool_blocks": pool, "window": window, "first_grant_mode": mode}
    with Quay(kind, choose=CHOOSERS["random"], layout=SMALL, **settings) as quay:
        receiving = quay.carry(total)
        assert sum(r.tokens for r in receiving.rounds) == total
        assert sum(r.blocks for r in receiving.rounds) == -(-total // 128)
        assert list(receiving.history) == sorted(receiving.history)
        assert receiving.sent_tokens == total
        assert max(r.blocks for r in receiving.rounds) <= pool if total else not receiving.rounds


def test_two_transfers_of_50_000_tokens_share_the_default_pool(kind: str) -> None:
    with Quay(kind) as quay:
        given = {room: rows(50_000, seed=room) for room in (1, 2)}
        receiving = {room: quay.receive(room) for room in given}
        sending = [quay.sender.send(room, **tensors) for room, tensors in given.items()]
        for room, transfer in receiving.items():
            assert_same(transfer.result(PATIENCE), given[room])
        for transfer in sending:
            transfer.wait(PATIENCE)


def test_a_wish_beyond_the_pool_is_clamped_to_it(kind: str) -> None:
    with Quay(kind, first_grant=10_000_000, pool_blocks=4, layout=SMALL) as quay:
        assert [tuple(r) for r in quay.carry(1000).rounds] == [(0, 0, 512, 4), (1, 512, 488, 4)]


@pytest.mark.parametrize("block_size", [1, 7, 4096])
def test_the_block_size_is_a_setting_like_any_other(kind: str, block_size: int) -> None:
    with Quay(kind, block_size=block_size, first_grant=50, pool_blocks=30, layout=SMALL) as quay:
        for total in (0, 1, block_size - 1, block_size, block_size + 1, 299):
            quay.carry(total, seed=total)


def test_one_block_is_pool_enough_for_any_length(kind: str) -> None:
    with Quay(kind, pool_blocks=1, block_size=16, layout=SMALL) as quay:
        assert len(quay.carry(1000).rounds) == 63
