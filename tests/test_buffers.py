"""The receiver's memory: rows come out as they went in, wrong ones are noticed, and pool memory is never handed out."""

from __future__ import annotations

import gc
import weakref
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_kit import (
    PlainTransport,
    RegisteringTransport,
    geometries,
    layouts,
    presences,
    random_rows,
    same_bytes,
    write,
)

from tensorferry.core import copying
from tensorferry.core.buffers import Destination, Gathered, Graveyard, PoolBuffers, Result
from tensorferry.core.carriers import Carriers
from tensorferry.core.digest import block_seed, digest
from tensorferry.core.errors import BadCall, ConfigError, InternalError, TooLarge
from tensorferry.core.layout import AUX_WORDS, Geometry, Layout, destination_bytes, embedding_layout, slab_plan
from tensorferry.core.memory import host_memory
from tensorferry.core.source import Source
from tensorferry.core.staging import Staging

AUX = tuple(range(AUX_WORDS))
CONTENT = bytes(16)
LAYOUT = embedding_layout(64, torch.float32, deepstack_layers=2)
NAMES = ("fill_ids", "input_embeds", "mrope_positions")
GEOMETRY = Geometry(128, 8, slabs=2)


def seed(index: int, xfer: int = 1) -> int:
    return block_seed(7, xfer, CONTENT, index)


class Pair:
    """A source and a pool with nothing but memory between them."""

    def __init__(
        self,
        total: int,
        *,
        layout: Layout = LAYOUT,
        names: tuple[str, ...] = NAMES,
        geometry: Geometry = GEOMETRY,
        salt: int = 0,
        pool: PoolBuffers | None = None,
    ) -> None:
        self.total, self.names, self.geometry = total, names, geometry
        self.rows = random_rows(layout, names, total, salt)
        self.source = Source(layout, total, names)
        self.source.put(0, **self.rows)
        self.pool = pool or PoolBuffers(Carriers(PlainTransport()), layout, geometry)
        self.staging = Staging(PlainTransport(), 1 << 20)
        self.destination = Destination(layout, total, names)

    def write(self, index: int, block: int, count: int = 1) -> None:
        write(self.source, self.pool, self.staging, index, block, count)

    def intact(self, index: int, block: int, mode: str = "full") -> bool:
        """Does the digest of what lies in the block match what was sent?"""
        sent = digest(self.source.block_views(index, self.geometry.block_size), seed(index), mode)
        return self.pool.digest(block, index, self.total, self.names, seed(index), mode) == sent

    def gather(self, index: int, block: int, count: int = 1) -> Gathered:
        return self.pool.gather_run(block, index, count, self.total, self.names, self.destination)

    def arrived(self) -> bool:
        result = self.destination.result(AUX)
        return all(same_bytes(result[name], rows) for name, rows in self.rows.items())  # type: ignore[arg-type]


# ---- round trips ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", [PlainTransport, RegisteringTransport])
@given(data=st.data(), order=st.randoms(use_true_random=False))
def test_any_rows_come_out_as_they_went_in(transport: type[PlainTransport], data: st.DataObject, order: Random) -> None:
    layout = data.draw(layouts())
    names = data.draw(presences(layout))
    geometry = data.draw(geometries())
    total = data.draw(st.integers(0, 5 * geometry.block_size))
    rows = random_rows(layout, names, total, seed=total)
    source = Source(layout, total, names)
    cuts = sorted(data.draw(st.lists(st.integers(0, total), max_size=4)))
    for start, stop in zip([0, *cuts], [*cuts, total], strict=True):
        source.put(start, **{name: tensor[start:stop] for name, tensor in rows.items()})
    pool = PoolBuffers(Carriers(transport()), layout, geometry)
    staging = Staging(transport(), 2 << 20)
    destination = Destination(layout, total, names)

    # Runs of any length, in any order, each into blocks that held something else before.
    missing = list(range(geometry.blocks_for(total)))
    runs: list[tuple[int, int]] = []
    while missing:
        longest = min(len(missing), len(geometry.slab_blocks(0)))
        count = data.draw(st.integers(1, longest))
        runs.append((missing[0], count))
        del missing[:count]
    order.shuffle(runs)
    for index, count in runs:
        block = geometry.slab_blocks(order.randrange(geometry.slab_count)).start
        plan = slab_plan(layout, geometry, geometry.slab_of(block))
        count_here = min(count, staging.max_blocks(plan, names))
        for first in range(index, index + count, count_here):
            many = min(count_here, index + count - first)
            write(source, pool, staging, first, block, many)
            for k in range(many):
                sent = digest(source.block_views(first + k, geometry.block_size), seed(first + k), "full")
                assert pool.digest(block + k, first + k, total, names, seed(first + k), "full") == sent
            assert pool.gather_run(block, first, many, total, names, destination).finished()
    assert staging.free_bytes == staging.max_take

    result = destination.result(AUX)
    for name in layout.names:
        if name in names:
            assert same_bytes(result[name], rows[name])  # type: ignore[arg-type]
        else:
            assert result[name] is None


