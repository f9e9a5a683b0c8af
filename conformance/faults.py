"""A transport around any transport, in which things go wrong as a policy says: seeded, logged, replayable.

Long because a truthful transport between two others is one state machine: what is held, what may still land, who knows.

    Faulty = proxied(ShmTransport, Policy.seeded(7))      a class: Faulty(options) opens the real one inside
    proxy = wrapped(transport, Policy.scripted("late=3"))  or around one that is open

With an empty policy the proxy answers as the bare transport does, capabilities and name included: every call is
handed on. A post that a policy decides about is first checked (what the inner transport would refuse is handed on to
it, to be refused), then held, and lands in pieces through the inner transport's own `post`: late, cut up, out of order,
twice, in part, or never. Bounds of the peer's regions are known where the peer is behind a proxy of this process too;
for other peers a wrong copy is noticed when it lands, and the post is FAILED.

Nothing depends on the clock. A beat is a poll of the handle, or (clock=steps) a `step`; a `Ticker` makes steps as time
passes. `log` is what was decided, and `Policy.from_log` decides it again.

A held write whose region has been retired lands in the memory that it was meant for, as an engine's would that has it
mapped, unless the transport declares Fence.RETIRE. After the owner's `close`, or the proxy's own, nothing lands.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

from tensorferry.conformance.fault_policy import Decision, Log, Policy
from tensorferry.conformance.fault_post import Held, Key, Met, memory_of, pieces_of
from tensorferry.core.errors import BadCall, FerryError, PeerUnreachable, TransportError
from tensorferry.core.memory import Memory, copy_bytes, host_memory
from tensorferry.core.transport import (
    Capabilities,
    Copy,
    Fence,
    Options,
    PeerState,
    Probe,
    Region,
    RemoteRegion,
    Status,
    Transport,
)

log = logging.getLogger("tensorferry.conformance")

FIRST_HANDLE = 1 << 62
"""Handles of held posts count from here: no engine's reach it."""

_lock = threading.RLock()
"""One for all proxies: what one of them loses or hides concerns the other end, which lives in another thread."""


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork_in_child)


