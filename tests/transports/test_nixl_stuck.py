"""A thread of the nixl transport that does not come back from the engine: what is said of its posts, and what stays."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from engine_kit import one_byte, post
from transport_ends import PATIENCE_S, Process, at, ended, eventually, filled, need, over, source

from tensorferry.backends import _nixl_jobs, _nixl_poster
from tensorferry.backends._nixl_engine import Agent, Request
from tensorferry.backends._nixl_jobs import Bell, Job, Submit, Target
from tensorferry.backends.nixl import NixlOptions, NixlTransport
from tensorferry.core.transport import Copy, Region, Status

pytestmark = pytest.mark.timeout(120)

MUCH = 48 << 20
"""More than the kernel's buffers between two processes hold."""


@dataclass
class Hang:
    """The next submit to the engine does not come back before `go`."""

    within: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)

    def submit(self, agent: Agent, request: Request) -> bool:
        if not self.within.is_set():
            self.within.set()
            self.go.wait(PATIENCE_S * 3)
        return SUBMIT(agent, request)


SUBMIT = Agent.submit


@pytest.fixture
def hang(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Hang]]:
    """Call it to let the next submit hang."""
    made: list[Hang] = []

    def put_on() -> Hang:
        made.append(Hang())
        monkeypatch.setattr(Agent, "submit", lambda agent, request: made[-1].submit(agent, request))
        return made[-1]

    yield put_on
    for one in made:
        one.go.set()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., NixlTransport]]:
    """Opens transports that give a thread up after a second, and are closed after the test."""
    need("nixl")
    monkeypatch.setattr(_nixl_poster, "STUCK_S", 0.5)
    monkeypatch.setattr(_nixl_poster, "GLANCE_S", 0.1)
    monkeypatch.setattr("tensorferry.backends._engine_transport.CLOSE_TIMEOUT_S", 1.0)
    all_of_them: list[NixlTransport] = []

    def open_one(workers: int = 1, require: str = "", progress_timeout: float = 0.5) -> NixlTransport:
        options = NixlOptions(workers=workers, require=require, progress_timeout=progress_timeout)
        all_of_them.append(NixlTransport(options))
        return all_of_them[-1]

    yield open_one
    for transport in all_of_them:
        transport.close()


def write(transport: NixlTransport, peer: object, region: Region) -> int:
    return transport.post(peer, [Copy(source(transport, b"x"), 0, at(region), 0, 1)])


def join(transport: NixlTransport) -> None:
    for worker in transport._crew.workers:
        worker.thread.join(PATIENCE_S)
        assert not worker.thread.is_alive()


# ---- connections that do not end -----------------------------------------------------------------------------


def test_a_post_behind_a_connection_that_does_not_end_costs_no_processor(opened: Callable[..., NixlTransport]) -> None:
    """It waits for what is under way. When it may be asked for at the earliest is not the question."""
    one = opened()
    one.close()
    target = Target(one._agent, None)  # type: ignore[arg-type]
    target.cut, target.not_before = True, 0.0
    target.under_way.append(Submit(None, None))  # type: ignore[arg-type]
    target.jobs.append(Job(target, deque(), [], 0.0))
    worker = one._crew.workers[0]
    worker._targets.append(target)
    assert worker._pause() > 0.001


# ---- what becomes of posts -----------------------------------------------------------------------------------


def test_posts_to_a_thread_that_does_not_come_back_fail_and_nothing_of_them_begins(
    opened: Callable[..., NixlTransport], hang: Callable[[], Hang]
) -> None:
    one, other = opened(workers=2), opened()
    region = other.register(other.allocate(4096))
    peer = one.connect(other.describe())
    assert ended(one, write(one, peer, region)) is Status.DONE
    assert peer.target.place == 0, "the other thread looks after this one"
    mine = one.register(filled(one, b"y"))
    held = hang()
    first = write(one, peer, region)
    assert held.within.wait(PATIENCE_S)
    meanwhile = one.post(peer, [Copy(mine, 0, at(region), 1, 1)])
    assert one.poll(meanwhile) is Status.PENDING
    assert over(one, first) is Status.UNKNOWN
    assert ended(one, meanwhile) is Status.FAILED
    assert one.source_free(meanwhile)
    late = one.post(peer, [Copy(mine, 0, at(region), 1, 1)])
    assert one.poll(late) is Status.FAILED, "at once, for it is known"
    held.go.set()
    eventually(lambda: not one._crew.stuck())
    assert ended(one, write(one, peer, region)) is Status.DONE, "it has come back"
    assert one.poll(first) is Status.UNKNOWN
    assert one.poll(meanwhile) is Status.FAILED
    assert bytes(region.memory.view()[:2]) == b"x\0"


