"""Rendezvous by etcd: a key for each name, kept by a lease, written in transactions that compare what stood there.

etcd 3.4 or newer, by its HTTP gateway (etcd3gw), which every member serves beside gRPC.

URL: `etcd://HOST:PORT[,HOST:PORT...][/PREFIX]`; `etcds://` for TLS, with `?ca=FILE`, `&cert=FILE&key=FILE` for a
client's certificate. Keys are PREFIX/NAME. Members are asked in turn until one answers. No proxy of the environment is
used, and no netrc.
"""

from __future__ import annotations

import math
import threading
import time
from base64 import b64encode
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from difflib import get_close_matches
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from tensorferry.core.directory import Directory, Entry, checked_name
from tensorferry.core.errors import (
    BadCall,
    BadEntry,
    ConfigError,
    DirectoryUnavailable,
    FerryError,
    NameTaken,
    UnknownDirectory,
    UnknownName,
    VersionMismatch,
)

PORT = 2379
"""etcd's own default for clients."""

PREFIX = "tensorferry"

API_PATH = "/v3/"
"""Where etcd 3.4 and later serve the gateway."""

_SHOWN = 200
"""Characters of a server's own words that an error repeats."""

_MOST_NAMES = 100
"""Names that are looked through for the one that may have been meant."""

_MOST_ASKING = 8
"""Threads at work for one directory. Each ends at its time, but for one whose server sends a byte now and then, for
ever; and an entry is renewed for as long as a process lives."""

