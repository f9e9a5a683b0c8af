"""The log of rounds that callers see: which grant carried what, and the watermark after each. Reporting only: no
decision is made from it, so that it is no part of a machine's state."""

from __future__ import annotations

from typing import NamedTuple


class Round(NamedTuple):
    """One grant whose blocks have all arrived (or were taken back). `start` and `tokens` in tokens."""

    round: int
    start: int
    tokens: int
    blocks: int


class RoundLog:
    def __init__(self) -> None:
        self._of: dict[int, int] = {}  # index -> round, while the block is on its way
        self._rounds: dict[int, list[int]] = {}  # round -> [first index, still on the way, arrived, last index]
        self._next = 0
        self.watermarks: list[int] = []  # sent_tokens after each finished round

    def granted(self, indices: list[int]) -> None:
        number = self._next
        self._next += 1
        self._rounds[number] = [indices[0], len(indices), 0, -1]
        self._of.update(dict.fromkeys(indices, number))

    def taken_back(self, index: int, watermark: int) -> None:
        self._settle(index, watermark, arrived=False)

    def arrived(self, index: int, watermark: int) -> None:
        self._settle(index, watermark, arrived=True)

    def _settle(self, index: int, watermark: int, *, arrived: bool) -> None:
        number = self._of.pop(index, None)
        entry = self._rounds.get(number) if number is not None else None
        if number is None or entry is None:
            return
        if arrived:
            entry[2] += 1
            entry[3] = max(entry[3], index)
        if entry[1] == 1:
            if entry[2]:
                self.watermarks.append(watermark)
            else:
                del self._rounds[number]
        entry[1] -= 1

    def finished(self, block_size: int, total: int) -> tuple[Round, ...]:
        """The finished rounds in order, renumbered from 0 without the ones that were wholly taken back."""
        rounds: list[Round] = []
        for first, pending, arrived, last in list(self._rounds.values()):  # another thread may be reading
            if pending or not arrived:
                continue
            tail = max(0, (last + 1) * block_size - total)
            rounds.append(Round(len(rounds), first * block_size, arrived * block_size - tail, arrived))
        return tuple(rounds)
