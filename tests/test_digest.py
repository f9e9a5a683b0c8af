"""What a digest sees: in `full` everything, in `sampled` every run of 4 KiB, and in both the place."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tensorferry.core.digest import (
    CHUNK_BYTES,
    SAMPLE_BYTES,
    SAMPLE_FROM_BYTES,
    SAMPLE_PERIOD,
    block_seed,
    digest,
)
from tensorferry.core.errors import ConfigError

CONTENT = bytes(range(16))
SEED = block_seed(1, 2, CONTENT, 3)


def noise(nbytes: int, salt: int = 0) -> bytearray:
    """Bytes in which no two stretches of a few bytes are alike."""
    words = (((k + salt) * 0x9E3779B97F4A7C15 >> 7) & 0xFFFFFFFF for k in range(nbytes // 4 + 1))
    return bytearray(b"".join(word.to_bytes(4, "little") for word in words)[:nbytes])


def of(*components: tuple[str, bytes | bytearray], seed: int = SEED, mode: str = "full") -> int:
    return digest([(name, memoryview(data)) for name, data in components], seed, mode)


def large_sizes() -> st.SearchStrategy[int]:
    return st.one_of(
        st.integers(SAMPLE_FROM_BYTES, 80_000),
        st.sampled_from([SAMPLE_FROM_BYTES, SAMPLE_FROM_BYTES + 1, 5 * SAMPLE_PERIOD - 1, 5 * SAMPLE_PERIOD + 63]),
    )


# ---- the value -----------------------------------------------------------------------------------------------


def test_the_values_are_part_of_the_protocol() -> None:
    data = noise(100_000)
    assert block_seed(1, 2, CONTENT, 3) == 0x818047AF0D37CD29
    assert of(("ids", data[:40]), ("rows", data)) == 0xA81B5109881B4662
    assert of(("ids", data[:40]), ("rows", data), mode="sampled") == 0x90D79466807BCC6A


def test_off_hashes_nothing() -> None:
    assert of(("x", noise(10)), mode="off") == 0


def test_an_unknown_mode_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="integrity 'crc' is unknown"):
        of(("x", noise(10)), mode="crc")


def test_small_components_are_hashed_in_full_in_both_modes() -> None:
    data = noise(SAMPLE_FROM_BYTES - 1)
    assert of(("x", data), mode="sampled") == of(("x", data), mode="full")


@pytest.mark.parametrize("mode", ["full", "sampled"])
@given(st.data())
def test_how_a_component_is_cut_does_not_matter(mode: str, data: st.DataObject) -> None:
    nbytes = data.draw(st.one_of(st.integers(0, 300), large_sizes()))
    cuts = sorted(data.draw(st.lists(st.integers(0, nbytes), max_size=5)))
    whole = noise(nbytes)
    pieces = [("x", whole[a:b]) for a, b in zip([0, *cuts], [*cuts, nbytes], strict=True)]
    assert of(("w", noise(7)), *pieces, ("y", noise(9)), mode=mode) == of(
        ("w", noise(7)), ("x", whole), ("y", noise(9)), mode=mode
    )


@pytest.mark.parametrize("mode", ["full", "sampled"])
@pytest.mark.parametrize("nbytes", [0, 1, SAMPLE_FROM_BYTES, CHUNK_BYTES, CHUNK_BYTES + 1, 5 * CHUNK_BYTES])
def test_read_only_bytes_have_the_same_digest(mode: str, nbytes: int) -> None:
    assert of(("x", bytes(noise(nbytes))), mode=mode) == of(("x", noise(nbytes)), mode=mode)


# ---- the place -----------------------------------------------------------------------------------------------


def test_every_part_of_the_position_changes_the_seed() -> None:
    seeds = {
        SEED,
        block_seed(2, 2, CONTENT, 3),
        block_seed(1, 3, CONTENT, 3),
        block_seed(1, 2, CONTENT[::-1], 3),
        block_seed(1, 2, CONTENT, 4),
        block_seed(3, 2, CONTENT, 1),
    }
    assert len(seeds) == 6
    assert all(0 <= seed < 1 << 64 for seed in seeds)


@pytest.mark.parametrize("mode", ["full", "sampled"])
@given(nbytes=st.one_of(st.integers(0, 100), large_sizes()), index=st.integers(0, 1 << 32))
def test_intact_bytes_in_another_place_fail(mode: str, nbytes: int, index: int) -> None:
    assume(index != 3)
    data = noise(nbytes)
    elsewhere = block_seed(1, 2, CONTENT, index)
    assert of(("x", data), mode=mode) != of(("x", data), mode=mode, seed=elsewhere)


@pytest.mark.parametrize("mode", ["full", "sampled"])
@pytest.mark.parametrize("nbytes", [4, 20_000])
def test_swapped_components_fail(mode: str, nbytes: int) -> None:
    one, other = noise(nbytes), noise(nbytes, salt=99)
    right = of(("a", one), ("b", other), mode=mode)
    assert right != of(("a", other), ("b", one), mode=mode)
    assert right != of(("b", other), ("a", one), mode=mode)
    assert right != of(("a", one), ("c", other), mode=mode)


@pytest.mark.parametrize("mode", ["full", "sampled"])
def test_bytes_that_move_from_one_component_to_the_next_fail(mode: str) -> None:
    data = noise(40_000)
    cuts = {of(("a", data[:n]), ("b", data[n:]), mode=mode) for n in (0, 1, 20_000, 39_999, 40_000)}
    assert len(cuts) == 5


def test_an_absent_component_is_not_an_empty_one() -> None:
    assert of(("a", noise(9))) != of(("a", noise(9)), ("b", b""))


# ---- the bytes -----------------------------------------------------------------------------------------------


@given(nbytes=st.one_of(st.integers(1, 300), large_sizes()), data=st.data())
def test_full_sees_a_single_wrong_bit(nbytes: int, data: st.DataObject) -> None:
    rows = noise(nbytes)
    right = of(("x", rows))
    rows[data.draw(st.integers(0, nbytes - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert of(("x", rows)) != right


@pytest.mark.parametrize(
    "nbytes", [CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES, 3 * CHUNK_BYTES + 1]
)
def test_full_sees_the_bytes_at_every_seam(nbytes: int) -> None:
    rows = noise(nbytes)
    right = of(("x", rows))
    for place in {0, nbytes - 1, *(k for k in (CHUNK_BYTES - 1, CHUNK_BYTES) if k < nbytes)}:
        rows[place] ^= 1
        assert of(("x", rows)) != right
        rows[place] ^= 1


@pytest.mark.parametrize("mode", ["full", "sampled"])
@given(nbytes=st.one_of(st.integers(2, 300), large_sizes()), data=st.data())
def test_truncated_rows_are_seen(mode: str, nbytes: int, data: st.DataObject) -> None:
    rows = noise(nbytes)
    assert of(("x", rows), mode=mode) != of(("x", rows[: data.draw(st.integers(0, nbytes - 1))]), mode=mode)


@pytest.mark.parametrize("mode", ["full", "sampled"])
@given(nbytes=st.one_of(st.integers(8, 300), large_sizes()), data=st.data())
def test_shifted_rows_are_seen(mode: str, nbytes: int, data: st.DataObject) -> None:
    by = data.draw(st.integers(1, min(nbytes - 1, 5000)))
    rows = noise(nbytes + by)
    assert of(("x", rows[:nbytes]), mode=mode) != of(("x", rows[by:]), mode=mode)


@pytest.mark.parametrize("mode", ["full", "sampled"])
@given(nbytes=large_sizes(), data=st.data())
def test_a_stale_run_of_4_kib_is_seen_wherever_it_lies(mode: str, nbytes: int, data: st.DataObject) -> None:
    rows, before = noise(nbytes), noise(nbytes, salt=1 << 20)  # before: what the previous tenant left
    right = of(("x", rows), mode=mode)
    length = data.draw(st.integers(SAMPLE_PERIOD, nbytes))
    start = data.draw(st.integers(0, nbytes - length))
    rows[start : start + length] = before[start : start + length]
    assert of(("x", rows), mode=mode) != right


@given(nbytes=large_sizes(), data=st.data())
def test_sampled_sees_a_wrong_end(nbytes: int, data: st.DataObject) -> None:
    rows = noise(nbytes)
    right = of(("x", rows), mode="sampled")
    rows[-data.draw(st.integers(1, SAMPLE_BYTES))] ^= 1
    assert of(("x", rows), mode="sampled") != right


def test_sampled_does_not_see_what_lies_between_its_samples() -> None:
    """The price of the mode, stated."""
    rows = noise(4 * SAMPLE_PERIOD)
    right = of(("x", rows), mode="sampled")
    gap = slice(SAMPLE_PERIOD + SAMPLE_BYTES, 2 * SAMPLE_PERIOD)
    rows[gap] = bytes(gap.stop - gap.start)
    assert of(("x", rows), mode="sampled") == right != of(("x", rows), mode="full")


def test_sampled_sees_any_wrong_byte_of_a_small_component() -> None:
    ids = noise(512)
    right = of(("ids", ids), ("rows", noise(20_000)), mode="sampled")
    for place in range(len(ids)):
        ids[place] ^= 1
        assert of(("ids", ids), ("rows", noise(20_000)), mode="sampled") != right
        ids[place] ^= 1
