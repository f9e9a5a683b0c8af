"""Callers in odd places: a finalizer in the endpoint's own thread, and a signal's handler in the middle of a wait."""

from __future__ import annotations

import asyncio
import gc
import itertools
import sys
import threading
from collections.abc import Callable
from concurrent.futures import _base
from contextlib import suppress
from types import FrameType
from typing import Any

import pytest
from scenario_kit import PATIENCE, SMALL, Quay, assert_same, rows

from tensorferry import errors
from tensorferry.core import endpoint, handles

TOKENS = 100

# ---- in an endpoint's own thread ---------------------------------------------------------------------------------


class Request:
    """An application's own: it gives up its transfer when it goes, and only the garbage collector sees that it can."""

    def __init__(self, transfer: Any, raised: list[str]) -> None:
        self.transfer, self.raised, self.me = transfer, raised, self

    def __del__(self) -> None:
        self.raised.append(threading.current_thread().name)
        try:
            self.transfer.cancel()
        except BaseException as problem:  # noqa: BLE001 - told by the test
            self.raised.append(repr(problem))


def test_a_finalizer_that_runs_in_the_endpoints_own_thread_may_cancel() -> None:
    with Quay(layout=SMALL) as quay:
        sending, receiving, told = quay.sender.announce(1, TOKENS), quay.receive(1), []
        for end, transfer in ((quay.receiver, receiving), (quay.sender, sending)):
            told.clear()
            gc.collect()
            gc.disable()
            try:
                Request(transfer, told)
                end._call(gc.collect)
            finally:
                gc.enable()
            assert told == [end._thread.name]  # it raised nothing
            with pytest.raises(errors.Cancelled):
                transfer.wait(PATIENCE)
        quay.carry(TOKENS, room=2)


def test_finalizers_in_two_endpoints_threads_do_not_wait_for_each_other() -> None:
    with Quay(layout=SMALL) as quay:
        sending, receiving = quay.sender.announce(1, TOKENS), quay.receive(2)
        both = threading.Barrier(2)

        def cancels(transfer: Any) -> Callable[[], None]:
            def work() -> None:
                both.wait(PATIENCE)
                transfer.cancel()

            return work

        other = threading.Thread(target=quay.sender._call, args=[cancels(receiving)])
        other.start()
        quay.receiver._call(cancels(sending))
        other.join(PATIENCE)
        for transfer in (sending, receiving):
            with pytest.raises(errors.Cancelled):
                transfer.wait(PATIENCE)


@pytest.mark.parametrize("what", ["receive", "free_blocks", "resolve", "rows", "wait", "result"])
def test_what_needs_an_answer_is_refused_in_the_receivers_own_thread(what: str) -> None:
    with Quay(layout=SMALL) as quay:
        sending, receiving = quay.sender.announce(1, TOKENS), quay.receive(1)
        calls: dict[str, Callable[[], Any]] = {
            "receive": lambda: quay.receive(2), "free_blocks": lambda: quay.receiver.free_blocks,
            "resolve": lambda: receiving.resolve("drop"), "rows": lambda: next(receiving.rows()),
            "wait": receiving.wait, "result": lambda: receiving.result(None),
        }  # fmt: skip
        with pytest.raises(errors.BadCall, match="own thread"):
            quay.receiver._call(calls[what])
        given = rows(TOKENS, layout=SMALL)
        sending.put(0, **given)
        assert_same(receiving.result(PATIENCE), given)
        sending.wait(PATIENCE)


@pytest.mark.parametrize("what", ["announce", "put", "wait"])
def test_what_needs_an_answer_is_refused_in_the_senders_own_thread(what: str) -> None:
    with Quay(layout=SMALL) as quay:
        given = rows(TOKENS, layout=SMALL)
        sending, receiving = quay.sender.announce(1, TOKENS), quay.receive(1)
        calls: dict[str, Callable[[], Any]] = {
            "announce": lambda: quay.sender.announce(2, 5), "put": lambda: sending.put(0, **given),
            "wait": sending.wait,
        }  # fmt: skip
        with pytest.raises(errors.BadCall, match="own thread"):
            quay.sender._call(calls[what])
        sending.put(0, **given)  # nothing has changed
        assert_same(receiving.result(PATIENCE), given)
        sending.wait(PATIENCE)


