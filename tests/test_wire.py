"""Frames: every message survives the trip, and nothing else gets through. `decode` raises BadFrame or nothing."""

from __future__ import annotations

import re
import struct
import zlib
from contextlib import suppress
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tensorferry.core import messages as m
from tensorferry.core.errors import from_code
from tensorferry.core.wire import FRAME_VERSION, MAGIC, MAX_FRAME_BYTES, BadFrame, decode, encode

KINDS: tuple[type[m.Message], ...] = get_args(m.AnyMessage)

U63 = st.integers(0, (1 << 63) - 1)
U32 = st.integers(0, (1 << 32) - 1)
TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
NAME = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40).filter(re.compile(m.PRINTABLE).search)
WORD = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=32)
ID16 = st.binary(min_size=16, max_size=16)
OFFERS = st.lists(
    st.builds(
        m.Offer,
        WORD.filter(bool),
        st.integers(0, (1 << 16) - 1),
        WORD,
        st.binary(max_size=100),
        st.binary(max_size=64),
    ),
    max_size=8,
).map(tuple)

FIELDS: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(("src", "dst", "min_live", "xfer", "room"), U63),
    **dict.fromkeys(
        ("block_size", "pool_blocks", "slabs", "revision", "ack", "epoch", "prefix", "upto", "present"), U32
    ),
    **dict.fromkeys(("dummy", "ok", "heard", "run"), st.booleans()),
    **dict.fromkeys(("code", "cause"), TEXT),
    **dict.fromkeys(("layout", "content_id"), ID16),
    **dict.fromkeys(("generations", "runs", "digests"), st.binary(max_size=100)),
    **dict.fromkeys(("total", "ready"), st.integers(0, (1 << 48) - 1)),
    "version": st.integers(0, (1 << 16) - 1),
    "name": NAME,
    "offers": OFFERS,
    "rank": st.integers(0, 4095),
    "ranks": st.integers(1, 4096),
    "aux": st.binary(min_size=128, max_size=128),
    "integrity": st.text(max_size=16).filter(lambda text: text.isascii()),
    **dict.fromkeys(("via", "path"), WORD),
}


def messages(kind: type[m.Message]) -> st.SearchStrategy[m.Message]:
    return st.builds(kind, **{name: FIELDS[name] for name in kind.__struct_fields__})


OFFER = ["a", 1, "", b"", b""]
LONG_OFFER = ["a", 1, "", bytes(65537), b""]
ANY = st.sampled_from(KINDS).flatmap(messages)


def frame(payload: bytes, *, magic: bytes = MAGIC, version: int = FRAME_VERSION, reserved: bytes = bytes(3)) -> bytes:
    return magic + bytes([version]) + reserved + struct.pack("<I", zlib.crc32(payload)) + payload


def reason(data: bytes) -> str:
    with pytest.raises(BadFrame) as caught:
        decode(data)
    return caught.value.reason


