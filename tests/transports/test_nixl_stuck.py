"""A thread of the nixl transport that does not come back from the engine: what is said of its posts, and what stays."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from engine_kit import one_byte, post
from transport_ends import PATIENCE_S, Process, at, ended, eventually, need, source

from tensorferry.backends import _nixl_poster
from tensorferry.backends._nixl_engine import Agent, Request
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