def test_a_thread_that_does_not_answer_is_a_typed_error_and_what_was_asked_is_not_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Quay(layout=SMALL) as quay:
        monkeypatch.setattr(endpoint, "CALL_SECONDS", 0.05)
        begun, go, done = threading.Event(), threading.Event(), []

        def stand_still() -> None:
            begun.set()
            assert go.wait(PATIENCE)

        def ask() -> None:
            with pytest.raises(errors.InternalError, match="not answered within"):
                quay.receiver._call(stand_still)

        standing = threading.Thread(target=ask)
        standing.start()
        assert begun.wait(PATIENCE)
        standing.join(PATIENCE)  # it has given up; the thread stands still all the same
        with pytest.raises(errors.InternalError, match="not answered within"):
            quay.receiver._call(lambda: done.append(1))
        go.set()
        monkeypatch.undo()
        quay.carry(TOKENS)
        assert done == []


# ---- in a signal's handler ---------------------------------------------------------------------------------------

WAITING = tuple(module.__file__ for module in (endpoint, handles, threading, _base))
"""Where a caller may be while it waits."""


def interrupted(number: int, call: Callable[[], object], handler: Callable[[], object]) -> bool:
    """`call`, with `handler` called before line `number` of those that it runs there: Python calls a signal's handler
    between two lines of whatever the main thread is at. False where `call` was over before."""
    left = number

    def at_line(frame: FrameType, event: str, value: object) -> Any:
        nonlocal left
        if event == "line":
            left -= 1
            if left == 0:
                handler()
        return at_line

    def enter(frame: FrameType, event: str, value: object) -> Any:
        return at_line if frame.f_code.co_filename in WAITING else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        call()
    finally:
        sys.settrace(before)
    return left <= 0


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for itself is noticed after a while, and not after a minute for each line."""
    monkeypatch.setattr(endpoint, "CALL_SECONDS", 10.0)


@pytest.mark.usefixtures("impatient")
def test_a_handler_may_call_wherever_a_call_is() -> None:
    with Quay(layout=SMALL) as quay:
        for number in itertools.count(1):
            go, told = threading.Event(), list[int]()

            def slow(go: threading.Event = go) -> None:
                go.wait(0.05)  # so that the caller is waiting when the handler comes

            def handler(go: threading.Event = go, told: list[int] = told) -> None:
                go.set()
                told.append(quay.receiver.free_blocks)

            if not interrupted(number, lambda slow=slow: quay.receiver._call(slow), handler):  # type: ignore[misc]
                break
            assert told == [quay.receiver.pool_blocks]
        assert number > 20


def waits(how: str, transfer: Any) -> Callable[[], object]:
    async def awaited() -> None:
        async with asyncio.timeout(0.2):
            await transfer

    calls = {
        "wait": lambda: transfer.wait(0.2),
        "rows": lambda: next(transfer.rows(0.2)),
        "await": lambda: asyncio.run(awaited()),
    }
    return calls[how]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("how", ["wait", "rows", "await"])
def test_a_handler_may_cancel_what_is_waited_for_wherever_the_waiter_is(how: str) -> None:
    with Quay(layout=SMALL) as quay:
        for number in itertools.count(1):
            receiving = quay.receive(number)
            over = False
            with suppress(errors.Cancelled, errors.DeadlineExceeded, TimeoutError):
                over = not interrupted(number, waits(how, receiving), receiving.cancel)
            if over or not receiving.done:
                receiving.cancel()
                break
            with pytest.raises(errors.Cancelled):
                receiving.wait(PATIENCE)
        assert number > 10


@pytest.mark.usefixtures("impatient")
def test_a_handler_may_close_while_its_thread_waits() -> None:
    with Quay(layout=SMALL, clean=False) as quay:
        for number in itertools.count(1):
            receiver = quay.add_receiver()
            receiving = receiver.receive(number, quay.sender.address)
            with suppress(errors.Cancelled, errors.DeadlineExceeded):
                interrupted(number, waits("wait", receiving), receiver.close)
            if not receiver._closing:
                break
            assert receiver._over  # it has not waited in vain
        assert number > 10
