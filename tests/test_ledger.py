"""Ranges is a set of integers: every operation is compared with Python's own set."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from tensorferry.core.ledger import Ranges, runs_of

SPAN = st.tuples(st.integers(0, 40), st.integers(0, 12)).map(lambda pair: (pair[0], pair[0] + pair[1]))
EDITS = st.lists(st.tuples(st.sampled_from(["add", "discard"]), SPAN), max_size=30)


def build(edits: list[tuple[str, tuple[int, int]]]) -> tuple[Ranges, set[int]]:
    ranges, model = Ranges(), set[int]()
    for name, (start, stop) in edits:
        getattr(ranges, name)(start, stop)
        (model.update if name == "add" else model.difference_update)(range(start, stop))
    return ranges, model


@given(EDITS)
def test_ranges_are_a_set(edits: list[tuple[str, tuple[int, int]]]) -> None:
    ranges, model = build(edits)
    assert list(ranges) == sorted(model)
    assert len(ranges) == len(model)
    assert bool(ranges) == bool(model)
    assert [n for n in range(60) if n in ranges] == sorted(model)
    assert -1 not in ranges


@given(EDITS)
def test_ranges_are_canonical(edits: list[tuple[str, tuple[int, int]]]) -> None:
    """One set, one form: disjoint, sorted, not empty, not adjacent; else snapshots of equal states would differ."""
    ranges, model = build(edits)
    rows = ranges.ranges()
    assert ranges.pieces == len(rows)
    assert all(start < stop for start, stop in rows)
    assert all(one[1] < other[0] for one, other in itertools.pairwise(rows))
    assert ranges == Ranges((n, n + 1) for n in sorted(model, reverse=True))
    assert rows == tuple((first, first + count) for first, count in runs_of(sorted(model)))


@given(EDITS, st.integers(0, 60), st.integers(0, 60))
def test_prefix_and_missing(edits: list[tuple[str, tuple[int, int]]], stop: int, most: int) -> None:
    ranges, model = build(edits)
    assert ranges.prefix == next(n for n in range(100) if n not in model)
    assert ranges.missing(stop, most) == [n for n in range(stop) if n not in model][:most]


@given(EDITS, st.integers(0, 50))
def test_one_number_is_a_range_of_one(edits: list[tuple[str, tuple[int, int]]], n: int) -> None:
    ranges, model = build(edits)
    ranges.add(n)
    assert set(ranges) == model | {n}
    ranges.discard(n)
    assert set(ranges) == model - {n}


def test_an_empty_range_changes_nothing() -> None:
    ranges = Ranges([(3, 5)])
    for start, stop in ((4, 4), (9, 2), (0, 0)):
        ranges.add(start, stop)
        ranges.discard(start, stop)
    assert ranges.ranges() == ((3, 5),)


def test_a_transfer_in_order_is_one_range() -> None:
    ranges = Ranges()
    for n in range(10_000):
        ranges.add(n)
    assert ranges.ranges() == ((0, 10_000),)


def test_ranges_equal_nothing_else_and_have_no_hash() -> None:
    assert Ranges([(0, 1)]) != ((0, 1),)
    assert Ranges.__hash__ is None
    assert repr(Ranges([(0, 2)])) == "Ranges(((0, 2),))"


@given(st.lists(st.integers(0, 20), max_size=20))
def test_runs_keep_the_order(numbers: list[int]) -> None:
    runs = runs_of(numbers)
    assert [first + k for first, count in runs for k in range(count)] == numbers
    assert all(one[0] + one[1] != other[0] for one, other in itertools.pairwise(runs))
