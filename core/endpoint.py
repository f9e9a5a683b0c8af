"""What both endpoints share: one I/O thread that owns the machine, the control channel and the transport (R10).

Callers never touch them: they hand the thread a function (`_call`) and wait for its result, or read what the thread
has published on a transfer. So `poll` has no effect on the protocol, however often it is called. An error over one
room, message or write is that room's error; the thread goes on serving the others.
"""

from __future__ import annotations

import logging
import os
import random
import re
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Self

from tensorferry.core import messages as m
from tensorferry.core.arguments import text
from tensorferry.core.carriers import Carriers
from tensorferry.core.control import Control, speaks_for
from tensorferry.core.effects import Effect, Send
from tensorferry.core.errors import (
    BadCall,
    Cancelled,
    ConfigError,
    FerryError,
    InternalError,
)
from tensorferry.core.handles import Bells, EndpointThread
from tensorferry.core.layout import Layout
from tensorferry.core.memory import HOST, Place
from tensorferry.core.selection import Verdict
from tensorferry.core.settings import Settings
from tensorferry.core.timing import IDLE_TICK, TICK, Watches, new_incarnation
from tensorferry.core.transport import Transport

log = logging.getLogger("tensorferry.endpoint")

BUSY_POLL = 0.0002
"""Seconds between polls of a transport that does not wake us while writes are under way, and of a GPU that copies."""

CLOSE_SECONDS = 1.0
"""How long `close` waits for peers to hear that it is over."""

CALL_SECONDS = 60.0
"""A caller's own request is answered by the I/O thread within a turn; beyond this something is badly wrong."""


