"""A sender's rows: what `put` takes and refuses, and the copies that write them."""

from __future__ import annotations

import gc
import re
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from memory_kit import PlainTransport, RegisteringTransport, land, layouts, presences, random_rows, raw

from tensorferry.core import source as source_module
from tensorferry.core.errors import BadCall, BadTensor
from tensorferry.core.layout import Component, Layout, SlabPlan, embedding_layout
from tensorferry.core.memory import Memory, host_memory
from tensorferry.core.source import Source, write_plan
from tensorferry.core.staging import Staging
from tensorferry.core.transport import Region

LAYOUT = embedding_layout(8, torch.float32, deepstack_layers=2)
NAMES = ("fill_ids", "input_embeds", "mrope_positions")


def rows(tokens: int, names: tuple[str, ...] = NAMES, seed: int = 0) -> dict[str, torch.Tensor]:
    return random_rows(LAYOUT, names, tokens, seed)


def put_all(source: Source, tensors: dict[str, torch.Tensor], *cuts: int) -> None:
    for start, stop in zip((0, *cuts), (*cuts, source.total_tokens), strict=True):
        source.put(start, **{name: tensor[start:stop] for name, tensor in tensors.items()})


def filled(total: int, *cuts: int, names: tuple[str, ...] = NAMES) -> tuple[Source, dict[str, torch.Tensor]]:
    source, tensors = Source(LAYOUT, total, names), rows(total, names)
    put_all(source, tensors, *cuts)
    return source, tensors


def bytes_of(source: Source, name: str, start: int, stop: int) -> bytes:
    return b"".join(bytes(m.view(offset, n)) for m, offset, n in source.spans(name, start, stop))


# ---- what is announced ---------------------------------------------------------------------------------------


def test_a_component_that_the_layout_lacks_is_refused_by_name() -> None:
    with pytest.raises(BadTensor, match="no component image_grid; it has deepstack_embeds, fill_ids"):
        Source(LAYOUT, 1, ["input_embeds", "image_grid"])


def test_a_component_that_is_not_optional_has_to_be_there() -> None:
    with pytest.raises(BadTensor, match="input_embeds is missing: it is not optional"):
        Source(LAYOUT, 1, ["fill_ids"])


def test_a_transfer_of_nothing_is_refused() -> None:
    """Its rows would never be ready: there is no tensor to count them by."""
    layout = Layout([c for c in LAYOUT.components if c.optional])
    with pytest.raises(BadTensor, match="at least one component of deepstack_embeds"):
        Source(layout, 4, [])


def test_a_negative_length_is_refused() -> None:
    with pytest.raises(BadCall, match="total_tokens -1 is not"):
        Source(LAYOUT, -1, NAMES)


# ---- put -----------------------------------------------------------------------------------------------------


def test_rows_are_read_where_the_caller_made_them() -> None:
    source, tensors = filled(10)
    for name in NAMES:
        ((memory, offset, nbytes),) = source.spans(name, 0, 10)
        assert (memory.address, offset, nbytes) == (tensors[name].data_ptr(), 0, 10 * LAYOUT[name].token_bytes)
        assert memory.kind == "cpu"


def test_ready_is_the_prefix_that_was_put() -> None:
    source, tensors = Source(LAYOUT, 10, NAMES), rows(10)
    assert source.ready == 0
    source.put(0, **{name: tensor[:4] for name, tensor in tensors.items()})
    assert source.ready == 4
    source.put(4, **{name: tensor[4:4] for name, tensor in tensors.items()})
    assert source.ready == 4
    source.put(4, **{name: tensor[4:] for name, tensor in tensors.items()})
    assert source.ready == 10


def test_none_is_not_given() -> None:
    source = Source(LAYOUT, 3, NAMES)
    source.put(0, **rows(3), deepstack_embeds=None)
    assert source.ready == 3


