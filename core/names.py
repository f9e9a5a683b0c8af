"""Host names in addresses: looked up in threads of our own, and followed when they lead elsewhere.

ZMQ would look them up itself, at each try to connect, in the one thread that carries the messages of all peers; and
getaddrinfo waits as long as the name service does: 10 seconds and more where that does not answer, and nothing ends it
before. So ZMQ gets numbers only. No thread waits for work: each is there for one name, and gone with the answer.
"""

from __future__ import annotations

import re
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

MOST_LOOKUPS = 4
"""Names of one endpoint that are looked up at a time; more of them wait."""

AGAIN_SECONDS = 2.5
"""Nothing answers for this long: the name is looked up again. A quarter of `patience`, where that is less."""

_NAMED = re.compile(r"(tcp://(?:[^;]*;)?)(\w[\w.:%-]*):([0-9]+)", re.ASCII)


@dataclass(slots=True)
class Lead:
    """Where an address with a host's name leads, as its owner sees it. Knows no clock: `now` is in seconds."""

    before: str
    name: str
    port: str
    patience: float
    """Seconds of silence after which one that has answered is given up for another of the name's addresses."""
    ip: str = ""
    """What is used of the name's addresses; empty while none is known."""
    trouble: str = ""
    """Why none was found, when the name was looked up last; else empty."""
    _answered: bool = False
    _looked: float = 0.0
    _since: float | None = None  # when that was said which nothing has answered yet

    @property
    def numeric(self) -> str:
        """The address with the number in place of the name."""
        return f"{self.before}{f'[{self.ip}]' if ':' in self.ip else self.ip}:{self.port}"

    def said(self, now: float) -> bool:
        """Something is sent there. True: it has been silent for so long that its name should be looked up again."""
        if self._since is None:
            self._since = now
        return self._overdue(now)

    def heard(self) -> None:
        """Somebody answers there."""
        self._since, self._answered = None, True

    def found(self, ips: tuple[str, ...], trouble: str, now: float) -> bool:
        """What its name stands for by now. True: `ip` has changed. The next of several has its turn where the one in
        use is silent: a name can have an address at which nobody listens, as localhost has in IPv6."""
        overdue, silent = self._overdue(now), 0.0 if self._since is None else now - self._since
        self._looked, self.trouble = now, trouble
        if not ips:
            return False
        if self.ip in ips and (len(ips) == 1 or not overdue or (self._answered and silent < self.patience)):
            return False
        self.ip = ips[(ips.index(self.ip) + 1) % len(ips)] if self.ip in ips else ips[0]
        self._answered = False
        return True

    def _overdue(self, now: float) -> bool:
        wait = min(AGAIN_SECONDS, self.patience / 4)
        return self._since is not None and now - max(self._since, self._looked) >= wait


def lead(address: str, patience: float) -> Lead | None:
    """What has to be looked up of an address; None: nothing, it has a number, or is none that has a host."""
    parts = _NAMED.fullmatch(address)
    if parts is None or _is_ipv4(parts[2]):
        return None
    return Lead(parts[1], parts[2], parts[3], patience)


def _is_ipv4(host: str) -> bool:
    try:
        socket.inet_pton(socket.AF_INET, host)
    except OSError:
        return False
    return True


class Names:
    """Look-ups of one owner, one thread. `wake` is called, from any thread, when there is something in `answers`.

    Nothing has to be closed: what nobody asks for begins no thread, and one that is under way ends with its answer.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._asked: set[str] = set()
        self._waiting: deque[str] = deque()
        self._under_way = 0
        self._answers: deque[tuple[str, tuple[str, ...], str]] = deque()

    def ask(self, name: str) -> None:
        """Look `name` up, unless that is under way. Returns at once."""
        if name not in self._asked:
            self._asked.add(name)
            self._waiting.append(name)
            self._begin()

    def answers(self) -> Iterator[tuple[str, tuple[str, ...], str]]:
        """Of each name that was looked up since: it, its addresses in numbers, IPv4 first, and why there are none."""
        while self._answers:
            answer = self._answers.popleft()
            self._asked.discard(answer[0])
            self._under_way -= 1
            self._begin()
            yield answer

    def _begin(self) -> None:
        while self._waiting and self._under_way < MOST_LOOKUPS:
            name = self._waiting.popleft()
            self._under_way += 1
            thread = threading.Thread(target=self._answer, args=(name,), name=f"tensorferry-name-{name}", daemon=True)
            try:
                thread.start()
            except RuntimeError as problem:  # the process has as many threads as it may have
                self._answers.append((name, (), str(problem)))

    def _answer(self, name: str) -> None:
        self._answers.append((name, *look_up(name)))
        self._wake()


def look_up(name: str) -> tuple[tuple[str, ...], str]:
    """The addresses of a host in numbers, IPv4 first, and why there are none. Waits for the name service."""
    try:
        found = socket.getaddrinfo(name.encode(), None, type=socket.SOCK_STREAM)  # bytes: as it stands, no IDNA
    except OSError as problem:
        return (), problem.strerror or str(problem)
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return tuple(dict.fromkeys(str(entry[4][0]) for entry in found)), ""
