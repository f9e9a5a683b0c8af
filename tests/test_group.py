"""The leader's memory of what was decided: one decision for each use of a room, told until every follower has heard."""

from __future__ import annotations

import pytest

from tensorferry.core.errors import ConfigError
from tensorferry.core.group import MOST_OVER, SOLO, Decisions, Group
from tensorferry.core.messages import Query, Verdict


def query(rank: int, xfer: int, *, room: int = 7, src: int | None = None, heard: bool = False) -> Query:
    return Query(
        src=100 + rank if src is None else src, dst=1, xfer=xfer, room=room, rank=rank, ranks=3, heard=heard,
        code="", cause="",
    )  # fmt: skip


def decisions(most: int = 10) -> Decisions:
    return Decisions(1, most)


@pytest.mark.parametrize(("rank", "ranks"), [(-1, 2), (2, 2), (0, 0), (0, 4097)])
def test_a_place_that_cannot_be_is_refused(rank: int, ranks: int) -> None:
    with pytest.raises(ConfigError):
        Group(rank, ranks)


def test_rank_0_leads() -> None:
    assert SOLO.leads
    assert Group(0, 4).leads
    assert not Group(3, 4).leads


def test_a_follower_that_asks_early_is_told_when_it_is_decided_and_one_that_asks_late_at_once() -> None:
    d = decisions()
    d.open(50, 7, 3)
    assert d.query("a", query(1, 4)) == (50, None)
    assert d.decide(50, True, "", "") == [("a", Verdict(src=1, dst=101, xfer=4, run=True, code="", cause=""))]
    assert d.query("b", query(2, 9)) == (50, Verdict(src=1, dst=102, xfer=9, run=True, code="", cause=""))


def test_the_first_decision_stands() -> None:
    d = decisions()
    d.open(50, 7, 3)
    d.query("a", query(1, 4))
    d.decide(50, False, "cancelled", "why")
    assert d.decide(50, True, "", "") == []
    assert d.query("a", query(1, 4))[1] == Verdict(src=1, dst=101, xfer=4, run=False, code="cancelled", cause="why")


def test_it_is_remembered_until_all_have_heard_and_no_longer() -> None:
    d = decisions()
    d.open(50, 7, 3)
    d.decide(50, True, "", "")
    for rank in (1, 2):
        d.query("x", query(rank, rank))
    assert d.query("x", query(1, 1, heard=True)) == (50, None)
    assert d.query("x", query(1, 1, heard=True)) == (50, None)  # twice is once
    assert list(d.uses) == [50]
    assert d.query("x", query(2, 2, heard=True)) == (50, None)
    assert d.uses == {}
    assert d.query("x", query(2, 2, heard=True)) == (None, None)


def test_two_uses_of_a_room_are_two_questions() -> None:
    d = decisions()
    d.open(50, 7, 2)
    d.query("a", query(1, 4))
    d.decide(50, False, "cancelled", "")
    d.open(60, 7, 2)
    assert d.query("a", query(1, 5)) == (60, None)
    assert d.query("a", query(1, 4))[1].run is False
    d.decide(60, True, "", "")
    assert d.query("a", query(1, 5))[1].run is True
    assert d.query("a", query(1, 4))[1].run is False


def test_having_heard_opens_nothing() -> None:
    d = decisions()
    d.open(50, 7, 3)
    assert d.query("a", query(1, 4, heard=True)) == (None, None)
    assert d.uses[50].bound == {}
    assert d.query("a", query(1, 4, room=8)) == (None, None)


def test_a_rank_that_never_asks_does_not_fill_the_memory() -> None:
    d = decisions(most=3)
    d.open(999, 1, 2)  # undecided: always kept
    for xfer in range(10):
        d.open(xfer, 7, 2)
        d.decide(xfer, True, "", "")
    assert list(d.uses) == [999, 7, 8, 9]


def test_a_snapshot_is_the_whole_state() -> None:
    d = decisions()
    d.open(50, 7, 3)
    d.open(51, 8, 3)
    d.query("a", query(1, 4))
    d.query("b", query(2, 5, room=8))
    d.decide(51, False, "cancelled", "why")
    d.query("b", query(2, 5, room=8, heard=True))
    other = decisions()
    other.restore(d.snapshot())
    assert other.snapshot() == d.snapshot()
    assert other.uses == d.uses
    other.query("c", query(2, 6))
    assert other.snapshot() != d.snapshot()  # nothing is shared


def test_a_late_question_is_not_taken_for_one_about_the_next_use_of_its_room() -> None:
    d = decisions()
    d.open(50, 7, 2)
    d.query("a", query(1, 4))
    d.decide(50, True, "", "")
    d.query("a", query(1, 4, heard=True))
    d.open(60, 7, 2)
    assert d.query("a", query(1, 4)) == (None, None)
    assert d.query("a", query(1, 5)) == (60, None)
    assert d.query("a", query(1, 9, src=90)) == (None, None)  # an earlier incarnation of that rank
    assert d.query("a", query(1, 1, src=900)) == (None, None)  # a later one: the use is bound to its predecessor


def test_what_a_hostile_rank_says_it_has_heard_is_bounded() -> None:
    d = decisions()
    d.open(50, 7, 2)
    d.query("a", query(1, 1))  # only whoever asks about a room that there is can be that rank
    for xfer in range(0, 2 * MOST_OVER + 100, 2):
        d.query("a", query(1, xfer, heard=True))
    assert d.over[1][1].pieces == MOST_OVER


def test_a_stray_question_bars_no_rank() -> None:
    d = decisions()
    d.open(50, 7, 2)
    for heard in (False, True):
        assert d.query("stranger", query(1, 9, room=12345, src=(1 << 63) - 1, heard=heard)) == (None, None)
    assert d.query("a", query(1, 4)) == (50, None)
    assert not [route for route, *_ in d.uses[50].bound.values() if route == "stranger"]


def test_a_verdict_is_said_again_to_those_who_have_asked_and_not_heard() -> None:
    d = decisions()
    d.open(50, 7, 3)
    assert d.unheard(50) == []
    d.query("a", query(1, 4))
    d.decide(50, True, "", "")
    assert [(route, verdict.xfer) for route, verdict in d.unheard(50)] == [("a", 4)]
    d.query("a", query(1, 4, room=0, heard=True))  # who has forgotten the transfer has forgotten its room
    assert d.unheard(50) == []
    assert d.unheard(51) == []
