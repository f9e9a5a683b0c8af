"""The mooncake transport between processes: what lands, what is noticed, and who is not held up by whom."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import msgspec
import pytest
from engine_kit import abroad, changed, check_quiet_end, ends, one_byte, post
from transport_ends import PATIENCE_S, Process, ended, eventually, need, over, source

from tensorferry.backends import _mooncake_poster
from tensorferry.backends._mooncake_contact import Contact
from tensorferry.backends._mooncake_engine import Engine
from tensorferry.backends._mooncake_sockets import cut_connections
from tensorferry.backends.mooncake import MooncakeOptions, MooncakeTransport
from tensorferry.core.errors import TransportError
from tensorferry.core.transport import PeerState, Status

Start = Callable[..., Process]

pytestmark = pytest.mark.timeout(120)

MUCH = 64 << 20
"""More than the kernel's buffers between two processes hold."""


@pytest.fixture
def there(process: Start) -> Start:
    need("mooncake")
    return partial(process, kind="mooncake")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[MooncakeTransport]:
    """Impatient: a peer has a second to go on with a write, and a little longer to answer at first contact."""
    need("mooncake")
    monkeypatch.setenv("MC_TCP_PROGRESS_TIMEOUT_SEC", "1")
    transport = MooncakeTransport(MooncakeOptions(host="127.0.0.1", contact_timeout=1.5))
    yield transport
    transport.close()


def test_both_sides_write_into_each_other(here: MooncakeTransport, there: Start) -> None:
    other = there()
    nbytes = (9 << 20) + 17
    ours = here.register(here.allocate(nbytes))
    theirs = other.ask("share", nbytes=nbytes)
    other.ask("connect", descriptor=here.describe().hex())
    peer = here.connect(other.describe())
    status, written = other.ask("write", region=[ours.id, ours.generation], seed=1, nbytes=nbytes)
    assert status == "DONE"
    assert hashlib.sha256(ours.memory.view()).hexdigest() == written
    data = os.urandom(nbytes)
    assert ended(here, post(here, peer, theirs, source(here, data))) is Status.DONE
    assert other.ask("digest") == hashlib.sha256(data).hexdigest()


def test_a_killed_peer_is_gone_what_was_under_way_is_drained_by_that_and_others_go_on(
    here: MooncakeTransport, there: Start
) -> None:
    doomed, living = there(), there()
    region, other_region = doomed.ask("share", nbytes=MUCH), living.ask("share", nbytes=1)
    peer, other = here.connect(doomed.describe()), here.connect(living.describe())
    assert ended(here, one_byte(here, peer, region)) is Status.DONE
    assert here.peer_state(peer) is PeerState.ALIVE
    woken: list[Status] = []
    doomed.stop()
    handle = post(here, peer, region, source(here, bytes(MUCH)))
    here.on_progress(lambda: woken.append(here.poll(handle)))
    doomed.signal(signal.SIGKILL)
    assert over(here, handle) is Status.UNKNOWN
    eventually(lambda: here.peer_state(peer) is PeerState.GONE)
    eventually(lambda: here.drained(handle))
    assert here.poll(handle) is Status.UNKNOWN
    assert Status.UNKNOWN in woken
    here.release(handle)
    with pytest.raises(TransportError, match="ended"):
        one_byte(here, peer, region)
    assert ended(here, one_byte(here, other, other_region)) is Status.DONE


def test_a_write_to_a_peer_that_is_stopped_has_an_unknown_outcome_and_disturbs_no_other(
    here: MooncakeTransport, there: Start
) -> None:
    stopped, running = there(), there()
    region, other_region = stopped.ask("share", nbytes=MUCH), running.ask("share", nbytes=4096)
    peer, other = here.connect(stopped.describe()), here.connect(running.describe())
    assert ended(here, one_byte(here, peer, region)) is Status.DONE
    stopped.stop()
    handle = post(here, peer, region, source(here, bytes(MUCH)))
    behind = one_byte(here, peer, region)
    for _ in range(50):
        assert ended(here, one_byte(here, other, other_region)) is Status.DONE
    assert over(here, handle) is Status.UNKNOWN
    assert not here.drained(handle), "its bytes are in the stopped process's kernel"
    assert eventually(lambda: here.source_free(handle)), "the engine has given all of it up"
    assert here.peer_state(peer) is PeerState.ALIVE
    assert over(here, behind) in (Status.FAILED, Status.UNKNOWN)
    stopped.signal(signal.SIGCONT)
    # After the failure posts wait until the peer has answered again: none is burnt on what the engine has lost.
    assert ended(here, one_byte(here, peer, region)) is Status.DONE
    assert not here.drained(handle)


