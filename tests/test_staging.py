"""Staging: what is taken never overlaps, what is given back can be taken again, and nobody waits for ever."""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_kit import PlainTransport, RegisteringTransport

from tensorferry.core.errors import BadCall, ConfigError
from tensorferry.core.layout import SlabPlan, embedding_layout
from tensorferry.core.memory import Memory
from tensorferry.core.staging import ALIGNMENT, MOST_ARENAS, Stage, Staging
from tensorferry.core.transport import Region


def taken(staging: Staging, nbytes: int) -> Stage:
    stage = staging.take(nbytes)
    assert stage is not None
    return stage


def test_plain_memory_serves_where_sources_need_no_registration() -> None:
    transport = PlainTransport()
    stage = taken(Staging(transport, 4096), 100)
    assert isinstance(stage.local, Memory)
    assert not stage.holds_rows
    assert transport.registered == 0


def test_memory_is_registered_once_where_sources_need_it() -> None:
    transport = RegisteringTransport()
    staging = Staging(transport, 4096)
    stages = [taken(staging, 100) for _ in range(3)]
    assert all(isinstance(stage.local, Region) and stage.holds_rows for stage in stages)
    assert transport.registered == 1
    staging.close()
    staging.close()
    assert len(transport.retired) == 1


@pytest.mark.parametrize("nbytes", [-1, 0, 63])
def test_staging_that_holds_nothing_is_refused(nbytes: int) -> None:
    with pytest.raises(ConfigError, match="holds nothing"):
        Staging(PlainTransport(), nbytes)


def test_more_than_all_of_it_is_refused_at_once_instead_of_never_served() -> None:
    staging = Staging(PlainTransport(), 1000)
    assert staging.max_take == 960
    with pytest.raises(ConfigError, match="961 bytes never fit into staging of 960"):
        staging.take(961)
    staging.give(taken(staging, 960))


@pytest.mark.parametrize("nbytes", [0, -5])
def test_nothing_cannot_be_taken(nbytes: int) -> None:
    with pytest.raises(BadCall):
        Staging(PlainTransport(), 1000).take(nbytes)


def test_none_says_not_now_and_a_return_changes_that() -> None:
    staging = Staging(PlainTransport(), 256)
    first = taken(staging, 200)
    assert staging.take(1) is None
    staging.give(first)
    assert staging.free_bytes == 256
    assert taken(staging, 256).offset == 0


def test_giving_back_twice_raises_and_changes_nothing() -> None:
    staging = Staging(PlainTransport(), 256)
    first = taken(staging, 64)
    staging.give(first)
    second = taken(staging, 64)
    assert (second.offset, second.nbytes) == (first.offset, first.nbytes)
    with pytest.raises(BadCall, match="is not taken"):
        staging.give(first)  # the same place is somebody else's now
    assert staging.free_bytes == 192
    staging.give(second)
    with pytest.raises(BadCall, match="is not taken"):
        staging.give(second)


def test_a_stage_of_another_staging_is_refused() -> None:
    one, other = Staging(PlainTransport(), 256), Staging(PlainTransport(), 256)
    taken(other, 64)
    with pytest.raises(BadCall, match="another's"):
        other.give(taken(one, 64))


def test_nothing_is_taken_after_close_and_what_is_out_stays_readable() -> None:
    staging = Staging(RegisteringTransport(), 256)
    stage = taken(staging, 64)
    stage.view()[:] = b"x" * 64
    staging.close()
    with pytest.raises(BadCall, match="closed"):
        staging.take(1)
    view = stage.view()
    del staging, stage
    assert bytes(view) == b"x" * 64


@given(
    nbytes=st.integers(64, 5000),
    wishes=st.lists(st.integers(1, 3000), max_size=40),
    order=st.randoms(use_true_random=False),
)
def test_whatever_came_before_everything_given_back_is_one_piece_again(
    nbytes: int, wishes: list[int], order: Random
) -> None:
    staging = Staging(PlainTransport(), nbytes)
    out: list[Stage] = []
    for wish in wishes:
        if wish > staging.max_take:
            continue
        stage = staging.take(wish)
        if stage is None and out:
            staging.give(out.pop(order.randrange(len(out))))
        elif stage is not None:
            out.append(stage)
        places = sorted((s.offset, s.offset + s.nbytes) for s in out)
        assert all(a_stop <= b_start for (_, a_stop), (b_start, _) in pairwise(places))
        assert all(start % ALIGNMENT == 0 and stop <= staging.max_take for start, stop in places)
    order.shuffle(out)
    for stage in out:
        staging.give(stage)
    assert staging.free_bytes == staging.max_take
    taken(staging, staging.max_take)


