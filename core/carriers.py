"""The transports of one endpoint, and how each of its peers is reached: by the best that both have, then the next.

The endpoint's memory is registered with all of them once. A peer's Hello offers what the peer has; `reach` connects
to each offer that both can use and keeps the reason for every one that is not used. With one transport there is
nothing to choose, and nothing here costs anything.

Long because all that is known of the ways to a peer, and found out of them later, stands in one file.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tensorferry.core import messages as m
from tensorferry.core.errors import (
    BadCall,
    ConfigError,
    FerryError,
    PathMismatch,
    ProtocolViolation,
    TransportError,
    TransportMismatch,
    TransportUnavailable,
    VersionMismatch,
)
from tensorferry.core.memory import HOST, Memory, Place
from tensorferry.core.selection import Candidate, Verdict, preference, rank
from tensorferry.core.transport import CONTRACT_VERSION, PeerState, Region, Transport

log = logging.getLogger("tensorferry.carriers")

LOOK_SECONDS = 1.0
"""Least time between two looks at how the transports describe themselves: strangers may cause one. It takes tcp
0.9 ms on a host with three interfaces, whose list it reads."""

Regions = Mapping[str, Region]
"""One piece of memory as each transport has registered it, by the transport's name."""


@dataclass(slots=True, eq=False)
class Lane:
    """One transport's way to a peer. `regions`: the peer's slabs as this transport knows them, (id, generation)."""

    transport: Transport
    peer: Any
    regions: list[tuple[int, int]]
    path: str
    """What carries the bytes: as the two sides chose it, and as the engine tells it once it has said otherwise."""
    word: str
    """What the engine said of this peer when it was connected."""
    barred: PathMismatch | None = None
    """Why it is not used any more, although it stays connected: what it may still write has to be watched."""
    mute: bool = False
    """Its transport cannot say how the peer is, and that was logged."""

    @property
    def state(self) -> PeerState:
        """As its transport says; UNKNOWN, which proves nothing, where it raises instead."""
        try:
            return self.transport.peer_state(self.peer)
        except Exception:  # foreign code, and asked at each tick: it is this peer's trouble and nobody else's
            if not self.mute:
                self.mute = True
                log.exception("%s.peer_state raised", self.transport.name)
            return PeerState.UNKNOWN