def test_close_leaves_no_post_without_an_outcome(
    opened: Callable[..., NixlTransport], hang: Callable[[], Hang]
) -> None:
    """Also where the thread has not been inside for long enough to be known as one that hangs."""
    one, other = opened(progress_timeout=PATIENCE_S), opened()
    region = other.register(other.allocate(4096))
    peer = one.connect(other.describe())
    assert ended(one, write(one, peer, region)) is Status.DONE
    held = hang()
    first = write(one, peer, region)
    assert held.within.wait(PATIENCE_S)
    meanwhile = write(one, peer, region)
    one.close()
    assert one.poll(first) is Status.UNKNOWN
    assert one.poll(meanwhile) is Status.FAILED
    held.go.set()
    join(one)
    assert one.poll(meanwhile) is Status.FAILED


def test_done_stays_where_it_comes_while_the_post_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread comes back after another one has begun to give it up, and before that has looked at the status."""
    job: Job = Job(Target.__new__(Target), deque(), [], 0.0)
    assert job.take()
    bell = Bell(logging.getLogger("test"))

    class Slow:
        def __enter__(self) -> None:
            monkeypatch.setattr(_nixl_jobs, "fate", threading.Lock())
            bell.finish(job, Status.DONE)

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(_nixl_jobs, "fate", Slow())
    assert not job.give_up()
    assert job.status is Status.DONE
    assert not job.take()


# ---- close ---------------------------------------------------------------------------------------------------


def test_an_agent_that_was_abandoned_stays_also_when_its_thread_comes_back(
    opened: Callable[..., NixlTransport], hang: Callable[[], Hang]
) -> None:
    """UCX goes on placing what peers send: into memory that is there."""
    one, other = opened(), opened()
    region = one.register(one.allocate(4096))
    theirs = other.register(other.allocate(4096))
    writer, reader = other.connect(one.describe()), one.connect(other.describe())
    assert ended(other, write(other, writer, region)) is Status.DONE
    assert ended(one, write(one, reader, theirs)) is Status.DONE
    held = hang()
    handle = write(one, reader, theirs)
    assert held.within.wait(PATIENCE_S)
    one.close()
    held.go.set()
    join(one)
    agent = one._crew.agent
    assert agent._agent is not None
    assert region.memory.address in agent._memory
    assert one.poll(handle) is Status.UNKNOWN
    assert ended(other, write(other, writer, region)) is Status.DONE, "it is placed as before"
    assert not agent.close()


def test_a_source_is_not_free_at_close_while_another_thread_keeps_the_agent(
    opened: Callable[..., NixlTransport], hang: Callable[[], Hang], process: Callable[..., Process]
) -> None:
    """UCX sends to the stopped peer when that goes on, from where it was told to, for there is still an agent."""
    stopped, other = process(kind="nixl", require="tcp"), opened(require="tcp")
    region, theirs = stopped.ask("share", nbytes=MUCH), other.register(other.allocate(4096))
    one = opened(workers=2, require="tcp", progress_timeout=PATIENCE_S)
    peer, second = one.connect(stopped.describe()), one.connect(other.describe())
    assert ended(one, one_byte(one, peer, region)) is Status.DONE
    assert ended(one, write(one, second, theirs)) is Status.DONE
    assert peer.target.place != second.target.place
    stopped.stop()
    handle = post(one, peer, region, source(one, b"\x55" * MUCH))
    eventually(lambda: peer.target.under_way)
    held = hang()
    write(one, second, theirs)
    assert held.within.wait(PATIENCE_S)
    one.close()
    assert one.poll(handle) is Status.UNKNOWN
    assert not one.source_free(handle)
    held.go.set()
    join(one)
    assert not one.source_free(handle), "the agent is there, and so are its connections"
    stopped.end()
    eventually(lambda: one.source_free(handle), "the end of the peer")
