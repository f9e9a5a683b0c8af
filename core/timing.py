"""When to say things again and when to stop waiting. The machines know no time: drivers turn it into their events.

Pure bookkeeping: every method takes `now` (seconds on a monotonic clock).
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field

RESEND_FIRST = 0.2
RESEND_MOST = 2.0
"""Seconds between repetitions, doubling: the first is far above a round trip (0.1 ms on a host), so that a healthy
transfer repeats nothing."""

BUMP_PAUSE_FIRST = 0.005
BUMP_PAUSE_MOST = 1.0
"""Seconds before granting goes on after a transfer's k-th bump, doubling (LV-3)."""

TICK = 0.05
"""Seconds between looks at the clock while anything is live."""

IDLE_TICK = 0.5


LOG_AGAIN_SECONDS = 60.0
"""Least time between two lines of a log about one trouble that lasts."""

MOST_TROUBLES = 64
"""Kept apart; of more, the one that was met longest ago counts as new when it comes again."""


@dataclass(slots=True)
class Watch:
    """One thing that is waited for: since when, and when to repeat."""

    since: float
    seen: object = None
    due: float = 0.0
    step: float = RESEND_FIRST


@dataclass
class Watches:
    """Watches by key; those not touched in a turn are over."""

    items: dict[Hashable, Watch] = field(default_factory=dict)

    def at(self, key: Hashable, now: float) -> Watch:
        watch = self.items.get(key)
        if watch is None:
            watch = self.items[key] = Watch(now, due=now + RESEND_FIRST)
        return watch

    def repeat(self, key: Hashable, seen: object, now: float) -> bool:
        """Is it time to say it again? Progress (another `seen`) starts the back-off anew."""
        watch = self.at(key, now)
        if watch.seen != seen:
            watch.seen, watch.step, watch.due = seen, RESEND_FIRST, now + RESEND_FIRST
            return False
        if now < watch.due:
            return False
        watch.step = min(2 * watch.step, RESEND_MOST)
        watch.due = now + watch.step
        return True

    def age(self, key: Hashable, now: float) -> float:
        """Seconds since the key was first asked about."""
        return now - self.at(key, now).since

    def every(self, key: Hashable, period: float, now: float) -> bool:
        """True once a period."""
        watch = self.at(key, now)
        if now - watch.since < period:
            return False
        watch.since = now
        return True

    def keep_only(self, keys: set[Hashable]) -> None:
        """Forget what is over."""
        for key in [key for key in self.items if key not in keys]:
            del self.items[key]


@dataclass
class Troubles:
    """What is met again and again, for a log: told when it comes up, then once in LOG_AGAIN_SECONDS."""

    met: dict[str, tuple[float, int]] = field(default_factory=dict)  # told when, and met how often since

    def worth_telling(self, trouble: str, now: float) -> str | None:
        """What a line about it ends with: how often it was met since the last line. None: it is too soon for one."""
        told, times = self.met.pop(trouble, (-math.inf, 0))
        if now - told < LOG_AGAIN_SECONDS:
            self.met[trouble] = told, times + 1
            return None
        self.met[trouble] = now, 0
        while len(self.met) > MOST_TROUBLES:
            del self.met[next(iter(self.met))]
        return f" ({times + 1} times in {now - told:.0f} s)" if times else ""


def bump_pause(bumps: int) -> float:
    """Seconds to pause after the `bumps`-th bump of a transfer."""
    return min(BUMP_PAUSE_MOST, BUMP_PAUSE_FIRST * 2.0 ** min(max(0, bumps - 1), 64))


def new_incarnation(clock_ns: int, noise: int) -> int:
    """A 63-bit number (until 2112) that is larger for every later start: microseconds of `clock_ns` (wall clock), then
    11 random bits against two starts in one microsecond. A clock set back is survived: a peer that has been silent for
    peer_timeout is met anew, whatever its number."""
    return ((clock_ns // 1000) << 11 | (noise & 0x7FF)) & ((1 << 63) - 1)
