"""What callers pass in: any kind of integer is a number, and what is none is refused at once, by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scenario_kit import PATIENCE, SMALL, Quay, assert_same, books, rows

import tensorferry as tf
from tensorferry import errors

INTEGERS: dict[str, Callable[[int], Any]] = {
    "int": int, "numpy": np.int64, "numpy uint8": np.uint8, "numpy array": np.array, "torch": torch.tensor,
}  # fmt: skip


class Odd(int):
    """A subclass of int that is somebody's own type."""

    def __repr__(self) -> str:
        return "odd"


@pytest.mark.parametrize("kind_of_integer", [*INTEGERS, "subclass"])
def test_any_kind_of_integer_is_a_number(kind_of_integer: str) -> None:
    n = INTEGERS.get(kind_of_integer, Odd)
    with Quay() as quay:
        given = rows(20, layout=quay.layout)
        sending = quay.sender.announce(n(7), n(20), aux=[n(3), n(4)], mrope_delta=n(5))
        receiving = quay.receive(n(7))
        sending.put(n(0), **{name: tensor[:8] for name, tensor in given.items()})
        sending.put(n(8), **{name: tensor[8:] for name, tensor in given.items()})
        assert_same(receiving.result(PATIENCE), given)
        assert receiving.result().aux[:5] == (20, 5, 3, 4, 0)
        sending.wait(PATIENCE)
        for number in (sending.room, sending.total_tokens, receiving.room):
            assert type(number) is int


@pytest.mark.parametrize("kind_of_integer", INTEGERS)
def test_a_rank_is_any_kind_of_integer(kind_of_integer: str) -> None:
    n = INTEGERS[kind_of_integer]
    group = tf.Group(n(1), n(2), "tcp://127.0.0.1:5000")
    assert group == tf.Group(1, 2, "tcp://127.0.0.1:5000")
    assert (type(group.rank), type(group.ranks)) == (int, int)


@pytest.mark.parametrize("group", [(0.0, 1), (False, 1), (0, True), ("0", 1), (None, 1), (0, 1, None), (0, 1, 5)])
def test_a_rank_that_is_none_is_refused(group: Any) -> None:
    with pytest.raises(errors.ConfigError, match=r"(rank|ranks) is an integer|address is a string"):
        tf.Group(*group)


@pytest.mark.parametrize("what", [np.bool_(True), 1, torch.tensor(True)])
def test_a_dummy_rank_may_be_said_with_any_truth(what: Any) -> None:
    with Quay(ranks=2) as quay:
        sending = quay.sender.send(1, **rows(30))
        receiving = [quay.receive(1), quay.receive(1, 1, dummy=what)]
        for one in (*receiving, sending):
            one.wait(PATIENCE)


X = rows(10, layout=SMALL)