@given(total=st.integers(1, 1024), data=st.data())
def test_a_run_gathers_what_its_blocks_one_by_one_would(total: int, data: st.DataObject) -> None:
    geometry = Geometry(128, 8, slabs=1)
    pair = Pair(total, geometry=geometry)
    blocks = geometry.blocks_for(total)
    pair.write(0, 0, blocks)
    other = Destination(LAYOUT, total, NAMES)
    for index in range(blocks):
        pair.pool.gather(index, index, total, NAMES, other)
    cut = data.draw(st.integers(0, blocks))
    for first, count in ((0, cut), (cut, blocks - cut)):
        if count:
            pair.gather(first, first, count)
    one, two = pair.destination.result(AUX), other.result(AUX)
    assert all(same_bytes(one[name], two[name]) for name in NAMES)  # type: ignore[arg-type]


@settings(max_examples=20)
@given(st.integers(1, 400))
def test_a_gather_writes_its_own_rows_and_no_others(total: int) -> None:
    pair = Pair(total, geometry=Geometry(100, 8))
    for name in NAMES:
        pair.destination.view(name)[:] = b"\xa5" * len(pair.destination.view(name))
    blocks = pair.geometry.blocks_for(total)
    for index in range(blocks):
        pair.write(index, index)
    pair.gather(blocks - 1, blocks - 1)
    result = pair.destination.result(AUX)
    start = (blocks - 1) * 100
    for name in NAMES:
        tensor = result[name]
        assert tensor is not None
        assert same_bytes(tensor[start:], pair.rows[name][start:])
        assert set(bytes(tensor[:start].reshape(-1).view(torch.uint8).tolist())) <= {0xA5}


@pytest.mark.parametrize("names", [NAMES, NAMES[::-1]])
def test_the_order_in_which_components_are_named_does_not_matter(names: tuple[str, ...]) -> None:
    pair = Pair(128)
    pair.write(0, 0)
    sent = digest(pair.source.block_views(0, 128), seed(0), "full")
    assert pair.pool.digest(0, 0, 128, names, seed(0), "full") == sent
    pair.pool.gather(0, 0, 128, names, pair.destination)
    assert pair.arrived()


# ---- what a digest catches -----------------------------------------------------------------------------------

BOTH = pytest.mark.parametrize("mode", ["full", "sampled"])


@BOTH
def test_swapped_blocks_are_seen(mode: str) -> None:
    pair = Pair(1024)
    pair.write(0, 1)
    pair.write(1, 0)
    assert not pair.intact(0, 0, mode)
    assert not pair.intact(1, 1, mode)
    assert pair.intact(0, 1, mode)
    assert pair.intact(1, 0, mode)


@BOTH
def test_what_the_previous_tenant_left_is_seen(mode: str) -> None:
    before = Pair(1024, salt=1)
    before.write(0, 0)
    pair = Pair(1024, salt=2, pool=before.pool)
    assert not pair.intact(0, 0, mode)


@BOTH
def test_the_same_rows_in_another_transfers_block_are_seen(mode: str) -> None:
    pair = Pair(1024)
    pair.write(0, 0)
    sent = digest(pair.source.block_views(0, 128), seed(0, xfer=2), mode)
    assert pair.pool.digest(0, 0, 1024, NAMES, seed(0), mode) != sent


