"""Callers in odd places: a finalizer in the endpoint's own thread, and a signal's handler in the middle of a wait."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
from scenario_kit import PATIENCE, SMALL, Quay, assert_same, rows

from tensorferry import errors
from tensorferry.core import endpoint

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
        with pytest.raises(errors.InternalError, match="not answered within"):
            quay.receiver._call(lambda: done.append(1))
        go.set()
        standing.join(PATIENCE)
        monkeypatch.undo()
        quay.carry(TOKENS)
        assert done == []