@dataclass(slots=True, eq=False)
class Reach:
    """How a peer is reached: the lanes that work, best first, and a verdict on every transport of either side."""

    lanes: list[Lane]
    verdicts: list[Verdict]
    watched: list[Lane] = field(default_factory=list)
    """Lanes that there were once. None carries any more; what was written by them may be under way."""
    blind: tuple[str, ...] = ()
    """Transports that could not be connected although both sides have them: whether the peer can use them is unknown,
    so nothing that they cannot rule out counts as proved."""
    failures: int = field(default=0)
    """Fresh starts in a row that the lane in use has cost: the posts of one hiccup count once."""
    covered: tuple[int, tuple[int, int]] = (0, (0, 0))
    """What the last failure covers: posts up to this number, and the (transfer, epoch) that it was met in."""

    @property
    def lane(self) -> Lane:
        return self.lanes[0]

    @property
    def path(self) -> str:
        """What carries the bytes to this peer, by all that is known so far."""
        return self.lane.path

    @property
    def way(self) -> tuple[str, str]:
        """The transport that carries, and its path."""
        return self.lane.transport.name, self.path

    def lane_of(self, name: str) -> Lane | None:
        return next((lane for lane in self.ever if lane.transport.name == name), None)

    @property
    def ever(self) -> list[Lane]:
        return [*self.lanes, *self.watched]

    @property
    def ended(self) -> bool:
        """Some transport proves that the peer's process has ended, or that it closed."""
        return any(lane.state is PeerState.GONE for lane in self.ever)

    @property
    def quiet(self) -> bool:
        """Every way by which the peer could write to us is proved to have ended (F4)."""
        return not self.blind and all(lane.state is PeerState.GONE for lane in self.ever)

    def fall_back(self, reason: str) -> bool:
        """Put the lane in use last: the next one carries from now on. False where there is no other."""
        self.failures, self.covered = 0, (0, (0, 0))
        if sum(lane.barred is None for lane in self.lanes) < 2:
            return False
        self._put_last(self.lanes[0], viable=True, reason=f"the last resort: {reason}")
        return True

    @property
    def fallen(self) -> bool:
        """A lane carries that was not the first choice: a better one was given up for a while."""
        return self._best() is not self.lane

    def prefer_again(self) -> bool:
        """Give the best lane another chance: it may have been one hiccup of the network. False where it is in use."""
        best = self._best()
        if best is self.lane:
            return False
        self.failures = 0
        self.lanes.remove(best)
        self.lanes.insert(0, best)
        told = next(v for v in self.verdicts if v.name == best.transport.name)
        again = replace(told, reason=f"first choice, tried again: over {best.path}")
        self.verdicts = [again, *(v for v in self.verdicts if v is not told)]
        return True

    def _best(self) -> Lane:
        return min(self.lanes, key=lambda one: (one.barred is not None, preference(one.transport.name, one.path)))

    def _put_last(self, lane: Lane, *, viable: bool, reason: str) -> None:
        self.lanes.remove(lane)
        self.lanes.append(lane)
        self.lanes.sort(key=lambda one: one.barred is not None)
        told = next(v for v in self.verdicts if v.name == lane.transport.name)
        kept = [v for v in self.verdicts if v is not told]
        kept.insert(sum(v.viable for v in kept), replace(told, path=lane.path, viable=viable, reason=reason))
        self.verdicts = kept

    def check(self, lane: Lane, require: str = "") -> PathMismatch | None:
        """Hold what the engine says of the path against what was chosen; to be asked after each write.

        Engines change their path without a word: a connection that is made anew, a device that goes down. Where it is
        not as chosen, the verdict says so from then on, and a warning is logged, once for each such change. Under
        `require` the lane is not used any more, and the answer is the error of what went by it.
        """
        if lane.barred is not None:
            return lane.barred
        told = _path(lane.transport, lane.peer)
        if told == lane.word:
            return None
        lane.word = told
        return self._hold(lane, told, "the engine's", require)

    def hear(self, lane: Lane, told: str, require: str = "") -> PathMismatch | None:
        """The same with what the peer says of its writes. It may know what this side's engine does not."""
        return lane.barred if lane.barred is not None else self._hold(lane, told, "the sender's", require)

    def _hold(self, lane: Lane, told: str, whose: str, require: str) -> PathMismatch | None:
        if told == lane.path:
            return None
        name, chosen, lane.path = lane.transport.name, lane.path, told
        what = f"chosen over {chosen}, and by {whose} word its bytes go over {told or 'nobody knows what'}"
        if not require or told == require:
            if preference(name, told) > preference(name, chosen):
                log.warning("transport %s: %s", name, what)
            self.verdicts = [replace(v, path=told, reason=what) if v.name == name else v for v in self.verdicts]
            return None
        lane.barred = PathMismatch(f"{require} is required, and {name} was {what}", transport=name)
        log.error("transport %s is not used any more for this peer: %s", name, lane.barred)
        self._put_last(lane, viable=False, reason=lane.barred.cause)
        return lane.barred

    def disconnect(self) -> None:
        """From every lane, whatever one of their transports raises: what follows it are proofs that blocks wait for."""
        for lane in self.ever:
            try:
                lane.transport.disconnect(lane.peer)
            except Exception:  # foreign code
                log.exception("%s.disconnect raised", lane.transport.name)