@BOTH
def test_a_block_that_is_shorter_than_it_should_be_is_seen(mode: str) -> None:
    """The sender counts another total than the receiver: the last block's rows differ in number."""
    pair = Pair(1000)
    pair.write(7, 0)
    assert pair.intact(7, 0, mode)
    sent = digest(pair.source.block_views(7, 128), seed(7), mode)
    assert pair.pool.digest(0, 7, 1001, NAMES, seed(7), mode) != sent
    assert pair.pool.digest(0, 7, 999, NAMES, seed(7), mode) != sent


@BOTH
def test_rows_shifted_by_one_token_are_seen(mode: str) -> None:
    pair = Pair(1024)
    shifted = Source(LAYOUT, 1023, NAMES)
    shifted.put(0, **{name: rows[1:] for name, rows in pair.rows.items()})
    write(shifted, pair.pool, pair.staging, 0, 0)
    assert not pair.intact(0, 0, mode)


@BOTH
def test_a_component_that_was_not_sent_is_seen(mode: str) -> None:
    pair = Pair(1024)
    pair.write(0, 0)
    less = Source(LAYOUT, 1024, ["input_embeds"])
    less.put(0, input_embeds=pair.rows["input_embeds"])
    sent = digest(less.block_views(0, 128), seed(0), mode)
    assert pair.pool.digest(0, 0, 1024, NAMES, seed(0), mode) != sent


@settings(max_examples=50)
@given(data=st.data())
@BOTH
def test_a_torn_block_is_seen(mode: str, data: st.DataObject) -> None:
    """The previous tenant's bytes shine through: one byte is enough for `full`, 4 KiB for `sampled`."""
    before = Pair(128, salt=1)
    before.write(0, 0)
    pair = Pair(128, salt=2, pool=before.pool)
    memory = pair.pool.memory(0)
    nbytes = 128 * LAYOUT["input_embeds"].token_bytes
    area = slab_plan(LAYOUT, GEOMETRY, 0).areas["input_embeds"]
    stale = bytes(memory.view(area.at(0), nbytes))
    pair.write(0, 0)
    fresh = bytes(memory.view(area.at(0), nbytes))
    length = data.draw(st.integers(4096 if mode == "sampled" else 1, nbytes))
    start = data.draw(st.integers(0, nbytes - length))
    memory.view(area.at(0) + start, length)[:] = stale[start : start + length]
    torn = stale[start : start + length] != fresh[start : start + length]
    assert pair.intact(0, 0, mode) != torn


# ---- the destination and the result --------------------------------------------------------------------------


def test_a_result_has_each_component_and_the_aux_record() -> None:
    result = Destination(LAYOUT, 5, NAMES).result(AUX)
    assert isinstance(result, Result)
    assert result.aux == AUX
    assert result.input_embeds is not None
    assert result.input_embeds.shape == (5, 64)
    assert result.input_embeds.dtype == torch.float32
    assert result["fill_ids"] is result.fill_ids
    assert result.mrope_positions is not None
    assert result.mrope_positions.shape == (5, 3)
    assert result.deepstack_embeds is None
    assert set(result) == set(LAYOUT.names)
    assert "fill_ids" in result
    assert "fill_ids" in dir(result)
    assert "deepstack_embeds=None" in repr(result)
    with pytest.raises(AttributeError, match="no component 'fill_id'; there are deepstack_embeds, fill_ids"):
        _ = result.fill_id


def test_one_transfers_optional_component_does_not_reach_the_next() -> None:
    """Through the same blocks: absent is None, whatever lies in the pool."""
    first = Pair(128)
    first.write(0, 0)
    first.gather(0, 0)
    assert first.arrived()
    second = Pair(128, names=("input_embeds",), salt=3, pool=first.pool)
    second.write(0, 0)
    assert second.intact(0, 0)
    second.gather(0, 0)
    assert second.destination.result(AUX).fill_ids is None


def test_no_result_is_a_view_of_pool_memory() -> None:
    pair = Pair(300)
    pair.write(0, 0, 3)
    pair.gather(0, 0, 3)
    early = pair.destination.rows(0, 128)
    result = pair.destination.result(AUX)
    for slab in range(GEOMETRY.slab_count):
        memory = pair.pool.memory(slab)
        for name in NAMES:
            tensor = result[name]
            assert tensor is not None
            inside = range(memory.address, memory.address + memory.nbytes)
            assert tensor.data_ptr() not in inside
            assert early[name].data_ptr() not in inside
        memory.view()[:] = b"\xff" * memory.nbytes
    pair.pool.close()
    for name in NAMES:
        assert same_bytes(result[name], pair.rows[name])  # type: ignore[arg-type]
        assert same_bytes(early[name], pair.rows[name][:128])


