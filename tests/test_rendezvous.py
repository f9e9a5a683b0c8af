"""Rendezvous: names in a real etcd, entries that expire, and what happens when the directory does not answer."""

from __future__ import annotations

import importlib.metadata
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
from carry_kit import listing, paste, sending, small_file
from etcd_kit import PATIENCE, Etcd, until
from hypothesis import given
from hypothesis import strategies as st

import tensorferry as tf
from tensorferry import api, cli, errors, reachable
from tensorferry.backends import etcd as etcd_backend
from tensorferry.commands.serving import Serving
from tensorferry.commands.token_file import open_file
from tensorferry.core.directory import Directory, Entry
from tensorferry.plugins import rendezvous
from tensorferry.plugins.rendezvous import Publication, find, open_directory

pytestmark = pytest.mark.xdist_group("etcd")

TTL = 1.0
"""Seconds: for entries that are to expire."""

LONG = 600.0
"""For those that are not, however slow the machine."""

_numbers = count(1)


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    server = Etcd(tmp_path_factory.mktemp("etcd"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def url(etcd: Etcd) -> str:
    """A prefix of its own for each test."""
    return f"{etcd.url}/test-{next(_numbers)}"


@pytest.fixture
def directory(url: str) -> Iterator[Directory]:
    with open_directory(url) as one:
        yield one


def entry(incarnation: int, name: str = "encoder-0") -> Entry:
    return Entry(name=name, address=f"tcp://127.0.0.1:{incarnation}", incarnation=incarnation)


def found(directory: Directory, name: str = "encoder-0") -> Entry | None:
    try:
        return directory.lookup(name)
    except errors.UnknownName:
        return None


def raw(url: str):
    """etcd's own client, and the key of a name under the prefix of `url`."""
    import etcd3gw

    host, _, prefix = url.removeprefix("etcd://").partition("/")
    client = etcd3gw.client("127.0.0.1", int(host.rpartition(":")[2]), api_path="/v3/")
    return client, lambda name: f"{prefix}/{name}"


# ---- one name, several incarnations


def test_what_is_published_is_found_until_it_is_withdrawn(directory):
    directory.publish(entry(7), LONG)
    assert found(directory) == entry(7)
    directory.withdraw(entry(7))
    assert found(directory) is None
    directory.withdraw(entry(7))  # nothing happens


def test_a_restarted_one_replaces_its_predecessor_whose_late_words_change_nothing(url, directory):
    with open_directory(url) as theirs:
        directory.publish(entry(7), LONG)
        theirs.publish(entry(8), LONG)
        with pytest.raises(errors.NameTaken, match=r"later incarnation, at tcp://127.0.0.1:8.*a name of its own"):
            directory.publish(entry(7), LONG)
        directory.withdraw(entry(7))
        assert found(directory) == entry(8)


def test_the_predecessors_lease_takes_nothing_with_it(url, directory):
    client, key = raw(url)
    with client.session:
        directory.publish(entry(7), LONG)
        [(_, about)] = client.get(key("encoder-0"), metadata=True)
        with open_directory(url) as theirs:
            theirs.publish(entry(8), LONG)
            from etcd3gw.lease import Lease

            old = Lease(int(about["lease"]), client)
            old.revoke()
            assert found(theirs) == entry(8)
            theirs.withdraw(entry(8))


def test_a_later_one_wins_whoever_comes_first(url):
    """All at once: who looked and then wrote, without comparing, would now and then bury a later one."""
    for _ in range(5):
        gate = threading.Barrier(6)

        def publish(incarnation: int, gate: threading.Barrier = gate) -> None:
            with open_directory(url, seconds=30) as mine:
                gate.wait()
                try:
                    mine.publish(entry(incarnation), LONG)
                except errors.NameTaken:
                    assert incarnation < 6

        threads = [threading.Thread(target=publish, args=(n,)) for n in range(1, 7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with open_directory(url) as directory:
            assert found(directory) == entry(6)
            directory.withdraw(entry(6))


def test_an_entry_that_is_not_renewed_expires(directory):
    directory.publish(entry(7), TTL)
    until(lambda: found(directory) is None, "the lease's end")


PUBLISHER = """
import sys
from tensorferry.core.directory import Entry
from tensorferry.plugins.rendezvous import Publication, open_directory

Publication(open_directory(sys.argv[1]), Entry(name="encoder-0", address="tcp://127.0.0.1:7", incarnation=7), 1.0)
print("published", flush=True)
sys.stdin.read()
"""


def test_the_entry_of_a_process_that_was_killed_expires(url, directory):
    with subprocess.Popen(
        [sys.executable, "-c", PUBLISHER, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"published\n"
            until(lambda: found(directory) == entry(7), "the entry: where this machine was held up, it had expired")
        finally:
            process.kill()
    until(lambda: found(directory) is None, "the lease's end")


def test_an_entry_that_was_deleted_by_hand_comes_back_with_its_lease(url, directory):
    client, key = raw(url)
    with client.session:
        directory.publish(entry(7), LONG)
        [(_, before)] = client.get(key("encoder-0"), metadata=True)
        client.delete(key("encoder-0"))
        directory.publish(entry(7), LONG)
        [(_, after)] = client.get(key("encoder-0"), metadata=True)
        assert before["lease"] == after["lease"]
        directory.publish(entry(7), LONG)
        [(_, again)] = client.get(key("encoder-0"), metadata=True)
        assert again == after  # renewed, and not written
        directory.withdraw(entry(7))


def test_a_wrong_name_is_told_the_nearest_one(url, directory):
    directory.publish(entry(7), LONG)
    with pytest.raises(errors.UnknownName, match=r"nobody is found under 'encoder_0'.*Did you mean 'encoder-0'\?"):
        directory.lookup("encoder_0")
    with open_directory(f"{url}0") as neighbour, pytest.raises(errors.UnknownName, match=r"'encoder_0'") as caught:
        neighbour.lookup("encoder_0")
    assert "mean" not in caught.value.hint


# ---- what stands there is not ours


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        (b"\x80\x04K\x01.", errors.BadEntry, "no entry"),
        (b"tcp://127.0.0.1:5555", errors.BadEntry, "no entry"),
        (b"[1]", errors.BadEntry, "no entry"),
        (b'{"name":"encoder-0","address":"tcp://1:1","incarnation":1}', errors.BadEntry, "names no version"),
        (b'{"version":1,"name":"other","address":"tcp://1:1","incarnation":1}', errors.BadEntry, "entry of 'other'"),
        (b'{"version":1,"name":"encoder-0","address":"nowhere","incarnation":1}', errors.BadEntry, "no address"),
        (b'{"version":1,"name":"encoder-0","address":"tcp://1:1","incarnation":"1"}', errors.BadEntry, "int"),
        (b'{"version":1,"name":"encoder-0"}', errors.BadEntry, "address"),
        (b'{"version":1,"x":"' + 5000 * b"x" + b'"}', errors.BadEntry, "bytes"),
        (b'{"version":1,"x":' + 2000 * b"[" + 2000 * b"]" + b"}", errors.BadEntry, "recursion"),
        (b'{"version":2,"addresses":[]}', errors.VersionMismatch, "version 2, this side reads version 1"),
    ],
)
def test_an_entry_of_somebody_else_is_named_and_left_alone(url, directory, value, kind, words):
    client, key = raw(url)
    with client.session:
        client.put(key("encoder-0"), value)
        with pytest.raises(kind, match=words):
            directory.lookup("encoder-0")
        with pytest.raises(kind, match=words):
            directory.publish(entry(7), LONG)
        directory.withdraw(entry(7))
        assert client.get(key("encoder-0")) == [value]


@given(st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["version", "name", "address", "incarnation", "x"]), inner, max_size=5),
).map(msgspec.json.encode))  # fmt: skip
def test_whatever_is_read_is_an_entry_or_a_typed_error(data):
    try:
        read = Entry.from_bytes(data, "encoder-0")
    except (errors.BadEntry, errors.VersionMismatch):
        return
    assert Entry.from_bytes(read.to_bytes(), "encoder-0") == read


@pytest.mark.parametrize("name", ["", "a/b", "a:1", "-x", "a b", "ä", "x" * 129, "a\n"])
def test_a_name_that_cannot_stand_there_is_refused(directory, name):
    with pytest.raises(errors.ConfigError, match="cannot stand in a directory"):
        entry(7, name)
    with pytest.raises(errors.ConfigError, match="cannot stand in a directory"):
        directory.lookup(name)


# ---- the directory does not answer


def serving(answer: bytes | None) -> Iterator[int]:
    """A port where something that is no etcd says `answer` to every connection, or nothing for as long as it lives."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        held = []

        def serve() -> None:
            while True:
                try:
                    one, _ = listener.accept()
                except OSError:
                    return
                held.append(one)
                if answer is not None:
                    one.recv(65536)
                    one.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for one in held:
                one.close()


def http(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


@pytest.mark.parametrize(
    "answer",
    [None, b"SSH-2.0-OpenSSH_9.2\r\n", http(b"<html>"), http(b'{"kvs":[{}]}'), http(b'{"kvs":[1]}'),
     http(10_000 * b"["),
     b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n",
     b"HTTP/1.1 302 Found\r\nLocation: /v3/kv/range\r\nContent-Length: 0\r\n\r\n", b"HTTP/1.1 200 OK\r\n"],
    ids=["silence", "ssh", "html", "no-key", "number", "deep", "503", "redirect", "half"],
)  # fmt: skip
def test_what_is_no_etcd_is_a_typed_error_in_bounded_time(answer):
    for port in serving(answer):
        with open_directory(f"etcd://127.0.0.1:{port}", seconds=0.3) as directory:
            for verb in (
                lambda d: d.lookup("encoder-0"),
                lambda d: d.publish(entry(7), LONG),
                lambda d: d.withdraw(entry(7)),
            ):
                with pytest.raises(errors.DirectoryUnavailable, match=f"etcd://127.0.0.1:{port}.*explicit address"):
                    verb(directory)


def test_a_server_that_never_ends_an_answer_is_asked_by_so_many_threads_and_no_more(monkeypatch):
    end = threading.Event()
    asked: list[object] = []

    def ask(self: object, work: object, until: float) -> None:
        asked.append(work)
        end.wait()

    def answers(directory: Directory) -> bool:
        try:
            return directory.lookup("encoder-0") is None
        except errors.DirectoryUnavailable:
            return False

    monkeypatch.setattr(etcd_backend.EtcdDirectory, "_ask", ask)
    with open_directory("etcd://127.0.0.1:1", seconds=0.01) as directory:
        try:
            for _ in range(20):
                with pytest.raises(errors.DirectoryUnavailable):
                    directory.lookup("encoder-0")
            with pytest.raises(errors.DirectoryUnavailable, match="answers that it began"):
                directory.lookup("encoder-0")
        finally:
            end.set()
        assert len(asked) == etcd_backend._MOST_ASKING
        until(lambda: answers(directory), "the threads to end")


@pytest.mark.parametrize(
    ("problem", "kind"),
    [
        (RuntimeError("can't start new thread"), errors.DirectoryUnavailable),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_thread_that_cannot_be_started_is_a_typed_error_and_takes_nothing_with_it(monkeypatch, problem, kind):
    def start(self: threading.Thread) -> None:
        raise problem

    with socket.create_server(("127.0.0.1", 0)) as one:
        nobody = one.getsockname()[1]
    with open_directory(f"etcd://127.0.0.1:{nobody}") as directory:
        with monkeypatch.context() as limit:
            limit.setattr(threading.Thread, "start", start)
            for _ in range(etcd_backend._MOST_ASKING + 1):
                with pytest.raises(kind):
                    directory.lookup("encoder-0")
        with pytest.raises(errors.DirectoryUnavailable, match="Connection refused"):
            directory.lookup("encoder-0")


def test_an_interrupt_once_the_thread_has_begun_gives_its_place_back_once(monkeypatch):
    real = threading.Thread.start

    def start(self: threading.Thread) -> None:
        real(self)
        self.join()
        raise KeyboardInterrupt

    with open_directory("etcd://127.0.0.1:1") as directory:
        with monkeypatch.context() as interrupted:
            interrupted.setattr(threading.Thread, "start", start)
            with pytest.raises(KeyboardInterrupt):
                directory.lookup("encoder-0")
        assert directory._asking._value == etcd_backend._MOST_ASKING


def test_nobody_at_the_port_says_so_and_another_member_is_asked(etcd, url, directory):
    with socket.create_server(("127.0.0.1", 0)) as one:
        dead = one.getsockname()[1]
    with (
        open_directory(f"etcd://127.0.0.1:{dead}") as nobody,
        pytest.raises(errors.DirectoryUnavailable, match=f"127.0.0.1:{dead}: Connection refused"),
    ):
        nobody.lookup("encoder-0")
    directory.publish(entry(7), LONG)
    prefix = url.rpartition("/")[2]
    with open_directory(f"etcd://127.0.0.1:{dead},127.0.0.1:{etcd.port}/{prefix}") as both:
        assert found(both) == entry(7)


def test_a_closed_directory_says_so(url):
    directory = open_directory(url)
    directory.close()
    directory.close()
    with pytest.raises(errors.BadCall, match="closed"):
        directory.lookup("encoder-0")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("", "no directory is set.*--directory"),
        ("encoder-0", "no URL of a directory"),
        ("etc://127.0.0.1", r"no installed distribution provides a directory etc://; did you mean etcd"),
        ("etcd://", "names no host"),
        ("etcd://a:1,:2", "names ':2'"),
        ("etcd://a:notaport", "names 'a:notaport'"),
        ("etcd://a:0", "names 'a:0'"),
        ("etcd://root:secret@a", "holds a user.*certificate"),
        ("etcd://a?ca=x", "those of etcds://"),
        ("etcds://a?cert=x", "give both"),
        ("etcds://a?cacert=x", "unknown option 'cacert'"),
        ("etcds://a?ca", "is no URL"),
        ("etcd://[::1", "is no URL"),
    ],
)
def test_a_bad_url_is_refused_with_the_remedy(bad, words):
    with pytest.raises(errors.ConfigError, match=words):
        open_directory(bad)


def test_without_the_client_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "etcd3gw", None)
    with pytest.raises(errors.UnknownDirectory, match=r"etcd3gw.*pip install 'tensorferry\[etcd\]'"):
        open_directory("etcd://127.0.0.1")


def test_tls_with_a_clients_certificate(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl: certificates are made with it")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = [
        "-subj",
        "/CN=x",
        "-days",
        "2",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-addext",
        "extendedKeyUsage=serverAuth,clientAuth",
    ]
    subprocess.run([*make, *names, "-keyout", key, "-out", cert], check=True, capture_output=True)
    flags = ["--cert-file", cert, "--key-file", key, "--trusted-ca-file", cert, "--client-cert-auth"]
    server = Etcd(tmp_path, *map(str, flags), scheme="https")
    server.start()
    try:
        at = f"etcds://127.0.0.1:{server.port}?ca={cert}"
        with open_directory(f"{at}&cert={cert}&key={key}") as directory:
            until(lambda: not isinstance(_outcome(directory), errors.DirectoryUnavailable), "a leader")
            directory.publish(entry(7), LONG)
            assert found(directory) == entry(7)
        for wrong in (at, f"etcds://127.0.0.1:{server.port}", f"{at}.missing"):
            with open_directory(wrong) as directory:
                assert isinstance(_outcome(directory), errors.DirectoryUnavailable), wrong
    finally:
        server.kill()


def _outcome(directory: Directory) -> object:
    try:
        return directory.lookup("encoder-0")
    except errors.FerryError as error:
        return error


# ---- entries that are kept alive


class Counting:
    """Counts what a directory is asked to publish."""

    def __init__(self, directory: Directory) -> None:
        self.directory, self.published = directory, 0

    def publish(self, one: Entry, ttl: float) -> None:
        self.published += 1
        self.directory.publish(one, ttl)

    def __getattr__(self, name: str) -> object:
        return getattr(self.directory, name)


def test_an_entry_is_renewed_until_it_is_closed(url, directory):
    counting = Counting(open_directory(url))
    with Publication(counting, entry(7), TTL) as publication:
        until(lambda: counting.published > 2 * rendezvous.RENEWALS, "twice its time")
        until(lambda: found(directory) == entry(7), "the entry: where this machine was held up, it had expired")
        assert publication.error is None
        publication.close()
    until(lambda: found(directory) is None, "the entry to be withdrawn: this machine is slow")


def test_a_publication_that_is_replaced_says_so_and_leaves_the_other_alone(url, directory):
    with Publication(open_directory(url), entry(7), TTL) as old, Publication(open_directory(url), entry(8), LONG):
        until(lambda: isinstance(old.error, errors.NameTaken), "the old one to hear of it")
        old.close()
        assert found(directory) == entry(8)
        with pytest.raises(errors.NameTaken, match="later incarnation"):
            Publication(open_directory(url), entry(7), LONG)


def test_a_forked_child_does_not_withdraw_its_parents_entry(url, directory, monkeypatch):
    with Publication(open_directory(url), entry(7), LONG) as publication:
        with monkeypatch.context() as child:
            child.setattr(publication, "_pid", -1)
            publication.close()
        assert found(directory) == entry(7)


def test_the_server_dies_and_comes_back_and_transfers_go_on(tmp_path):
    server = Etcd(tmp_path)
    server.start()
    try:
        rows = torch.arange(400.0).view(100, 4)
        settings = {"transport": "memory", "directory": server.url, "peer_timeout": 2.0, "block_size": 8}
        with (
            tf.Sender(LAYOUT, name="encoder-0", **settings) as sender,
            tf.Receiver(LAYOUT, **settings) as receiver,
            tf.open_directory(server.url) as directory,
        ):
            publication = sender.publish()
            address = receiver.find("encoder-0")
            sending = sender.announce(1, 100)
            sending.put(0, x=rows[:50])
            receiving = receiver.receive(1, address)
            until(lambda: receiving.sent_tokens >= 48, "the first rows")
            server.kill()
            until(lambda: isinstance(publication.error, errors.DirectoryUnavailable), "a renewal that fails")
            sending.put(50, x=rows[50:])
            assert torch.equal(receiving.result(timeout=30).x, rows)
            with pytest.raises(errors.DirectoryUnavailable):
                receiver.find("encoder-0", timeout=0)
            server.start()
            until(lambda: publication.error is None, "a renewal that succeeds")
            assert directory.lookup("encoder-0").address == address
            server.kill()
            server.wipe()
            server.start()  # with nothing in it
            assert find(directory, "encoder-0", 30).incarnation == sender.incarnation
            server.kill()
            until(lambda: publication.error is not None, "a renewal that fails")
            again = sender.send(2, x=rows)
            assert torch.equal(receiver.receive(2, address).result(timeout=30).x, rows)
            again.wait(timeout=30)
    finally:
        server.kill()


# ---- endpoints


LAYOUT = tf.Layout([tf.Component("x", torch.float32, (4,))])


def test_a_receiver_finds_a_sender_by_name_and_its_successor_at_once(url):
    settings = {"transport": "memory", "directory": url}
    rows = torch.ones(3, 4)
    with tf.Receiver(LAYOUT, **settings) as receiver, tf.Sender(LAYOUT, name="encoder-0", **settings) as first:
        publication = first.publish()
        assert receiver.find("encoder-0") == first.address
        with tf.Sender(LAYOUT, name="encoder-0", **settings) as second:
            second.publish()
            assert receiver.find("encoder-0", timeout=0) == second.address != first.address
            second.send(1, x=rows)
            assert torch.equal(receiver.receive(1, receiver.find("encoder-0")).result(timeout=30).x, rows)
        with tf.open_directory(url) as directory:
            until(lambda: found(directory) is None, "the entry to be withdrawn: this machine is slow")
        with pytest.raises(errors.UnknownName, match="encoder-0"):
            receiver.find("encoder-0", timeout=0)
        assert publication.error is None or isinstance(publication.error, errors.NameTaken)


def test_a_receiver_may_look_before_the_sender_is_there(url):
    with tf.Receiver(LAYOUT, transport="memory", directory=url) as receiver:
        answers: list[str] = []
        looking = threading.Thread(target=lambda: answers.append(receiver.find("late", timeout=30)))
        looking.start()
        with tf.Sender(LAYOUT, transport="memory", directory=url) as sender:
            sender.publish("late", address="tcp://192.0.2.1:5555")
            looking.join()
    assert answers == ["tcp://192.0.2.1:5555"]


def test_a_sender_on_every_interface_publishes_an_address_that_others_can_dial(url, directory):
    with tf.Sender(LAYOUT, transport="memory", directory=url, bind="tcp://0.0.0.0:0") as sender:
        sender.publish("encoder-0")
        found_at = directory.lookup("encoder-0").address
        assert "0.0.0.0" not in found_at
        assert found_at.rpartition(":")[2] == sender.address.rpartition(":")[2]


def test_without_a_directory_a_name_is_refused_and_says_what_helps():
    with (
        tf.Sender(LAYOUT, transport="memory") as sender,
        pytest.raises(errors.ConfigError, match=r"no directory is set.*explicit address"),
    ):
        sender.publish("encoder-0")
    with (
        tf.Receiver(LAYOUT, transport="memory") as receiver,
        pytest.raises(errors.ConfigError, match=r"no directory is set.*explicit address"),
    ):
        receiver.find("encoder-0")


# ---- a directory of a third party


class Shelf(Directory):
    """A dictionary, which forgets nothing."""

    kept: dict[str, Entry] = {}  # noqa: RUF012 - one for all who open it

    @classmethod
    def open(cls, url: str, *, seconds: float) -> Shelf:
        return cls()

    def publish(self, one: Entry, ttl: float) -> None:
        self.kept[one.name] = one

    def withdraw(self, one: Entry) -> None:
        self.kept.pop(one.name, None)

    def lookup(self, name: str) -> Entry:
        if name not in self.kept:
            raise errors.UnknownName(f"no {name}")
        return self.kept[name]

    def close(self) -> None:
        return


class Lame(Shelf):
    """Publishes once, and withdraws when it is `well`."""

    def __init__(self) -> None:
        self.well = threading.Event()
        self.withdrawing = self.closed = False
        self.kept = {}

    def publish(self, one: Entry, ttl: float) -> None:
        if self.kept:
            raise errors.DirectoryUnavailable("no answer")
        super().publish(one, ttl)

    def withdraw(self, one: Entry) -> None:
        self.withdrawing = True
        assert self.well.wait(PATIENCE)
        super().withdraw(one)

    def close(self) -> None:
        self.closed = True


class Later(Shelf):
    contract_version = 2


def test_a_renewal_that_was_lost_keeps_no_entry_from_being_withdrawn():
    shelf = Lame()
    shelf.well.set()
    with Publication(shelf, entry(7), 0.1) as publication:
        until(lambda: publication.error, "a renewal that is lost")
        assert shelf.kept == {"encoder-0": entry(7)}
    until(lambda: shelf.closed, "the end: this machine is slow")
    assert shelf.kept == {}


def test_closing_waits_for_no_directory_however_many_entries_there_are(monkeypatch):
    shelves: list[Lame] = []

    def opened(url: str) -> Lame:
        shelves.append(Lame())
        return shelves[-1]

    monkeypatch.setattr(api, "open_directory", opened)
    with tf.Sender(LAYOUT, transport="memory") as sender:
        for number in range(3):
            sender.publish(f"encoder-{number}")
        began = time.monotonic()
        sender.close()
        assert time.monotonic() - began < PATIENCE / 2  # none of them waits less than PATIENCE
        until(lambda: all(shelf.withdrawing for shelf in shelves), "each of them to be asked")
        assert not any(shelf.closed for shelf in shelves)
        for shelf in shelves:
            shelf.well.set()
        until(lambda: all(shelf.closed for shelf in shelves), "the late answers")
    assert [shelf.kept for shelf in shelves] == [{}, {}, {}]


def test_an_interrupt_while_an_entry_is_withdrawn_leaves_no_endpoint_open(monkeypatch):
    def interrupted(self: Publication) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "open_directory", lambda url: Shelf())
    sender = tf.Sender(LAYOUT, transport="memory")
    sender.publish("encoder-0")
    with monkeypatch.context() as now:
        now.setattr(Publication, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sender.close()
    with pytest.raises(errors.BadCall, match="closed"):
        sender.announce(1, 10)
    until(lambda: Shelf.kept == {}, "the entry to be withdrawn")


def test_an_entry_that_no_thread_could_renew_is_a_typed_error(monkeypatch):
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    shelf = Lame()
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(errors.DirectoryUnavailable, match="can't start new thread"):
        Publication(shelf, entry(7), LONG)
    assert shelf.closed


def test_whoever_closes_while_it_publishes_is_not_found_afterwards(monkeypatch):
    with tf.Sender(LAYOUT, transport="memory") as sender:

        class Slow(Shelf):
            def publish(self, one: Entry, ttl: float) -> None:
                super().publish(one, ttl)
                sender.close()

        monkeypatch.setattr(api, "open_directory", lambda url: Slow())
        with pytest.raises(errors.BadCall, match="closed"):
            sender.publish("encoder-0")
        assert Shelf.kept == {}
        monkeypatch.setattr(api, "open_directory", lambda url: Shelf())
        with pytest.raises(errors.BadCall, match="closed"):
            sender.publish("encoder-0")
        assert Shelf.kept == {}


@pytest.mark.parametrize("said", ["", "tcp://192.0.2.1:5555"])
def test_a_sender_that_is_published_before_its_network_is_up_is_found_at_its_address_since(monkeypatch, said):
    addresses: list[str] = []
    told: list[str] = []

    class Told(Shelf):
        def publish(self, one: Entry, ttl: float) -> None:
            told.append(one.address)

    monkeypatch.setattr(reachable, "local_addresses", lambda: list(addresses))
    monkeypatch.setattr(api, "open_directory", lambda url: Told())
    with tf.Sender(LAYOUT, transport="memory", bind="tcp://0.0.0.0:0", peer_timeout=0.3, heartbeat=0.05) as sender:
        port = sender.address.rpartition(":")[2]
        sender.publish("encoder-0", address=said)
        assert told == [said or f"tcp://127.0.0.1:{port}"]
        since = said or f"tcp://192.0.2.7:{port}"
        for now in (["192.0.2.7"], ["192.0.2.8", "192.0.2.7"], []):  # up; another one, which is better; down again
            addresses[:] = now
            seen = len(told) + 1  # one may have looked before
            until(lambda seen=seen: len(told) > seen, "a renewal")
            assert told[-1] == since


def test_any_distribution_may_bring_a_directory(monkeypatch):
    points = {
        name: importlib.metadata.EntryPoint(name, f"a_third_party:{target}", rendezvous.GROUP)
        for name, target in (("shelf", "Shelf"), ("later", "Later"), ("gone", "Missing"), ("other", "LAYOUT"))
    }
    real = importlib.metadata.entry_points
    monkeypatch.setattr(
        importlib.metadata,
        "entry_points",
        lambda group: list(points.values()) if group == rendezvous.GROUP else real(group=group),
    )
    monkeypatch.setitem(sys.modules, "a_third_party", sys.modules[__name__])
    settings = {"transport": "memory", "directory": "shelf://here"}
    with tf.Sender(LAYOUT, name="encoder-0", **settings) as sender, tf.Receiver(LAYOUT, **settings) as receiver:
        sender.publish()
        assert receiver.find("encoder-0") == sender.address
    assert Shelf.kept == {}
    with pytest.raises(errors.VersionMismatch, match="version 2 of the directory contract"):
        open_directory("later://x")
    with pytest.raises(errors.UnknownDirectory, match="cannot be imported"):
        open_directory("gone://x")
    with pytest.raises(errors.UnknownDirectory, match="is no Directory"):
        open_directory("other://x")


# ---- between two shells


def test_a_file_is_received_by_the_senders_name(tmp_path: Path, url, directory, capsys):
    file = small_file(tmp_path / "clip.safetensors")
    with sending(file, "--publish", "encoder-0", "--directory", url) as sender:
        assert "--from encoder-0 " in sender.command
        assert f"--directory {url} " in sender.command
        done = paste(sender.command, tmp_path)
        assert done.returncode == 0, done.stderr
        status, _, problems = sender.end()
    assert (status, problems) == (0, "")
    assert (tmp_path / "clip.received.safetensors").read_bytes() == file.read_bytes()
    out = str(tmp_path / "out")
    words = ["--from", "encoder-0", "--directory", url, "--peer-timeout", "1.5", "--layout", "x:float32:4", "-o", out]
    assert cli.main(["receive", "--room", "17", "--transport", "memory", *words]) == 1
    assert "nobody is found under 'encoder-0' in" in capsys.readouterr().err


def test_send_says_once_that_its_name_is_lost_and_found(tmp_path: Path):
    serving = Serving(open_file(str(small_file(tmp_path / "clip.safetensors"))), 17, 1, receipts=True, publish="x")
    said: list[str] = []
    view, publication = SimpleNamespace(line=said.append), SimpleNamespace(error=None)
    serving._publication = publication
    for error in (None, errors.NameTaken("another has it"), errors.NameTaken("another has it"), None, None):
        publication.error = error
        serving._look(view)
    assert said == ["not found by name: another has it", "found as x again"]


def test_a_name_without_a_directory_and_a_directory_without_a_server_are_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file, out = str(small_file(tmp_path / "clip.safetensors")), str(tmp_path / "out")
    assert cli.main(["receive", "--room", "17", "--from", "encoder-0", "--layout-from", file, "-o", out]) == 2
    assert "no --directory to look in (bad_flag)" in capsys.readouterr().err
    assert cli.main(["send", file, "--room", "17", "--publish", "encoder-0"]) == 2
    assert "no --directory to publish in (bad_flag)" in capsys.readouterr().err
    nobody = ["--directory", "etcd://127.0.0.1:9", "--transport", "memory"]
    assert cli.main(["send", file, "--room", "17", "--publish", "encoder-0", *nobody]) == 1
    assert "127.0.0.1:9: Connection refused (directory_unavailable)" in capsys.readouterr().err
    assert listing(tmp_path) == ["clip.safetensors"]