def wire_form(message: m.Message) -> list[Any]:
    """The message as an array: tag first, then the fields."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(message))


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_every_message_survives_the_trip(kind: type[m.Message], data: st.DataObject) -> None:
    message = data.draw(messages(kind))
    assert decode(encode(message)) == message
    assert decode(memoryview(encode(message))) == message


def test_every_kind_has_a_tag_of_its_own() -> None:
    tags = [kind.__struct_config__.tag for kind in KINDS]
    assert len(set(tags)) == len(KINDS) == 19
    assert all(isinstance(tag, str) and len(tag) == 1 for tag in tags)


def test_the_longest_messages_fit_a_frame() -> None:
    offers = tuple(m.Offer("n" * 128, 1, "p" * 32, bytes(64 * 1024), bytes(8 * m.MAX_RUNS)) for _ in range(8))
    hello = m.Hello(
        src=1, dst=2, min_live=3, version=1, name="n" * 128, layout=bytes(16), block_size=1, pool_blocks=1, slabs=1,
        generations=bytes(4 * m.MAX_RUNS), offers=offers, revision=1, ack=1,
    )  # fmt: skip
    assert decode(encode(hello)) == hello
    grant = m.Grant(src=1, dst=2, min_live=3, xfer=4, epoch=5, prefix=6, runs=bytes(16 * m.MAX_RUNS))
    assert decode(encode(grant)) == grant
    done = m.Done(src=1, dst=2, xfer=4, epoch=5, runs=bytes(8 * m.MAX_RUNS), digests=bytes(8 * m.MAX_RUNS),
                  path="p" * 32)  # fmt: skip
    assert decode(encode(done)) == done


def test_what_is_too_long_is_not_encoded() -> None:
    grant = m.Grant(src=1, dst=2, min_live=3, xfer=4, epoch=5, prefix=6, runs=bytes(MAX_FRAME_BYTES))
    with pytest.raises(ValueError, match="does not fit a frame"):
        encode(grant)


# ---------------------------------------------------------------- what is refused


@given(st.binary(max_size=300))
@example(b"")
@example(MAGIC)
@example(frame(b""))
@example(frame(b"\xc0"))
@example(frame(b"\x91" * 100_000))  # nesting
@example(frame(b"\xdd\xff\xff\xff\xff"))  # a list of four billion
@example(frame(b"\xc6\xff\xff\xff\xff"))  # four billion bytes
@example(frame(b"\x81\xa1H\x01"))  # a map
def test_no_bytes_do_more_than_be_refused(data: bytes) -> None:
    for candidate in (data, frame(data)):
        with suppress(BadFrame):  # anything else that is raised fails the test
            message = decode(candidate)
            assert decode(encode(message)) == message


@pytest.mark.parametrize("bad", ["\n", "a\n", "\x1b[2J", "\x7f", "\x9b2J", "a\u2028b", "\u202eab", "\0"])
def test_what_people_read_holds_no_control_characters(bad: str) -> None:
    """Names and paths of whoever speaks stand in logs and on terminals as they are."""
    offer = m.Offer("tcp", 1, "tcp", b"", b"")
    good = m.Hello(
        src=1, dst=2, min_live=3, version=1, name="größe 1", layout=bytes(16), block_size=1, pool_blocks=1, slabs=1,
        generations=b"", offers=(offer, m.Offer("x", 1, "", b"", b"")), revision=1, ack=1,
    )  # fmt: skip
    assert decode(encode(good)) == good
    replace = msgspec.structs.replace
    for spoilt in (
        replace(good, name=bad),
        replace(good, offers=(replace(offer, name=bad),)),
        replace(good, offers=(replace(offer, path=bad),)),
    ):
        assert reason(encode(spoilt)) == "content"
    announce = m.Announce(
        src=1, dst=2, xfer=3, total=4, content_id=bytes(16), present=1, aux=bytes(128), integrity="off", ready=0,
        via="",
    )  # fmt: skip
    assert decode(encode(announce)) == announce
    assert reason(encode(replace(announce, via=bad))) == "content"
    done = m.Done(src=1, dst=2, xfer=3, epoch=1, runs=b"", digests=b"", path="")
    assert decode(encode(done)) == done
    assert reason(encode(replace(done, path=bad))) == "content"


def test_what_a_peer_says_of_its_end_is_shown_without_control_characters() -> None:
    for code in ("cancelled", "unheard_of"):
        cause = from_code(code, "größe\n\x1b[2J\u202ex").cause
        assert cause.endswith("größe\\n\\x1b[2J\\u202ex")


@given(ANY, st.data())
def test_damage_is_noticed(message: m.Message, data: st.DataObject) -> None:
    whole = encode(message)
    cut = data.draw(st.integers(0, len(whole) - 1))
    assert reason(whole[:cut]) in {"size", "checksum"}
    assert reason(whole + b"\0") == "checksum"
    at, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    bent = bytearray(whole)
    bent[at] ^= 1 << bit
    assert reason(bytes(bent)) == ("magic" if at < 4 else "version" if at < 8 else "checksum")


@given(ANY)
def test_other_versions_are_refused(message: m.Message) -> None:
    payload = encode(message)[12:]
    assert decode(frame(payload)) == message
    assert reason(frame(payload, magic=b"XXXX")) == "magic"
    assert reason(frame(payload, version=FRAME_VERSION + 1)) == "version"
    assert reason(frame(payload, version=0)) == "version"
    assert reason(frame(payload, reserved=b"\0\1\0")) == "version"
    assert reason(frame(payload) + bytes(MAX_FRAME_BYTES)) == "size"


@given(ANY, st.data())
def test_a_field_too_many_or_too_few_is_refused(message: m.Message, data: st.DataObject) -> None:
    """A message is told by its tag, never by how many fields it has: no count makes one kind into another."""
    form = wire_form(message)
    assert reason(frame(msgspec.msgpack.encode([*form, 0]))) == "content"
    if len(form) > 1:
        gone = data.draw(st.integers(1, len(form) - 1))
        assert reason(frame(msgspec.msgpack.encode(form[:gone]))) == "content"
    assert reason(frame(msgspec.msgpack.encode(form[1:]))) == "content"


@given(ANY, st.data())
def test_a_field_of_another_type_is_refused(message: m.Message, data: st.DataObject) -> None:
    form = wire_form(message)
    at = data.draw(st.integers(1, len(form) - 1))
    for other in (None, {}, -1, 1 << 63, 1.5, "x" * 2000, [[]]):
        bent = [*form[:at], other, *form[at + 1 :]]
        assert reason(frame(msgspec.msgpack.encode(bent))) == "content"


@pytest.mark.parametrize("tag", ["", "Z", "HH", "h", 7, None, True, ["H"]])
def test_an_unknown_kind_is_refused(tag: object) -> None:
    assert reason(frame(msgspec.msgpack.encode([tag, 1, 2]))) == "content"


PING = ["I", 1, 2]
OPEN = ["O", 1, 2, 3, 4, 5, 0, 1, False]


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(["I", -1, 2], id="negative"),
        pytest.param(["I", 1 << 63, 2], id="64 bits"),
        pytest.param([*OPEN[:6], 4096, 4096, False], id="a rank beyond the bound"),
        pytest.param([*OPEN[:6], 0, 0, False], id="no ranks"),
        pytest.param([*OPEN[:6], 0, 4097, False], id="too many ranks"),
        pytest.param([*OPEN[:8], 1], id="a number for a truth"),
        pytest.param(["G", 1, 2, 3, 4, 5, 6, bytes(16 * m.MAX_RUNS + 1)], id="too many runs"),
        pytest.param(["G", 1, 2, 3, 4, 1 << 32, 6, b""], id="an epoch beyond 32 bits"),
        pytest.param(["D", 1, 2, 3, 4, b"", bytes(8 * m.MAX_RUNS + 1)], id="too many digests"),
        pytest.param(["A", 1, 2, 3, 1 << 48, bytes(16), 0, bytes(128), "full", 0], id="an absurd length"),
        pytest.param(["A", 1, 2, 3, 4, bytes(15), 0, bytes(128), "full", 0], id="a short content_id"),
        pytest.param(["A", 1, 2, 3, 4, bytes(16), 0, bytes(127), "full", 0], id="a short aux record"),
        pytest.param(["A", 1, 2, 3, 4, bytes(16), 0, bytes(128), "x" * 17, 0], id="a long word"),
        pytest.param(["N", 1, 2, 3, "x" * 1025, ""], id="a long code"),
        pytest.param(["H", 1, 2, 3, 1, "", bytes(16), 1, 1, 1, b"", [], 1, 1], id="no name"),
        pytest.param(["H", 1, 2, 3, 1, "n", bytes(16), 1, 1, 1, b"", [OFFER] * 9, 1, 1], id="nine offers"),
        pytest.param(["H", 1, 2, 3, 1, "n", bytes(16), 1, 1, 1, b"", [["a", 1]], 1, 1], id="half an offer"),
        pytest.param(["H", 1, 2, 3, 1, "n", bytes(16), 1, 1, 1, b"", [LONG_OFFER], 1, 1], id="long offer"),
    ],
)  # fmt: skip
def test_what_is_out_of_bounds_is_refused(form: list[object]) -> None:
    assert reason(frame(msgspec.msgpack.encode(form))) == "content"


def test_the_forms_above_would_be_taken_within_their_bounds() -> None:
    assert decode(frame(msgspec.msgpack.encode(PING))) == m.Ping(src=1, dst=2)
    assert isinstance(decode(frame(msgspec.msgpack.encode(OPEN))), m.Open)


def test_text_that_is_no_text_is_refused() -> None:
    good = msgspec.msgpack.encode(["N", 1, 2, 3, "code", ""])
    assert decode(frame(good)) == m.Abort(src=1, dst=2, xfer=3, code="code", cause="")
    assert reason(frame(good.replace(b"code", b"\xff\xfe\xfd\xfc"))) == "content"


# ---------------------------------------------------------------- packed lists


RUN = st.tuples(U32, U32, st.integers(1, 50), U32)


@given(st.lists(RUN, max_size=20))
def test_grants_survive_packing(runs: list[tuple[int, int, int, int]]) -> None:
    assert m.unpack_grant(m.pack_grant(runs)) == runs


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 20)), max_size=10), st.data())
def test_dones_survive_packing(runs: list[tuple[int, int]], data: st.DataObject) -> None:
    indices = [first + k for first, count in runs for k in range(count)]
    digests = data.draw(st.lists(st.integers(0, (1 << 64) - 1), min_size=len(indices), max_size=len(indices)))
    packed = m.pack_digests(digests)
    assert m.unpack_done(m.pack_done(runs), packed) == list(zip(indices, digests, strict=True))
    for wrong in (packed + bytes(8), packed + b"\0", packed[:-8] if packed else b"\0"):
        with pytest.raises(ValueError, match="digests"):
            m.unpack_done(m.pack_done(runs), wrong)


@given(st.lists(st.tuples(U32, U32), max_size=20))
def test_regions_survive_packing(regions: list[tuple[int, int]]) -> None:
    assert m.unpack_regions(m.pack_regions(regions)) == regions


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_packed_lists_refuse_with_valueerror_alone(data: bytes, digests: bytes) -> None:
    for unpack in (m.unpack_grant, m.unpack_regions, lambda packed: m.unpack_done(packed, digests)):
        with suppress(ValueError):
            unpack(data)


@pytest.mark.parametrize(
    ("unpack", "data"),
    [
        pytest.param(m.unpack_grant, bytes(15), id="torn grant"),
        pytest.param(m.unpack_grant, m.pack_grant([(0, 0, 0, 1)]), id="empty grant run"),
        pytest.param(m.unpack_grant, m.pack_grant([(0, 0, (1 << 32) - 1, 1)]), id="a run of four billion"),
        pytest.param(m.unpack_grant, m.pack_grant([(0, 0, 1 << 19, 1)] * 3), id="too many in all"),
        pytest.param(lambda data: m.unpack_done(data, b""), bytes(7), id="torn done"),
        pytest.param(lambda data: m.unpack_done(data, b""), m.pack_done([(0, 0)]), id="empty done run"),
        pytest.param(lambda data: m.unpack_done(data, b""), m.pack_done([(0, 1 << 31)]), id="digests of nothing"),
        pytest.param(m.unpack_regions, bytes(7), id="torn regions"),
    ],
)
def test_a_count_is_bounded_before_anything_is_made_of_it(unpack: Any, data: bytes) -> None:
    with pytest.raises(ValueError, match=r"run|torn|bound|digests|list"):
        unpack(data)