WRONG: dict[str, tuple[str, Callable[[tf.Sender, tf.Receiver], Any]]] = {
    "room text": ("room is an integer, not '1'", lambda s, r: s.send("1", **X)),  # type: ignore[arg-type]
    "room none": ("room is an integer", lambda s, r: s.announce(None, 5)),  # type: ignore[arg-type]
    "room float": ("room is an integer, not 4.0", lambda s, r: r.receive(4.0, s.address)),  # type: ignore[arg-type]
    "room bool": ("room is an integer, not True", lambda s, r: r.receive(True, s.address)),
    "room torch bool": ("room is an integer", lambda s, r: r.receive(torch.tensor(True), s.address)),  # type: ignore[arg-type]
    "room numpy bool": ("room is an integer", lambda s, r: r.receive(np.bool_(True), s.address)),  # type: ignore[arg-type]
    "room array": ("room is an integer", lambda s, r: r.receive(np.zeros(3, int), s.address)),  # type: ignore[arg-type]
    "room beyond": (r"room \d+ is not in \[0, 2\*\*63\)", lambda s, r: r.receive(1 << 63, s.address)),
    "address none": ("address is a string, not None", lambda s, r: r.receive(1, None)),  # type: ignore[arg-type]
    "address bytes": ("address is a string", lambda s, r: r.receive(1, b"tcp://127.0.0.1:1")),  # type: ignore[arg-type]
    "address surrogate": ("address .* cannot be encoded", lambda s, r: r.receive(1, "tcp://\ud800:1")),
    "total beyond": (r"total_tokens \d+ is not in \[0, 2\*\*48\)", lambda s, r: s.announce(1, 1 << 48)),
    "total far beyond": (r"total_tokens \d+ is not in \[0, 2\*\*48\)", lambda s, r: s.announce(1, 1 << 70)),
    "total below": (r"total_tokens -1 is not in", lambda s, r: s.announce(1, -1)),
    "total float": ("total_tokens is an integer, not 10.0", lambda s, r: s.announce(1, 10.0)),  # type: ignore[arg-type]
    "total bool": ("total_tokens is an integer", lambda s, r: s.announce(1, True)),
    "id number": ("content_id is 16 bytes, not 16", lambda s, r: s.send(1, content_id=16, **X)),  # type: ignore[arg-type]
    "id text": ("content_id is 16 bytes", lambda s, r: s.send(1, content_id="x" * 16, **X)),  # type: ignore[arg-type]
    "id short": ("content_id has 15 bytes", lambda s, r: s.send(1, content_id=bytes(15), **X)),
    "id list": ("content_id is 16 bytes", lambda s, r: s.send(1, content_id=[0] * 16, **X)),  # type: ignore[arg-type]
    "aux none": ("aux is a sequence", lambda s, r: s.send(1, aux=None, **X)),  # type: ignore[arg-type]
    "aux number": ("aux is a sequence", lambda s, r: s.send(1, aux=5, **X)),  # type: ignore[arg-type]
    "aux float": (r"aux\[1\] is an integer, not 1.5", lambda s, r: s.send(1, aux=[1, 1.5], **X)),  # type: ignore[list-item]
    "aux text": (r"aux\[0\] is an integer", lambda s, r: s.send(1, aux="ab", **X)),  # type: ignore[arg-type]
    "aux beyond": (r"aux\[0\] \d+ is not in \[-2\*\*63, 2\*\*63\)", lambda s, r: s.send(1, aux=[1 << 63], **X)),
    "aux long": ("aux has 15 words", lambda s, r: s.send(1, aux=torch.zeros(15, dtype=torch.int64), **X)),  # type: ignore[arg-type]
    "delta none": ("mrope_delta is an integer", lambda s, r: s.send(1, mrope_delta=None, **X)),  # type: ignore[arg-type]
    "delta float": ("mrope_delta is an integer", lambda s, r: s.send(1, mrope_delta=1.5, **X)),  # type: ignore[arg-type]
    "delta beyond": ("mrope_delta -.* is not in", lambda s, r: s.send(1, mrope_delta=-(1 << 63) - 1, **X)),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_not_such_a_thing_is_refused_by_its_name_and_changes_nothing(what: str) -> None:
    message, call = WRONG[what]
    with Quay(layout=SMALL) as quay:
        with pytest.raises(errors.BadCall, match=message):
            call(quay.sender, quay.receiver)
        assert (books(quay.sender), books(quay.receiver)) == ({}, {})
        quay.carry(10)


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "a\n", "\u202eab"])
def test_a_name_that_no_log_can_show_is_refused(name: str) -> None:
    with pytest.raises(errors.ConfigError, match="control characters"):
        tf.Sender(SMALL, transport="shm", name=name)


@pytest.mark.parametrize("components", [5, "input_embeds", [1, 2], [None, "input_embeds"], [["input_embeds"]]])
def test_components_that_are_no_names_are_refused(components: Any) -> None:
    with Quay(layout=SMALL) as quay, pytest.raises(errors.BadTensor, match="components are names"):
        quay.sender.announce(1, 5, components=components)


@pytest.mark.parametrize("start", [0.0, False, None, "0", 1, -1])
def test_rows_at_no_token_are_refused_and_the_next_are_taken(start: Any) -> None:
    with Quay(layout=SMALL) as quay:
        sending, receiving = quay.sender.announce(1, 10), quay.receive()
        with pytest.raises(errors.BadCall, match=r"start is an integer|put at token"):
            sending.put(start, **X)
        sending.put(0, **X)
        assert_same(receiving.result(PATIENCE), X)
        sending.wait(PATIENCE)


@pytest.mark.parametrize("content_id", [bytes(16), bytearray(16), memoryview(bytes(16))])
def test_sixteen_bytes_in_any_form_are_an_id(content_id: Any) -> None:
    with Quay(layout=SMALL) as quay:
        sending = quay.sender.send(1, content_id=content_id, **X)
        assert_same(quay.receive().result(PATIENCE), X)
        sending.wait(PATIENCE)


def test_a_receive_that_is_refused_leaves_no_connection_behind() -> None:
    with Quay(layout=SMALL, max_rooms=2) as quay:
        sockets = quay.receiver._control.routes
        receiving = quay.receive(1)
        with_one = quay.receiver._control.routes
        assert len(with_one) == len(sockets) + 1
        with pytest.raises(errors.RoomInUse):
            quay.receiver.receive(1, "tcp://127.0.0.1:7")
        second = quay.receive(2)
        with pytest.raises(errors.Overloaded):
            quay.receiver.receive(3, "tcp://127.0.0.1:7")
        with pytest.raises(errors.ConfigError):
            quay.receiver.receive(4, "nonsense")
        with pytest.raises(errors.RoomInUse):
            quay.receive(1)  # of a sender that is in use: its connection stays
        assert quay.receiver._control.routes == with_one
        for one in (receiving, second):
            one.cancel()
