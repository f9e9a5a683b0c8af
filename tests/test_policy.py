"""What is decided without protocol state: how much to grant, when to repeat, which rounds a caller sees."""

from __future__ import annotations

import itertools
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorferry.core import timing
from tensorferry.core.policy import AUTO_WINDOW_BLOCKS, ReceiverPolicy
from tensorferry.core.rounds import Round, RoundLog
from tensorferry.core.timing import Troubles, Watches, bump_pause, new_incarnation

# ---------------------------------------------------------------- how much to grant (R5)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (127, 1), (128, 1), (129, 2), (300, 3), (8192, 64)])
def test_tokens_take_whole_blocks(tokens: int, blocks: int) -> None:
    assert ReceiverPolicy(block_size=128).blocks(tokens) == blocks


def test_rounds_grant_only_when_nothing_is_out_and_double() -> None:
    policy = ReceiverPolicy(first_grant=8, window="rounds")
    assert policy.grant_size(held=0, last=0, needed=100, pool=64) == 8
    assert policy.grant_size(held=1, last=8, needed=100, pool=64) == 0
    assert policy.grant_size(held=0, last=8, needed=100, pool=64) == 16
    announced = ReceiverPolicy(first_grant=8, window="rounds", optimistic=False)
    assert announced.grant_size(held=0, last=0, needed=100, pool=64) == 100


@pytest.mark.parametrize(("window", "size"), [("auto", AUTO_WINDOW_BLOCKS), (5, 5), (100, 64)])
def test_a_window_is_what_is_held_at_most(window: str | int, size: int) -> None:
    policy = ReceiverPolicy(window=window)  # type: ignore[arg-type]
    assert policy.grant_size(held=0, last=0, needed=1000, pool=64) == size
    assert policy.grant_size(held=size, last=1, needed=1000, pool=64) == 0


@given(st.sampled_from(["auto", 1, 2, 3, 7, 64]), *[st.integers(0, 80)] * 2, *[st.integers(1, 80)] * 2)
def test_a_grant_is_never_negative_and_never_beyond_the_window(
    window: str | int, held: int, last: int, needed: int, pool: int
) -> None:
    size = ReceiverPolicy(window=window).grant_size(held=held, last=last, needed=needed, pool=pool)  # type: ignore[arg-type]
    assert size >= 0
    assert not size or held + size <= min(AUTO_WINDOW_BLOCKS if window == "auto" else window, pool)
    assert held or size >= 1  # whoever holds nothing may have something: any length goes through any pool (AL-2)


# ---------------------------------------------------------------- when to repeat


def test_repetition_backs_off_and_progress_starts_it_anew() -> None:
    watches, now = Watches(), 100.0
    assert not watches.repeat("x", 1, now)  # the first look at it
    repeats = []
    for step in range(1, 10_000):
        now = 100.0 + step / 100
        if watches.repeat("x", 1, now):
            repeats.append(round(now - 100.0, 2))
    gaps = [b - a for a, b in zip([0.0, *repeats], repeats, strict=False)]
    assert gaps[0] == pytest.approx(timing.RESEND_FIRST, abs=0.02)
    assert max(gaps) == pytest.approx(timing.RESEND_MOST, abs=0.02)
    assert all(b >= a - 0.02 for a, b in itertools.pairwise(gaps))
    assert not watches.repeat("x", 2, now)
    assert not watches.repeat("x", 2, now + timing.RESEND_FIRST / 2)
    assert watches.repeat("x", 2, now + timing.RESEND_FIRST)


def test_ages_periods_and_what_is_over() -> None:
    watches = Watches()
    assert watches.age("a", 10.0) == 0
    assert watches.age("a", 12.5) == 2.5
    beats = [watches.every("beat", 1.0, now) for now in (0.0, 0.5, 1.0, 1.5, 2.0, 3.9)]
    assert beats == [False, False, True, False, True, True]
    watches.keep_only({"a"})
    assert set(watches.items) == {"a"}
    assert watches.age("beat", 20.0) == 0


def test_the_pause_after_a_bump_doubles_up_to_a_bound() -> None:
    pauses = [bump_pause(bumps) for bumps in range(1, 100)]
    assert pauses[0] == timing.BUMP_PAUSE_FIRST
    assert pauses[1] == 2 * pauses[0]
    assert pauses == sorted(pauses)
    assert pauses[-1] == timing.BUMP_PAUSE_MOST
    assert bump_pause(0) == timing.BUMP_PAUSE_FIRST
    assert bump_pause(5000) == timing.BUMP_PAUSE_MOST


