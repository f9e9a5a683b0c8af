"""The pool: GR-1 to GR-4, the three proofs that end a quarantine, slabs that are replaced, and the choice of blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tensorferry.core.allocator import BlockPool, Tenant, lowest_runs
from tensorferry.core.errors import InternalError


def tenants(n: int, *, xfer: int = 1, sender: int = 5, epoch: int = 1) -> list[Tenant]:
    return [Tenant(xfer, sender, epoch, index) for index in range(n)]


def granted(pool: BlockPool, n: int, **who: int) -> list[tuple[int, Tenant]]:
    wanted = tenants(n, **who)
    return list(zip(pool.grant(wanted), wanted, strict=True))


def quarantined(pool: BlockPool, n: int, **who: int) -> list[tuple[int, Tenant]]:
    held = granted(pool, n, **who)
    for block, tenant in held:
        pool.quarantine(block, tenant)
    return held


# ---------------------------------------------------------------- GR-4: a tenant frees its block once


def test_a_block_is_freed_by_its_tenant_once() -> None:
    pool = BlockPool(4)
    (block, tenant), *_ = granted(pool, 2)
    pool.free(block, tenant)
    before = pool.snapshot()
    with pytest.raises(InternalError, match="not granted"):
        pool.free(block, tenant)
    with pytest.raises(InternalError, match="not granted"):
        pool.quarantine(block, tenant)
    assert pool.snapshot() == before
    assert pool.free_count == 3
    pool.audit()


def test_nobody_frees_the_block_of_another() -> None:
    pool = BlockPool(1)
    (block, old) = granted(pool, 1)[0]
    pool.free(block, old)
    (again, new) = granted(pool, 1, epoch=2)[0]
    assert again == block  # the same number again: it is the tenant that counts (ID-4)
    for act in (pool.free, pool.quarantine):
        with pytest.raises(InternalError):
            act(block, old)
    assert pool.granted == {block: new}


def test_more_than_is_free_is_refused_and_changes_nothing() -> None:
    pool = BlockPool(3)
    granted(pool, 2)
    before = pool.snapshot()
    with pytest.raises(InternalError, match="2 blocks asked of 1"):
        pool.grant(tenants(2, xfer=2))
    assert pool.snapshot() == before
    pool.audit()


@pytest.mark.parametrize(
    "choose",
    [
        pytest.param(lambda pieces, n: [0] * n, id="one block twice"),
        pytest.param(lambda pieces, n: [2, 3][:n], id="a block that is granted"),
        pytest.param(lambda pieces, n: [8, 9][:n], id="beyond the pool"),
        pytest.param(lambda pieces, n: [0], id="too few"),
        pytest.param(lambda pieces, n: [0, 1, 4], id="too many"),
    ],
)
def test_a_choice_that_is_not_free_is_refused_and_changes_nothing(
    choose: Callable[[list[tuple[int, int]], int], list[int]],
) -> None:
    pool = BlockPool(8, choose=lambda pieces, n: [2, 3])
    granted(pool, 2)
    pool.choose = choose
    before = pool.snapshot()
    with pytest.raises(InternalError):
        pool.grant(tenants(2, xfer=2))
    assert pool.snapshot() == before
    pool.audit()


# ---------------------------------------------------------------- GR-2, GR-3: out of quarantine by a proof alone


def test_a_fence_frees_its_own_transfer_sender_and_epochs() -> None:
    pool = BlockPool(8)
    quarantined(pool, 1, xfer=1, sender=5, epoch=1)
    quarantined(pool, 1, xfer=1, sender=5, epoch=2)
    quarantined(pool, 1, xfer=1, sender=6, epoch=1)
    quarantined(pool, 1, xfer=2, sender=5, epoch=1)
    held = granted(pool, 1, xfer=1, sender=5, epoch=1)
    assert pool.fenced(1, 5, 1) == 1
    assert pool.fenced(1, 5, 1) == 0
    left = sorted(pool.quarantined.values())
    assert left == [Tenant(1, 5, 2, 0), Tenant(1, 6, 1, 0), Tenant(2, 5, 1, 0)]
    assert dict(held) == pool.granted  # what is granted is not in quarantine: no fence frees it
    pool.audit()


def test_a_death_frees_what_that_incarnation_could_write_to() -> None:
    pool = BlockPool(8)
    quarantined(pool, 2, xfer=1, sender=5)
    quarantined(pool, 2, xfer=2, sender=5, epoch=9)
    quarantined(pool, 1, xfer=1, sender=6)
    held = granted(pool, 1, xfer=3, sender=5)
    assert pool.gone(5) == 4
    assert [t.sender for t in pool.quarantined.values()] == [6]
    assert dict(held) == pool.granted
    pool.audit()


def test_the_transitions_are_all_there_are() -> None:
    """A quarantined block is not granted, not freed and not found by any grant."""
    pool = BlockPool(2)
    (block, tenant), *_ = quarantined(pool, 2)
    assert pool.free_count == pool.grantable == 0
    with pytest.raises(InternalError):
        pool.free(block, tenant)
    with pytest.raises(InternalError):
        pool.quarantine(block, tenant)
    with pytest.raises(InternalError):
        pool.grant(tenants(1, xfer=2))


# ---------------------------------------------------------------- slabs


def test_a_retiring_slab_gives_nothing_and_takes_its_blocks_back() -> None:
    pool = BlockPool(8, 4)
    held = granted(pool, 2)  # in slab 0
    late = quarantined(pool, 1, xfer=2)
    pool.retire(0)
    assert pool.free_count == 5
    assert pool.grantable == 4
    assert all(pool.slab_of(block) == 1 for block, _ in granted(pool, 4, xfer=3))
    assert pool.replaceable() == []  # two of its blocks are granted still
    with pytest.raises(InternalError):
        pool.replace(0)
    for block, tenant in held:
        pool.free(block, tenant)
    assert pool.replaceable() == [0]
    assert pool.replace(0) == [tenant for _, tenant in late]
    assert pool.replaceable() == []
    assert pool.grantable == 4
    pool.audit()


def test_replacing_says_who_may_still_write_to_the_old_memory_block_by_block() -> None:
    pool = BlockPool(8, 4)
    quarantined(pool, 3, xfer=1, sender=5)
    quarantined(pool, 4, xfer=2, sender=6)  # in slab 1
    quarantined(pool, 1, xfer=3, sender=7)
    pool.retire(0)
    assert sorted(t.sender for t in pool.replace(0)) == [5, 5, 5, 7]
    assert sorted(t.sender for t in pool.quarantined.values()) == [6] * 4
    with pytest.raises(InternalError):
        pool.replace(0)  # once
    with pytest.raises(InternalError):
        pool.replace(1)  # not retired


def test_the_last_slab_may_be_shorter() -> None:
    pool = BlockPool(10, 4)
    assert pool.slabs == 3
    assert [pool.slab_of(block) for block in range(10)] == [0] * 4 + [1] * 4 + [2] * 2
    pool.retire(2)
    assert pool.grantable == 8


# ---------------------------------------------------------------- which blocks (R12)


@pytest.mark.parametrize(
    ("pieces", "n", "chosen"),
    [
        ([(0, 2), (4, 7), (10, 20)], 3, [4, 5, 6]),  # the smallest piece that holds all
        ([(0, 4), (8, 12)], 2, [0, 1]),  # the lowest of equals
        ([(0, 2), (4, 7)], 4, [4, 5, 6, 0]),  # none holds all: the largest first
        ([(3, 4)], 1, [3]),
        ([], 0, []),
        ([(1, 9)], 0, []),
    ],
)
def test_runs_are_kept_together(pieces: list[tuple[int, int]], n: int, chosen: list[int]) -> None:
    assert lowest_runs(pieces, n) == chosen


def test_a_run_stays_inside_one_slab_if_one_has_room() -> None:
    pool = BlockPool(12, 4)
    granted(pool, 2)
    assert pool.grant(tenants(4, xfer=2)) == [4, 5, 6, 7]
    assert pool.grant(tenants(2, xfer=3)) == [2, 3]


# ---------------------------------------------------------------- audit


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda pool: pool.granted.pop(0), id="lost"),
        pytest.param(lambda pool: pool._free.add(0), id="free and granted"),
        pytest.param(lambda pool: pool.quarantined.update({1: pool.granted[1]}), id="granted and in quarantine"),
        pytest.param(lambda pool: pool.granted.update({0: pool.granted[1]}), id="one tenant, two blocks"),
        pytest.param(lambda pool: pool._free.add(99), id="beyond the pool"),
    ],
)
def test_the_audit_sees_wrong_books(damage: Callable[[BlockPool], object]) -> None:
    pool = BlockPool(4)
    granted(pool, 2)
    pool.audit()
    damage(pool)
    with pytest.raises(InternalError):
        pool.audit()


# ---------------------------------------------------------------- any history at all

BLOCKS, PER_SLAB = 11, 4


class PoolHistory(RuleBasedStateMachine):
    """Against a model that keeps, for each block, its state in one word: GR-1 cannot be broken in it."""

    def __init__(self) -> None:
        super().__init__()
        self.serial = 0

    @initialize(seed=st.randoms(use_true_random=False))
    def start(self, seed) -> None:  # type: ignore[no-untyped-def]
        def choose(pieces: list[tuple[int, int]], n: int) -> list[int]:
            return seed.sample([block for start, stop in pieces for block in range(start, stop)], n)

        self.pool = BlockPool(BLOCKS, PER_SLAB, choose if seed.random() < 0.5 else lowest_runs)
        self.state: dict[int, tuple[str, Tenant | None]] = dict.fromkeys(range(BLOCKS), ("free", None))

    def of(self, state: str) -> list[tuple[int, Tenant]]:
        return [(block, tenant) for block, (s, tenant) in sorted(self.state.items()) if s == state and tenant]

    @rule(n=st.integers(0, BLOCKS), xfer=st.integers(1, 3), sender=st.integers(1, 2), epoch=st.integers(1, 3))
    def grant(self, n: int, xfer: int, sender: int, epoch: int) -> None:
        wanted = [Tenant(xfer, sender, epoch, self.serial + k) for k in range(n)]
        self.serial += n
        live = [b for b, (s, _) in self.state.items() if s == "free" and b // PER_SLAB not in self.pool.retiring]
        if n > len(live):
            with pytest.raises(InternalError):
                self.pool.grant(wanted)
            return
        blocks = self.pool.grant(wanted)
        assert len(blocks) == len(set(blocks)) == n
        assert set(blocks) <= set(live)
        self.state.update((block, ("granted", tenant)) for block, tenant in zip(blocks, wanted, strict=True))

    @precondition(lambda self: self.of("granted"))
    @rule(data=st.data(), quarantine=st.booleans())
    def give_back(self, data: st.DataObject, quarantine: bool) -> None:
        block, tenant = data.draw(st.sampled_from(self.of("granted")))
        (self.pool.quarantine if quarantine else self.pool.free)(block, tenant)
        self.state[block] = ("quarantined", tenant) if quarantine else ("free", None)

    @rule(block=st.integers(-1, BLOCKS), xfer=st.integers(1, 3), at=st.integers(0, 5), quarantine=st.booleans())
    def a_stranger(self, block: int, xfer: int, at: int, quarantine: bool) -> None:
        stranger = Tenant(xfer, 77, 1, at)
        with pytest.raises(InternalError):
            (self.pool.quarantine if quarantine else self.pool.free)(block, stranger)

    def proved(self, what: Callable[[Tenant], bool]) -> int:
        freed = [block for block, tenant in self.of("quarantined") if what(tenant)]
        self.state.update((block, ("free", None)) for block in freed)
        return len(freed)

    @rule(xfer=st.integers(1, 3), sender=st.integers(1, 2), upto=st.integers(0, 4))
    def fence(self, xfer: int, sender: int, upto: int) -> None:
        freed = self.pool.fenced(xfer, sender, upto)
        assert freed == self.proved(lambda t: (t.xfer, t.sender) == (xfer, sender) and t.epoch <= upto)

    @rule(sender=st.integers(1, 2))
    def death(self, sender: int) -> None:
        assert self.pool.gone(sender) == self.proved(lambda t: t.sender == sender)

    @rule(slab=st.integers(0, 2))
    def retire(self, slab: int) -> None:
        self.pool.retire(slab)

    @rule()
    def replace_all(self) -> None:
        for slab in self.pool.replaceable():
            late = [t for block, t in self.of("quarantined") if block // PER_SLAB == slab]
            assert self.pool.replace(slab) == late
            for block, _ in self.of("quarantined"):
                if block // PER_SLAB == slab:
                    self.state[block] = ("free", None)

    @rule()
    def travel_in_time(self) -> None:
        pool = BlockPool(BLOCKS, PER_SLAB, self.pool.choose)
        pool.restore(self.pool.snapshot())
        assert pool.snapshot() == self.pool.snapshot()
        assert (pool.free_count, pool.grantable) == (self.pool.free_count, self.pool.grantable)
        self.pool = pool

    @invariant()
    def books(self) -> None:
        if hasattr(self, "pool"):
            self.pool.audit()
            assert self.pool.granted == dict(self.of("granted"))
            assert self.pool.quarantined == dict(self.of("quarantined"))
            assert self.pool.free_count == sum(s == "free" for s, _ in self.state.values())


TestPoolHistory = PoolHistory.TestCase