def test_a_tensor_that_is_not_contiguous_is_copied_once_and_any_gradient_is_left_behind() -> None:
    layout = embedding_layout(4, torch.float32, mrope=True)
    embeds = torch.randn(6, 9, requires_grad=True)[:, 2:6]
    positions = torch.arange(18, dtype=torch.int32).view(3, 6).T  # what a [3, n] table is when it is turned
    source = Source(layout, 6, ["input_embeds", "mrope_positions"])
    source.put(0, input_embeds=embeds, mrope_positions=positions)
    assert bytes_of(source, "input_embeds", 1, 5) == raw(embeds[1:5].detach())
    assert bytes_of(source, "mrope_positions", 2, 3) == raw(positions[2:3])
    ((first, _, _),), ((again, _, _),) = source.spans("input_embeds", 0, 1), source.spans("input_embeds", 0, 1)
    assert first is again


@pytest.mark.parametrize("shape", [(5, 8), (1, 1)])
def test_a_lazily_negated_tensor_is_sent_with_its_sign(shape: tuple[int, int]) -> None:
    negated = torch.randn(*shape, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    source = Source(embedding_layout(shape[1], torch.float32), shape[0], ["input_embeds"])
    source.put(0, input_embeds=negated)
    assert bytes_of(source, "input_embeds", 0, shape[0]) == raw(negated.resolve_neg())


def test_an_expanded_row_is_sent_as_often_as_it_says() -> None:
    one = torch.randn(1, 8)
    source = Source(LAYOUT, 5, ["input_embeds"])
    source.put(0, input_embeds=one.expand(5, 8))
    assert bytes_of(source, "input_embeds", 0, 5) == raw(one) * 5


REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    ("dtype", {"input_embeds": torch.zeros(4, 8).half()}, "input_embeds is torch.float16, the layout says float32",
     ".to(torch.float32)"),
    ("int64 ids", {"fill_ids": torch.zeros(4, dtype=torch.int64)}, "fill_ids is torch.int64, the layout says int32",
     ".to(torch.int32)"),
    ("hidden size", {"input_embeds": torch.zeros(4, 9)}, "has shape [4, 9], the layout says [n, 8]", ""),
    ("no row axis", {"input_embeds": torch.zeros(8)}, "has shape [8], the layout says [n, 8]", ".unsqueeze(0)"),
    ("channel-major", {"mrope_positions": torch.zeros(3, 4, dtype=torch.int32)},
     "has shape [3, 4], the layout says [n, 3]", "token-major, .permute(1, 0)"),
    ("two axes for ids", {"fill_ids": torch.zeros(4, 1, dtype=torch.int32)},
     "has shape [4, 1], the layout says [n]", ""),
    ("lengths", {"fill_ids": torch.zeros(3, dtype=torch.int32)},
     "differ in length: fill_ids 3, input_embeds 4, mrope_positions 4", ""),
    ("not a tensor", {"fill_ids": [1, 2, 3, 4]}, "fill_ids is a list, not a torch.Tensor", ""),
    ("unknown", {"pixel_values": torch.zeros(4)}, "pixel_values is not in the layout", ""),
    ("not announced", {"deepstack_embeds": torch.zeros(4, 2, 8)}, "deepstack_embeds is not in the announcement", ""),
    ("missing", {"fill_ids": None}, "fill_ids is missing: it was announced", ""),
    ("meta", {"input_embeds": torch.zeros(4, 8, device="meta")}, "input_embeds is torch.strided on meta",
     "in cpu, cuda memory"),
    ("sparse", {"input_embeds": torch.zeros(4, 8).to_sparse()}, "input_embeds is torch.sparse_coo", "dense"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "cause", "hint"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_a_tensor_that_does_not_fit_is_refused_and_nothing_changes(
    change: dict[str, Any], cause: str, hint: str
) -> None:
    source = Source(LAYOUT, 10, NAMES)
    source.put(0, **rows(2))
    with pytest.raises(BadTensor, match=re.escape(cause)) as caught:
        source.put(2, **(rows(4) | change))
    assert hint in caught.value.hint
    assert source.ready == 2
    source.put(2, **rows(8))


def test_stacked_layers_in_one_axis_get_a_hint() -> None:
    source = Source(LAYOUT, 4, ["input_embeds", "deepstack_embeds"])
    with pytest.raises(BadTensor) as caught:
        source.put(0, input_embeds=torch.zeros(4, 8), deepstack_embeds=torch.zeros(4, 16))
    assert caught.value.hint.endswith(".view(-1, 2, 8)")
    with pytest.raises(BadTensor) as caught:
        source.put(0, input_embeds=torch.zeros(4, 8), deepstack_embeds=torch.zeros(2, 8, 4))
    assert ".permute(2, 0, 1)" in caught.value.hint


@pytest.mark.parametrize("start", [0, 1, 3, 5, -1])
def test_rows_come_in_order_without_gaps(start: int) -> None:
    source = Source(LAYOUT, 10, NAMES)
    source.put(0, **rows(2))
    with pytest.raises(BadCall, match=f"put at token {start}, but the next token is 2"):
        source.put(start, **rows(1))


def test_more_rows_than_announced_are_refused() -> None:
    source = Source(LAYOUT, 10, NAMES)
    source.put(0, **rows(8))
    with pytest.raises(BadCall, match="3 rows at token 8 go beyond the 10 announced"):
        source.put(8, **rows(3))
    assert source.ready == 8


def test_memory_that_the_transport_cannot_read_is_refused_at_put() -> None:
    source = Source(LAYOUT, 4, ["input_embeds"], kinds=frozenset({"cuda"}))
    with pytest.raises(BadTensor) as caught:
        source.put(0, input_embeds=torch.zeros(4, 8))
    assert caught.value.hint == "Rows have to be dense, in cuda memory"


# ---- reading -------------------------------------------------------------------------------------------------


@given(total=st.integers(1, 60), data=st.data())
def test_spans_are_the_rows_however_they_were_cut(total: int, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, total), max_size=6)))
    source, tensors = filled(total, *cuts)
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    for name in NAMES:
        assert bytes_of(source, name, start, stop) == raw(tensors[name][start:stop])
    inside = [cut for cut in set(cuts) if start < cut < stop]
    assert len(source.spans("fill_ids", start, stop)) == (len(inside) + 1 if start < stop else 0)


