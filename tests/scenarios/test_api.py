"""The public names as an application uses them: order, pieces, waiting, awaiting, rows as they come, and ownership."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import weakref
from typing import Any

import pytest
import torch
from fault_kit import FAULTY, proxy
from scenario_kit import CHOOSERS, PATIENCE, SMALL, Quay, assert_clean, assert_same, eventually, rows

import tensorferry as tf
from tensorferry import errors
from tensorferry.core.endpoint import Asked
from tensorferry.core.source import Source

SIZES: dict[str, Any] = {"layout": SMALL, "block_size": 16, "pool_blocks": 8, "first_grant": 64}
TOKENS = 1000
RICH = tf.embedding_layout(hidden_size=512, dtype="float32", deepstack_layers=2)


def part(given: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    return {name: tensor[start:stop] for name, tensor in given.items()}


@pytest.mark.parametrize("first", ["send", "receive"])
def test_send_may_come_before_or_after_receive(kind: str, first: str) -> None:
    with Quay(kind, **SIZES) as quay:
        given = rows(TOKENS, layout=SMALL)
        sending = quay.sender.send(1, **given) if first == "send" else None
        receiving = quay.receive()
        if sending is None:
            eventually(lambda: receiving.status == "WAITING_FOR_INPUT")
            sending = quay.sender.send(1, **given)
        assert_same(receiving.result(PATIENCE), given)
        sending.wait(PATIENCE)
        assert (sending.status, receiving.status) == ("SUCCESS", "SUCCESS")
        assert sending.error is receiving.error is None


@pytest.mark.parametrize("pieces", [[1] * 200, [7, 1, 30, 16, 15, 17, 333, 581], [16] * 62 + [8], [0, 999, 0, 1, 0]])
@pytest.mark.parametrize("window", ["rounds", "auto"])
def test_rows_may_be_put_in_pieces_of_any_size(kind: str, pieces: list[int], window: str) -> None:
    with Quay(kind, **SIZES, window=window, choose=CHOOSERS["random"]) as quay:
        total = sum(pieces)
        given = rows(total, layout=SMALL)
        receiving, at = quay.receive(), 0
        sending = quay.sender.announce(1, total)
        for n in pieces:
            sending.put(at, **part(given, at, at + n))
            at += n
        assert_same(receiving.result(PATIENCE), given)
        sending.wait(PATIENCE)


def test_many_small_pieces_in_a_large_block_are_no_trouble(kind: str) -> None:
    """More pieces in one block than a transport takes copies in one post."""
    total = 1500
    with Quay(kind, layout=RICH, block_size=2048, pool_blocks=2, staging_bytes=16 << 20) as quay:
        given = rows(total, layout=RICH)
        sending, receiving = quay.sender.announce(1, total), quay.receive()
        for at in range(total):
            sending.put(at, **part(given, at, at + 1))
        assert_same(receiving.result(PATIENCE), given)
        sending.wait(PATIENCE)


def test_rows_that_are_ready_arrive_before_the_rest_is_there(kind: str) -> None:
    with Quay(kind, **SIZES) as quay:
        given = rows(TOKENS, layout=SMALL)
        sending, receiving = quay.sender.announce(1, TOKENS), quay.receive()
        eventually(lambda: receiving.total_tokens == TOKENS)
        for at in range(0, TOKENS, 200):
            sending.put(at, **part(given, at, at + 200))
            whole = at + 200 if at + 200 == TOKENS else (at + 200) // 16 * 16
            eventually(lambda whole=whole: receiving.ready_tokens == whole)
        assert_same(receiving.result(PATIENCE), given)
        sending.wait(PATIENCE)


def test_both_sides_can_be_awaited(kind: str) -> None:
    with Quay(kind, **SIZES) as quay:
        given = {room: rows(TOKENS, room, SMALL) for room in range(5)}

        async def one(room: int) -> None:
            receiving = quay.receive(room)
            sending = quay.sender.send(room, **given[room])
            result, nothing = await asyncio.gather(receiving, sending)
            assert nothing is None
            assert_same(result, given[room])
            assert await receiving is result  # again, and after the end

        async def all_of_them() -> None:
            await asyncio.gather(*(one(room) for room in given))
            cancelled = quay.receive(9)
            asyncio.get_running_loop().call_soon(cancelled.cancel)
            with pytest.raises(errors.Cancelled):
                await cancelled

        asyncio.run(asyncio.wait_for(all_of_them(), PATIENCE))


def test_giving_up_an_await_leaves_the_transfer_alone(kind: str) -> None:
    with Quay(kind, **SIZES) as quay:
        receiving = quay.receive()

        async def impatient() -> None:
            async with asyncio.timeout(0.05):
                await receiving

        with pytest.raises(TimeoutError):
            asyncio.run(impatient())
        given = rows(TOKENS, layout=SMALL)
        sending = quay.sender.send(1, **given)  # the loop that waited is closed by now
        assert_same(receiving.result(PATIENCE), given)
        sending.wait(PATIENCE)


def test_awaits_that_were_given_up_leave_nothing_on_the_transfer() -> None:
    with Quay(**SIZES) as quay:
        receiving = quay.receive()

        async def waiting() -> Any:
            return await receiving

        async def impatient() -> None:
            patient = asyncio.ensure_future(waiting())
            for _ in range(20):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(waiting(), 0.001)
            assert len(receiving._waiters) == 1
            given = rows(TOKENS, layout=SMALL)
            quay.sender.send(1, **given)
            assert_same(await patient, given)

        asyncio.run(asyncio.wait_for(impatient(), PATIENCE))
        assert not receiving._waiters


def test_a_loop_that_closes_at_the_wrong_moment_is_no_other_waiters_trouble() -> None:
    with Quay(**SIZES) as quay:
        receiving = quay.receive()
        given = rows(TOKENS, layout=SMALL)

        async def waiting() -> Any:
            return await receiving

        async def both() -> None:
            loop = asyncio.get_running_loop()
            call_soon = loop.call_soon_threadsafe
            answers = iter([RuntimeError("Event loop is closed"), None, None])

            def closed_at_first(*arguments: Any) -> Any:
                if (problem := next(answers)) is not None:
                    raise problem
                return call_soon(*arguments)

            def broken() -> None:
                raise ValueError("a waiter of some other kind")

            receiving._waiters.append(broken)
            lost, told = asyncio.ensure_future(waiting()), asyncio.ensure_future(waiting())
            await asyncio.sleep(0)  # both are waiting now
            loop.call_soon_threadsafe = closed_at_first  # type: ignore[method-assign]
            quay.sender.send(1, **given)
            assert_same(await told, given)
            assert not lost.done()
            lost.cancel()

        asyncio.run(asyncio.wait_for(both(), PATIENCE))


def test_a_wait_that_times_out_says_so_and_the_transfer_goes_on(kind: str) -> None:
    with Quay(kind, **SIZES) as quay:
        receiving = quay.receive()
        for wait in (lambda: receiving.wait(0.01), lambda: receiving.result(), lambda: next(receiving.rows(0.01))):
            with pytest.raises(errors.DeadlineExceeded, match="goes on"):
                wait()
        sending = quay.sender.announce(1, TOKENS)
        with pytest.raises(errors.DeadlineExceeded):
            sending.wait(0.01)
        given = rows(TOKENS, layout=SMALL)
        sending.put(0, **given)
        assert_same(receiving.result(PATIENCE), given)
        sending.wait(PATIENCE)


def test_how_long_a_wait_may_be() -> None:
    with Quay(**SIZES) as quay:
        receiving = quay.receive()
        for none in (0, -1, -math.inf):
            with pytest.raises(errors.DeadlineExceeded):
                receiving.wait(none)
        for wait in (receiving.wait, receiving.result, lambda nan: next(receiving.rows(nan))):
            with pytest.raises(errors.BadCall, match="nan"):
                wait(math.nan)
        given = rows(TOKENS, layout=SMALL)
        quay.sender.send(1, **given).wait(1e300)
        assert_same(receiving.result(math.inf), given)
        assert [stop for _, stop, _ in receiving.rows(math.inf)] == [TOKENS]


def test_a_wait_for_ever_ends_when_the_transfer_does() -> None:
    with Quay(**SIZES) as quay:
        receiving, waited = quay.receive(), threading.Event()

        def wait() -> None:
            with pytest.raises(errors.Cancelled):
                receiving.wait(math.inf)
            waited.set()

        threading.Thread(target=wait, daemon=True).start()
        eventually(lambda: receiving._bells._hung)  # it waits
        receiving.cancel()
        assert waited.wait(PATIENCE)


def test_whoever_sees_success_sees_every_token_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []

    def set_and_look(transfer: Any, name: str, value: Any) -> None:
        object.__setattr__(transfer, name, value)
        if transfer.__dict__.get("status") == "SUCCESS":
            sent.append(transfer.sent_tokens)

    monkeypatch.setattr(tf.SendTransfer, "__setattr__", set_and_look, raising=False)
    with Quay(**SIZES) as quay:
        quay.carry(TOKENS)
    assert set(sent) == {TOKENS}


def test_rows_that_are_put_as_their_transfer_ends_raise_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with Quay(**SIZES) as quay:
        sending, put = quay.sender.announce(1, TOKENS), Source.put

        def too_late(source: Source, start: int, /, **components: Any) -> None:
            sending.cancel()
            put(source, start, **components)

        monkeypatch.setattr(Source, "put", too_late)
        with pytest.raises(errors.Cancelled):
            sending.put(0, **rows(TOKENS, layout=SMALL))


def test_rows_come_in_order_each_once_while_the_rest_is_on_its_way(kind: str) -> None:
    with Quay(kind, **SIZES) as quay:
        given = rows(TOKENS, layout=SMALL)
        sending, receiving = quay.sender.send(1, **given), quay.receive()
        at = 0
        for start, stop, views in receiving.rows(PATIENCE):
            assert start == at < stop
            assert_same(views, part(given, start, stop))
            at = stop
        assert at == TOKENS
        assert_same(receiving.result(), given)
        sending.wait(PATIENCE)
        assert [(a, b) for a, b, _ in receiving.rows()] == [(0, TOKENS)]  # after the end: all at once


def test_rows_keep_their_time_where_the_leader_does_not_say_what_became_of_the_room() -> None:
    with Quay(**SIZES, ranks=2) as quay:
        given = rows(400, layout=SMALL)
        sending = quay.sender.announce(1, 400)
        leading, receiving = quay.receive(1), quay.receive(1, rank=1)
        sending.put(0, **part(given, 0, 100))
        arriving = receiving.rows(0.5)
        next(arriving)
        sending.put(100, **part(given, 100, 200))
        eventually(lambda: receiving.ready_tokens == 192)
        begun, go, follower = threading.Event(), threading.Event(), quay.receivers[1]
        quay.receiver._commands.append(Asked(lambda: begun.set() or go.wait(PATIENCE)))  # type: ignore[func-returns-value]
        assert begun.wait(PATIENCE)  # the leader stands still
        error = errors.InternalError("this rank cannot go on")
        follower._call(lambda: follower._do(follower.machine.fail(receiving._xfer, error)))
        try:
            with pytest.raises(errors.DeadlineExceeded, match=r"not finished within 0\.5 s"):
                next(arriving)
        finally:
            go.set()
        for transfer in (leading, receiving, sending):
            with pytest.raises(errors.InternalError):
                transfer.wait(PATIENCE)


def test_absent_components_are_none_and_cost_no_bytes(kind: str) -> None:
    with Quay(kind, layout=RICH, sender_transport=FAULTY[kind]) as quay:
        only = rows(TOKENS, layout=RICH, names=("input_embeds",))
        sending, receiving = quay.sender.send(1, **only, deepstack_embeds=None), quay.receive()
        assert_same(receiving.result(PATIENCE), only)
        sending.wait(PATIENCE)
        assert proxy(quay.sender).bytes_posted == TOKENS * 512 * 4
        everything = quay.carry(TOKENS, room=2)  # and the next one inherits nothing
        assert everything.result().deepstack_embeds is not None
        two = rows(10, layout=RICH, names=("input_embeds", "fill_ids"))
        sending, receiving = quay.sender.send(3, **two), quay.receive(3)
        assert_same(receiving.result(PATIENCE), two)
        sending.wait(PATIENCE)


def test_the_aux_record_travels_and_is_not_inherited(kind: str) -> None:
    with Quay(kind, **SIZES) as quay:
        words = [-(2**63), 2**63 - 1, *range(12)]
        sending = quay.sender.send(1, aux=words, mrope_delta=-7, **rows(20, layout=SMALL))
        assert quay.receive(1).result(PATIENCE).aux == (20, -7, *words)
        sending.wait(PATIENCE)
        quay.sender.send(2, **rows(0, layout=SMALL))
        assert quay.receive(2).result(PATIENCE).aux == (0,) * 16


def test_a_result_is_the_callers_alone(kind: str) -> None:
    """Not a view of the pool: later transfers through the same blocks do not change it, nor does it change them."""
    with Quay(kind, layout=RICH, block_size=16, pool_blocks=2, choose=CHOOSERS["lowest-first"]) as quay:
        given = rows(100, 1, RICH)
        quay.sender.send(1, **given)
        first = quay.receive(1).result(PATIENCE)
        quay.carry(100, room=2, seed=2)
        assert_same(first, given)
        pool = [quay.receiver._buffers.memory(k) for k in range(quay.receiver.geometry.slab_count)]
        for name in first:
            tensor = first[name]
            assert tensor is not None
            assert tensor.data_ptr() % 64 == 0
            assert tensor.is_contiguous()
            assert not any(m.address <= tensor.data_ptr() < m.address + m.nbytes for m in pool)
            tensor.view(torch.uint8).fill_(0xAB)
        quay.carry(100, room=3, seed=3)


def test_a_result_outlives_its_receiver_and_the_senders_rows_are_let_go_of(kind: str) -> None:
    quay = Quay(kind, **SIZES)
    given = rows(TOKENS, layout=SMALL)
    mine = {name: tensor.clone() for name, tensor in given.items()}
    watched = [weakref.ref(tensor) for tensor in mine.values()]
    sending = quay.sender.send(1, **mine)
    result = quay.receive().result(PATIENCE)
    sending.wait(PATIENCE)
    assert_clean(quay.sender)
    mine.clear()

    def gone() -> bool:
        gc.collect()
        return all(ref() is None for ref in watched)

    eventually(gone)
    quay.close()
    assert_same(result, given)


BAD: dict[str, dict[str, Any]] = {
    "dtype": {"input_embeds": torch.zeros(5, 8)},
    "shape": {"input_embeds": torch.zeros(5, 9, dtype=torch.bfloat16)},
    "lengths": {"input_embeds": torch.zeros(5, 8, dtype=torch.bfloat16), "fill_ids": torch.zeros(4, dtype=torch.int32)},
    "no tensor": {"input_embeds": [[0.0] * 8]},
    "unknown": {"input_embeds": torch.zeros(5, 8, dtype=torch.bfloat16), "output_embeds": torch.zeros(5)},
    "missing": {"fill_ids": torch.zeros(5, dtype=torch.int32)},
    "nothing": {},
    "channel-major": {
        "input_embeds": torch.zeros(5, 8, dtype=torch.bfloat16), "mrope_positions": torch.zeros(3, 5, dtype=torch.int32)
    },
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_rows_that_do_not_fit_are_refused_and_the_room_stays_free(what: str) -> None:
    with Quay(**SIZES) as quay:
        with pytest.raises(errors.BadTensor):
            quay.sender.send(1, **BAD[what])
        quay.carry(50)


def test_calls_that_make_no_sense_are_refused_and_change_nothing() -> None:
    with Quay(**SIZES) as quay:
        given = rows(100, layout=SMALL)
        for call in (
            lambda: quay.sender.announce(-1, 5), lambda: quay.sender.announce(1 << 63, 5), lambda: quay.receive(-1),
            lambda: quay.sender.announce(1, -5), lambda: quay.sender.announce(1, 5, content_id=b"short"),
            lambda: quay.sender.announce(1, 5, aux=[0] * 15), lambda: quay.sender.announce(1, 5, aux=[1 << 63]),
            lambda: quay.sender.send(1, mrope_delta=1 << 63, **given),
        ):  # fmt: skip
            with pytest.raises(errors.BadCall):
                call()
        sending, receiving = quay.sender.announce(1, 100), quay.receive()
        for start, stop in ((1, 5), (0, 101)):
            with pytest.raises((errors.BadCall, errors.BadTensor)):
                sending.put(start, **{name: torch.cat([t, t])[start:stop] for name, t in given.items()})
        with pytest.raises(errors.BadTensor):
            sending.put(0, input_embeds=given["input_embeds"])
        sending.put(0, **given)
        assert_same(receiving.result(PATIENCE), given)
        sending.wait(PATIENCE)
        with pytest.raises(errors.BadCall, match="ended"):
            sending.put(100, **part(given, 0, 0))


def test_what_the_configuration_cannot_be_is_refused_before_anything_is_opened() -> None:
    cases: list[tuple[dict[str, Any], type[errors.FerryError]]] = [
        ({"transport": "no-such-engine"}, errors.UnknownTransport),
        ({"pool_blokcs": 3}, errors.UnknownOption),
        ({"transport": "shm", "options": {"no_such": 1}}, errors.UnknownOption),
        ({"block_size": 0}, errors.ConfigError),
        ({"peer_timeout": 1, "heartbeat": 2}, errors.ConfigError),
        ({"window": "sometimes"}, errors.ConfigError),
    ]
    for arguments, kind in cases:
        for make in (tf.Sender, tf.Receiver):
            with pytest.raises(kind):
                make(SMALL, **arguments)
    with pytest.raises(errors.ConfigError):
        tf.Sender(SMALL, transport="memory", bind="tcp://256.1.1.1:0")
    with tf.Sender(SMALL, transport="memory") as sender, pytest.raises(errors.ConfigError):
        tf.Sender(SMALL, transport="memory", bind=sender.address)


@pytest.mark.parametrize("integrity", ["full", "sampled", "off"])
def test_any_integrity_carries_every_byte(kind: str, integrity: str) -> None:
    with Quay(kind, layout=RICH, pool_blocks=4, integrity=integrity) as quay:
        quay.carry(3000)


def test_a_layout_of_the_callers_own_travels_like_the_standard_one(kind: str) -> None:
    layout = tf.Layout(
        [
            tf.Component("scores", "float64"),
            tf.Component("flags", "bool", (3,)),
            tf.Component("codes", "uint8", (7, 300)),
        ]
    )
    with Quay(kind, layout=layout, pool_blocks=3, choose=CHOOSERS["highest-first"]) as quay:
        quay.carry(1000)
        quay.carry(0, room=2)
