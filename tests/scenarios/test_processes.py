"""Two real processes: whole transfers, and what is left when one is killed or stopped in the middle."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scenario_kit import PATIENCE, SMALL, Quay, assert_clean, assert_same, eventually, rows
from side import Failed, Side

from tensorferry import errors

QUICK: dict[str, object] = {"heartbeat": 0.1, "peer_timeout": 1.0}
SIZES: dict[str, object] = {"block_size": 16, "pool_blocks": 8, "first_grant": 64, "window": "rounds", "slabs": 4}
TOKENS = 1000

PLAIN = pytest.mark.parametrize("kind", ["shm", "tcp"], indirect=True)
"""For what is the protocol's alone."""


@pytest.fixture(params=["mooncake", "nixl", "shm", "tcp"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def start(kind: str) -> Iterator[Callable[..., Side]]:
    """Starts sides; those that are left are killed after the test."""
    started: list[Side] = []

    def start_side(role: str, **settings: Any) -> Side:
        started.append(Side(role, **{**SIZES, "transport": kind, "staging_bytes": 1 << 20, **settings}))
        return started[-1]

    yield start_side
    for side in started:
        side.end()


def quay(kind: str, **more: Any) -> Quay:
    return Quay(kind, layout=SMALL, **{**SIZES, **more})


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def test_every_length_arrives_from_another_process(start: Callable[..., Side], kind: str) -> None:
    sender = start("sender")
    address = sender.address
    with quay(kind) as here:
        for room, total in enumerate([0, 1, 15, 16, 17, 500, TOKENS, 20_000]):
            sender.ask("send", room=room, total=total, seed=room)
            receiving = here.receiver.receive(room, address)
            assert_same(receiving.result(PATIENCE), rows(total, room, SMALL))
            sender.ask("wait", room=room)
        assert_clean(here.receiver)
        eventually(lambda: sender.ask("books") == {})
        assert sender.ask("free_blocks") == 8
    assert sender.ask("close") is None


@PLAIN
def test_a_room_that_another_process_receives_is_in_use(start: Callable[..., Side], kind: str) -> None:
    other = start("receiver")
    with quay(kind) as here:
        sending = here.sender.announce(1, TOKENS)
        other.ask("receive", room=1, sender=here.sender.address)
        eventually(lambda: sending.status == "WAITING_FOR_INPUT")
        second = here.receive(1)
        with pytest.raises(errors.RoomInUse):
            second.wait(PATIENCE)
        given = rows(TOKENS, 4, SMALL)
        sending.put(0, **given)
        other.ask("check", room=1, total=TOKENS, seed=4)
        sending.wait(PATIENCE)
        here.carry(TOKENS, room=1)  # and now it is not


def test_a_sender_killed_in_the_middle_of_a_write_is_lost_and_its_blocks_are_free_at_once(
    start: Callable[..., Side],
    kind: str,
) -> None:
    """F4: the kernel's word that the process is gone; no slab is replaced. Other senders' rooms go on meanwhile."""
    victim = start("sender")
    address = victim.address
    with quay(kind, **QUICK) as here:
        slow = here.sender.announce(7, TOKENS)
        alive = here.receive(7)
        victim.ask("hold_copies")
        victim.ask("send", room=1, total=TOKENS)
        receiving = here.receiver.receive(1, address)
        victim.ask("until_held")
        regions = here.receiver._call(here.receiver._buffers.regions)
        victim.kill()
        with pytest.raises(errors.PeerLost):
            receiving.wait(PATIENCE)
        given = rows(TOKENS, 5, SMALL)
        slow.put(0, **given)
        assert_same(alive.result(PATIENCE), given)
        assert_clean(here.receiver)
        assert here.receiver._call(here.receiver._buffers.regions) == regions
        assert here.receiver._call(lambda: here.receiver._buffers.graveyard.nbytes) == 0


@PLAIN
@pytest.mark.parametrize("same", [True, False], ids=["same-content", "other-content"])
def test_a_sender_killed_and_started_again_on_its_address_goes_on_or_starts_over(
    start: Callable[..., Side], kind: str, same: bool
) -> None:
    address = free_port()
    first = start("sender", bind=address)
    name = "00" * 16
    with quay(kind) as here:
        first.ask("announce", room=1, total=TOKENS, ready=320, content_id=name if same else None)
        receiving = here.receiver.receive(1, address)
        eventually(lambda: receiving.sent_tokens == 320)
        first.kill()
        second = start("sender", bind=address)
        second.ask("send", room=1, total=TOKENS, seed=0 if same else 9, content_id=name if same else None)
        assert_same(receiving.result(PATIENCE), rows(TOKENS, 0 if same else 9, SMALL))
        second.ask("wait", room=1)
        starts = [r.start for r in receiving.rounds]
        assert starts.count(0) == 1
        assert sum(r.tokens for r in receiving.rounds) == TOKENS


def test_a_receiver_killed_in_the_middle_ends_the_send_and_releases_the_rows(
    start: Callable[..., Side], kind: str
) -> None:
    victim = start("receiver")
    with quay(kind, **QUICK) as here:
        sending = here.sender.announce(1, TOKENS)
        sending.put(0, **rows(320, 0, SMALL))
        other, other_room = here.receive(2), here.sender.announce(2, TOKENS)
        victim.ask("receive", room=1, sender=here.sender.address)
        victim.ask("sent_tokens", room=1, least=320)
        victim.kill()
        with pytest.raises(errors.PeerLost):
            sending.wait(PATIENCE)
        given = rows(TOKENS, 5, SMALL)
        other_room.put(0, **given)
        assert_same(other.result(PATIENCE), given)
        assert_clean(here.sender)
        eventually(lambda: not here.sender._poster.targets.keys() - here.sender.machine.receivers.keys())


@PLAIN
def test_a_receiver_killed_and_started_again_receives_from_the_beginning(start: Callable[..., Side], kind: str) -> None:
    victim, successor = start("receiver"), start("receiver")
    with quay(kind, **QUICK) as here:
        given = rows(TOKENS, 0, SMALL)
        sending = here.sender.announce(1, TOKENS)
        sending.put(0, **{name: tensor[:320] for name, tensor in given.items()})
        victim.ask("receive", room=1, sender=here.sender.address)
        victim.ask("sent_tokens", room=1, least=320)
        assert successor.ask("free_blocks") == 8  # it is up: the room waits for peer_timeout, not for an interpreter
        victim.kill()
        successor.ask("receive", room=1, sender=here.sender.address)
        sending.put(320, **{name: tensor[320:] for name, tensor in given.items()})
        successor.ask("check", room=1, total=TOKENS)
        sending.wait(PATIENCE)
        eventually(lambda: successor.ask("books") == {})


def test_the_memory_of_receivers_that_are_gone_is_let_go_of(start: Callable[..., Side], kind: str) -> None:
    """A sender maps a receiver's pool. Of one that has finished and ended nothing is kept."""
    with quay(kind) as here:
        for room in range(2):
            visitor = start("receiver")
            visitor.ask("receive", room=room, sender=here.sender.address)
            here.sender.send(room, **rows(TOKENS, 0, SMALL)).wait(PATIENCE)
            visitor.kill()
        eventually(lambda: not here.sender._call(lambda: dict(here.sender._poster.targets)))
        assert not here.sender._call(lambda: here.sender._heard)


def test_a_sender_stopped_in_the_middle_of_a_write_costs_its_slab_and_corrupts_nothing(
    start: Callable[..., Side],
    kind: str,
) -> None:
    """F3: what it still writes when it wakes lands in memory that nobody uses. Then it is a sender like any other."""
    zombie = start("sender", **QUICK)
    address = zombie.address
    with quay(kind, **QUICK) as here:
        zombie.ask("hold_copies")
        zombie.ask("send", room=1, total=TOKENS)
        receiving = here.receiver.receive(1, address)
        zombie.ask("until_held")
        zombie.signal(signal.SIGSTOP)
        with pytest.raises(errors.PeerLost):
            receiving.wait(PATIENCE)
        eventually(lambda: here.receiver.free_blocks == 8)
        assert here.receiver._call(lambda: here.receiver._buffers.graveyard.nbytes) > 0
        tenant, given = here.receive(2), rows(TOKENS, 6, SMALL)
        eventually(lambda: here.receiver.free_blocks < 8)  # the same block numbers, in other hands
        zombie.signal(signal.SIGCONT)
        zombie.ask("let_go")
        with pytest.raises(Failed):
            zombie.ask("wait", room=1)
        eventually(lambda: zombie.ask("books") == {})  # it has written its last
        sending = here.sender.send(2, **given)
        assert_same(tenant.result(PATIENCE), given)
        sending.wait(PATIENCE)
        zombie.ask("send", room=3, total=TOKENS, seed=3)
        again = here.receiver.receive(3, address)
        assert_same(again.result(PATIENCE), rows(TOKENS, 3, SMALL))
        zombie.ask("wait", room=3)
        assert_clean(here.receiver)
        assert not here.receiver.stale_writes


def test_a_stopped_receiver_ends_the_send_and_is_welcome_again_when_it_wakes(
    start: Callable[..., Side], kind: str
) -> None:
    sleeper = start("receiver", **QUICK)
    with quay(kind, **QUICK) as here:
        given = rows(TOKENS, 0, SMALL)
        sending = here.sender.announce(1, TOKENS)
        sending.put(0, **{name: tensor[:320] for name, tensor in given.items()})
        sleeper.ask("receive", room=1, sender=here.sender.address)
        sleeper.ask("sent_tokens", room=1, least=320)
        sleeper.signal(signal.SIGSTOP)
        with pytest.raises(errors.PeerLost):
            sending.wait(PATIENCE)
        assert_clean(here.sender)
        sleeper.signal(signal.SIGCONT)
        with pytest.raises(Failed) as raised:
            sleeper.ask("wait", room=1)
        assert raised.value.code == "peer_lost"
        second = here.sender.send(2, **given)
        sleeper.ask("receive", room=2, sender=here.sender.address)
        sleeper.ask("check", room=2, total=TOKENS)
        second.wait(PATIENCE)
        eventually(lambda: sleeper.ask("books") == {})


@PLAIN
@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_a_pause_shorter_than_the_timeout_is_only_a_pause(start: Callable[..., Side], kind: str, who: str) -> None:
    there = start("receiver" if who == "receiver" else "sender")
    with quay(kind) as here:
        given = rows(20_000, 0, SMALL)
        if who == "sender":
            address = there.address
            there.ask("send", room=1, total=20_000)
            receiving = here.receiver.receive(1, address)
            eventually(lambda: receiving.sent_tokens > 0)
        else:
            there.ask("receive", room=1, sender=here.sender.address)
            sending = here.sender.send(1, **given)
            there.ask("sent_tokens", room=1, least=1)
        there.signal(signal.SIGSTOP)
        pid = there._process.pid
        eventually(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("T"))
        there.signal(signal.SIGCONT)
        if who == "sender":
            assert_same(receiving.result(PATIENCE), given)
            there.ask("wait", room=1)
        else:
            there.ask("check", room=1, total=20_000)
            sending.wait(PATIENCE)


@pytest.mark.parametrize("kind", ["shm"], indirect=True)
def test_memory_does_not_join_two_processes_and_says_so_on_both_sides(start: Callable[..., Side]) -> None:
    there = start("sender", transport="memory", **QUICK)
    with Quay("memory", layout=SMALL, **SIZES, **QUICK) as here:  # type: ignore[arg-type]
        there.ask("send", room=1, total=10)
        receiving = here.receiver.receive(1, there.address)
        with pytest.raises(errors.TransportMismatch, match="one process"):
            receiving.wait(PATIENCE)