@given(
    wishes=st.lists(st.integers(1, 1024), min_size=1, max_size=60),
    order=st.randoms(use_true_random=False),
)
def test_first_in_first_out_serves_every_wish(wishes: list[int], order: Random) -> None:
    staging = Staging(PlainTransport(), 1024)
    waiting, out, served = deque(wishes), [], 0
    while waiting:
        stage = staging.take(waiting[0])
        if stage is not None:
            waiting.popleft()
            out.append(stage)
            served += 1
            continue
        assert out, "a wish waits although nothing is taken"
        staging.give(out.pop(order.randrange(len(out))))
    assert served == len(wishes)


# ---- how many blocks a stage holds ---------------------------------------------------------------------------

LAYOUT = embedding_layout(3584)
PLAN = SlabPlan(LAYOUT, 128, 8)


def test_a_run_is_as_long_as_staging_and_slab_allow() -> None:
    names = LAYOUT.names
    assert Staging(PlainTransport(), 1 << 20).max_blocks(PLAN, names) == 8  # packed rows alone are staged
    assert Staging(PlainTransport(), PLAN.packed_stride * 3).max_blocks(PLAN, names) == 3
    one = PLAN.stage_bytes(names, 1, rows=True)
    assert Staging(RegisteringTransport(), 2 * one).max_blocks(PLAN, names) == 2


def test_staging_for_less_than_one_block_is_refused_at_plan_time() -> None:
    with pytest.raises(ConfigError, match="smaller than one block, which needs"):
        Staging(RegisteringTransport(), 100_000).max_blocks(PLAN, LAYOUT.names)


def test_what_is_not_packed_needs_no_staging_where_it_is_read_in_place() -> None:
    assert Staging(PlainTransport(), 64).max_blocks(PLAN, ("input_embeds",)) == 8
    with pytest.raises(ConfigError):
        Staging(PlainTransport(), 64).max_blocks(PLAN, ("fill_ids", "input_embeds"))


@given(st.integers(64, 200_000), st.integers(1, 12), st.booleans())
def test_the_longest_run_fits_and_one_more_block_would_not(nbytes: int, blocks: int, registering: bool) -> None:
    plan = SlabPlan(embedding_layout(40), 7, blocks)
    staging = Staging(RegisteringTransport() if registering else PlainTransport(), nbytes)
    names = plan.layout.names
    try:
        count = staging.max_blocks(plan, names)
    except ConfigError:
        count = 0
    if count:
        taken(staging, plan.stage_bytes(names, count, rows=registering))
    assert count <= blocks
    if count < blocks:
        assert plan.stage_bytes(names, count + 1, rows=registering) > staging.max_take


# ---- writes whose outcome nobody knows -----------------------------------------------------------------------


def test_stages_of_lost_writes_do_not_stop_the_others() -> None:
    transport = RegisteringTransport()
    staging = Staging(transport, 1024)
    lost = [taken(staging, 256) for _ in range(3)]
    living = taken(staging, 256)
    for stage in lost:
        staging.strand(stage)
    assert transport.registered == 2
    whole = taken(staging, 1024)
    assert whole.local is not living.local
    staging.give(living)
    assert not transport.retired  # three lost writes may still read it
    for stage in lost:
        staging.give(stage)
    assert [region.memory for region in transport.retired] == [lost[0].memory]
    staging.give(whole)
    assert staging.taken_bytes == 0
    staging.close()
    assert len(transport.retired) == 2


def test_one_lost_write_of_many_costs_no_fresh_memory() -> None:
    transport = RegisteringTransport()
    staging = Staging(transport, 1024)
    staging.strand(taken(staging, 512))
    assert transport.registered == 1
    assert staging.take(1024) is None
    assert staging.take(512) is not None


def test_what_lost_writes_can_hold_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    transport = RegisteringTransport()
    staging = Staging(transport, 1024)
    lost = []
    for _ in range(MOST_ARENAS):
        lost.append(taken(staging, 1024))
        staging.strand(lost[-1])
    assert transport.registered == MOST_ARENAS
    assert staging.take(64) is None
    assert "hold 3 times the staging" in caplog.text
    staging.give(lost[-1])
    assert staging.take(1024) is not None


def test_without_fresh_memory_writes_wait_for_the_lost_ones(caplog: pytest.LogCaptureFixture) -> None:
    transport = RegisteringTransport()
    staging = Staging(transport, 1024)
    lost = taken(staging, 1024)
    staging._transport = refusing = PlainTransport()
    refusing.allocate = no_memory  # type: ignore[method-assign]
    staging.strand(lost)
    assert "no fresh staging" in caplog.text
    assert staging.take(64) is None
    staging.give(lost)
    assert staging.take(1024) is not None


def no_memory(nbytes: int, kind: str = "cpu") -> Memory:
    raise OSError("no memory")


def test_a_stage_that_is_back_cannot_be_stranded() -> None:
    staging = Staging(PlainTransport(), 1024)
    stage = taken(staging, 64)
    staging.give(stage)
    with pytest.raises(BadCall):
        staging.strand(stage)
