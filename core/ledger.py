"""Sets of block indices as sorted ranges: what is posted, what is here, and the prefix that is `sent_tokens`.

A transfer mostly proceeds in order, so that a set of ten thousand indices is one range. Every operation is bounded by
the number of ranges, not of indices.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class Ranges:
    """A set of integers >= 0, kept as disjoint, sorted, non-adjacent half-open ranges."""

    __slots__ = ("_starts", "_stops")

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        for start, stop in ranges:
            self.add(start, stop)

    def __contains__(self, n: int) -> bool:
        at = bisect_right(self._starts, n) - 1
        return at >= 0 and n < self._stops[at]

    def __len__(self) -> int:
        return sum(self._stops) - sum(self._starts)

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __iter__(self) -> Iterator[int]:
        for start, stop in self.ranges():
            yield from range(start, stop)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranges) and self.ranges() == other.ranges()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Ranges({self.ranges()})"

    @property
    def pieces(self) -> int:
        """How many ranges: what the set costs."""
        return len(self._starts)

    def ranges(self) -> tuple[tuple[int, int], ...]:
        """The canonical form: ((start, stop), ...)."""
        return tuple(zip(self._starts, self._stops, strict=True))

    def add(self, start: int, stop: int | None = None) -> None:
        """Put in [start, stop), or one number."""
        stop = start + 1 if stop is None else stop
        if start >= stop:
            return
        first = bisect_left(self._stops, start)
        last = bisect_right(self._starts, stop)
        if first < last:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    def discard(self, start: int, stop: int | None = None) -> None:
        """Take out [start, stop), or one number, as far as it is in."""
        stop = start + 1 if stop is None else stop
        first = bisect_right(self._stops, start)
        last = bisect_left(self._starts, stop)
        if first >= last or start >= stop:
            return
        keep = [(self._starts[first], start), (stop, self._stops[last - 1])]
        keep = [(a, b) for a, b in keep if a < b]
        self._starts[first:last] = [a for a, _ in keep]
        self._stops[first:last] = [b for _, b in keep]

    @property
    def prefix(self) -> int:
        """How far the set reaches from 0 without a gap."""
        return self._stops[0] if self._starts and self._starts[0] == 0 else 0

    def missing(self, stop: int, most: int) -> list[int]:
        """The first `most` numbers of [0, stop) that are not in the set."""
        found: list[int] = []
        at = 0
        for start, end in [*self.ranges(), (stop, stop)]:
            found.extend(range(at, min(start, stop, at + most - len(found))))
            if len(found) >= most or end >= stop:
                break
            at = end
        return found


def runs_of(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """(first, count) for each maximal run of consecutive numbers, in the order given."""
    runs: list[tuple[int, int]] = []
    for n in numbers:
        if runs and n == runs[-1][0] + runs[-1][1]:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((n, 1))
    return runs