class FaultProxy(Transport):
    """Made by `proxied` and `wrapped`, which give it the inner transport's name and capabilities."""

    inner_type: ClassVar[type[Transport]]
    policy: ClassVar[Policy]

    @classmethod
    def probe(cls) -> Probe:
        return cls.inner_type.probe()

    def __init__(self, options: Options) -> None:
        self._take(self.inner_type(options))

    def _take(self, inner: Transport) -> None:
        self.inner = inner
        self.bytes_posted = 0
        self._pid = os.getpid()
        self._log = Log(self.policy)
        self._posts: dict[int, Held] = {}
        self._loose: list[Held] = []  # let go of by a caller who was lied to
        self._numbers = itertools.count(FIRST_HANDLE)
        self._met: dict[int, Met] = {}
        self._flying: dict[int, int] = {}  # what was handed on and is not known to have drained: handle -> id(peer)
        self._regions: dict[Key, Region] = {}
        self._said: dict[bytes, frozenset[Key]] = {}
        self._unseen: list[tuple[Key, int, bytes]] = []
        self._wake: Callable[[], None] | None = None
        self._owed = 0
        self._closed = False
        with _lock:
            _proxies.add(self)

    # ---- what a test asks for --------------------------------------------------------------------------------

    @property
    def log(self) -> str:
        """Every decision so far that was not "as it is": print it, and replay it with `Policy.from_log`."""
        with _lock:
            return str(self._log)

    @property
    def posts(self) -> int:
        """Calls of `post` so far."""
        return self._log.counts["post"]

    @property
    def connects(self) -> int:
        """Calls of `connect` so far."""
        return self._log.counts["connect"]

    def follow(self, policy: Policy) -> None:
        """From the next call on, this policy decides. Raises ValueError where it would hold or hide writes and the one
        before did not: what is declared stays declared."""
        if (policy.holds and not self.policy.holds) or policy.hides != self.policy.hides:
            raise ValueError("what a proxy holds or hides is declared when it is made")
        with _lock:
            self.policy = self._log.policy = policy  # type: ignore[misc]  # the class's is how it began

    @property
    def held(self) -> list[Held]:
        """Posts that wait for `let_go` or `drop`, in the order of posting."""
        with _lock:
            return [post for post in self._posts.values() if post.held and not post.over]

    def step(self, beats: int = 1) -> None:
        """So many beats for every held post: what is due lands."""
        with _lock:
            for _ in range(beats):
                for post in [*self._posts.values(), *self._loose]:
                    self._advance(post, 1)
        self._call_back()

    def beat(self) -> None:
        """One beat, from any thread: it is taken at the next call of the thread that this transport belongs to."""
        with _lock:
            self._owed += 1
        self._call_back()

    def let_go(self) -> None:
        """What was held back lands now, whoever has the memory by now."""
        self._unhold(dropped=False)

    def drop(self) -> None:
        """What was held back never lands: FAILED."""
        self._unhold(dropped=True)

    def lose(self, peer: Any) -> None:
        """The peer is gone, and it is true: from now on nothing passes between the two, in either direction."""
        with _lock:
            met = self._met[id(peer)]
            self._part(met)
            for post in self._posts.values():
                self._advance(post, 0)
            other = met.owner() if met.owner is not None else None
            if other is not None:
                for back in other._met.values():
                    if back.owner is not None and back.owner() is self:
                        other._part(back)
        self._call_back()

    # ---- memory ------------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int, kind: str = "cpu", device: int = 0) -> Memory:
        return self.inner.allocate(nbytes, kind, *([device] if device else []))

    def register(self, memory: Memory) -> Region:
        region = self.inner.register(memory)
        with _lock:
            self._regions[region.id, region.generation] = region
        return region

    def retire(self, region: Region) -> None:
        self.inner.retire(region)
        with _lock:
            self._regions.pop((region.id, region.generation), None)

    def flush(self, region: Region) -> None:
        if self.inner.capabilities.needs_flush or not self.capabilities.needs_flush:
            self.inner.flush(region)
        key = (region.id, region.generation)
        with _lock:
            due = [entry for entry in self._unseen if entry[0] == key]
            self._unseen = [entry for entry in self._unseen if entry[0] != key]
            if not self._closed and key in self._regions:
                for _, offset, data in due:
                    copy_bytes(region.memory.view(offset, len(data)), memoryview(data))

    # ---- peers -------------------------------------------------------------------------------------------------

    def describe(self) -> bytes:
        blob = self.inner.describe()
        with _lock:
            self._said[blob] = frozenset(self._regions)
        return blob

    def connect(self, descriptor: bytes) -> Any:
        with _lock:
            decision = self._log.next("connect")
            owner = next((proxy for proxy in _proxies if descriptor in proxy._said), None)
            lost = any(met.lost and met.owner is not None and met.owner() is owner for met in self._met.values())
        if decision.refuse or (owner is not None and lost):
            raise PeerUnreachable("connection refused", transport=self.name)
        peer = self.inner.connect(descriptor)
        with _lock:
            met = self._met.setdefault(id(peer), Met(peer))
            if owner is not None:
                met.owner = weakref.ref(owner)
                met.told |= owner._said[descriptor]
        return peer

    def disconnect(self, peer: Any) -> None:
        self.inner.disconnect(peer)
        with _lock:
            self._met.pop(id(peer), None)

    def peer_state(self, peer: Any) -> PeerState:
        state = self.inner.peer_state(peer)
        with _lock:
            met = self._met.get(id(peer))
            if met is None or not (met.lost or met.buried):
                return state
            if Fence.PEER_GONE not in self.capabilities.fences:
                return PeerState.UNKNOWN
            if met.buried:
                return PeerState.GONE
            other = met.owner() if met.owner is not None else None
            return PeerState.UNKNOWN if other is not None and other._flies_to(self) else PeerState.GONE

    def path(self, peer: Any = None) -> str:
        return self.inner.path(peer)

    # ---- writing -----------------------------------------------------------------------------------------------

    def post(self, peer: Any, copies: Sequence[Copy]) -> int:
        held = False
        with _lock:
            decision = self._log.next("post")
            met = self._met.get(id(peer))
            if decision.broken:
                raise RuntimeError("a defect in the engine's binding")
            if met is not None and not self._closed and self._pid == os.getpid() and self._sound(met, copies):
                if met.lost:
                    raise TransportError("the peer is gone", transport=self.name)
                if decision.refuse:
                    raise TransportError("the session with the peer is not valid", transport=self.name)
                if decision.lose:
                    self.lose(peer)
                    raise TransportError("the peer has gone", transport=self.name)
                if self.policy.hides and not decision.unseen:
                    decision = replace(decision, unseen=True)  # all of them, so that they become visible in order
                if not decision.plain:
                    handle = self._hold(decision, met, list(copies))
                    held = True
                    self.bytes_posted += sum(copy.nbytes for copy in copies)
        if held:
            self._call_back()  # it wants to be polled
            return handle
        handle = self.inner.post(peer, copies)
        with _lock:
            self._flying[handle] = id(peer)
            self.bytes_posted += sum(copy.nbytes for copy in copies)
        return handle

    def poll(self, handle: int) -> Status:
        with _lock:
            self._catch_up()
            if self.policy.clock == "polls":
                for loose in list(self._loose):
                    self._advance(loose, 1)
            post = self._posts.get(handle)
            if post is not None:
                if post.decision.mute and post.held:
                    raise RuntimeError("a defect in the engine's binding")
                self._advance(post, self.policy.clock == "polls")
                waits_for_polls = not (post.over or post.held) and post.inner is None and self.policy.clock == "polls"
                status = post.status
        if post is None:
            status = self.inner.poll(handle)
            if status in (Status.DONE, Status.FAILED):
                self._flying.pop(handle, None)
        elif waits_for_polls:
            self._call_back()
        return status

    def drained(self, handle: int) -> bool:
        with _lock:
            self._catch_up()
            post = self._posts.get(handle)
            if post is not None:
                self._advance(post, self.policy.clock == "polls")  # as a poll: some ask nothing else
                return post.drained
        return self.inner.drained(handle)

    def source_free(self, handle: int) -> bool:
        with _lock:
            if handle in self._posts:  # what waits here is read when it lands
                return self.drained(handle)
        return self.inner.source_free(handle)

    def release(self, handle: int) -> None:
        with _lock:
            post = self._posts.get(handle)
            if post is not None:
                if not post.drained:
                    raise BadCall(f"handle {handle} is not drained", transport=self.name)
                del self._posts[handle]
                if not post.over:
                    self._loose.append(post)
                return
        self.inner.release(handle)
        self._flying.pop(handle, None)

    def cancel(self, handle: int) -> None:
        with _lock:
            post = self._posts.get(handle)
            if post is not None and self.capabilities.cancellable:
                if not post.decision.deaf and not post.over:
                    post.dropped = True
                    if post.inner is not None:
                        self.inner.cancel(post.inner)
                return
        self.inner.cancel(handle)

    def on_progress(self, wake: Callable[[], None]) -> None:
        self.inner.on_progress(wake)
        self._wake = wake

    def close(self) -> None:
        with _lock:
            self._closed = True
            self._wake = None
            self._loose.clear()
            self._unseen.clear()
            for post in self._posts.values():
                post.dropped = True
        self.inner.close()
        with _lock:
            self._regions.clear()
            for post in self._posts.values():
                self._advance(post, 0)

    # ---- a held post -------------------------------------------------------------------------------------------

    def _sound(self, met: Met, copies: Sequence[Copy]) -> bool:
        """Whether the inner transport would take it. What it would not is its own to refuse."""
        capabilities, owner = self.capabilities, met.owner() if met.owner is not None else None
        if not 0 < len(copies) <= capabilities.max_copies:
            return False
        for copy in copies:
            local = copy.local
            if isinstance(local, Region):
                if self._regions.get((local.id, local.generation)) != local:
                    return False
                local = local.memory
            elif capabilities.registers_sources:
                return False
            if local.kind not in capabilities.memory_kinds or copy.nbytes <= 0:
                return False
            if copy.local_offset < 0 or copy.local_offset + copy.nbytes > local.nbytes:
                return False
            if owner is not None:
                key = (copy.remote.id, copy.remote.generation)
                region = owner._regions.get(key)
                if owner._closed or region is None or key not in met.told:
                    return False
                if copy.remote_offset < 0 or copy.remote_offset + copy.nbytes > region.memory.nbytes:
                    return False
        return True

    def _hold(self, decision: Decision, met: Met, copies: list[Copy]) -> int:
        owner = met.owner() if met.owner is not None else None
        targets: dict[RemoteRegion, Memory] = {}
        if owner is not None:
            targets = {copy.remote: owner._regions[copy.remote.id, copy.remote.generation].memory for copy in copies}
        if decision.unseen and (owner is None or not owner.capabilities.needs_flush):
            decision = replace(decision, unseen=False)  # nobody would ever see them
        if decision.buried:
            met.buried = True
        lands, staged = copies, None
        late_reader = not (decision.early or decision.ghost or decision.drained or decision.again or decision.snapshot)
        if not late_reader and all(memory_of(copy).kind == "cpu" for copy in copies):
            lands, staged = self._snapshot(copies)
        if decision.torn:
            lands = [replace(copy, nbytes=copy.nbytes // 2) for copy in lands if copy.nbytes > 1]
        waves = pieces_of(lands, decision)
        outcome = Status.FAILED if decision.fails >= 0 else Status.DONE
        post = Held(
            self._log.counts["post"] - 1, decision, met, copies, waves, outcome, decision.late, targets,
            decision.held, staged,
        )  # fmt: skip
        handle = next(self._numbers)
        self._posts[handle] = post
        self._advance(post, 0)
        return handle

    def _snapshot(self, copies: list[Copy]) -> tuple[list[Copy], Region | None]:
        memory = host_memory(sum(copy.nbytes for copy in copies))
        staged = self.inner.register(memory) if self.capabilities.registers_sources else None
        kept, at = [], 0
        for copy in copies:
            copy_bytes(memory.view(at, copy.nbytes), memory_of(copy).view(copy.local_offset, copy.nbytes))
            kept.append(replace(copy, local=staged or memory, local_offset=at))
            at += copy.nbytes
        return kept, staged

    def _advance(self, post: Held, beats: int) -> None:
        """Count the beats, then do what is due: learn of the piece that is landing, land the next, tell the end."""
        post.beats -= beats
        while not post.over:
            if post.inner is not None:
                if not self.inner.drained(post.inner):
                    return None
                status = self.inner.poll(post.inner)  # after it: asked before, it may have been PENDING still
                self.inner.release(post.inner)
                post.inner = None
                if status is not Status.DONE:
                    return self._end(post, Status.FAILED)
            landed = post.next == len(post.waves)
            if post.dropped:
                return self._end(post, post.outcome if landed else Status.FAILED)
            if post.held or post.beats > 0:
                return None
            if landed:
                return self._end(post, post.outcome)
            if not self._land(post, post.waves[post.next]):
                return self._end(post, Status.FAILED)
            post.next += 1
            post.beats = 1
        return None

    def _land(self, post: Held, wave: list[Copy]) -> bool:
        owner = post.met.owner() if post.met.owner is not None else None
        if post.decision.unseen and owner is not None:
            for copy in wave:
                data = bytes(memory_of(copy).view(copy.local_offset, copy.nbytes))
                owner._unseen.append(((copy.remote.id, copy.remote.generation), copy.remote_offset, data))
            return not owner._closed
        try:
            post.inner = self.inner.post(post.met.peer, wave)
        except FerryError:  # the region was retired meanwhile, or the peer disconnected or closed
            late = post.decision.lies or Fence.RETIRE not in self.capabilities.fences
            if owner is None or owner._closed or not late:
                return False
            for copy in wave:
                target, source = post.targets[copy.remote], memory_of(copy)
                if target.kind != "cpu" or source.kind != "cpu":
                    return False
                copy_bytes(target.view(copy.remote_offset, copy.nbytes), source.view(copy.local_offset, copy.nbytes))
        return True

    def _end(self, post: Held, outcome: Status) -> None:
        post.outcome = outcome
        post.over = True
        if post in self._loose:
            self._loose.remove(post)
        if post.decision.again and outcome is Status.DONE and not self._closed:
            decision = Decision(late=post.decision.late, early=True)
            self._loose.append(replace(post, decision=decision, over=False, next=0, beats=post.decision.late))
        elif post.staged is not None and not self._closed:
            self.inner.retire(post.staged)
        post.waves, post.copies, post.targets = [], [], {}  # a source lives as long as it may be read, and no longer

    def _unhold(self, *, dropped: bool) -> None:
        with _lock:
            for post in [*self._posts.values(), *self._loose]:
                if post.held:
                    post.held, post.dropped, post.beats = False, dropped, 0
                    self._advance(post, 0)
        self._call_back()

    def _part(self, met: Met) -> None:
        met.lost = True
        for post in self._posts.values():
            if post.met is met:
                post.dropped, post.held = True, False

    def _flies_to(self, there: FaultProxy) -> bool:
        """Something that was posted to `there` is not known to have drained."""
        peers = {number for number, met in self._met.items() if met.owner is not None and met.owner() is there}
        return any(peer in peers for peer in self._flying.values()) or any(
            not post.over and post.met.owner is not None and post.met.owner() is there
            for post in [*self._posts.values(), *self._loose]
        )

    def _catch_up(self) -> None:
        owed, self._owed = self._owed, 0
        if owed:
            for post in [*self._posts.values(), *self._loose]:
                for _ in range(owed):
                    self._advance(post, 1)

    def _call_back(self) -> None:
        wake = self._wake
        if wake is not None:
            try:
                wake()
            except Exception:  # a bad call of the caller's: it must not come back out of poll
                log.exception("the function given to on_progress failed")


_proxies: weakref.WeakSet[FaultProxy] = weakref.WeakSet()


class Ticker:
    """A thread that gives a proxy a beat every `seconds`: for those who want time to pass. Use it in a `with`."""

    def __init__(self, proxy: FaultProxy, seconds: float) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(proxy, seconds), name="fault-ticker", daemon=True)

    def _run(self, proxy: FaultProxy, seconds: float) -> None:
        while not self._stop.wait(seconds):
            proxy.beat()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


def proxied(inner: type[Transport], policy: Policy | None = None) -> type[FaultProxy]:
    """The transport `inner` with faults: a class, opened with the same options. Without a policy: with none."""
    return _class_for(inner, inner.capabilities, policy or Policy.empty())


def wrapped(inner: Transport, policy: Policy | None = None) -> FaultProxy:
    """A proxy around a transport that is open, and has no regions, peers or posts yet. Closing it closes that."""
    made = _class_for(type(inner), inner.capabilities, policy or Policy.empty())
    proxy = made.__new__(made)
    proxy._take(inner)
    return proxy


def _class_for(inner: type[Transport], declared: Capabilities, policy: Policy) -> type[FaultProxy]:
    if policy.holds:
        declared = replace(declared, fences=declared.fences - {Fence.DRAIN})
    if policy.hides:
        declared = replace(declared, needs_flush=True)
    members = {
        "name": inner.name,
        "contract_version": inner.contract_version,
        "capabilities": declared,
        "options_type": inner.options_type,
        "inner_type": inner,
        "policy": policy,
        "__module__": __name__,
        "__doc__": f"{inner.__name__}, with faults.",
    }
    return type(f"Faulty{inner.__name__}", (FaultProxy,), members)
