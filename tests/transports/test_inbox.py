"""The box of what other threads hand to an engine's thread: all of it, in order, and never a wait beyond its time."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

import pytest

from tensorferry.backends._inbox import Inbox


@pytest.fixture
def interrupted_in_its_wait() -> Iterator[None]:
    """50 ms from now this thread is interrupted, for longer than the 100 ms that it wants to wait."""

    def hold_up(number: int, frame: object) -> None:
        time.sleep(0.3)

    before = signal.signal(signal.SIGUSR2, hold_up)
    timer = threading.Timer(0.05, signal.pthread_kill, (threading.main_thread().ident, signal.SIGUSR2))
    timer.start()
    yield
    timer.join()
    signal.signal(signal.SIGUSR2, before)


@pytest.mark.usefixtures("interrupted_in_its_wait")
@pytest.mark.timeout(10)
def test_a_wait_whose_time_passes_while_something_else_runs_is_over() -> None:
    # queue.SimpleQueue.get(timeout=0.1) does not come back from this: what is left of the time is negative by then.
    assert Inbox[int]().take(0.1) == []


def test_what_was_put_is_taken_once_and_in_order() -> None:
    inbox = Inbox[int]()
    assert inbox.take() == []
    for number in range(3):
        inbox.put(number)
    assert inbox.take() == [0, 1, 2]
    assert inbox.take() == []


@pytest.mark.parametrize("timeout", [None, 30.0])
def test_what_is_put_ends_a_wait(timeout: float | None) -> None:
    inbox = Inbox[str]()
    threading.Timer(0.05, inbox.put, ("here",)).start()
    assert inbox.take(timeout) == ["here"]


def test_a_time_that_has_passed_is_no_wait() -> None:
    assert Inbox[int]().take(-1.0) == []


def test_nothing_is_lost_or_taken_twice_between_four_threads_that_put_and_one_that_takes() -> None:
    inbox = Inbox[tuple[int, int]]()
    count = 5000
    threads = [
        threading.Thread(target=lambda part=part: [inbox.put((part, number)) for number in range(count)])
        for part in range(4)
    ]
    for thread in threads:
        thread.start()
    taken: list[tuple[int, int]] = []
    while len(taken) < 4 * count:
        taken += inbox.take(0.0005)
    for thread in threads:
        thread.join()
    assert inbox.take() == []
    for part in range(4):
        assert [number for whose, number in taken if whose == part] == list(range(count))


def test_a_put_in_the_middle_of_a_put_is_taken_too() -> None:
    # As when the garbage collector runs there, and ends a transport that nobody has closed.
    inbox = Inbox[int]()
    lock, pending = inbox._bell, [2]

    class Bell:
        def release(self) -> None:
            if pending:
                inbox.put(pending.pop())
            lock.release()

        def acquire(self, timeout: float) -> bool:
            return lock.acquire(timeout=timeout)

    inbox._bell = Bell()  # type: ignore[assignment]
    inbox.put(1)
    assert inbox.take() == [1, 2]