class Asked:
    """What a caller wants done in the I/O thread, and what came of it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._value: Any = None
        self._error: Exception | None = None
        self._over = False
        self._bells = Bells()

    def do(self) -> None:
        """By the I/O thread."""
        try:
            self._value = self._work()
        except Exception as problem:  # noqa: BLE001 - whatever it is, it belongs to the caller
            self._error = problem
        self._over = True
        self._bells.ring()

    def refuse(self) -> None:
        """Instead: the endpoint is closed."""
        self._work = _closed
        self.do()

    def answered(self, seconds: float) -> bool:
        return self._bells.wait(lambda: self._over, seconds)

    def answer(self) -> Any:
        """What the work returned, or raises what it raised. Once."""
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # it knows this frame, and must not hold what the caller's frames hold
        return self._value


class Endpoint:
    """Base of the two endpoints. Subclasses supply `_on_message`, `_carry_out`, `_progress`, `_tick`, `_wind_down`.

    A subclass's constructor ends with `_start`, and calls `_undo.close()` whatever it leaves by raising, Ctrl-C too:
    what was opened is closed by then, the last first, and the thread ended before. The transports are not, unless the
    thread had begun: whoever opened them closes them, unless this succeeds.
    """

    def __init__(
        self,
        layout: Layout,
        transports: Transport | Sequence[Transport],
        settings: Settings,
        *,
        bind: str,
        name: str,
        place: Place = HOST,
        passed_over: Sequence[Verdict] = (),
    ) -> None:
        self.layout = layout
        self.settings = settings
        self.incarnation = new_incarnation(time.time_ns(), random.getrandbits(12))
        text(bind, "bind", kind=ConfigError)
        self.name = text(name, "name", kind=ConfigError) or f"{os.getpid()}-{self.incarnation:x}"
        if len(self.name) > 128:
            raise ConfigError(f"an endpoint's name has at most 128 characters, not {len(self.name)}")
        if re.search(m.PRINTABLE, self.name) is None:
            raise ConfigError(f"an endpoint's name cannot hold control characters: {self.name!r}")
        self.carriers = Carriers(transports, require=settings.require, place=place, passed_over=passed_over)
        self._watches = Watches()
        self._commands: deque[Asked] = deque()
        self._changed: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()  # a caller may never poll
        self._pid = os.getpid()
        self._closing = False
        self._stopped = threading.Event()
        self._over = False  # the I/O thread has nothing left to do
        self._begin = threading.Lock()  # taken by the I/O thread when it begins, or by who will not have it begin
        self._thread = EndpointThread(target=self._run, name=f"tensorferry-{self.name}", daemon=True)
        with ExitStack() as undo:
            self._control = Control(_identity(self.incarnation), bind, settings.peer_timeout)
            undo.callback(self._control.close)
            self.carriers.on_progress(self._control.wake)
            self._undo = undo.pop_all()

    # ---- for subclasses ----------------------------------------------------------------------------------------

    def _start(self) -> None:
        """The last line of a constructor: from here on, the I/O thread gives back what was opened."""
        self._undo.callback(self._unstart)  # before: an interrupt may arrive as soon as the thread has begun
        self._thread.start()

    def _unstart(self) -> None:
        """The constructor was left after all: no thread may go on with what is closed next."""
        if not self._begin.acquire(blocking=False):
            Endpoint.close(self)

    def _on_message(self, route: str, message: m.Message, now: float) -> None:
        raise NotImplementedError

    def _carry_out(self, effect: Effect) -> None:
        raise NotImplementedError

    def _progress(self) -> bool:
        """Look after the transport; True while something is under way there."""
        raise NotImplementedError

    @property
    def _copies(self) -> bool:
        """A GPU is at work for us: it has to be asked how far it is, for it does not wake us."""
        raise NotImplementedError

    def _tick(self, now: float) -> bool:
        """Timers; True while anything is live."""
        raise NotImplementedError

    def _wind_down(self) -> bool:
        """End everything; True when the peers have heard."""
        raise NotImplementedError

    def _release(self) -> None:
        """The thread is at its end: give up memory and transport."""
        raise NotImplementedError

    def _blame(self, message: m.Message, error: FerryError) -> None:
        """A handler failed over this message: end the transfer that it is about, if any."""
        raise NotImplementedError

    # ---- the I/O thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        if not self._begin.acquire(blocking=False):
            return  # the constructor was interrupted while this thread was being started
        busy = live = False
        next_tick = 0.0
        deadline: float | None = None
        try:
            while True:
                if self._commands:
                    timeout = 0.0
                elif busy and (self._copies or not self.carriers.wakes):
                    timeout = BUSY_POLL
                else:
                    timeout = TICK if live or deadline is not None else IDLE_TICK
                received = self._guard(lambda t=timeout: self._control.receive(t)) or []  # type: ignore[misc]
                now = time.monotonic()
                for route, message in received:
                    if "://" not in route and not speaks_for(route, _identity(message.src)):
                        self._control.dropped["identity"] += 1  # who connected to us speaks for itself and nobody else
                        continue
                    self._guard(lambda r=route, x=message, t=now: self._on_message(r, x, t), message)  # type: ignore[misc]
                while self._commands:
                    self._next_command(Asked.do)
                busy = bool(self._guard(self._progress))
                if now >= next_tick:
                    live = bool(self._guard(lambda t=now: self._tick(t)))  # type: ignore[misc]
                    next_tick = now + TICK
                if self._closing:
                    deadline = deadline or now + CLOSE_SECONDS
                    if self._guard(self._wind_down) or now >= deadline:
                        return
        finally:
            self._stopped.set()
            self._guard(self._release)
            self._guard(self._control.close)
            while self._commands:
                self._next_command(Asked.refuse)
            self._over = True

    def _guard(self, work: Callable[[], Any], message: m.Message | None = None) -> Any:
        """Run `work`; whatever it raises ends a transfer at most, never the thread."""
        try:
            return work()
        except Exception as problem:
            log.exception("an internal error; the endpoint goes on")
            error = (
                problem if isinstance(problem, FerryError) else InternalError(f"{type(problem).__name__}: {problem}")
            )
            if message is not None:
                try:
                    self._blame(message, error)
                except Exception:
                    log.exception("ending the transfer failed too")
            return None

    def _look_after(self, work: Callable[[], Any], blame: Callable[[FerryError], Any]) -> None:
        """The timers of one transfer: whatever they raise is that transfer's end, and the others' go on."""
        try:
            work()
        except Exception as problem:
            log.exception("an internal error over one transfer; the endpoint goes on")
            error = problem if isinstance(problem, FerryError) else InternalError(repr(problem))
            self._guard(lambda: blame(error))

    def _next_command(self, what: Callable[[Asked], None]) -> None:
        try:
            asked = self._commands.popleft()
        except IndexError:
            return  # its caller has given it up this instant
        what(asked)

    def _do(self, effects: Iterable[Effect]) -> None:
        """Carry out every effect: one that fails has others behind it, of other rooms. Raises the first error then."""
        failed: Exception | None = None
        for effect in effects:
            try:
                if isinstance(effect, Send):
                    self._control.send(effect.route, effect.message)
                else:
                    self._carry_out(effect)
            except Exception as problem:  # noqa: BLE001 - raised below
                failed = failed or problem
        if failed is not None:
            raise failed

    # ---- callers -----------------------------------------------------------------------------------------------

    def _call(self, work: Callable[[], Any], *, later: bool = False) -> Any:
        """Run `work` in the I/O thread and return or raise what it does; InternalError after CALL_SECONDS.

        `later`: nobody needs the answer. In an endpoint's own thread, where the garbage collector may run anybody's
        finalizer, it is then not waited for, and an error is logged: the thread would wait for itself, or two of them
        for each other. All else that is asked of an endpoint in its own thread raises BadCall.
        """
        self._check_caller(later=later)
        unanswered = later and isinstance(threading.current_thread(), EndpointThread)
        asked = Asked(partial(self._guard, work) if unanswered else work)
        self._commands.append(asked)
        self._control.wake()
        if unanswered:
            return None
        if self._stopped.is_set() and self._give_up(asked):  # it ended meanwhile, and nobody is going to answer
            _closed()
        if not asked.answered(CALL_SECONDS):
            self._give_up(asked)  # it is not done any more, unless it has begun
            raise InternalError(f"the endpoint's thread has not answered within {CALL_SECONDS:g} s")
        return asked.answer()

    def _give_up(self, asked: Asked) -> bool:
        """True: the I/O thread has not taken it, and never will."""
        try:
            self._commands.remove(asked)
        except ValueError:
            return False
        return True

    def _check_caller(self, *, later: bool = False) -> None:
        """Raises BadCall where `_call` would not even ask."""
        if os.getpid() != self._pid:
            raise BadCall("an endpoint does not survive fork", hint="Make one in the child, or start it with spawn")
        if self._stopped.is_set() or self._closing:
            _closed()
        if not later and threading.current_thread() is self._thread:
            raise BadCall(
                "this was called in the endpoint's own thread, which cannot wait for itself",
                hint="A finalizer (__del__) may cancel a transfer, and nothing else",
            )

    def poll(self) -> list[Any]:
        """The transfers that have changed since the last call, of those that the caller still holds. Never blocks and
        has no effect on the protocol."""
        time.sleep(0)  # let the I/O thread have the interpreter lock: a tight loop of polls would keep it for 5 ms
        changed = []
        while self._changed:
            try:
                changed.append(self._changed.popitem()[0])
            except KeyError:
                break
        return changed

    def close(self) -> None:
        """End what is live (as Cancelled), tell the peers, free everything. Idempotent; a second or two at most.

        From any thread, from several at once, and from a signal's handler: each returns when it is over. Nothing else
        ends an endpoint before its process: the I/O thread holds it, so that dropping the last reference does not.
        """
        if os.getpid() != self._pid:
            return
        self._closing = True  # no lock: a handler may run in the thread that is in here already
        self._control.wake()
        if not self._over and threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_SECONDS + 30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _closed() -> None:
    raise BadCall("the endpoint is closed")


def _identity(incarnation: int) -> bytes:
    """What an endpoint calls itself to those that it connects to."""
    return f"{incarnation:016x}".encode()


def closed_error(room: int) -> FerryError:
    return Cancelled("the endpoint was closed", room=room, hint="Wait for the transfer before closing the endpoint")
