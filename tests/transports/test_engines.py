"""What both engines have to come through, the same for each: the rows of their failure tables that are alike."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from engine_kit import abroad, changed, one_byte, post
from memory_kit import random_rows, same_bytes
from transport_ends import PATIENCE_S, Process, ended, eventually, need, over, source

import tensorferry as tf
from tensorferry.backends import _mooncake_contact
from tensorferry.backends._mooncake_engine import Engine as MooncakeEngine
from tensorferry.backends._mooncake_wire import Answer
from tensorferry.backends._nixl_engine import Agent
from tensorferry.backends.mooncake import MooncakeOptions, MooncakeTransport
from tensorferry.backends.nixl import NixlOptions, NixlPeer, NixlTransport
from tensorferry.core import receiving, sending
from tensorferry.core.errors import BadCall, PathMismatch, TransportError
from tensorferry.core.memory import Memory
from tensorferry.core.settings import Settings
from tensorferry.core.transport import Copy, PeerState, RemoteRegion, Status

pytestmark = pytest.mark.timeout(120)

Engine = MooncakeTransport | NixlTransport
Start = Callable[..., Process]

MUCH = 64 << 20
"""More than the kernel's buffers between two processes hold."""

ENGINES = ["mooncake", "nixl-memcpy", "nixl-tcp"]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    need(str(request.param).partition("-")[0])
    return str(request.param)