def test_a_trouble_that_lasts_is_told_at_once_and_then_now_and_again_with_how_often() -> None:
    troubles, again = Troubles(), timing.LOG_AGAIN_SECONDS
    assert troubles.worth_telling("a", 10.0) == ""
    assert troubles.worth_telling("b", 10.5) == ""
    assert [troubles.worth_telling("a", 10.0 + k * again / 4) for k in range(1, 4)] == [None] * 3
    assert troubles.worth_telling("a", 10.0 + again) == " (4 times in 60 s)"
    assert troubles.worth_telling("a", 11.0 + again) is None
    assert troubles.worth_telling("a", 20.0 + 3 * again) == " (2 times in 130 s)"
    assert troubles.worth_telling("b", 20.0 + 3 * again) == ""  # it was met once, and long ago


def test_troubles_without_end_are_not_all_kept() -> None:
    troubles = Troubles()
    for k in range(3 * timing.MOST_TROUBLES):
        assert troubles.worth_telling(f"block {k}", 1.0) == ""
        assert troubles.worth_telling("the same", 1.0) == ("" if k == 0 else None)
    assert len(troubles.met) == timing.MOST_TROUBLES


@given(st.integers(0, 4_000_000_000_000_000_000), st.integers(1000, 10**18), st.integers(0, 4095), st.integers(0, 4095))
def test_a_later_start_has_a_larger_incarnation(at: int, later: int, one: int, other: int) -> None:
    first, second = new_incarnation(at, one), new_incarnation(min(at + later, 4_500_000_000_000_000_000), other)
    assert 0 <= first < second < 1 << 63


# ---------------------------------------------------------------- the rounds that callers see


def test_rounds_are_reported_when_they_have_wholly_arrived() -> None:
    log = RoundLog()
    log.granted([0, 1])
    log.granted([2])
    log.arrived(2, 0)
    assert log.finished(10, 25) == (Round(0, 20, 5, 1),)
    log.arrived(0, 10)
    assert log.watermarks == [0]
    log.arrived(1, 25)
    assert log.finished(10, 25) == (Round(0, 0, 20, 2), Round(1, 20, 5, 1))
    assert log.watermarks == [0, 25]


def test_what_was_taken_back_counts_in_the_round_that_brought_it() -> None:
    log = RoundLog()
    log.granted([0, 1, 2])
    log.arrived(0, 10)
    log.taken_back(1, 10)
    log.taken_back(2, 10)
    log.granted([1, 2])
    log.taken_back(1, 10)
    log.taken_back(2, 10)  # a round of which nothing arrived
    log.granted([1, 2])
    log.arrived(1, 20)
    log.arrived(2, 30)
    assert log.finished(10, 30) == (Round(0, 0, 10, 1), Round(1, 10, 20, 2))
    assert log.watermarks == [10, 30]


def test_what_was_never_granted_or_settled_before_changes_nothing() -> None:
    log = RoundLog()
    log.arrived(5, 0)
    log.taken_back(5, 0)
    log.granted([0])
    log.arrived(0, 10)
    log.arrived(0, 10)
    assert log.finished(10, 10) == (Round(0, 0, 10, 1),)
    assert log.watermarks == [10]


@given(st.integers(1, 9), st.integers(1, 20), st.randoms(use_true_random=False))
def test_the_rounds_add_up_to_the_transfer(block_size: int, blocks: int, chance: Random) -> None:
    total = chance.randint((blocks - 1) * block_size + 1, blocks * block_size)
    log, have, missing = RoundLog(), set[int](), list(range(blocks))
    while missing:
        grant = missing[: chance.randint(1, len(missing))]
        log.granted(grant)
        for index in chance.sample(grant, len(grant)):
            if chance.random() < 0.5:
                have.add(index)
                log.arrived(index, 0)
            else:
                log.taken_back(index, 0)
        missing = [index for index in range(blocks) if index not in have]
    rounds = log.finished(block_size, total)
    assert sum(r.tokens for r in rounds) == total
    assert sum(r.blocks for r in rounds) == blocks
    assert [r.round for r in rounds] == list(range(len(rounds)))
    assert len(log.watermarks) == len(rounds)