@pytest.mark.parametrize("lanes", [4, 1], ids=["all", "one after another"])
def test_when_its_idle_connections_are_lost_the_engine_burns_one_post_at_the_most(
    here: MooncakeTransport, there: Start, monkeypatch: pytest.MonkeyPatch, lanes: int
) -> None:
    """The engine has up to four to a peer. It learns that one is dead from the write that fails on it; and after the
    loss of the last that it had open it fails the next request whatever the time."""
    monkeypatch.setattr(_mooncake_poster, "COOLDOWN_S", 0.05)  # waiting is not what helps
    other = there()
    region = other.ask("share", nbytes=MUCH)
    peer = here.connect(other.describe())
    assert ended(here, post(here, peer, region, source(here, bytes(MUCH if lanes > 1 else 1)))) is Status.DONE
    for _ in range(4 // lanes):
        assert cut_connections("127.0.0.1", peer.target.told.data_port) == lanes
        assert over(here, one_byte(here, peer, region)) is Status.UNKNOWN
        assert ended(here, one_byte(here, peer, region)) is Status.DONE


def test_a_peer_that_is_stopped_at_first_contact_gets_no_submit_and_disturbs_no_other(
    here: MooncakeTransport, there: Start
) -> None:
    stopped, running = there(), there()
    region, other_region = stopped.ask("share", nbytes=4096), running.ask("share", nbytes=4096)
    descriptor = stopped.describe()
    stopped.stop()
    peer, other = here.connect(descriptor), here.connect(running.describe())
    handle = one_byte(here, peer, region)
    assert ended(here, one_byte(here, other, other_region)) is Status.DONE
    assert here.poll(handle) is Status.PENDING
    assert ended(here, handle) is Status.FAILED
    assert here.drained(handle)
    assert here.peer_state(peer) is PeerState.ALIVE
    stopped.signal(signal.SIGCONT)
    assert ended(here, one_byte(here, peer, region)) is Status.DONE


def test_a_peer_that_stops_between_our_question_and_the_engines_holds_others_up_no_longer_than_the_contact_timeout(
    here: MooncakeTransport, there: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, running = there(), there()
    region, other_region = stopped.ask("share", nbytes=4096), running.ask("share", nbytes=4096)
    descriptor = stopped.describe()
    stopped.stop()
    monkeypatch.setattr(Contact, "_try", lambda contact: None)  # it answered, and then it stopped
    handle = one_byte(here, here.connect(descriptor), region)
    eventually(lambda: here._poster._opening is not None, "the engine asks")
    other = one_byte(here, here.connect(running.describe()), other_region)
    assert ended(here, handle) is Status.FAILED
    assert ended(here, other) is Status.DONE


def test_close_ends_a_question_of_the_engine(
    here: MooncakeTransport, there: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = there()
    region, descriptor = stopped.ask("share", nbytes=4096), stopped.describe()
    stopped.stop()
    monkeypatch.setattr(Contact, "_try", lambda contact: None)
    handle = one_byte(here, here.connect(descriptor), region)
    eventually(lambda: here._poster._opening is not None, "the engine asks")
    here.close()
    assert here.poll(handle) is Status.FAILED
    assert not here._poster.thread.is_alive()


def test_close_with_a_stopped_peer_ends_and_says_unknown(here: MooncakeTransport, there: Start) -> None:
    stopped = there()
    region = stopped.ask("share", nbytes=MUCH)
    peer = here.connect(stopped.describe())
    assert ended(here, one_byte(here, peer, region)) is Status.DONE
    stopped.stop()
    handle = post(here, peer, region, source(here, bytes(MUCH)))
    waits = one_byte(here, peer, region)
    eventually(lambda: peer.target.under_way)
    here.close()
    assert not here._poster.thread.is_alive()
    assert here.poll(handle) is Status.UNKNOWN
    assert not here.drained(handle)
    assert here.poll(waits) in (Status.FAILED, Status.UNKNOWN)
    stopped.signal(signal.SIGKILL)
    eventually(lambda: here.drained(handle), "the peer's end drains it, also after close")


def test_a_peer_that_never_was_there_fails_and_nothing_was_submitted(here: MooncakeTransport, there: Start) -> None:
    once = there()
    region, descriptor = once.ask("share", nbytes=4096), once.describe()
    once.end()
    for told in (descriptor, abroad(descriptor)):
        peer = here.connect(told)
        handle = one_byte(here, peer, region)
        assert ended(here, handle) is Status.FAILED
        assert here.drained(handle)
        assert here.peer_state(peer) is PeerState.UNKNOWN
    # Whoever answers at its port by now is another: that too is seen before a byte moves.
    other = there()
    other.ask("share", nbytes=4096)
    port = msgspec.msgpack.decode(other.describe())[5]
    handle = one_byte(here, here.connect(changed(descriptor, port=port, host=["another boot", 1, 1, 1])), region)
    assert ended(here, handle) is Status.FAILED


def test_a_later_instance_at_the_same_port_gets_a_name_of_its_own(here: MooncakeTransport, there: Start) -> None:
    """The engine would go on with what it remembers of the earlier one."""
    other = there()
    region = other.ask("share", nbytes=1)
    first, later = here.connect(other.describe()), here.connect(changed(other.describe()))
    for peer in (first, later):
        assert ended(here, one_byte(here, peer, region)) is Status.DONE
    assert later.target.session != first.target.session
    assert other.ask("digest") == hashlib.sha256(b"x").hexdigest()


def test_an_engine_with_the_ports_and_addresses_of_an_earlier_one_does_not_take_its_writes(
    here: MooncakeTransport, there: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer of another host that was started anew, behind a narrow range of ports; nothing but its token differs."""
    if here.path() != "tcp":
        pytest.skip("over RDMA no token is read")
    restarted = there()
    region = restarted.ask("share", nbytes=4096)
    descriptor = restarted.describe()
    earlier = here.connect(changed(descriptor, token=os.urandom(16), host=["another boot", 1, 1, 1]))
    with monkeypatch.context() as watched:
        watched.setattr(Engine, "submit", lambda *_: pytest.fail("something was submitted"))
        for _ in range(2):
            assert ended(here, one_byte(here, earlier, region)) is Status.FAILED
    assert ended(here, one_byte(here, here.connect(descriptor), region)) is Status.DONE
    assert restarted.ask("bytes_there") == "0078", "of x, and of nothing else"


def test_a_post_that_waits_for_a_peer_to_answer_can_be_cancelled(there: Start) -> None:
    stopped = there()
    region, descriptor = stopped.ask("share", nbytes=4096), stopped.describe()
    stopped.stop()
    transport = MooncakeTransport(MooncakeOptions(host="127.0.0.1", contact_timeout=PATIENCE_S * 2))
    handle = one_byte(transport, transport.connect(descriptor), region)
    transport.cancel(handle)
    assert ended(transport, handle) is Status.FAILED
    transport.close()


def test_no_more_than_the_window_is_under_way_to_one_peer(there: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    other = there()
    region = other.ask("share", nbytes=4 << 20)
    transport = MooncakeTransport(MooncakeOptions(host="127.0.0.1", window=3, submit_bytes=64 << 10))
    peer = transport.connect(other.describe())
    submit, under_way, sizes = Engine.submit, [], []

    def count(engine: Engine, *piece: Any) -> int:
        under_way.append(len(peer.target.under_way))
        sizes.append(piece[-1])
        return submit(engine, *piece)

    monkeypatch.setattr(Engine, "submit", count)
    local = source(transport, os.urandom(4 << 20))
    handles = [post(transport, peer, region, local) for _ in range(4)]
    assert {ended(transport, handle) for handle in handles} == {Status.DONE}
    assert max(under_way) == 2  # and one more is then submitted
    assert set(sizes) == {64 << 10}
    transport.close()


@ends
def test_a_process_ends_cleanly_and_quietly(how: str) -> None:
    need("mooncake")
    opened = (
        "from tensorferry.backends.mooncake import MooncakeOptions, MooncakeTransport\n"
        "t = MooncakeTransport(MooncakeOptions(host='127.0.0.1'))"
    )
    check_quiet_end(opened, {"torch"}, how, ("MC_",))
