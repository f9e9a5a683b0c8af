"""Finding an embedding side by its name: the directory of a URL, an entry that is kept alive, and waiting for one.

A directory is a class under the entry-point group `tensorferry.directories`, by its URL's scheme
(core/directory.py is the contract). Without one there are explicit addresses, and nothing here is used.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Self

from msgspec.structs import replace

from tensorferry.core.directory import CONTRACT_VERSION, Directory, Entry
from tensorferry.core.errors import (
    ConfigError,
    DirectoryUnavailable,
    FerryError,
    NameTaken,
    UnknownDirectory,
    UnknownName,
    VersionMismatch,
)
from tensorferry.core.setting_values import did_you_mean

log = logging.getLogger("tensorferry.rendezvous")

GROUP = "tensorferry.directories"

ANSWER_SECONDS = 5.0
"""Longest wait for a directory's answer: etcd elects a new leader within one to two seconds."""

RENEWALS = 3
"""Within an entry's time: two may be lost."""

AGAIN_SECONDS = 0.2
"""Between two looks for a name that is not there yet."""

LEAVE_SECONDS = 1.0
"""How long closing waits for the entry to be withdrawn, a renewal that is under way included."""


def open_directory(url: str, *, seconds: float = ANSWER_SECONDS) -> Directory:
    """The directory at `url`, by its scheme; `seconds` is the longest that each of its verbs waits. Does not connect.

    Raises ConfigError where there is no URL or a bad one, UnknownDirectory where nothing installed knows its scheme or
    something that it needs is not installed, and VersionMismatch for a directory of another contract.
    """
    scheme, colon, _ = url.partition("://")
    if not colon:
        raise ConfigError(
            f"{url!r} is no URL of a directory" if url else "no directory is set",
            hint="Give one (--directory, TENSORFERRY_DIRECTORY or directory=), such as etcd://HOST:2379, "
            "or the embedding side's explicit address tcp://HOST:PORT",
        )
    entries = {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}
    if scheme not in entries:
        raise UnknownDirectory(
            f"no installed distribution provides a directory {scheme}://{did_you_mean(scheme, tuple(entries))}",
            hint=f"Installed: {', '.join(f'{name}://' for name in sorted(entries)) or 'none'}",
        )
    try:
        cls = entries[scheme].load()
    except Exception as problem:  # foreign code
        raise UnknownDirectory(
            f"the directory {scheme}:// cannot be imported: {type(problem).__name__}: {problem}"
        ) from problem
    if not (isinstance(cls, type) and issubclass(cls, Directory)):
        raise UnknownDirectory(f"{entries[scheme].value} is no Directory")
    if cls.contract_version != CONTRACT_VERSION:
        raise VersionMismatch(
            f"{entries[scheme].value} is written for version {cls.contract_version} of the directory contract, "
            f"this tensorferry has version {CONTRACT_VERSION}"
        )
    return cls.open(url, seconds=seconds)


def find(directory: Directory, name: str, timeout: float) -> Entry:
    """Who is found under `name`, waiting up to `timeout` seconds for it to appear, or for the directory to answer.

    Raises UnknownName or DirectoryUnavailable then, and at once BadEntry, VersionMismatch and ConfigError.
    """
    end = time.monotonic() + timeout
    while True:
        try:
            return directory.lookup(name)
        except (UnknownName, DirectoryUnavailable):
            if time.monotonic() + AGAIN_SECONDS > end:
                raise
        time.sleep(AGAIN_SECONDS)


class Publication:
    """An entry that stands in a directory until this is closed, renewed by a thread of its own.

    The first publication is made here and now; what it raises is raised. After that nothing is: `error` says what went
    wrong the last time, None where nothing did. While the directory does not answer it is asked again and again, and
    the entry comes back with it. A later incarnation under the same name ends it (NameTaken). The directory is this
    publication's, and closed with it. `found_at`: asked at each renewal where it is found by now, of where it was.
    """

    def __init__(
        self, directory: Directory, entry: Entry, ttl: float, *, found_at: Callable[[str], str] = lambda before: before
    ) -> None:
        self.entry = entry
        self._found_at = found_at
        self.error: FerryError | None = None
        self._directory = directory
        self._ttl = ttl
        self._pid = os.getpid()
        self._leave = threading.Event()
        self._leave_by = 0.0  # on the monotonic clock; 0 while nobody has asked for it
        self._thread = threading.Thread(target=self._run, name=f"tensorferry-entry-{entry.name}", daemon=True)
        try:
            directory.publish(entry, ttl)
            try:
                self._thread.start()
            except RuntimeError as problem:  # the system has no more threads
                raise DirectoryUnavailable(f"the entry of {entry.name} could not be renewed: {problem}") from None
        except BaseException:
            directory.close()
            raise
        log.info("%s is found as %s for %g s at a time", entry.address, entry.name, ttl)

    def _run(self) -> None:
        """Renew until the end, then withdraw: in this thread, so that closing need not wait for a slow directory."""
        try:
            if self._keep():
                self._directory.withdraw(self.entry)
        except Exception as problem:  # noqa: BLE001 - as in `_keep`
            log.warning("the entry of %s is left to expire: %s", self.entry.name, problem)
        finally:
            self._directory.close()

    def _keep(self) -> bool:
        """Whether there may be an entry to withdraw; false where a later incarnation has the name."""
        while not self._leave.wait(self._ttl / RENEWALS):
            try:
                if (address := self._found_at(self.entry.address)) != self.entry.address:
                    log.info("%s is found at %s from now on", self.entry.name, address)
                    self.entry = replace(self.entry, address=address)
                self._directory.publish(self.entry, self._ttl)
            except NameTaken as problem:
                self.error = problem
                log.error("%s is not found as %s any more: %s", self.entry.address, self.entry.name, problem)
                return False
            except Exception as problem:  # noqa: BLE001 - it may be foreign code, and transfers go on without it
                if self.error is None:
                    log.warning("the entry of %s cannot be renewed: %s", self.entry.name, problem)
                self.error = (
                    problem if isinstance(problem, FerryError) else DirectoryUnavailable(f"it raised {problem!r}")
                )
            else:
                if self.error is not None:
                    log.info("%s is found as %s again", self.entry.address, self.entry.name)
                self.error = None
        return True

    def leave(self) -> None:
        """Begin to close, and wait for nothing: for several at once. Idempotent."""
        if os.getpid() == self._pid and not self._leave_by:  # it is not a forked child's to withdraw
            self._leave_by = time.monotonic() + LEAVE_SECONDS
            self._leave.set()

    def close(self) -> None:
        """Withdraw the entry. Idempotent, never raises. Waits a second at most: where the directory has not answered by
        then, its answer is waited for in the publication's thread, and where none comes, the entry expires."""
        self.leave()
        if os.getpid() == self._pid and threading.current_thread() is not self._thread:
            self._thread.join(max(0.0, self._leave_by - time.monotonic()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
