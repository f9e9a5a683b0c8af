"""Where an embedding side listens, asked beside the scheduler's loop: a directory may be asked, and the loop waits for
nothing."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from tensorferry.core.errors import ConfigError, DirectoryUnavailable, FerryError

Resolve = Callable[[str, int], str]
"""(bootstrap_addr, dp rank) -> the control address (tcp://host:port) of the embedding side that is meant. May take its
time, as a directory does, and is called in threads of its own. What it raises fails the requests that asked."""

MOST_ASKING = 4
"""Threads at work for one manager. Requests that want the same address at the same time share one call."""


def explicit(bootstrap_addr: str, dp_rank: int) -> str:
    """The default: `bootstrap_addr` is the control address itself, with or without its "tcp://". Raises ConfigError
    for a rank other than 0, which one address cannot name."""
    if dp_rank:
        raise ConfigError(
            f"{bootstrap_addr} is one address, and data-parallel rank {dp_rank} is wanted",
            hint="Give the manager `resolve`, which finds each rank's address",
        )
    return bootstrap_addr if "://" in bootstrap_addr else f"tcp://{bootstrap_addr}"


class Finder:
    """The calls of one manager's `resolve`. Its threads end when nobody asks, and keep no process from ending."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: dict[tuple[str, int], Future[str]] = {}
        self._waiting: deque[tuple[Resolve, tuple[str, int], Future[str]]] = deque()
        self._threads = 0

    def find(self, resolve: Resolve, bootstrap_addr: str, dp_rank: int) -> Future[str]:
        """The address, or a FerryError for all that goes wrong. Neither blocks nor raises; what `explicit` says is
        there at once."""
        if resolve is explicit:
            at_once: Future[str] = Future()
            _settle(at_once, resolve, bootstrap_addr, dp_rank)
            return at_once
        what = (bootstrap_addr, dp_rank)
        with self._lock:
            if (known := self._under_way.get(what)) is not None:
                return known
            answer: Future[str] = Future()
            if self._threads < MOST_ASKING:
                try:
                    threading.Thread(target=self._work, name="tensorferry-resolve", daemon=True).start()
                    self._threads += 1
                except RuntimeError as problem:  # the system has no more of them
                    if not self._threads:  # else one of those at work comes to it
                        why = f"nobody can be asked for {bootstrap_addr}: {problem}"
                        answer.set_exception(DirectoryUnavailable(why))
                        return answer
            self._under_way[what] = answer
            self._waiting.append((resolve, what, answer))
        return answer

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                resolve, what, answer = self._waiting.popleft()
            _settle(answer, resolve, *what)
            with self._lock:
                del self._under_way[what]  # who asks from now on is told what is so then


def _settle(answer: Future[str], resolve: Resolve, bootstrap_addr: str, dp_rank: int) -> None:
    call = f"resolve({bootstrap_addr!r}, {dp_rank})"
    try:
        found: object = resolve(bootstrap_addr, dp_rank)
        if not isinstance(found, str) or not found:
            raise ConfigError(f"{call} gave {found!r}", hint="It gives a control address, tcp://HOST:PORT")
        answer.set_result(found)
    except FerryError as problem:
        answer.set_exception(problem)
    except BaseException as problem:  # noqa: BLE001 - it is foreign code, and the requests that wait are to hear of it
        answer.set_exception(
            ConfigError(f"{call} raised {problem!r}", hint="It gives a control address, or raises a FerryError")
        )