@given(total=st.integers(1, 60), block_size=st.integers(1, 20), data=st.data())
def test_blocks_are_viewed_sorted_by_name_and_end_at_the_last_token(
    total: int, block_size: int, data: st.DataObject
) -> None:
    source, tensors = filled(total, *sorted(data.draw(st.lists(st.integers(0, total), max_size=4))))
    for index in range(-(-total // block_size)):
        views = list(source.block_views(index, block_size))
        assert [name for name, _ in views] == sorted(name for name, _ in views)
        for name in NAMES:
            expected = tensors[name][index * block_size : (index + 1) * block_size]
            assert b"".join(bytes(v) for n, v in views if n == name) == raw(expected)


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (4, 5), (-1, 2), (3, 2)])
def test_rows_that_are_not_there_are_not_read(start: int, stop: int) -> None:
    source = Source(LAYOUT, 10, NAMES)
    source.put(0, **rows(4))
    with pytest.raises(BadCall, match="cannot be read, 4 are ready"):
        source.spans("fill_ids", start, stop)
    with pytest.raises(BadCall):
        list(source.block_views(1, 4))


def test_release_lets_the_tensors_go_and_spans_under_way_keep_theirs() -> None:
    source, tensors = Source(LAYOUT, 4, ["input_embeds"]), rows(4, ("input_embeds",))
    source.put(0, **tensors)
    list(source.block_views(0, 4))
    alive = weakref.ref(tensors["input_embeds"].untyped_storage())
    expected = raw(tensors.pop("input_embeds"))
    spans = source.spans("input_embeds", 1, 3)
    source.release()
    source.release()
    gc.collect()
    ((memory, offset, nbytes),) = spans
    assert bytes(memory.view(offset, nbytes)) == expected[32:96]
    del spans, memory
    gc.collect()
    assert alive() is None
    with pytest.raises(BadCall, match="released"):
        source.spans("input_embeds", 0, 1)
    with pytest.raises(BadCall, match="ended"):
        source.put(4, **rows(1, ("input_embeds",)))


