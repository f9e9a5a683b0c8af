"""Views of memory: inside its bounds, alive as long as somebody looks, and only where the host can look."""

from __future__ import annotations

import gc
import mmap
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorferry.core.memory import COPY_CHUNK, Memory, advise_huge_pages, copy_bytes, host_memory


def test_host_memory_is_zeroed_page_aligned_and_writable() -> None:
    memory = host_memory(10_000)
    assert memory.address % mmap.PAGESIZE == 0
    assert bytes(memory.view()) == bytes(10_000)
    memory.view(5, 3)[:] = b"abc"
    assert bytes(memory.view(0, 10)) == b"\0\0\0\0\0abc\0\0"


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 1), (0, 101), (100, 1), (50, -1), (101, None)])
def test_a_view_outside_is_refused(offset: int, nbytes: int | None) -> None:
    with pytest.raises(ValueError, match="lies outside 100 bytes"):
        host_memory(100).view(offset, nbytes)


def test_an_empty_view_may_stand_anywhere_inside() -> None:
    assert len(host_memory(100).view(100)) == len(Memory(0, 0).view()) == 0
    Memory(0, 0).view()[:] = b""


def test_memory_of_a_device_has_no_host_view() -> None:
    with pytest.raises(TypeError, match="cuda memory has no host view"):
        Memory(4096, 64, "cuda").view()


def test_a_view_keeps_its_memory_alive() -> None:
    class Owner(bytearray):
        pass

    owner = Owner(64)
    alive = weakref.ref(owner)
    base = host_memory(64)
    part = Memory(base.address, 64, "cpu", owner).view()[3:9]
    del owner
    gc.collect()
    assert alive() is not None
    del part
    gc.collect()
    assert alive() is None


def test_freed_host_memory_is_not_read() -> None:
    views = [host_memory(1 << 16).view() for _ in range(20)]  # nothing but the views holds it
    for k, view in enumerate(views):
        view[:] = bytes([k]) * len(view)
    assert all(bytes(view) == bytes([k]) * len(view) for k, view in enumerate(views))


def test_the_owner_does_not_tell_two_memories_apart() -> None:
    assert Memory(64, 8, "cpu", "one") == Memory(64, 8, "cpu", "other")
    assert len({Memory(64, 8, "cpu", []), Memory(64, 8, "cpu", {})}) == 1


@pytest.mark.parametrize("nbytes", [0, 1, COPY_CHUNK - 1, COPY_CHUNK, 2 * COPY_CHUNK + 7])
def test_a_copy_is_whole(nbytes: int) -> None:
    source = memoryview(bytes(k % 251 for k in range(1000)) * (nbytes // 1000 + 1))[:nbytes]
    target = memoryview(bytearray(nbytes))
    copy_bytes(target, source)
    assert target == source


@given(st.integers(0, 50), st.integers(0, 50))
def test_a_copy_between_lengths_that_differ_is_refused(one: int, other: int) -> None:
    target = memoryview(bytearray(b"\xff" * one))
    if one == other:
        copy_bytes(target, memoryview(bytes(other)))
        return
    with pytest.raises(ValueError, match="do not fit"):
        copy_bytes(target, memoryview(bytes(other)))
    assert bytes(target) == b"\xff" * one


def test_advice_changes_no_byte() -> None:
    memory = host_memory(5 << 20)
    memory.view()[:] = b"\x07" * memory.nbytes
    advise_huge_pages(memory)
    advise_huge_pages(Memory(0, 0))
    advise_huge_pages(Memory(4096, 1 << 30, "cuda"))
    assert bytes(memory.view()) == b"\x07" * memory.nbytes
