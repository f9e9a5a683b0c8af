"""Which transport carries: a pure function of what both sides have."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorferry.core.selection import Candidate, Verdict, rank

MOONCAKE, MOONCAKE_TCP = Candidate("mooncake", "rdma"), Candidate("mooncake", "tcp")
NIXL, SHM, TCP = Candidate("nixl", "rdma"), Candidate("shm", "memcpy"), Candidate("tcp", "tcp")

CANDIDATES = st.builds(
    Candidate,
    st.sampled_from(["mooncake", "nixl", "shm", "tcp", "acme", "zebra"]),
    st.sampled_from(["rdma", "memcpy", "tcp", "", "carrier pigeon"]),
    st.sampled_from([1, 2]),
)
SIDES = st.lists(CANDIDATES, unique_by=lambda c: c.name, max_size=6)


def names(verdicts: list[Verdict]) -> list[str]:
    return [v.name for v in verdicts if v.viable]


def why(verdicts: list[Verdict], name: str) -> str:
    return next(v.reason for v in verdicts if v.name == name)


@pytest.mark.parametrize(
    ("ours", "theirs", "order"),
    [
        ([MOONCAKE, SHM, TCP], [MOONCAKE, SHM, TCP], ["mooncake", "shm", "tcp"]),
        ([TCP, SHM, NIXL, MOONCAKE], [MOONCAKE, NIXL, TCP, SHM], ["mooncake", "nixl", "shm", "tcp"]),
        ([MOONCAKE_TCP, SHM, TCP], [MOONCAKE, SHM, TCP], ["shm", "tcp", "mooncake"]),
        ([MOONCAKE, TCP], [SHM, TCP], ["tcp"]),
        ([MOONCAKE], [MOONCAKE_TCP, SHM], ["mooncake"]),
        ([Candidate("zebra", "odd"), Candidate("acme", "odd"), TCP], [TCP, Candidate("acme", "odd")], ["tcp", "acme"]),
        ([SHM], [TCP], []),
        ([], [TCP], []),
    ],
)
def test_the_faster_way_that_both_have_comes_first(
    ours: list[Candidate], theirs: list[Candidate], order: list[str]
) -> None:
    assert names(rank(ours, theirs)) == order


@given(SIDES, SIDES, st.sampled_from(["", "rdma"]))
def test_both_sides_come_to_the_same_answer_whatever_order_they_ask_in(
    ours: list[Candidate], theirs: list[Candidate], require: str
) -> None:
    mine, other = rank(ours, theirs, require), rank(theirs[::-1], ours[::-1], require)
    assert [(v.name, v.path) for v in mine if v.viable] == [(v.name, v.path) for v in other if v.viable]
    assert sorted(v.name for v in mine) == sorted({c.name for c in [*ours, *theirs]})
    assert all(v.reason for v in mine)
    assert [v.viable for v in mine] == sorted((v.viable for v in mine), reverse=True)


@given(SIDES, SIDES)
def test_what_is_required_is_never_replaced(ours: list[Candidate], theirs: list[Candidate]) -> None:
    assert all(v.path == "rdma" for v in rank(ours, theirs, "rdma") if v.viable)


def test_every_transport_that_is_not_taken_says_why() -> None:
    old, new = Candidate("acme", "x", 1), Candidate("acme", "x", 2)
    found = rank([MOONCAKE, NIXL, SHM, old], [MOONCAKE_TCP, TCP, new], "rdma")
    assert not names(found)
    assert why(found, "mooncake") == "rdma is required, and the peer's path is tcp"
    assert why(found, "nixl") == "the peer does not offer it"
    assert why(found, "tcp") == "only the peer has it"
    assert "contract 2" in why(found, "acme")