# ---- writing -------------------------------------------------------------------------------------------------

TRANSPORTS = [PlainTransport, RegisteringTransport]


def read_slab(plan: SlabPlan, memory: Memory, name: str, slab_block: int, tokens: int) -> bytes:
    area = plan.areas[name]
    return bytes(memory.view(area.at(slab_block), tokens * area.component.token_bytes))


@pytest.mark.parametrize("transport", TRANSPORTS)
@given(data=st.data())
def test_a_run_arrives_as_the_source_has_it(transport: type[PlainTransport], data: st.DataObject) -> None:
    layout = data.draw(layouts())
    names = data.draw(presences(layout))
    plan = SlabPlan(layout, data.draw(st.integers(1, 40)), data.draw(st.integers(1, 6)))
    size = plan.block_size
    total = data.draw(st.integers(1, 4 * size))
    blocks = -(-total // size)
    first = data.draw(st.integers(0, blocks - 1))
    count = data.draw(st.integers(1, min(blocks - first, plan.blocks)))
    slab_block = data.draw(st.integers(0, plan.blocks - count))
    tensors = random_rows(layout, names, total, seed=total)
    source = Source(layout, total, names)
    put_all(source, tensors, *sorted(data.draw(st.lists(st.integers(0, total), max_size=3))))

    staging = Staging(transport(), max(plan.stage_bytes(names, count, rows=transport is RegisteringTransport), 64))
    staging_size = plan.stage_bytes(names, count, rows=staging.holds_rows)
    stage = staging.take(staging_size) if staging_size else None
    copies = write_plan(source, plan, first, slab_block, count, stage)
    slab = host_memory(plan.nbytes)
    slab.view()[:] = b"\xa5" * plan.nbytes
    placed = land(copies, slab)

    touched = 0
    for name in names:
        area = plan.areas[name]
        for k in range(count):
            tokens = min(size, total - (first + k) * size)
            expected = tensors[name][(first + k) * size : (first + k) * size + tokens]
            assert read_slab(plan, slab, name, slab_block + k, tokens) == raw(expected)
            touched += 0 if area.packed else tokens * area.component.token_bytes
    packed = any(plan.areas[name].packed for name in names)
    assert placed == touched + (count * plan.packed_stride if packed else 0)
    neighbours = [b for b in range(plan.blocks) if not slab_block <= b < slab_block + count]
    assert all(set(read_slab(plan, slab, name, b, size)) <= {0xA5} for name in layout.names for b in neighbours), (
        "another block was touched"
    )
    if transport is RegisteringTransport:
        assert all(isinstance(copy.local, Region) for copy in copies)


def test_packed_gaps_travel_as_zeros_even_from_a_used_stage() -> None:
    layout = embedding_layout(8, torch.float32)
    plan = SlabPlan(layout, 10, 4)
    staging = Staging(PlainTransport(), 4096)
    used = staging.take(4096)
    assert used is not None
    used.view()[:] = b"\xee" * 4096
    staging.give(used)
    source = Source(layout, 13, layout.names)
    source.put(0, **random_rows(layout, layout.names, 13, 1))
    stage = staging.take(plan.stage_bytes(layout.names, 2, rows=False))
    assert stage is not None
    (copy,) = write_plan(source, plan, 0, 1, 2, stage)
    assert copy.nbytes == 2 * plan.packed_stride
    content = bytearray(stage.view()[: copy.nbytes])
    for name in layout.names:
        area, token_bytes = plan.areas[name], layout[name].token_bytes
        for block, tokens in ((0, 10), (1, 3)):
            start = area.at(block) - plan.packed_start
            content[start : start + tokens * token_bytes] = bytes(tokens * token_bytes)
    assert not any(content)


def test_adjacent_blocks_merge_into_one_copy_per_large_component() -> None:
    layout = embedding_layout(3584)
    plan = SlabPlan(layout, 128, 8)
    source = Source(layout, 1000, layout.names)
    source.put(0, **random_rows(layout, layout.names, 1000, 1))
    stage = Staging(PlainTransport(), 1 << 20).take(plan.stage_bytes(layout.names, 8, rows=False))
    copies = write_plan(source, plan, 0, 0, 8, stage)
    assert [copy.nbytes for copy in copies] == [8 * plan.packed_stride, 1000 * 7168]


def test_nothing_is_staged_where_nothing_is_packed() -> None:
    layout = embedding_layout(3584)
    source = Source(layout, 200, ["input_embeds"])
    source.put(0, **random_rows(layout, ["input_embeds"], 200, 1))
    (copy,) = write_plan(source, SlabPlan(layout, 128, 8), 1, 3, 1, None)
    assert (copy.local_offset, copy.slab_offset, copy.nbytes) == (128 * 7168, 3 * 128 * 7168, 72 * 7168)


@pytest.mark.parametrize(
    ("first", "slab_block", "count", "cause"),
    [
        (0, 0, 0, "are not in 20 tokens"),
        (-1, 0, 1, "are not in 20 tokens"),
        (5, 0, 1, "are not in 20 tokens"),
        (3, 0, 3, "are not in 20 tokens"),
        (0, -1, 1, "do not fit into a slab of 3"),
        (0, 3, 1, "do not fit into a slab of 3"),
        (0, 2, 2, "do not fit into a slab of 3"),
        (0, 0, 2, "need .* bytes of staging"),
        (3, 0, 1, "16 are ready|cannot be read"),
    ],
)
def test_a_run_that_cannot_be_written_is_refused(first: int, slab_block: int, count: int, cause: str) -> None:
    plan = SlabPlan(LAYOUT, 4, 3)
    source = Source(LAYOUT, 20, NAMES)
    source.put(0, **rows(14))
    stage = Staging(PlainTransport(), 1 << 16).take(plan.stage_bytes(NAMES, 1, rows=False))
    with pytest.raises(BadCall, match=cause):
        write_plan(source, plan, first, slab_block, count, stage)


def test_packed_rows_without_a_stage_are_refused() -> None:
    source, _ = filled(4)
    with pytest.raises(BadCall, match="bytes of staging"):
        write_plan(source, SlabPlan(LAYOUT, 4, 3), 0, 0, 1, None)


# ---- from several threads ------------------------------------------------------------------------------------


def test_of_two_that_put_at_the_same_token_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source, tensors = Source(LAYOUT, 10, NAMES), rows(10)
    both = threading.Barrier(2, timeout=30)
    first_name, check = source.names[0], source_module._checked

    def check_together(component: Component, tensor: object, kinds: frozenset[str]) -> torch.Tensor:
        if component.name == first_name:
            both.wait()  # each has found that its rows are the next
        return check(component, tensor, kinds)

    monkeypatch.setattr(source_module, "_checked", check_together)
    with ThreadPoolExecutor(2) as pool:
        puts = [pool.submit(source.put, 0, **{name: t[:5] for name, t in tensors.items()}) for _ in range(2)]
    refused = [problem for put in puts if (problem := put.exception()) is not None]
    assert [type(problem) for problem in refused] == [BadCall]
    monkeypatch.undo()
    source.put(5, **{name: t[5:] for name, t in tensors.items()})
    for name in NAMES:
        assert bytes_of(source, name, 0, 10) == raw(tensors[name])


def test_rows_that_come_while_the_transfer_ends_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    source, tensors = Source(LAYOUT, 10, NAMES), rows(10)
    check = source_module._checked

    def end_meanwhile(component: Component, tensor: object, kinds: frozenset[str]) -> torch.Tensor:
        source.release()
        return check(component, tensor, kinds)

    monkeypatch.setattr(source_module, "_checked", end_meanwhile)
    with pytest.raises(BadCall, match="ended"):
        source.put(0, **tensors)
    assert not any(source._pieces.values())
