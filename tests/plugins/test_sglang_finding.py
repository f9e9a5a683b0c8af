"""`resolve`, which finds a sender's address: beside the scheduler's loop, bounded, and each failure one request's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from scenario_kit import PATIENCE, SMALL, eventually

from tensorferry import errors
from tensorferry.plugins.sglang import FerryKVManager, FerryKVReceiver, KVPoll, finding

ADDRESS = "tcp://127.0.0.1:9"


class Slow:
    """A `resolve` that answers when `answers` is set, and notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.answers = threading.Event()

    def __call__(self, bootstrap_addr: str, dp_rank: int) -> str:
        self.asked.append((bootstrap_addr, dp_rank))
        self.answers.wait(PATIENCE)  # who would hold the loop up is found out, and holds up no test
        return ADDRESS


@pytest.fixture
def slow() -> Iterator[Slow]:
    one = Slow()
    yield one
    one.answers.set()


Begin = Callable[..., FerryKVReceiver]


@pytest.fixture
def begin() -> Iterator[Begin]:
    """A receiver that has called `init`, of one manager for the whole test."""
    settings = {"transport": "memory", "announce_deadline": 60.0}
    made: list[FerryKVManager] = []

    def receiver(resolve: Any, room: int = 1, addr: str = "encoder-0:8998", rank: int = 0, **more: Any) -> Any:
        if not made:
            args = SimpleNamespace(engine_rank=0)
            made.append(FerryKVManager(args, "decode", None, layout=SMALL, **{**settings, **more}))
        made[0].resolve = resolve
        end = FerryKVReceiver(made[0], addr, room)
        end.init(rank)
        return end

    yield receiver
    for manager in made:
        manager.close()


def reason(end: FerryKVReceiver) -> errors.FerryError:
    eventually(lambda: end.poll() == KVPoll.Failed)
    with pytest.raises(errors.FerryError) as caught:
        end.failure_exception()
    return caught.value


def test_a_directory_that_does_not_answer_holds_no_loop_up(begin: Begin, slow: Slow) -> None:
    ends = [begin(slow, room) for room in range(3)]
    other = begin(slow, 3, rank=1)
    assert [end.poll() for end in (*ends, other)] == [KVPoll.Bootstrapping] * 4
    lease = ends[0].kv_mgr.buffers.alloc(10)
    assert lease is not None
    with pytest.raises(errors.BadCall, match="when poll says WaitingForInput"):
        ends[0].send_metadata(lease)
    eventually(lambda: len(slow.asked) == 2)  # requests for the same sender share an answer
    slow.answers.set()
    for end in (*ends, other):
        eventually(lambda end=end: end.poll() == KVPoll.WaitingForInput)
    assert sorted(slow.asked) == [("encoder-0:8998", 0), ("encoder-0:8998", 1)]
    ends[0].send_metadata(lease)
    ends[0].kv_mgr.buffers.free(lease)


def test_so_many_are_asked_for_at_a_time_and_the_others_wait_their_turn(begin: Begin, slow: Slow) -> None:
    ends = [begin(slow, room, addr=f"encoder-{room}:1") for room in range(20)]
    eventually(lambda: len(slow.asked) == finding.MOST_ASKING)
    assert sum(thread.name == "tensorferry-resolve" for thread in threading.enumerate()) == finding.MOST_ASKING
    slow.answers.set()
    for end in ends:
        eventually(lambda end=end: end.poll() == KVPoll.WaitingForInput)
    assert len(slow.asked) == 20
    eventually(lambda: all(thread.name != "tensorferry-resolve" for thread in threading.enumerate()))
    again = begin(lambda *_: "tcp://127.0.0.1:10", 30, addr="encoder-0:1")  # asked anew: it may have moved
    eventually(lambda: again._sender_address == "tcp://127.0.0.1:10")


def raising(problem: BaseException) -> Callable[[str, int], str]:
    def resolve(bootstrap_addr: str, dp_rank: int) -> str:
        raise problem

    return resolve


@pytest.mark.parametrize(
    ("resolve", "kind", "words"),
    [
        (raising(errors.UnknownName("nobody is found")), errors.UnknownName, "nobody is found"),
        (raising(KeyError("encoder-0")), errors.ConfigError, r"resolve\('encoder-0:8998', 0\) raised KeyError"),
        (raising(SystemExit(1)), errors.ConfigError, "raised SystemExit"),
        (lambda *_: None, errors.ConfigError, "gave None"),
        (lambda *_: "", errors.ConfigError, "gave ''"),
        (lambda: ADDRESS, errors.ConfigError, "raised TypeError"),
    ],
)
def test_what_resolve_does_wrong_is_this_requests_failure(
    begin: Begin, resolve: Any, kind: type[errors.FerryError], words: str
) -> None:
    end = begin(resolve)
    problem = reason(end)
    assert isinstance(problem, kind)
    assert words.replace("\\", "") in str(problem)
    end.clear()
    assert reason(end) is problem
    lease = end.kv_mgr.buffers.alloc(10)
    assert lease is not None
    end.send_metadata(lease)  # what has failed has failed: nothing is raised in the loop
    end.kv_mgr.buffers.free(lease)
    other = begin(lambda *_: ADDRESS, 2)
    eventually(lambda: other.poll() == KVPoll.WaitingForInput)


def test_the_reason_is_known_without_a_poll(begin: Begin) -> None:
    end = begin(None, addr="encoder-0:8998", rank=0)
    eventually(end._found.done)
    with pytest.raises(errors.ConfigError, match="raised TypeError"):
        end.failure_exception()


def test_no_answer_within_the_deadline_is_a_failure_and_a_late_one_changes_nothing(begin: Begin, slow: Slow) -> None:
    end = begin(slow, announce_deadline=0.05)
    problem = reason(end)
    assert isinstance(problem, errors.DeadlineExceeded)
    slow.answers.set()
    eventually(lambda: end._sender_address == ADDRESS)
    assert end.poll() == KVPoll.Failed


def test_an_abort_does_not_wait_for_the_answer(begin: Begin, slow: Slow) -> None:
    end = begin(slow)
    end.abort()
    assert isinstance(reason(end), errors.Cancelled)
    slow.answers.set()
    eventually(lambda: end._sender_address == ADDRESS)
    assert end.poll() == KVPoll.Failed


def test_without_a_thread_to_ask_in_the_request_fails_and_the_next_one_is_asked_for(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    idle = begin(lambda *_: ADDRESS).kv_mgr._finder
    eventually(lambda: idle._threads == 0)
    with monkeypatch.context() as limit:
        limit.setattr(threading.Thread, "start", start)
        ends = [begin(lambda *_: ADDRESS, room) for room in range(2, 8)]
    for end in ends:
        assert isinstance(reason(end), errors.DirectoryUnavailable)
    end = begin(lambda *_: ADDRESS, 9)
    eventually(lambda: end.poll() == KVPoll.WaitingForInput)