def test_a_destination_is_handed_over_once_and_written_to_no_more() -> None:
    pair = Pair(128)
    pair.write(0, 0)
    pair.destination.result(AUX)
    for use in (
        lambda: pair.destination.result(AUX),
        lambda: pair.destination.rows(0, 1),
        lambda: pair.destination.view("fill_ids"),
        lambda: pair.gather(0, 0),
    ):
        with pytest.raises(BadCall, match="handed over"):
            use()


@pytest.mark.parametrize("words", [0, 15, 17])
def test_an_aux_record_has_sixteen_words(words: int) -> None:
    with pytest.raises(BadCall, match=f"has 16 words, not {words}"):
        Destination(LAYOUT, 1, NAMES).result([0] * words)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 6), (3, 2)])
def test_rows_outside_the_transfer_are_refused(start: int, stop: int) -> None:
    with pytest.raises(BadCall, match="are not in 5"):
        Destination(LAYOUT, 5, NAMES).rows(start, stop)


@given(st.data())
def test_the_budget_is_what_the_tensors_take(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    names = data.draw(presences(layout))
    total = data.draw(st.integers(0, 300))
    destination = Destination(layout, total, names)
    assert destination.nbytes == destination_bytes(layout, total, names)
    result = destination.result(AUX)
    tensors = [tensor for name in names if (tensor := result[name]) is not None]
    assert sum(tensor.nbytes for tensor in tensors) == destination.nbytes
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)


def test_a_default_device_does_not_move_the_destination() -> None:
    with torch.device("meta"):
        rows = Destination(LAYOUT, 128, NAMES).rows(0, 128)
    assert {tensor.device.type for tensor in rows.values()} == {"cpu"}


def test_a_destination_that_no_memory_can_hold_is_a_typed_error() -> None:
    with pytest.raises(TooLarge, match="no memory for the"):
        Destination(LAYOUT, 1 << 50, NAMES)


# ---- slabs, and where old ones go ----------------------------------------------------------------------------


def test_one_region_is_registered_for_each_slab() -> None:
    transport = PlainTransport()
    pool = PoolBuffers(Carriers(transport), LAYOUT, Geometry(128, 64, slabs=8))
    assert len(pool.regions()) == transport.registered == 8
    assert [slab["plain"].memory for slab in pool.regions()] == [pool.memory(slab) for slab in range(8)]
    assert pool.nbytes == sum(pool.memory(slab).nbytes for slab in range(8))
    pool.close()
    assert not transport.live


def test_late_bytes_into_a_replaced_slab_reach_nobody() -> None:
    transport = PlainTransport()
    pool = PoolBuffers(Carriers(transport), LAYOUT, GEOMETRY)
    before = pool.regions()
    old = before[0]["plain"]
    pool.replace(0, ["peer"])
    assert transport.retired == [old]
    assert pool.regions()[0]["plain"].generation > old.generation
    assert pool.regions()[1] == before[1]
    pair = Pair(128, pool=pool)
    pair.write(0, 0)
    old.memory.view()[:] = b"\xff" * old.memory.nbytes  # still mapped: a late write does no harm
    assert pair.intact(0, 0)
    assert pool.graveyard.nbytes_of("peer") == old.memory.nbytes
    memory = weakref.ref(old.memory.owner)
    transport.retired.clear()
    del old, before
    gc.collect()
    assert memory() is not None
    pool.graveyard.exhume("peer")
    gc.collect()
    assert memory() is None