_ODD = (AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What the client raises where the answer has another shape: it does not come from an etcd."""

T = TypeVar("T")
Work = Callable[[Any, float], T]
"""What is to be done with a client, by a time on the monotonic clock."""


class EtcdDirectory(Directory):
    """See the module. Holds no connection: each verb makes its own, in a thread that nobody waits for beyond
    `seconds`, so that neither a name server nor a slow reader can hold the caller up."""

    def __init__(self, members: list[tuple[str, int]], prefix: str, tls: dict[str, str] | None, seconds: float) -> None:
        self._members = deque(members)  # the one that answered last comes first
        self._prefix = prefix
        self._tls = tls
        self._seconds = seconds
        self._leases: dict[tuple[str, int, int], int] = {}  # (name, incarnation, ttl) -> etcd's id
        self._asking = threading.BoundedSemaphore(_MOST_ASKING)
        self._closed = False

    @classmethod
    def open(cls, url: str, *, seconds: float) -> EtcdDirectory:
        members, prefix, tls = _parsed(url)
        _library()
        return cls(members, prefix, tls, seconds)

    def publish(self, entry: Entry, ttl: float) -> None:
        key, written = self._key(entry.name), entry.to_bytes()
        kept = (entry.name, entry.incarnation, max(1, math.ceil(ttl)))

        def work(client: Any, end: float) -> None:
            while True:
                revision, lease, standing = self._read(client, entry.name)
                if standing is not None and standing.incarnation > entry.incarnation:
                    raise NameTaken(
                        f"{entry.name!r} belongs to a later incarnation, at {standing.address}", peer=entry.name
                    )
                ours = self._renewed(client, kept)
                if standing == entry and lease == ours:
                    return
                put = {"key": _b64(key), "value": _b64(written), "lease": ours}
                if _swap(client, key, revision, {"request_put": put}, end):
                    return

        try:
            self._run(work)
        except FerryError:
            self._leases.pop(kept, None)  # the next one is granted anew; this one expires
            raise

    def withdraw(self, entry: Entry) -> None:
        key = self._key(entry.name)

        def work(client: Any, end: float) -> None:
            while True:
                try:
                    revision, _, standing = self._read(client, entry.name)
                except (BadEntry, VersionMismatch):
                    return  # not ours
                if standing is None or standing.incarnation != entry.incarnation:
                    return
                if _swap(client, key, revision, {"request_delete_range": {"key": _b64(key)}}, end):
                    return

        self._run(work)
        for kept in [kept for kept in self._leases if kept[:2] == (entry.name, entry.incarnation)]:
            del self._leases[kept]  # it holds nothing, and expires

    def lookup(self, name: str) -> Entry:
        checked_name(name)

        def work(client: Any, _end: float) -> Entry:
            _, _, standing = self._read(client, name)
            if standing is not None:
                return standing
            first, end = (
                f"{self._prefix}/".encode(),
                f"{self._prefix}0".encode(),
            )  # all keys from / to the next character
            found = client.get(first, metadata=True, range_end=end, keys_only=True, limit=_MOST_NAMES)
            names = [about["key"].removeprefix(first).decode(errors="replace") for _, about in found]
            near = get_close_matches(name, [other for other in names if other.isprintable()], n=1)
            hint = f"Did you mean {near[0]!r}? {UnknownName.default_hint}" if near else ""
            raise UnknownName(f"nobody is found under {name!r} in {self}", hint=hint, peer=name)

        return self._run(work)

    def close(self) -> None:
        self._closed = True

    def __str__(self) -> str:
        scheme = "etcd" if self._tls is None else "etcds"
        return f"{scheme}://{','.join(f'{_bracketed(h)}:{p}' for h, p in sorted(self._members))}/{self._prefix}"

    # ---- one key -----------------------------------------------------------------------------------------------

    def _key(self, name: str) -> bytes:
        return f"{self._prefix}/{name}".encode()

    def _read(self, client: Any, name: str) -> tuple[int, int, Entry | None]:
        """(revision of the key, its lease, what it says); zeros and None where there is no key."""
        found = client.get(self._key(name), metadata=True)
        if not found:
            return 0, 0, None
        value, about = found[0]
        return int(about["mod_revision"]), int(about.get("lease", 0)), Entry.from_bytes(bytes(value), name)

    def _renewed(self, client: Any, kept: tuple[str, int, int]) -> int:
        """The lease, with all of its time before it: the one of before where etcd still has it, else a new one."""
        from etcd3gw.lease import Lease

        known = self._leases.get(kept)
        if known is not None and Lease(known, client).refresh() > 0:
            return known
        granted = self._leases[kept] = int(client.lease(ttl=kept[2]).id)
        return granted

    # ---- asking ------------------------------------------------------------------------------------------------

    def _run(self, work: Work[T]) -> T:
        if self._closed:
            raise BadCall("the directory is closed")
        if not self._asking.acquire(blocking=False):
            raise DirectoryUnavailable(f"{self} has not ended {_MOST_ASKING} answers that it began")
        answer: Future[T] = Future()
        end = time.monotonic() + self._seconds
        given_back = threading.Lock()

        def give_back() -> None:
            if given_back.acquire(blocking=False):  # once: where `start` is interrupted, the thread may have begun
                self._asking.release()

        def ask() -> None:
            try:
                answer.set_result(self._ask(work, end))
            except BaseException as problem:  # noqa: BLE001 - it is the caller's, who waits for it
                answer.set_exception(problem)
            finally:
                give_back()

        try:
            threading.Thread(target=ask, name="tensorferry-etcd", daemon=True).start()
        except BaseException as problem:
            give_back()
            if isinstance(problem, RuntimeError):  # the system has no more threads
                raise DirectoryUnavailable(
                    f"{self} cannot be asked: {problem}", hint="The process is at its limit of threads: ulimit -u"
                ) from None
            raise
        try:
            return answer.result(self._seconds)
        except TimeoutError:
            raise DirectoryUnavailable(f"{self} has not answered within {self._seconds:g} s") from None

    def _ask(self, work: Work[T], end: float) -> T:
        """Ask one member after the other; the first that answers is asked first the next time."""
        etcd3gw, requests = _library()
        from etcd3gw.exceptions import Etcd3Exception

        problems: list[str] = []
        for _ in range(len(self._members)):
            host, port = self._members[0]
            share = (end - time.monotonic()) / (len(self._members) - len(problems))
            if share <= 0:
                raise TimeoutError
            try:
                with requests.Session() as session:
                    session.trust_env = False  # no proxy: a directory is a service of the cluster
                    session.verify = (self._tls or {}).get("ca", True)
                    if self._tls and "cert" in self._tls:
                        session.cert = (self._tls["cert"], self._tls["key"])
                    client = etcd3gw.client(
                        host, port, protocol="http" if self._tls is None else "https", timeout=share,
                        api_path=API_PATH, session=session,
                    )  # fmt: skip
                    return work(client, end)
            except FerryError:
                raise
            except (Etcd3Exception, requests.RequestException, OSError, *_ODD) as e:
                problems.append(f"{_bracketed(host)}:{port}: {_told(e)}")
                self._members.rotate(-1)
        raise DirectoryUnavailable(f"no answer from {self}: {'; '.join(problems)}")


def _swap(client: Any, key: bytes, revision: int, then: dict[str, object], end: float) -> bool:
    """Do `then` if the key is what it was at `revision` (0: it was not there); False if it is not."""
    if time.monotonic() > end:
        raise TimeoutError  # the caller has gone: nothing is written for it any more
    same = {"key": _b64(key), "target": "MOD", "result": "EQUAL", "mod_revision": revision}
    return bool(client.transaction({"compare": [same], "success": [then], "failure": []}).get("succeeded", False))


def _b64(data: bytes) -> str:
    return b64encode(data).decode()


def _told(problem: BaseException) -> str:
    """The operating system's word, which libraries wrap several times, or else the server's or the library's own."""
    inner: BaseException | None = problem
    while inner is not None:
        if isinstance(inner, OSError) and inner.strerror:
            return str(inner.strerror)
        inner = inner.__context__
    words = str(getattr(problem, "detail_text", "")) or str(problem) or type(problem).__name__
    return " ".join(words.split())[:_SHOWN]


def _library() -> tuple[Any, Any]:
    try:
        import etcd3gw
        import requests
    except ImportError as problem:
        raise UnknownDirectory(
            f"etcd's client library cannot be imported: {problem}", hint="pip install 'tensorferry[etcd]'"
        ) from problem
    return etcd3gw, requests


# ---- the URL ---------------------------------------------------------------------------------------------------


def _parsed(url: str) -> tuple[list[tuple[str, int]], str, dict[str, str] | None]:
    """(members, prefix, the files of TLS or None). Raises ConfigError."""

    def wrong(why: str, hint: str = "Write it as etcd://HOST:2379 or etcd://HOST:2379,HOST:2379/PREFIX") -> ConfigError:
        return ConfigError(f"the directory {url!r} {why}", hint=hint)

    try:
        parts = urlsplit(url)
        query = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError as problem:
        raise wrong(f"is no URL: {problem}") from None
    if "@" in parts.netloc:
        raise wrong("holds a user", "etcd's users are not supported: use etcds:// with a client's certificate")
    members = []
    for member in parts.netloc.split(","):
        try:
            one = urlsplit(f"//{member}")
            host, port = one.hostname, one.port
        except ValueError as problem:
            raise wrong(f"names {member!r}: {problem}") from None
        if not host or port == 0:
            raise wrong(f"names {member!r}, which is no HOST:PORT" if member else "names no host")
        members.append((host, port or PORT))
    prefix = unquote(parts.path).strip("/") or PREFIX
    if not prefix.isprintable() or parts.fragment:
        raise wrong("has a prefix that cannot be")
    tls = dict(query)
    if parts.scheme == "etcd" and tls:
        raise wrong(f"has options ({', '.join(tls)}), which are those of etcds://", "Write etcds:// for TLS")
    if unknown := tls.keys() - {"ca", "cert", "key"}:
        raise wrong(f"has an unknown option {min(unknown)!r}", "It has ca, cert and key, each a file")
    if ("cert" in tls) != ("key" in tls):
        raise wrong("has one of cert and key", "A client's certificate goes with its key: give both")
    return members, prefix, None if parts.scheme == "etcd" else tls


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
