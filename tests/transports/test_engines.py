"""What both engines have to come through, the same for each: the rows of their failure tables that are alike."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from transport_ends import Process, ended, eventually, need, over, source

from tensorferry.backends.mooncake import MooncakeOptions, MooncakeTransport
from tensorferry.backends.nixl import NixlOptions, NixlTransport
from tensorferry.core.memory import Memory
from tensorferry.core.transport import Copy, PeerState, RemoteRegion, Status

pytestmark = pytest.mark.timeout(120)

Engine = MooncakeTransport | NixlTransport
Start = Callable[..., Process]

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


def post(transport: Engine, peer: Any, region: list[int], nbytes: int, offset: int = 0) -> int:
    return transport.post(peer, [Copy(source(transport, bytes(nbytes)), 0, RemoteRegion(*region), offset, nbytes)])


def test_many_posts_under_way_to_a_peer_that_is_killed_all_come_to_their_end(here: Engine, there: Start) -> None:
    doomed = there()
    region = doomed.ask("share", nbytes=64 << 20)
    peer = here.connect(doomed.describe())
    assert ended(here, post(here, peer, region, 1)) is Status.DONE
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
    assert ended(here, post(here, peer, region, 1)) is Status.DONE
    other.ask("close")
    # The first write after it may be the one that finds out; by then the engine has nobody to write to.
    assert over(here, post(here, peer, region, 1)) in (Status.FAILED, Status.UNKNOWN)
    assert ended(here, post(here, peer, region, 1)) is Status.FAILED
    assert here.peer_state(peer) is PeerState.ALIVE, "its process is not over"
    own = here.register(here.allocate(4096))
    oneself = here.connect(here.describe())
    assert ended(here, post(here, oneself, [own.id, own.generation], 1)) is Status.DONE, "the engine goes on"


def test_a_source_that_is_no_memory_is_not_called_done_and_hurts_nobody(here: Engine, there: Start) -> None:
    """What a caller says of an address is not checked by either engine when it is registered."""
    other = there()
    region = other.ask("share", nbytes=1 << 20)
    peer = here.connect(other.describe())
    assert ended(here, post(here, peer, region, 1)) is Status.DONE
    wrong = here.allocate(1 << 20)
    local = here.register(wrong)
    sealed(wrong)
    assert over(here, here.post(peer, [Copy(local, 0, RemoteRegion(*region), 0, 1 << 20)])) is Status.UNKNOWN
    eventually(lambda: over(here, post(here, peer, region, 1)) is Status.DONE, "the pair works again")
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
    assert ended(here, post(here, peer, region, 1)) is Status.DONE
    other.ask("seal_first")
    assert over(here, post(here, peer, region, 1 << 20)) is Status.UNKNOWN
    eventually(lambda: over(here, post(here, peer, kept, 1)) is Status.DONE, "the pair works again")