def test_a_pool_that_does_not_fit_as_a_whole_is_refused_before_its_first_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each slab alone would fit. Taken one by one they end in the kernel killing processes of its own choice."""
    wanted = sum(slab_plan(LAYOUT, GEOMETRY, slab).nbytes for slab in range(GEOMETRY.slab_count))
    transport = PlainTransport()
    monkeypatch.setattr(copying, "available_bytes", lambda: wanted - 1)
    with pytest.raises(
        ConfigError, match=f"8 blocks of 128 tokens takes {wanted} bytes, .* {wanted - 1} are"
    ) as caught:
        PoolBuffers(Carriers(transport), LAYOUT, GEOMETRY)
    assert "pool_blocks" in caught.value.hint
    assert transport.registered == 0
    monkeypatch.setattr(copying, "available_bytes", lambda: wanted)
    assert PoolBuffers(Carriers(transport), LAYOUT, GEOMETRY).nbytes == wanted


def test_if_there_is_no_memory_for_a_new_slab_the_old_one_stays() -> None:
    transport = PlainTransport()
    pool = PoolBuffers(Carriers(transport), LAYOUT, GEOMETRY)
    before = pool.regions()
    transport.memory_left = 0
    with pytest.raises(MemoryError):
        pool.replace(0, ["peer"])
    assert pool.regions() == before
    assert pool.graveyard.nbytes == 0
    assert not transport.retired


def test_a_grave_is_kept_until_all_who_might_write_are_proved_quiet() -> None:
    graveyard = Graveyard()
    buried = host_memory(4096)
    memory = weakref.ref(buried.owner)
    graveyard.bury(buried, ["a", "b"])
    graveyard.bury(host_memory(8192), ["b"])
    del buried
    assert (graveyard.nbytes, graveyard.nbytes_of("a"), graveyard.nbytes_of("b")) == (12288, 4096, 12288)
    assert graveyard.exhume("a") == 0
    gc.collect()
    assert memory() is not None
    assert graveyard.nbytes_of("a") == 0
    assert graveyard.exhume("b") == 12288
    gc.collect()
    assert memory() is None
    assert graveyard.exhume("b") == graveyard.nbytes == 0


def test_a_grave_without_keys_is_kept_until_the_end() -> None:
    graveyard = Graveyard()
    graveyard.bury(host_memory(4096), [])
    assert graveyard.exhume("a") == 0
    assert graveyard.nbytes == 4096
    graveyard.clear()
    assert graveyard.nbytes == 0


# ---- poison --------------------------------------------------------------------------------------------------


def test_poison_is_off_unless_asked_for() -> None:
    pair = Pair(128)
    pair.write(0, 0)
    pair.pool.poison(0)
    assert pair.intact(0, 0)
    pair.pool.check_poison(0)


@given(st.data())
@settings(max_examples=30)
def test_a_write_to_a_free_block_is_seen_when_it_is_granted(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    geometry = data.draw(geometries())
    pool = PoolBuffers(Carriers(PlainTransport()), layout, geometry, poison=True)
    for block in range(geometry.pool_blocks):
        pool.check_poison(block)
    names = layout.names
    total = geometry.block_size
    source = Source(layout, total, names)
    source.put(0, **random_rows(layout, names, total, seed=5))
    block = data.draw(st.integers(0, geometry.pool_blocks - 1))
    write(source, pool, Staging(PlainTransport(), 1 << 20), 0, block)
    for other in range(geometry.pool_blocks):
        if other != block:
            pool.check_poison(other)
    with pytest.raises(InternalError, match=f"free block {block} was written to"):
        pool.check_poison(block)
    pool.poison(block)
    pool.check_poison(block)


def test_a_replaced_slab_is_poisoned_too() -> None:
    pool = PoolBuffers(Carriers(PlainTransport()), LAYOUT, GEOMETRY, poison=True)
    pool.replace(1)
    for block in range(GEOMETRY.pool_blocks):
        pool.check_poison(block)


# ---- our own mistakes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "index", "count", "cause"),
    [
        (8, 0, 1, "are not in a pool of 8"),
        (-1, 0, 1, "are not in a pool of 8"),
        (0, 0, 0, "are not in a pool of 8"),
        (3, 0, 2, "are not in one slab"),
        (0, 3, 1, "are not in 300 tokens"),
        (0, 1, 3, "are not in 300 tokens"),
        (0, -1, 1, "are not in 300 tokens"),
    ],
)
def test_blocks_that_cannot_be_meant_are_refused(block: int, index: int, count: int, cause: str) -> None:
    pair = Pair(300)
    with pytest.raises(InternalError, match=cause):
        pair.gather(index, block, count)
    if count == 1:
        with pytest.raises(InternalError, match=cause):
            pair.pool.digest(block, index, 300, NAMES, 0, "full")
