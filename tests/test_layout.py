"""Components, layouts, and the arithmetic of slabs and blocks."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from memory_kit import geometries, layouts, presences

from tensorferry.core.errors import ConfigError
from tensorferry.core.layout import (
    ALIGNMENT,
    PACK_BELOW_BYTES,
    Component,
    Geometry,
    Layout,
    SlabPlan,
    destination_bytes,
    dtype_name,
    embedding_layout,
    slab_plan,
)


def test_the_memory_modules_need_no_torch() -> None:
    names = ", ".join(f"tensorferry.core.{name}" for name in ("layout", "memory", "digest", "transport"))
    code = f"import sys, {names}\nassert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- components ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_a_dtype_is_named_or_given(dtype: object) -> None:
    assert dtype_name(dtype) == "bfloat16"


def test_a_dtype_that_does_not_travel_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'complex64' does not travel"):
        Component("x", "complex64")


@pytest.mark.parametrize("name", ["", "two words", "3d", "class", "_hidden", "ﬁll", "é", "x" * 65])
def test_a_name_that_cannot_be_an_argument_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is not a free ASCII identifier"):
        Component(name, "int32")


@pytest.mark.parametrize("name", ["aux", "room", "start", "mrope_delta"])
def test_a_name_that_means_something_else_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is taken"):
        Component(name, "int32")


@pytest.mark.parametrize("shape", [(0,), (-1,), (3, 0), (1 << 31,), (1 << 20, 1 << 20)])
def test_an_impossible_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="must have dimensions of at least 1"):
        Component("x", "int8", shape)


@pytest.mark.parametrize("shape", [(2.5,), ("3",), 3])
def test_a_shape_that_is_no_tuple_of_whole_numbers_is_refused(shape: object) -> None:
    with pytest.raises(ConfigError, match="is not a tuple of whole numbers"):
        Component("x", "int8", shape)  # type: ignore[arg-type]


def test_a_list_serves_as_a_shape() -> None:
    assert Component("x", "int8", [2, 3]) == Component("x", "int8", (2, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"), [("bfloat16", (3584,), 7168), ("int32", (), 4), ("bool", (3,), 3)]
)
def test_token_bytes(dtype: str, shape: tuple[int, ...], nbytes: int) -> None:
    assert Component("x", dtype, shape).token_bytes == nbytes


# ---- layouts -------------------------------------------------------------------------------------------------


def test_the_standard_layout_is_token_major_and_all_but_the_embeds_are_optional() -> None:
    layout = embedding_layout(3584, torch.bfloat16, deepstack_layers=3)
    assert {(c.name, c.dtype, c.shape, c.optional) for c in layout.components} == {
        ("input_embeds", "bfloat16", (3584,), False),
        ("fill_ids", "int32", (), True),
        ("mrope_positions", "int32", (3,), True),
        ("deepstack_embeds", "bfloat16", (3, 3584), True),
    }
    assert embedding_layout(3584).token_bytes == 7184
    assert "mrope_positions" not in embedding_layout(8, mrope=False)


def test_a_layout_needs_components_with_unique_names() -> None:
    with pytest.raises(ConfigError, match="1 to 32 components, not 0"):
        Layout([])
    with pytest.raises(ConfigError, match="must be unique"):
        Layout([Component("x", "int8"), Component("x", "int16")])


BASE = Layout([Component("x", "int32", (3,)), Component("y", "float32", (2, 3), optional=True)])


def test_the_order_of_declaration_does_not_matter() -> None:
    turned = Layout(reversed(BASE.components))
    assert turned.fingerprint == BASE.fingerprint
    assert turned.names == BASE.names
    assert slab_plan(turned, Geometry(4, 8), 0).areas == slab_plan(BASE, Geometry(4, 8), 0).areas


@pytest.mark.parametrize(
    "changed",
    [
        {"name": "z"},
        {"dtype": "float16"},
        {"shape": (3, 2)},
        {"shape": (6,)},
        {"optional": False},
    ],
)
def test_the_fingerprint_tells_any_difference(changed: dict[str, object]) -> None:
    x, y = BASE.components
    assert Layout([x, replace(y, **changed)]).fingerprint != BASE.fingerprint  # type: ignore[arg-type]
    assert Layout([x]).fingerprint != BASE.fingerprint


@given(st.data())
def test_a_presence_bitmap_comes_back_as_the_names_it_was_made_of(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    names = data.draw(presences(layout))
    assert layout.present(layout.presence(names)) == names


@given(layouts(), st.integers())
def test_a_garbage_bitmap_is_refused_or_names_all_that_has_to_be_there(layout: Layout, bitmap: int) -> None:
    try:
        names = layout.present(bitmap)
    except ValueError:
        return
    assert layout.presence(names) == bitmap
    assert {c.name for c in layout.components if not c.optional} <= set(names)


def test_bitmaps_are_refused_for_what_is_wrong_with_them() -> None:
    with pytest.raises(ValueError, match="names components that the layout does not have"):
        BASE.present(0b100)
    with pytest.raises(ValueError, match="names components that the layout does not have"):
        BASE.present(-1)
    with pytest.raises(ValueError, match="no component is present"):
        BASE.present(0)
    with pytest.raises(ValueError, match=r"\['x'\] are not optional"):
        BASE.present(0b10)


def test_the_budget_counts_the_components_that_travel() -> None:
    layout = embedding_layout(3584, deepstack_layers=2)
    assert destination_bytes(layout, 1000, ["input_embeds", "fill_ids"]) == 1000 * (7168 + 4)
    assert destination_bytes(layout, 0, layout.names) == 0


# ---- slabs ---------------------------------------------------------------------------------------------------


@given(layouts(), st.integers(1, 40), st.integers(1, 9))
def test_no_two_rows_of_a_slab_share_a_byte(layout: Layout, block_size: int, blocks: int) -> None:
    plan = SlabPlan(layout, block_size, blocks)
    taken = sorted(
        (area.at(block), area.at(block) + block_size * area.component.token_bytes)
        for area in plan.areas.values()
        for block in range(blocks)
    )
    assert all(stop <= start for (_, stop), (start, _) in pairwise(taken))
    assert taken[0][0] >= 0
    assert taken[-1][1] <= plan.nbytes
    assert set(plan.areas) == set(layout.names)


@given(layouts(), st.integers(1, 40), st.integers(1, 9))
def test_large_components_lie_together_and_small_ones_by_block(layout: Layout, block_size: int, blocks: int) -> None:
    plan = SlabPlan(layout, block_size, blocks)
    for area in plan.areas.values():
        nbytes = area.component.token_bytes * block_size
        assert area.packed == (nbytes < PACK_BELOW_BYTES)
        if area.packed:
            assert area.stride == plan.packed_stride
            assert plan.packed_start <= area.start <= plan.packed_start + plan.packed_stride - nbytes
        else:
            assert area.stride == nbytes
            assert area.start % ALIGNMENT == 0


@given(st.data())
def test_a_longer_run_never_needs_less_staging(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    names = data.draw(presences(layout))
    plan = SlabPlan(layout, data.draw(st.integers(1, 40)), 9)
    for rows in (False, True):
        needs = [plan.stage_bytes(names, count, rows=rows) for count in range(1, 10)]
        assert needs == sorted(needs)
        assert needs[0] >= 0
    assert plan.stage_bytes((), 9, rows=True) == 0


def test_a_plan_can_be_compared_and_hashed() -> None:
    assert SlabPlan(BASE, 4, 2) == SlabPlan(BASE, 4, 2) != SlabPlan(BASE, 4, 3)
    assert len({SlabPlan(BASE, 4, 2), SlabPlan(BASE, 4, 2)}) == 1


# ---- geometry ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (-1, 1, 1)])
def test_sizes_below_one_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="must be at least 1"):
        Geometry(*sizes)


@given(geometries())
def test_every_block_lies_in_exactly_one_slab(geometry: Geometry) -> None:
    slabs = [geometry.slab_blocks(slab) for slab in range(geometry.slab_count)]
    assert [block for blocks in slabs for block in blocks] == list(range(geometry.pool_blocks))
    assert all(geometry.slab_of(block) == slab for slab, blocks in enumerate(slabs) for block in blocks)
    assert len(slabs) <= geometry.slabs
    assert all(len(blocks) == geometry.blocks_per_slab for blocks in slabs[:-1])


@given(geometries(), st.integers(0, 2000))
def test_the_blocks_of_a_transfer_carry_each_token_once(geometry: Geometry, total: int) -> None:
    carried = [geometry.tokens_in(index, total) for index in range(geometry.blocks_for(total))]
    assert sum(carried) == total
    assert all(carried)
    assert all(tokens == geometry.block_size for tokens in carried[:-1])
    assert geometry.tokens_in(geometry.blocks_for(total), total) == 0


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (127, 1), (128, 1), (129, 2), (300, 3), (50_000, 391)])
def test_capacity_is_counted_in_whole_blocks(tokens: int, blocks: int) -> None:
    assert Geometry(128, 64).blocks_for(tokens) == blocks


def test_a_shorter_last_slab_has_its_own_plan() -> None:
    geometry = Geometry(4, 7, slabs=2)
    assert [slab_plan(BASE, geometry, slab).blocks for slab in (0, 1)] == [4, 3]