class Carriers:
    """Owns the transports: what it is given it closes. One thread only (the endpoint's I/O thread)."""

    def __init__(
        self,
        transports: Transport | Sequence[Transport],
        *,
        require: str = "",
        place: Place = HOST,
        passed_over: Sequence[Verdict] = (),
    ) -> None:
        """`require`: a path ("rdma") that the bytes must take. Raises TransportUnavailable where none can take it.
        `place`: where the memory lies that `allocate` gives. Raises ConfigError where no transport takes such.
        `passed_over`: what was not even opened, with the reason."""
        given = [transports] if isinstance(transports, Transport) else list(transports)
        if not given or len({t.name for t in given}) != len(given):
            raise BadCall(f"an endpoint needs transports of different names, not {[t.name for t in given]}")
        self.require, self.place = require, place
        self.rejected: list[Verdict] = list(passed_over)
        """Those that are there and are not used, with the reason."""
        self._all = list(given)
        self._withdrawn: list[Transport] = []  # used no more, and open: peers were told of them
        self._told = False
        fit = [t for t in given if not require or t.path() == require]
        self.rejected += [
            Verdict(t.name, t.path(), False, f"{require} is required, and its path is {t.path()}")
            for t in given
            if t not in fit
        ]
        if not fit:
            raise TransportUnavailable(
                f"{require} is required, and no transport here has it: "
                + "; ".join([*(f"{t.name} goes over {t.path()}{_said(t)}" for t in given), *map(str, passed_over)]),
                hint="`tensorferry doctor` says, step by step, what stands against RDMA",
                transport=given[0].name,
            )
        fit = self._taking(fit)
        self.transports = sorted(fit, key=lambda t: preference(t.name, t.path()))
        # Only one can say where the pool lies. The others register what it allocated.
        choosy = [t for t in self.transports if t.capabilities.allocates_targets]
        for other in choosy[1:]:
            self.reject(other, f"its targets have to be of its own making, and {choosy[0].name} comes first")
        self._allocator = choosy[0] if choosy else self.transports[0]
        self._looked = -math.inf

    def _taking(self, fit: list[Transport]) -> list[Transport]:
        """Those that take memory of the pool's kind. Raises ConfigError for none."""
        kind = self.place.kind
        able = [t for t in fit if kind in t.capabilities.memory_kinds]
        for t in [t for t in fit if t not in able]:
            reason = (
                f"the pool lies on {self.place}, and it takes {'/'.join(sorted(t.capabilities.memory_kinds))} memory"
            )
            self.rejected.append(Verdict(t.name, t.path(), False, reason))
        if not able:
            told = "; ".join(f"{v.name}: {v.reason}" for v in self.rejected)
            raise ConfigError(
                f"pool_device is {self.place}, and no transport here takes {kind} memory: {told}",
                hint="Leave it at cpu, and set destination_device. `tensorferry doctor` says what lacks (cuda_memory)",
            )
        return able

    @property
    def wakes(self) -> bool:
        """All of them call back when something happens: nobody needs to poll."""
        return all(t.capabilities.wakes for t in self.transports)

    def on_progress(self, wake: Callable[[], None]) -> None:
        for transport in self.transports:
            if transport.capabilities.wakes:
                transport.on_progress(wake)

    # ---- memory ------------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> Memory:
        return self._allocator.allocate(nbytes, *(() if self.place == HOST else self.place))

    def register(self, memory: Memory) -> dict[str, Region]:
        """With every transport. One that will not take it is not used any more, unless it is the only one left."""
        regions: dict[str, Region] = {}
        for transport in list(self.transports):
            try:
                regions[transport.name] = transport.register(memory)
            except FerryError as problem:
                if len(self.transports) == 1:
                    raise
                self.reject(transport, f"it could not register the pool: {problem}")
        return regions

    def retire(self, regions: Regions) -> None:
        for transport in [*self.transports, *self._withdrawn]:
            if transport.name in regions:
                transport.retire(regions[transport.name])

    def flush(self, regions: Regions) -> None:
        for transport in [*self.transports, *self._withdrawn]:
            if transport.capabilities.needs_flush and transport.name in regions:
                transport.flush(regions[transport.name])

    # ---- peers -------------------------------------------------------------------------------------------------

    def candidates(self) -> list[Candidate]:
        return [Candidate(t.name, t.path(), CONTRACT_VERSION) for t in self.transports]

    def offers(self, slabs: Iterable[Regions] = ()) -> tuple[m.Offer, ...]:
        """What Hello says: each transport with its descriptor and its name for every slab."""
        held = list(slabs)
        self._told = True
        return tuple(
            m.Offer(
                t.name,
                CONTRACT_VERSION,
                t.path(),
                t.describe(),
                m.pack_regions((s[t.name].id, s[t.name].generation) for s in held if t.name in s),
            )
            for t in self.transports
        )

    def news(self, told: tuple[m.Offer, ...], now: float, slabs: Iterable[Regions] = ()) -> tuple[m.Offer, ...]:
        """What Hello should say instead of `told`: a transport may be found elsewhere by now, as where the network has
        come up since. Asked of the transports once in LOOK_SECONDS.

        The same transports in the same order, or `told` stays: one that is offered no more would be missing from what
        the peer waits for before it takes this side's writes for ended (F4).
        """
        if now - self._looked < LOOK_SECONDS:
            return told
        self._looked = now
        try:
            offers = self.offers(slabs)
        except Exception as problem:  # noqa: BLE001 - foreign code, and the greeting that asked for it goes on
            log.debug("a transport does not describe itself again: %r", problem)
            return told
        return offers if [offer.name for offer in offers] == [offer.name for offer in told] else told

    def reach(self, hello: m.Hello, who: str, before: Reach | None = None) -> Reach:
        """Connect to a peer by every transport that both have; again when its Hello has changed, with the Reach of
        before, so that what was given up then is not tried first now.

        Raises TransportMismatch, VersionMismatch, or what the only common transport's `connect` raises, where no way
        is left; the cause lists every transport's reason.
        """
        reach, problems = self.survey(hello, who, before)
        if reach.lanes and reach.lane.barred is None:
            return reach
        if len(problems) == 1:
            raise problems[0]
        raise self._no_way(reach.verdicts, hello, who, problems)

    def survey(self, hello: m.Hello, who: str, before: Reach | None = None) -> tuple[Reach, list[FerryError]]:
        """The same, and no way at all is an answer too: then there are no lanes."""
        offered = {offer.name: offer for offer in hello.offers}
        ours = {t.name: t for t in self.transports}
        verdicts = rank(self.candidates(), [Candidate(o.name, o.path, o.contract) for o in hello.offers], self.require)
        slabs = len(hello.generations) // 4
        lanes: list[Lane] = []
        seen: list[Verdict] = []
        blind: list[str] = []
        problems: list[FerryError] = []
        for verdict in verdicts:
            if not verdict.viable:
                seen.append(verdict)
                if verdict.name in ours and verdict.name in offered:
                    blind.append(verdict.name)  # ours not to use; the peer may see it otherwise
                continue
            known = before.lane_of(verdict.name) if before is not None else None
            try:
                require = "" if known is not None and known.barred is not None else self.require
                lane = _lane(ours[verdict.name], offered[verdict.name], slabs, verdict.path, require, who)
                lanes.append(lane)
                if known is not None and before is not None:  # what was found out of it still holds
                    lane.path, lane.word, lane.barred = known.path, known.word, known.barred
                    lane.mute = known.mute
                    if lane.barred is not None:
                        problems.append(lane.barred)
                    if lane.path != verdict.path:
                        verdict = next(v for v in before.verdicts if v.name == verdict.name)
                elif lane.path != verdict.path:
                    verdict = replace(verdict, path=lane.path, reason=f"{verdict.reason}; {lane.path} to this peer")
                seen.append(verdict)
            except FerryError as problem:
                problems.append(problem)
                seen.append(replace(verdict, viable=False, reason=problem.cause))
                # That two sides are on one host holds for both of them. Whether there is a way over a network may not.
                same_host = ours[verdict.name].capabilities.same_host_only
                if not (same_host and isinstance(problem, TransportMismatch)):
                    blind.append(verdict.name)
        known_here = {v.name: v for v in self.rejected}
        for k, v in enumerate(seen):
            if v.name not in ours and v.name in known_here:  # the peer's word: it is here as well
                seen[k] = replace(v, reason=f"the peer has it, and here: {known_here[v.name].reason}")
        seen.sort(key=lambda v: not v.viable)
        if lanes:
            if before is not None:
                order = [lane.transport.name for lane in before.lanes]
                lanes.sort(key=lambda lane: (lane.barred is not None, _place(lane.transport.name, order)))
                seen.sort(key=lambda v: (not v.viable, _place(v.name, order)))
            first = next((v for v in seen if v.viable), None)
            if first is not None and not first.reason.startswith(("first choice", "chosen over")):
                seen[seen.index(first)] = replace(first, reason=f"first choice of what is left: over {first.path}")
        seen += [v for v in self.rejected if v.name not in offered]
        carrying = [lane.transport.name for lane in lanes]
        watched = [lane for lane in before.ever if lane.transport.name not in carrying] if before is not None else []
        return Reach(lanes, seen, watched, tuple(blind)), problems

    def verdicts(self, reach: Reach) -> tuple[Verdict, ...]:
        """The reach's, with what has become of this side's transports since."""
        gone = {t.name for t in self._withdrawn}
        kept = [v for v in reach.verdicts if v.name not in gone]
        return (*kept, *(v for v in self.rejected if v.name in gone)) if gone else tuple(kept)

    def _no_way(self, seen: list[Verdict], hello: m.Hello, who: str, problems: Sequence[FerryError] = ()) -> FerryError:
        ours, theirs = [t.name for t in self.transports], [offer.name for offer in hello.offers]
        both = [v for v in seen if v.name in ours and v.name in theirs]
        if not both:
            here = [str(v) for v in self.rejected if v.name in theirs]
            return TransportMismatch(
                f"this side has {', '.join(ours)}{''.join(f', {one}' for one in here)}, "
                f"the peer offers {', '.join(theirs) or 'none'}",
                hint="Name the same transport on both sides, or leave both to choose (transport=auto)",
                peer=who,
            )
        told = "; ".join(f"{v.name}: {v.reason}" for v in both)
        kind = VersionMismatch if all("transport contract" in v.reason for v in both) else TransportMismatch
        hints = dict.fromkeys(p.hint for p in problems if p.hint and p.hint != p.default_hint)  # any one may help
        if self.require and any(v.reason.startswith(f"{self.require} is required") for v in both):
            hints[_look_for(self.require)] = None
        return kind(f"no transport joins the two sides: {told}", hint="; ".join(hints), peer=who)

    # ---- the end -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """All of them, whatever one of them raises. Idempotent."""
        close_all(self._all)

    def reject(self, transport: Transport, reason: str) -> None:
        """Use it no more: the endpoint has others. Where peers were told of it, it is closed with the endpoint: they
        would take its end for that of this process, and their writes by it for over."""
        log.warning("transport %s is not used%s: %s", transport.name, " any more" if self._told else "", reason)
        self.transports.remove(transport)
        if transport is getattr(self, "_allocator", None):  # what it allocated stays; the next slab is another's
            self._allocator = self.transports[0]
        self.rejected.append(Verdict(transport.name, transport.path(), False, reason))
        if self._told:
            self._withdrawn.append(transport)
        else:
            transport.close()


