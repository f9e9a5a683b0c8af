"""The pool's story: every block is FREE, GRANTED to one tenant, or QUARANTINED until a proof arrives.

    FREE --grant--> GRANTED --free (the write is drained and the rows are copied out)--> FREE           GR-1, GR-2
                    GRANTED --quarantine (anything else)--> QUARANTINED                                 GR-2
                    QUARANTINED --fenced, gone, replace (proofs F2, F4, F3)--> FREE                      GR-3

No timer, lease or retry count appears here. A block is freed by showing the tenant that it was granted to; a second
use of the same tenant raises and changes nothing (GR-4). Block numbers have no meaning in the protocol: a tenant is
named by (xfer, sender incarnation, epoch, index), so that handing out the same numbers again confuses nobody (ID-4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from tensorferry.core.errors import InternalError
from tensorferry.core.ledger import Ranges

Snapshot = tuple[Any, ...]


class Tenant(NamedTuple):
    """To whom a block is granted. Unique for ever within one receiver incarnation."""

    xfer: int
    sender: int
    epoch: int
    at: int  # the block's index in the transfer


Choose = Callable[[list[tuple[int, int]], int], list[int]]
"""Picks `n` blocks out of free (start, stop) pieces, each inside one slab. A policy: the protocol does not care."""


def lowest_runs(pieces: list[tuple[int, int]], n: int) -> list[int]:
    """The smallest piece that holds all of `n`, else the largest pieces first; lowest numbers win ties (R12)."""
    fitting = [piece for piece in pieces if piece[1] - piece[0] >= n]
    if fitting:
        start = min(fitting, key=lambda piece: (piece[1] - piece[0], piece[0]))[0]
        return list(range(start, start + n))
    chosen: list[int] = []
    for start, stop in sorted(pieces, key=lambda piece: (piece[0] - piece[1], piece[0])):
        chosen.extend(range(start, min(stop, start + n - len(chosen))))
        if len(chosen) == n:
            break
    return chosen


class BlockPool:
    """`blocks` blocks in slabs of `blocks_per_slab`. A retiring slab gives no new grants until it is replaced."""

    def __init__(self, blocks: int, blocks_per_slab: int | None = None, choose: Choose = lowest_runs) -> None:
        self.blocks = blocks
        self.blocks_per_slab = blocks_per_slab or blocks
        self.choose = choose
        self.granted: dict[int, Tenant] = {}
        self.quarantined: dict[int, Tenant] = {}
        self.retiring: set[int] = set()
        self._free = Ranges([(0, blocks)])

    # ---- what there is ---------------------------------------------------------------------------------------

    @property
    def slabs(self) -> int:
        return -(-self.blocks // self.blocks_per_slab)

    @property
    def free_count(self) -> int:
        """Blocks that nothing can write to, those of retiring slabs included."""
        return len(self._free)

    @property
    def free_blocks(self) -> list[int]:
        return list(self._free)

    @property
    def grantable(self) -> int:
        return sum(stop - start for start, stop in self._pieces())

    def slab_of(self, block: int) -> int:
        return block // self.blocks_per_slab

    def _pieces(self) -> list[tuple[int, int]]:
        """Free ranges of live slabs, cut at slab borders: no run spans slabs."""
        size, pieces = self.blocks_per_slab, []
        for start, stop in self._free.ranges():
            while start < stop:
                end = min(stop, (start // size + 1) * size)
                if start // size not in self.retiring:
                    pieces.append((start, end))
                start = end
        return pieces

    # ---- FREE -> GRANTED -> FREE -------------------------------------------------------------------------------

    def grant(self, tenants: list[Tenant]) -> list[int]:
        """One block for each tenant, in order. Raises InternalError, changing nothing, if there are fewer free or if
        `choose` picked something else."""
        pieces = self._pieces()
        if sum(stop - start for start, stop in pieces) < len(tenants):
            raise InternalError(f"{len(tenants)} blocks asked of {self.grantable}")
        chosen = self.choose(pieces, len(tenants))
        free = Ranges(pieces)
        if len(chosen) != len(tenants) or len(set(chosen)) != len(chosen) or not all(block in free for block in chosen):
            raise InternalError(f"chose blocks {chosen} for {len(tenants)} tenants out of {pieces}")
        for block, tenant in zip(chosen, tenants, strict=True):
            self._free.discard(block)
            self.granted[block] = tenant
        return chosen

    def free(self, block: int, tenant: Tenant) -> None:
        """Only after the tenant's write is drained and its rows are copied out, or can never have been written."""
        if self.granted.get(block) != tenant:
            raise InternalError(f"block {block} is not granted to {tenant} but to {self.granted.get(block)}")
        del self.granted[block]
        self._free.add(block)

    # ---- GRANTED -> QUARANTINED -> FREE ------------------------------------------------------------------------

    def quarantine(self, block: int, tenant: Tenant) -> None:
        if self.granted.get(block) != tenant:
            raise InternalError(f"block {block} is not granted to {tenant} but to {self.granted.get(block)}")
        self.quarantined[block] = self.granted.pop(block)

    def fenced(self, xfer: int, sender: int, upto: int) -> int:
        """F2: that incarnation says that no write of `xfer` up to epoch `upto` is left. Blocks freed."""
        return self._release(lambda t: t.xfer == xfer and t.sender == sender and t.epoch <= upto)

    def gone(self, sender: int) -> int:
        """F4: that incarnation is proved gone. Blocks freed."""
        return self._release(lambda t: t.sender == sender)

    def retire(self, slab: int) -> None:
        """No new grants in `slab`; the blocks granted in it return as usual."""
        self.retiring.add(slab)

    def replaceable(self) -> list[int]:
        """Retiring slabs in which nothing is granted any more."""
        busy = {self.slab_of(block) for block in self.granted}
        return sorted(self.retiring - busy)

    def replace(self, slab: int) -> list[Tenant]:
        """F3: fresh memory stands behind `slab`, so that late writes land in memory that is nobody's. The tenants
        whose writes may still land in the old memory, one for each block."""
        if slab not in self.replaceable():
            raise InternalError(f"slab {slab} is not retired, or blocks in it are still granted")
        late = [tenant for block, tenant in sorted(self.quarantined.items()) if self.slab_of(block) == slab]
        for block in [b for b in self.quarantined if self.slab_of(b) == slab]:
            del self.quarantined[block]
            self._free.add(block)
        self.retiring.discard(slab)
        return late

    def _release(self, proved: Callable[[Tenant], bool]) -> int:
        blocks = [block for block, tenant in self.quarantined.items() if proved(tenant)]
        for block in blocks:
            del self.quarantined[block]
            self._free.add(block)
        return len(blocks)

    # ---- for the machine, its tests and its exploration --------------------------------------------------------

    def quarantine_of(self, xfers: Iterable[int]) -> list[Tenant]:
        wanted = set(xfers)
        return [tenant for _, tenant in sorted(self.quarantined.items()) if tenant.xfer in wanted]

    def audit(self) -> None:
        """GR-1: each block is in exactly one state. Raises InternalError."""
        everywhere = sorted([*self._free, *self.granted, *self.quarantined])
        if everywhere != list(range(self.blocks)):
            raise InternalError(f"the pool's books do not add up: {everywhere} of {self.blocks} blocks")
        for books in (self.granted, self.quarantined):
            if len(set(books.values())) != len(books):
                raise InternalError("one tenant holds two blocks")

    def snapshot(self) -> Snapshot:
        return (
            tuple(sorted(self.granted.items())),
            tuple(sorted(self.quarantined.items())),
            tuple(sorted(self.retiring)),
        )

    def restore(self, snapshot: Snapshot) -> None:
        granted, quarantined, retiring = snapshot
        self.granted = dict(granted)
        self.quarantined = dict(quarantined)
        self.retiring = set(retiring)
        self._free = Ranges([(0, self.blocks)])
        for block in [*self.granted, *self.quarantined]:
            self._free.discard(block)
