"""Host names in addresses: looked up by threads that nobody waits for, and never by ZMQ."""

from __future__ import annotations

import ipaddress
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import zmq

from tensorferry.core import messages as m
from tensorferry.core.asking import ask
from tensorferry.core.control import Control
from tensorferry.core.errors import ConfigError, PeerUnreachable
from tensorferry.core.names import AGAIN_SECONDS, MOST_LOOKUPS, Lead, Names, lead, look_up

PATIENCE_S = 30.0

PING, PONG = m.Ping(src=1, dst=2), m.Pong(src=2, dst=1)


class NameService:
    """Answers for names that end in .example; the others are looked up as ever. `slow`: it waits for `answer`."""

    def __init__(self) -> None:
        self.ips: dict[str, list[str]] = {}
        self.asked: list[str] = []
        self.slow = False
        self.answer = threading.Event()
        self.waiting = self.most_waiting = 0
        self._lock = threading.Lock()
        self._real = socket.getaddrinfo

    def __call__(self, host: Any, port: Any, *rest: Any, **more: Any) -> list[Any]:
        name = host.decode() if isinstance(host, bytes) else str(host)
        if not name.endswith(".example"):
            return self._real(host, port, *rest, **more)
        with self._lock:
            self.asked.append(name)
            self.waiting += 1
            self.most_waiting = max(self.most_waiting, self.waiting)
        if self.slow:
            assert self.answer.wait(PATIENCE_S)
        with self._lock:
            self.waiting -= 1
        if name not in self.ips:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [entry for ip in self.ips[name] for entry in self._real(ip, None, type=socket.SOCK_STREAM)]


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[NameService]:
    service = NameService()
    monkeypatch.setattr(socket, "getaddrinfo", service)
    yield service
    service.answer.set()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def control(stack: ExitStack, bind: str = "", patience: float = 8.0) -> Control:
    made = Control(b"server" if bind else b"client", bind, patience)
    stack.callback(made.close)
    return made


def port_of(server: Control) -> str:
    return server.address.rpartition(":")[2]


def until(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := what()):
        assert time.monotonic() < deadline, f"still {found!r}"
        time.sleep(0.002)
    return found


def looking_up(prefix: str) -> int:
    """Threads that look up a name that begins so."""
    return sum(thread.name.startswith(f"tensorferry-name-{prefix}") for thread in threading.enumerate())


def talk(client: Control, address: str, server: Control) -> None:
    """Say it until it is heard, and answered."""

    def heard() -> bool:
        client.send(address, PING)
        for route, _ in server.receive(0.01):
            server.send(route, PONG)
        return (address, PONG) in client.receive(0.01)

    until(heard)


# ---------------------------------------------------------------- what an address leads to


@pytest.mark.parametrize(
    "address",
    ["tcp://127.0.0.1:5555", "tcp://[::1]:5555", "tcp://[fe80::1%eth0]:1", "inproc://x", "tcp://", "tcp://host", "x:5"],
)
def test_what_has_a_number_or_no_host_is_not_looked_up(address: str) -> None:
    assert lead(address, 8.0) is None


@pytest.mark.parametrize(
    ("address", "name", "numeric"),
    [
        ("tcp://encoder-7.prod:5555", "encoder-7.prod", "tcp://10.0.0.1:5555"),
        ("tcp://localhost:1", "localhost", "tcp://10.0.0.1:1"),
        ("tcp://10.0.0.9:0;host:5", "host", "tcp://10.0.0.9:0;10.0.0.1:5"),
    ],
)
def test_a_name_gives_way_to_a_number(address: str, name: str, numeric: str) -> None:
    found = lead(address, 8.0)
    assert found is not None
    assert found.name == name
    assert found.found(("10.0.0.1",), "", 1.0)
    assert found.numeric == numeric
    assert found.found(("fd00::1",), "", 2.0)
    assert found.numeric == numeric.replace("10.0.0.1", "[fd00::1]")


def led(*ips: str, at: float = 100.0) -> Lead:
    found = lead("tcp://host:5", 10.0)
    assert found is not None
    assert found.found(ips, "", at)
    return found