def close_all(transports: Iterable[Transport]) -> None:
    for transport in transports:
        try:
            transport.close()
        except Exception:  # it may not; the others' memory and sockets are given back all the same
            log.exception("%s.close raised", transport.name)


def _place(name: str, order: list[str]) -> int:
    return order.index(name) if name in order else len(order)


def _look_for(path: str) -> str:
    return f"`tensorferry doctor`, on each of the two sides, says what stands against {path}"


def _said(transport: Transport) -> str:
    """What it says of itself, in brackets: it may name the cause."""
    try:
        return f" ({transport.probe().reason})"
    except Exception:  # it may not; the error that this is for goes without
        log.exception("%s.probe raised", transport.name)
        return ""


def _path(transport: Transport, peer: Any) -> str:
    """The engine's word; empty where it has none."""
    try:
        return transport.path(peer)
    except Exception:  # as with `poll`: what it does not tell is not known, and `require` fails closed
        log.exception("%s.path raised", transport.name)
        return ""


def _lane(transport: Transport, offer: m.Offer, slabs: int, chosen: str, require: str, who: str) -> Lane:
    try:
        regions = m.unpack_regions(offer.regions)
    except ValueError as problem:
        raise ProtocolViolation(str(problem), peer=who, transport=transport.name) from None
    if len(regions) != slabs:
        raise ProtocolViolation(f"{len(regions)} regions for {slabs} slabs", peer=who, transport=transport.name)
    try:
        peer = transport.connect(offer.descriptor)
    except FerryError:
        raise
    except Exception as problem:
        log.exception("%s.connect raised what no transport may raise", transport.name)
        raise TransportError(f"{type(problem).__name__}: {problem}", peer=who) from problem
    word = _path(transport, peer)
    if require and word != require:
        transport.disconnect(peer)
        raise TransportMismatch(
            f"{require} is required, and the path to this peer is {word or 'not known'}",
            hint=_look_for(require),
            transport=transport.name,
        )
    # What it says of all peers alike says nothing of the other side, whose word counts in the choice.
    return Lane(transport, peer, regions, chosen if word in ("", transport.path()) else word, word)
