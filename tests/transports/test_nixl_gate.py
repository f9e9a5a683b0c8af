"""Who may call NIXL while somebody else is inside it, and what becomes of those that cannot."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from transport_ends import PATIENCE_S, at, ended, eventually, need, source

from tensorferry.backends import _nixl_gate
from tensorferry.backends._nixl_engine import Agent
from tensorferry.backends._nixl_gate import Gate, Held
from tensorferry.backends.nixl import NixlOptions, NixlTransport
from tensorferry.core.errors import TransportError
from tensorferry.core.transport import Copy, Status

pytestmark = pytest.mark.timeout(120)


@contextmanager
def inside(way: Callable[[], Any]) -> Iterator[Callable[[], None]]:
    """Another thread is inside by this way, until the function is called that this yields."""
    there, go = threading.Event(), threading.Event()

    def stay() -> None:
        with way():
            there.set()
            assert go.wait(PATIENCE_S)

    thread = threading.Thread(target=stay)
    thread.start()
    assert there.wait(PATIENCE_S)

    def let_go() -> None:
        go.set()
        thread.join(PATIENCE_S)

    try:
        yield let_go
    finally:
        let_go()


def test_many_are_inside_together_and_one_alone_waits_for_them() -> None:
    gate = Gate()
    order: list[str] = []

    def alone() -> None:
        with gate.alone():
            order.append("alone")

    def come_later() -> None:
        with gate.among():
            order.append("later")

    with inside(gate.among) as first, inside(gate.among) as second:
        thread = threading.Thread(target=alone)
        thread.start()
        eventually(lambda: gate._wanted)
        later = threading.Thread(target=come_later)
        later.start()
        first()
        order.append("one is out")
        second()
        thread.join(PATIENCE_S)
        later.join(PATIENCE_S)
    assert order == ["one is out", "alone", "later"]


def test_who_wants_to_be_alone_waits_for_nobody_that_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    with inside(gate.among) as let_go:
        monkeypatch.setattr(_nixl_gate, "ALONE_S", 0.0)
        with pytest.raises(Held, match="does not come back"), gate.alone():
            pytest.fail("it went in")
        with gate.among():
            pass  # and holds up nobody behind it
        let_go()
        with gate.alone():
            pass


def test_a_long_call_is_waited_for_by_threads_that_nobody_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """To pin much memory takes long, and the peers' posts are not to fail for it."""
    gate, got_in = Gate(), threading.Event()

    def patient() -> None:
        with gate.alone(patient=True):
            got_in.set()

    with inside(gate.alone) as let_go:
        monkeypatch.setattr(_nixl_gate, "ALONE_S", 0.0)
        with pytest.raises(Held), gate.alone():
            pytest.fail("it went in")
        thread = threading.Thread(target=patient)
        thread.start()
        eventually(lambda: gate._wanted == 2)
        assert not got_in.is_set()
        let_go()
        assert got_in.wait(PATIENCE_S)
        thread.join(PATIENCE_S)


def test_a_call_that_hangs_in_the_engine_freezes_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the engine's lock, which the engine's own registering waits for without a limit, partly with the GIL."""
    need("nixl")
    one, other, third = (NixlTransport(NixlOptions(workers=1)) for _ in range(3))
    try:
        region, kept = other.register(other.allocate(4096)), third.register(third.allocate(4096))
        mine = source(one, b"x")
        peer, parted = one.connect(other.describe()), one.connect(third.describe())
        copies = [Copy(mine, 0, at(region), 0, 1)]
        assert ended(one, one.post(peer, copies)) is Status.DONE
        assert ended(one, one.post(parted, [Copy(mine, 0, at(kept), 0, 1)])) is Status.DONE
        retired = one.register(one.allocate(4096))
        with inside(one._agent._gate.among) as let_go:
            monkeypatch.setattr(_nixl_gate, "ALONE_S", 0.0)
            memory = one.allocate(4096)
            with pytest.raises(TransportError, match="does not come back"):
                one.register(memory)
            assert not one._agent.unregister(retired.memory)
            one.retire(retired)
            with pytest.raises(TransportError, match="does not come back"):
                one.describe()
            one.disconnect(parted)
            eventually(lambda: parted.target.learnt < 0)
            assert one._agent._owed == {third._agent.name}, "it is forgotten later"
            assert ended(one, one.post(peer, copies)) is Status.DONE, "peers that are known are written to"
            new = one.connect(third.describe())
            assert ended(one, one.post(new, [Copy(mine, 0, at(kept), 0, 1)])) is Status.FAILED
            let_go()
        monkeypatch.undo()
        assert one.register(memory)
        assert one.describe()
        assert ended(one, one.post(new, [Copy(mine, 0, at(kept), 0, 1)])) is Status.DONE
        assert not one._agent._owed
    finally:
        for transport in (one, other, third):
            transport.close()


def test_memory_whose_registering_was_broken_off_can_be_registered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine had it, and could not say so."""
    need("nixl")
    one = NixlTransport(NixlOptions(workers=1))
    try:
        memory, register, told = one.allocate(4096), Agent.register, []
        monkeypatch.setattr(Agent, "register", lambda agent, given: told.append(given) or register(agent, given))
        with monkeypatch.context() as within:
            within.setattr(Agent, "metadata", lambda _: Agent.learn(one._agent, "nobody", b""))
            with pytest.raises(TransportError):
                one.register(memory)
        assert one.register(memory).memory is memory
        assert told == [memory], "not twice"
    finally:
        one.close()