def test_a_name_is_looked_up_again_when_nobody_has_answered_for_a_while_and_not_before() -> None:
    there = led("10.0.0.1")
    assert not there.said(200.0)
    assert not there.said(200.0 + AGAIN_SECONDS - 0.1)
    there.heard()
    assert not there.said(300.0)  # it was idle, not silent
    assert there.said(300.0 + AGAIN_SECONDS)
    assert not there.found(("10.0.0.1",), "", 303.0)  # as before
    assert not there.said(303.1)
    assert there.said(303.0 + AGAIN_SECONDS)


def test_a_host_that_has_moved_is_followed() -> None:
    there = led("10.0.0.1")
    there.said(200.0)
    there.heard()
    there.said(201.0)
    assert there.found(("10.0.0.2", "10.0.0.3"), "", 204.0)
    assert there.ip == "10.0.0.2"


def test_each_address_of_a_silent_name_has_its_turn() -> None:
    there = led("10.0.0.1", "fd00::1")
    seen = []
    for now in (110.0, 120.0, 130.0):
        there.said(now)
        there.said(now + AGAIN_SECONDS)
        assert there.found(("10.0.0.1", "fd00::1"), "", now + AGAIN_SECONDS)
        seen.append(there.ip)
    assert seen == ["fd00::1", "10.0.0.1", "fd00::1"]


def test_what_has_answered_is_kept_until_it_counts_as_lost() -> None:
    there = led("10.0.0.1", "10.0.0.2")
    there.said(200.0)
    there.heard()
    there.said(300.0)
    assert not there.found(("10.0.0.1", "10.0.0.2"), "", 305.0)
    there.said(309.0)
    assert there.found(("10.0.0.2", "10.0.0.1"), "", 311.0)
    assert there.ip == "10.0.0.2"


def test_somebody_elses_question_moves_nobody() -> None:
    there = led("10.0.0.1", "10.0.0.2")
    assert not there.found(("10.0.0.1", "10.0.0.2"), "", 101.0)
    there.said(102.0)
    assert not there.found(("10.0.0.2", "10.0.0.1"), "", 102.1)


def test_a_name_that_is_not_found_any_more_leaves_what_there_is() -> None:
    there = led("10.0.0.1")
    assert not there.found((), "Name or service not known", 101.0)
    assert (there.ip, there.trouble) == ("10.0.0.1", "Name or service not known")
    assert not there.found(("10.0.0.1",), "", 102.0)
    assert there.trouble == ""


# ---------------------------------------------------------------- looking up


def test_ipv4_comes_first_and_each_address_once(service: NameService) -> None:
    service.ips["two.example"] = ["::1", "127.0.0.1", "::1"]
    assert look_up("two.example") == (("127.0.0.1", "::1"), "")
    assert look_up("none.example") == ((), "Name or service not known")


@pytest.mark.parametrize("name", ["a..b", "x" * 70 + ".invalid", "."])
def test_what_can_be_no_name_is_not_found(name: str) -> None:
    ips, trouble = look_up(name)
    assert ips == ()
    assert trouble


def test_so_many_names_are_looked_up_at_once_and_none_twice(service: NameService) -> None:
    service.slow = True
    woken = threading.Event()
    looking = Names(woken.set)
    wanted = {f"host-{k}.example" for k in range(3 * MOST_LOOKUPS)}
    for name in [*wanted, *wanted]:
        looking.ask(name)
    until(lambda: service.waiting == MOST_LOOKUPS)
    assert looking_up("host-") == MOST_LOOKUPS
    assert list(looking.answers()) == []
    service.answer.set()
    answers: list[tuple[str, tuple[str, ...], str]] = []
    until(lambda: answers.extend(looking.answers()) or len(answers) >= len(wanted))
    assert {name for name, _, _ in answers} == wanted
    assert sorted(service.asked) == sorted(wanted)
    assert service.most_waiting <= MOST_LOOKUPS
    assert woken.is_set()
    until(lambda: looking_up("host-") == 0)  # nobody waits for another name


def test_where_there_is_no_thread_the_name_is_not_found_just_now(monkeypatch: pytest.MonkeyPatch) -> None:
    looking = Names(lambda: None)

    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        for k in range(2 * MOST_LOOKUPS):
            looking.ask(f"host-{k}")
        assert [trouble for _, _, trouble in looking.answers()] == ["can't start new thread"] * 2 * MOST_LOOKUPS
    looking.ask("localhost")
    assert until(lambda: list(looking.answers()))[0][2] == ""


# ---------------------------------------------------------------- the control channel