@pytest.fixture
def here(engine: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Impatient: a peer has a second to go on with a write."""
    monkeypatch.setenv("MC_TCP_PROGRESS_TIMEOUT_SEC", "1")
    transport: Engine
    if engine == "mooncake":
        transport = MooncakeTransport(MooncakeOptions(host="127.0.0.1", contact_timeout=1.5))
    else:
        transport = NixlTransport(
            NixlOptions(require=engine.removeprefix("nixl-"), contact_timeout=1.5, progress_timeout=1.0, workers=1)
        )
    yield transport
    transport.close()


@pytest.fixture
def there(process: Start, engine: str) -> Start:
    kind, _, way = engine.partition("-")
    return partial(process, kind=kind, **({"require": way} if way else {}))


def test_many_posts_under_way_to_a_peer_that_is_killed_all_come_to_their_end(here: Engine, there: Start) -> None:
    doomed = there()
    region = doomed.ask("share", nbytes=64 << 20)
    peer = here.connect(doomed.describe())
    assert ended(here, one_byte(here, peer, region)) is Status.DONE
    local = here.register(here.allocate(1 << 20))
    doomed.stop()
    handles = [
        here.post(peer, [Copy(local, 0, RemoteRegion(*region), (n % 64) << 20, 1 << 20)]) for n in range(256)
    ]  # fmt: skip
    doomed.signal(signal.SIGKILL)
    for handle in handles:
        assert over(here, handle) in (Status.DONE, Status.FAILED, Status.UNKNOWN)
    eventually(lambda: all(here.drained(handle) for handle in handles))
    eventually(lambda: here.peer_state(peer) is PeerState.GONE)
    for handle in handles:
        here.release(handle)


def test_a_peer_that_closes_in_a_living_process_takes_no_write_and_is_not_called_dead(
    here: Engine, there: Start
) -> None:
    other = there()
    region = other.ask("share", nbytes=4096)
    peer = here.connect(other.describe())
    assert ended(here, one_byte(here, peer, region)) is Status.DONE
    other.ask("close")
    # The first write after it may be the one that finds out; by then the engine has nobody to write to.
    assert over(here, one_byte(here, peer, region)) in (Status.FAILED, Status.UNKNOWN)
    assert ended(here, one_byte(here, peer, region)) is Status.FAILED
    assert here.peer_state(peer) is PeerState.ALIVE, "its process is not over"
    own = here.register(here.allocate(4096))
    oneself = here.connect(here.describe())
    assert ended(here, one_byte(here, oneself, [own.id, own.generation])) is Status.DONE, "the engine goes on"


def test_a_source_that_is_no_memory_is_not_called_done_and_hurts_nobody(here: Engine, there: Start) -> None:
    """What a caller says of an address is not checked by either engine when it is registered."""
    other = there()
    region = other.ask("share", nbytes=1 << 20)
    peer = here.connect(other.describe())
    assert ended(here, one_byte(here, peer, region)) is Status.DONE
    wrong = here.allocate(1 << 20)
    local = here.register(wrong)
    sealed(wrong)
    assert over(here, here.post(peer, [Copy(local, 0, RemoteRegion(*region), 0, 1 << 20)])) is Status.UNKNOWN
    eventually(lambda: over(here, one_byte(here, peer, region)) is Status.DONE, "the pair works again")
    assert other.ask("describe")


def sealed(memory: Memory) -> None:
    """Its pages are given back, as if their owner had unmapped them."""
    mapping = getattr(memory.owner, "mapping", memory.owner)
    mapping.seal()


@pytest.mark.parametrize("engine", ["mooncake", "nixl-memcpy"], indirect=True)
def test_a_target_whose_pages_are_gone_is_not_called_done_and_the_pair_goes_on(here: Engine, there: Start) -> None:
    """Over TCP NIXL's engine ends the process that it places in: so a region's pages stay for as long as anybody could
    write there, which is tested for each engine by itself."""
    other = there()
    region, kept = other.ask("share", nbytes=1 << 20), other.ask("share", nbytes=4096)
    peer = here.connect(other.describe())
    assert ended(here, one_byte(here, peer, region)) is Status.DONE
    other.ask("seal_first")
    assert over(here, post(here, peer, region, source(here, bytes(1 << 20)))) is Status.UNKNOWN
    eventually(lambda: over(here, one_byte(here, peer, kept)) is Status.DONE, "the pair works again")


def test_a_restarted_peer_is_another_peer(here: Engine, there: Start) -> None:
    first = there()
    region = first.ask("share", nbytes=4096)
    peer = here.connect(first.describe())
    assert ended(here, one_byte(here, peer, region)) is Status.DONE
    first.end()
    second = there()
    region = second.ask("share", nbytes=4096)
    again = here.connect(second.describe())
    assert again is not peer
    if isinstance(again, NixlPeer):
        assert again.target.name != peer.target.name
    assert ended(here, one_byte(here, again, region)) is Status.DONE
    eventually(lambda: here.peer_state(peer) is PeerState.GONE)


@pytest.mark.parametrize("engine", ["mooncake", "nixl-tcp"], indirect=True)
def test_of_a_peer_of_another_host_no_end_is_proved(here: Engine, there: Start) -> None:
    far = there()
    region = far.ask("share", nbytes=MUCH)
    peer = here.connect(abroad(far.describe()))
    assert ended(here, one_byte(here, peer, region)) is Status.DONE
    far.stop()
    handle = post(here, peer, region, source(here, bytes(MUCH)))
    far.end()
    assert over(here, handle) is Status.UNKNOWN
    assert here.peer_state(peer) is PeerState.UNKNOWN
    assert not here.drained(handle)
    assert ended(here, one_byte(here, peer, region)) is Status.FAILED


@pytest.mark.parametrize("engine", ["mooncake", "nixl-tcp"], indirect=True)
@pytest.mark.parametrize("pid", [1 << 22, os.getpid()], ids=["nobody's", "another's"])
def test_a_peer_that_is_seen_dead_at_first_sight_may_be_alive_elsewhere(here: Engine, there: Start, pid: int) -> None:
    """Two machines cloned from one snapshot have the same boot id and the same namespace numbers: where its process
    runs cannot be told. (By copies within the host, CMA, such a peer is not reached at all.)"""
    clone = there()
    region = clone.ask("share", nbytes=4096)
    peer = here.connect(changed(clone.describe(), pid=pid, started=1))
    assert here.peer_state(peer) is PeerState.UNKNOWN
    assert ended(here, one_byte(here, peer, region)) is Status.DONE
    assert here.peer_state(peer) is PeerState.UNKNOWN


@pytest.mark.parametrize("engine", ["mooncake", "nixl-memcpy"], indirect=True)
def test_a_region_stays_registered_until_no_peer_is_left_that_knew_it(here: Engine, there: Start) -> None:
    writer = there()
    peer = here.connect(writer.describe())
    region = here.register(here.allocate(4096))
    registered = (here._engine if isinstance(here, MooncakeTransport) else here._agent)._memory
    writer.ask("connect", descriptor=here.describe().hex())
    here.retire(region)
    status, _ = writer.ask("write", region=[region.id, region.generation], seed=1, nbytes=4096)
    assert status == "DONE", "others' writes into a suspect slab end as they should"
    assert region.memory.address in registered
    writer.end()
    eventually(lambda: here.peer_state(peer) is PeerState.GONE)
    assert region.memory.address not in registered
    again = here.register(region.memory)
    assert again.generation > region.generation


def registered(here: Engine) -> set[int]:
    """The addresses that the engine of this side has."""
    return set((here._engine if isinstance(here, MooncakeTransport) else here._agent)._memory)


@pytest.mark.parametrize("when", ["retired first", "disconnected first", "registered again"])
def test_what_a_disconnected_peer_knows_stays_registered_until_its_process_has_ended(
    here: Engine, there: Start, when: str
) -> None:
    """It does not know that it was disconnected, and may have a write under way."""
    writer = there()
    peer = here.connect(writer.describe())
    region = here.register(here.allocate(4096))
    writer.ask("connect", descriptor=here.describe().hex())
    if when == "disconnected first":
        here.disconnect(peer)
        here.retire(region)
    else:
        here.retire(region)
        here.disconnect(peer)
    if when == "registered again":
        here.retire(here.register(region.memory))
    oneself = here.connect(here.describe())  # nobody asks for one that was disconnected: others' verbs look after it
    assert here.peer_state(oneself) is PeerState.ALIVE
    assert region.memory.address in registered(here)
    assert writer.ask("write", region=[region.id, region.generation], seed=1, nbytes=4096), "and this process lives on"
    writer.end()
    eventually(lambda: here.peer_state(oneself) is PeerState.ALIVE and region.memory.address not in registered(here))


@pytest.mark.parametrize("engine", ["mooncake", "nixl-tcp"], indirect=True)
def test_what_a_disconnected_peer_of_another_host_knows_stays_registered_until_the_end(
    here: Engine, there: Start
) -> None:
    writer = there()
    retired, live = (here.register(here.allocate(4096)) for _ in range(2))
    peer = here.connect(abroad(writer.describe()))
    here.retire(retired)
    here.disconnect(peer)
    later = here.register(here.allocate(4096))
    near = here.connect(writer.describe())
    here.retire(live)
    here.retire(later)
    assert not here._parted, "there is nothing to wait for"
    writer.end()
    eventually(lambda: here.peer_state(near) is PeerState.GONE)
    kept = registered(here)
    assert {retired.memory.address, live.memory.address} <= kept
    assert later.memory.address not in kept, "it came after the one of another host had gone"


def test_peers_that_come_and_go_leave_no_file_behind_and_none_of_them_when_their_process_has_ended(
    here: Engine, there: Start
) -> None:
    """Instances of one process, which lives."""
    other = there()
    here.register(here.allocate(4096))
    descriptor = other.describe()
    here.disconnect(here.connect(descriptor))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        here.disconnect(here.connect(changed(descriptor)))
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(here._parted) == 21
    other.end()
    oneself = here.connect(here.describe())
    eventually(lambda: here.peer_state(oneself) is PeerState.ALIVE and not here._parted)
    assert not here._left


def test_a_forked_child_cannot_use_what_it_inherited_and_ends(here: Engine, there: Start) -> None:
    other = there()
    answers = other.ask("fork_and_use")
    assert answers == {"describe": "BadCall", "poll": "BadCall", "allocate": "BadCall", "close": "returned"}
    region = other.ask("share", nbytes=4096)
    assert ended(here, one_byte(here, here.connect(other.describe()), region)) is Status.DONE


def test_a_forked_child_lets_go_of_nothing_that_its_parent_keeps(here: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = here.allocate(64)
    with monkeypatch.context() as child:
        child.setattr(here, "_bury", lambda: pytest.fail("it looked for what can be let go of"))
        child.setattr(os, "getpid", lambda: 1)
        with pytest.raises(BadCall, match="forked"):
            here.register(memory)


FORKS = """
import os, signal, sys
from tensorferry.backends import _{0}_engine as engine
from tensorferry.backends.{0} import {1}Options, {1}Transport
for lock in {2}:
    getattr(engine, lock).acquire()  # as another thread does that opens one
child = os.fork()
if not child:
    signal.alarm(30)
    {1}Transport({1}Options()).close()
    os._exit(0)
assert all(getattr(engine, lock).locked() for lock in {2}), "the parent's are as they were"
os._exit(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""


@pytest.mark.parametrize(
    ("kind", "name", "locks"), [("mooncake", "Mooncake", ["_quiet"]), ("nixl", "Nixl", ["_loading", "_creating"])]
)
def test_a_child_that_is_forked_while_another_thread_opens_a_transport_can_open_its_own(
    kind: str, name: str, locks: list[str]
) -> None:
    need(kind)
    subprocess.run([sys.executable, "-c", FORKS.format(kind, name, locks)], timeout=60, check=True)


# ---- the path ------------------------------------------------------------------------------------------------

LAYOUT = tf.embedding_layout(8)
SETTINGS = Settings(pool_blocks=8, block_size=16, staging_bytes=1 << 20)


def carry(sender: sending.Sender, receiver: receiving.Receiver, room: int) -> tf.SendTransfer:
    given = random_rows(LAYOUT, LAYOUT.names, 300, room)
    sent, received = sender.send(room, **given), receiver.receive(room, sender.address)
    result = received.result(PATIENCE_S)
    assert all(same_bytes(result[name], given[name]) for name in given)
    sent.wait(PATIENCE_S)
    return sent


def warned_once_each(caplog: pytest.LogCaptureFixture, chosen: str) -> None:
    """The side that writes, by its engine's word, and the side that is written to, by the other's."""
    for whose in ("engine", "sender"):
        assert caplog.text.count(f"chosen over {chosen}, and by the {whose}'s word its bytes go over tcp") == 1


def test_copies_that_nixl_makes_by_way_of_tcp_are_warned_of_once_and_the_transfer_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy is over when it was posted. What is not is none, whatever UCX was meant to choose."""
    need("nixl")
    ends = [NixlTransport(NixlOptions(require="memcpy", workers=1)) for _ in range(2)]
    with (
        sending.Sender(LAYOUT, [ends[0]], SETTINGS) as sender,
        receiving.Receiver(LAYOUT, [ends[1]], SETTINGS, poison=True) as receiver,
    ):
        assert carry(sender, receiver, 1).path == "memcpy"
        submit = Agent.submit
        monkeypatch.setattr(Agent, "submit", lambda agent, request: submit(agent, request) and False)
        sent = carry(sender, receiver, 2)
        carry(sender, receiver, 3)
        assert sent.path == "tcp"
        assert "chosen over memcpy, and by the engine's word its bytes go over tcp" in sent.verdicts[0].reason
    warned_once_each(caplog, "memcpy")


def test_the_path_of_a_transfer_of_one_write_is_what_that_write_has_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the end follows the write: what the engine says after it has to be shown by then."""
    need("nixl")
    ends = [NixlTransport(NixlOptions(require="memcpy", workers=1)) for _ in range(2)]
    submit = Agent.submit
    monkeypatch.setattr(Agent, "submit", lambda agent, request: submit(agent, request) and False)
    settings = replace(SETTINGS, pool_blocks=32, first_grant=512)
    with (
        sending.Sender(LAYOUT, [ends[0]], settings) as sender,
        receiving.Receiver(LAYOUT, [ends[1]], settings) as receiver,
    ):
        sent = carry(sender, receiver, 1)
        assert (sent.path, sent.verdicts[0].path) == ("tcp", "tcp")


@pytest.mark.parametrize("require", ["", "rdma"])
def test_a_mooncake_engine_that_says_another_way_after_a_write_is_warned_of_or_used_no_more(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, require: str
) -> None:
    """Engines over TCP that take themselves, and each other, for RDMA: until one says what it is."""
    need("mooncake")
    ends = [MooncakeTransport(MooncakeOptions(host="127.0.0.1")) for _ in range(2)]
    asked = _mooncake_contact.ask

    def says_rdma(*arguments: Any) -> Answer:
        answer = asked(*arguments)
        answer.protocol = "rdma"
        return answer

    monkeypatch.setattr(_mooncake_contact, "ask", says_rdma)
    for one in ends:
        one._engine.protocol = "rdma"
    settings = replace(SETTINGS, require=require)
    with (
        sending.Sender(LAYOUT, [ends[0]], settings) as sender,
        receiving.Receiver(LAYOUT, [ends[1]], settings, poison=True) as receiver,
    ):
        assert carry(sender, receiver, 1).path == "rdma"
        ends[0]._engine.protocol = "tcp"
        if require:
            with pytest.raises(PathMismatch, match=r"rdma is required.*over tcp"):
                carry(sender, receiver, 2)
        else:
            assert carry(sender, receiver, 2).path == "tcp"
            carry(sender, receiver, 3)
            warned_once_each(caplog, "rdma")
        ends[1]._engine.protocol = "tcp"


def test_where_rdma_is_required_an_engine_whose_own_handshake_says_tcp_gets_no_write(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Both sides take themselves for RDMA; what is asked before the first write is the peer's engine itself."""
    need("mooncake")
    monkeypatch.setattr(MooncakeEngine, "submit", lambda *_: pytest.fail("something was submitted"))
    ends = [MooncakeTransport(MooncakeOptions(host="127.0.0.1", contact_timeout=1.5)) for _ in range(2)]
    for one in ends:
        one._engine.protocol = "rdma"
    settings = replace(SETTINGS, require="rdma", max_bumps=1, transfer_deadline=PATIENCE_S)
    with (
        sending.Sender(LAYOUT, [ends[0]], settings) as sender,
        receiving.Receiver(LAYOUT, [ends[1]], settings, poison=True) as receiver,
    ):
        sent = sender.send(1, **random_rows(LAYOUT, LAYOUT.names, 300, 1))
        with pytest.raises(TransportError):
            receiver.receive(1, sender.address).wait(PATIENCE_S)
        with pytest.raises(TransportError):
            sent.wait(PATIENCE_S)
        for one in ends:
            one._engine.protocol = "tcp"
    assert "another engine than the peer's answers" in caplog.text