def test_zmq_is_given_numbers_only_and_the_first_word_arrives(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []
    connect = zmq.Socket.connect
    monkeypatch.setattr(zmq.Socket, "connect", lambda socket, to: given.append(to) or connect(socket, to))  # type: ignore[func-returns-value]
    server, client = control(stack, "tcp://127.0.0.1:0"), control(stack)
    address = f"tcp://localhost:{port_of(server)}"
    client.connect(address)
    client.send(address, PING)
    said: list[Any] = []
    until(lambda: said.extend(server.receive(0.01)) or client.receive(0.01) or said)
    assert [message for _, message in said] == [PING]
    assert client.routes == (address,)
    for to in given:
        assert ipaddress.ip_address(re.fullmatch(r"tcp://\[?(.*?)\]?:\d+", to)[1])  # type: ignore[index]


def test_a_name_that_is_looked_up_slowly_keeps_nobody_waiting(stack: ExitStack, service: NameService) -> None:
    service.slow = True
    server, client = control(stack, "tcp://127.0.0.1:0"), control(stack)
    slow = f"tcp://slow.example:{port_of(server)}"
    client.connect(slow)
    client.send(slow, m.Ping(src=7, dst=2))
    until(lambda: service.waiting)
    client.connect(server.address)
    talk(client, server.address, server)
    service.ips["slow.example"] = ["127.0.0.1"]
    service.answer.set()
    said: list[Any] = []
    until(lambda: client.receive(0.01) or said.extend(server.receive(0.01)) or said)
    assert m.Ping(src=7, dst=2) in [message for _, message in said]  # it has waited for the name
    talk(client, slow, server)


def test_what_is_said_to_a_name_that_is_not_found_is_bounded(
    stack: ExitStack, service: NameService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tensorferry.core.control.QUEUE_FRAMES", 10)
    client = control(stack)
    client.connect("tcp://none.example:5")
    for _ in range(100):
        client.send("tcp://none.example:5", PING)
    assert client.dropped == {"queue full": 90}
    until(lambda: client.receive(0.01) or client.trouble("tcp://none.example:5"))
    assert client.trouble("tcp://none.example:5") == "Name or service not known"
    assert client.trouble("tcp://elsewhere:5") == ""


def test_a_name_with_ipv6_alone_is_reached(stack: ExitStack, service: NameService) -> None:
    try:
        server = control(stack, "tcp://[::1]:0")
    except ConfigError as problem:
        pytest.skip(f"needs ipv6: {problem}")
    service.ips["six.example"] = ["::1"]
    client = control(stack)
    address = f"tcp://six.example:{port_of(server)}"
    client.connect(address)
    talk(client, address, server)


def test_a_host_that_moves_is_found_again(stack: ExitStack, service: NameService) -> None:
    server, client = control(stack, "tcp://127.0.0.1:0"), control(stack, patience=0.4)
    service.ips["host.example"] = ["127.0.0.1"]
    address = f"tcp://host.example:{port_of(server)}"
    client.connect(address)
    talk(client, address, server)
    server.close()
    service.ips.clear()  # for a while it has none
    until(lambda: (client.send(address, PING), client.receive(0.01), client.trouble(address))[2])
    service.ips["host.example"] = ["127.0.0.2"]
    talk(client, address, control(stack, address.replace("host.example", "127.0.0.2")))
    assert client.routes == (address,)


def test_of_several_addresses_one_that_answers_is_found(stack: ExitStack, service: NameService) -> None:
    service.ips["host.example"] = ["127.0.0.3", "127.0.0.4", "127.0.0.1"]
    server, client = control(stack, "tcp://127.0.0.1:0"), control(stack, patience=0.4)
    address = f"tcp://host.example:{port_of(server)}"
    client.connect(address)
    talk(client, address, server)


def test_nobody_waits_for_a_name_at_the_end(service: NameService) -> None:
    service.slow = True
    client = Control(b"client")
    client.connect("tcp://slow.example:5")
    client.connect("tcp://slower.example:5")
    client.disconnect("tcp://slower.example:5")
    until(lambda: service.waiting == 2)
    client.close()
    assert service.waiting == 2
    service.answer.set()
    until(lambda: looking_up("slow") == 0)


def test_asking_by_a_name_that_is_not_found_says_so(service: NameService) -> None:
    with pytest.raises(PeerUnreachable, match="host is not found: Name or service not known"):
        ask("tcp://none.example:5555", 0.3)
