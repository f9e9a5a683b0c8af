"""The NIXL engine behind the few calls of it that are safe.

The binding module is loaded by itself: the wheel's Python layer imports numpy (and `import nixl`, on a machine without
CUDA, torch), logs to standard output, and makes a progress thread that spins. Not used, and why: notifications are sent
by the initiator's next look at a finished request and get lost with it; a request is never released while it is under
way, because that ends nothing: the bytes land all the same.

Long because each call stands here with what makes it safe.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import secrets
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

from tensorferry.backends import _nixl_environment as environment
from tensorferry.backends._mapping import Mapping
from tensorferry.backends._nixl_backends import check_backend, explain_backend
from tensorferry.backends._nixl_environment import RDMA, TCP, Unfit
from tensorferry.backends._nixl_gate import Gate, Held
from tensorferry.backends._nixl_sockets import (
    Aftermath,
    Stalled,
    cut_connections,
    event_sets,
    leave_to_parent,
    listening_ports,
)
from tensorferry.backends._rdma import MAY_BE_LOCKED, rdma_ports, why_not_locked
from tensorferry.core.errors import TransportError
from tensorferry.core.memory import Memory

log = logging.getLogger("tensorferry.backends.nixl")

PROGRESS_US = 100_000
"""How long the engine's progress thread sleeps when nothing comes in; what comes in wakes it. At 0, the wheel's own
choice, it takes a core when idle; at 100 ms 0.04 % of one (three seconds of `time.process_time`)."""

DOORSTEP_BYTES = 4096

Piece = tuple[int, int, int]
"""(source address, target address, bytes)"""

Route = tuple[int, int]
"""The GPUs that a request reads from and writes to, by number; -1 is host memory."""

HOST_TO_HOST = (-1, -1)

START_S = 60.0
"""For an agent to come to be. It takes 0.1 to 0.5 s; under an emulated processor that others used, too, 18."""

_loading = threading.Lock()
_creating = threading.Lock()
"""Held while an agent comes to be: what is there afterwards and was not before is its own. By an agent that does not
come back it is held for good, and none starts any more."""

_LOCKED = (
    f"Most likely too little memory may be locked (see `ulimit -l`), and UCX tries for ever: {MAY_BE_LOCKED}. "
    "`UCX_LOG_LEVEL=error tensorferry doctor --debug nixl` shows what UCX itself says"
)

_keep: list[ctypes.CDLL] = []


def load() -> Any:
    """The engine's binding module. Raises Unfit with what is missing."""
    name = environment.module_name()
    environment.refuse_dangers()
    environment.prepare()
    full = f"{name}._bindings"
    with _loading:
        if full in sys.modules:
            return sys.modules[full]
        if os.environ.get("UCX_MODULES") != "^ib":
            _settle_libraries(name)
        file = environment.binding_file(name)
        spec = importlib.util.spec_from_file_location(full, file)
        assert spec is not None
        assert spec.loader is not None
        try:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        except ImportError as error:
            raise environment.explain_library(str(error), "the NIXL engine") from error
        sys.modules[full] = module
        return module


def _settle_libraries(name: str) -> None:
    """Load the wheel's netlink libraries and the system's, each by itself, before anything else does.

    UCX's InfiniBand module loads its own copy, and then a driver library of the system loads the system's, whose
    symbols the loader binds to the wheel's: at exit one copy's destructor takes off the other's list what was never on
    it, and the process dies (SIGSEGV in `rtnl_tc_unregister`). A library that is loaded alone binds to itself.

    The wheel's libibverbs finds drivers for Mellanox devices and for no others. Where there are others the system's is
    made the one that is found first.
    """
    for pattern in ("libnl-3-*.so*", "libnl-route-3-*.so*"):
        for file in environment.bundled(name, pattern):
            _preload(str(file), ctypes.RTLD_LOCAL)
    _preload("libnl-route-3.so.200", ctypes.RTLD_LOCAL)
    others = [device for device in rdma_ports() if not device.startswith("mlx")]
    _preload("libibverbs.so.1", ctypes.RTLD_GLOBAL if others else ctypes.RTLD_LOCAL)


def _preload(file: str, mode: int) -> None:
    try:
        _keep.append(ctypes.CDLL(file, mode=mode))
    except OSError as error:  # then nothing else will load it either
        log.debug("not there: %s", error)


def _sockets() -> tuple[set[int], set[int]]:
    """What this process listens on, and its epoll descriptors. Raises Unfit: without the engine's own, nothing can be
    proved of what a dead peer has sent."""
    try:
        return listening_ports(), event_sets()
    except OSError as error:
        raise Unfit(
            f"the process cannot look at its own sockets: {error}", "`ulimit -n` bounds its open files; /proc is needed"
        ) from error


class Agent:
    """One agent of this process. Any thread may call `start`, `look`, `learn` and `forget`; `close` comes last."""

    def __init__(self, backend: str, require: str, workers: int, *, cuda: bool = False) -> None:
        """Raises Unfit where the engine does not start. `require`: give UCX nothing else ("rdma", "tcp"), or "".
        `cuda`: let it know GPU memory when it is given some, which UCX's module for copies within a process does."""
        self._nixl = nixl = load()
        self.name = f"tensorferry-{secrets.token_hex(16)}"
        config = nixl.nixlAgentConfig()
        config.useProgThread = True
        config.useListenThread = False
        config.captureTelemetry = False
        config.pthrDelay = PROGRESS_US
        # Posts of several threads side by side; NONE, the wheel's own choice, is for one thread alone.
        config.syncMode = nixl.NIXL_THREAD_SYNC_RW
        self._agent: Any = nixl.nixlAgent(self.name, config)
        check_backend(backend, self._agent.getAvailPlugins())
        parameters = {"num_workers": str(workers)} if backend == "UCX" else {}
        if backend == "UCX" and require in (RDMA, TCP):
            parameters["engine_config"] = ("TLS=ib" if require == RDMA else "TLS=tcp") + (",cuda_copy" if cuda else "")
        self._pins = backend == "UCX" and require == RDMA
        self._memory: dict[int, tuple[Memory, Any]] = {}
        self._gate = Gate()
        self._owed: set[str] = set()  # whom to forget as soon as nobody is inside
        self._learnt: set[str] = set()  # whom `learn` was called for and `forget` was not
        self._door = Mapping(DOORSTEP_BYTES)
        self.doorstep = self._door.address
        self._within(START_S, lambda: self._start(backend, require, parameters))
        _alive.add(self)

    def _start(self, backend: str, require: str, parameters: dict[str, str]) -> None:
        ports, sets = _sockets()
        try:
            self._backend = self._agent.createBackend(backend, parameters)
        except Exception as error:
            raise explain_backend(backend, require, error) from error
        ports_now, sets_now = _sockets()
        self.ports, self._sets = sorted(ports_now - ports), sets_now - sets
        self.register(Memory(self.doorstep, DOORSTEP_BYTES, "cpu", self._door))

    def _within(self, seconds: float, start: Callable[[], None]) -> None:
        """Run it on a thread. Raises what it raises, and Unfit where it does not return: UCX tries again for ever where
        a device refuses to register memory, with a core and deaf to signals. What is left there is the process's."""
        if not _creating.acquire(timeout=seconds):
            raise Unfit(
                f"an agent that this process started before has not come back from NIXL within {seconds:g} s", _LOCKED
            )
        raised: list[BaseException] = []
        over = threading.Event()

        def run() -> None:
            try:
                start()
            except BaseException as error:  # noqa: BLE001 - it is raised again by the thread that waits
                raised.append(error)
            finally:
                _creating.release()
                over.set()

        try:
            threading.Thread(target=run, name="nixl-start", daemon=True).start()
            came_back = over.wait(seconds)
        except RuntimeError as error:  # it has not begun
            _creating.release()
            raise Unfit(f"no thread can be had to start NIXL on: {error}", "`ulimit -u` bounds them") from error
        except BaseException:  # an interrupt, as early as in `start`, while the engine may be at it for ever
            self.abandon()
            raise
        if not came_back:
            self.abandon()
            raise Unfit(f"NIXL did not come back within {seconds:g} s from starting an agent", _LOCKED)
        if raised:
            raise raised[0]

    # ---- memory ------------------------------------------------------------------------------------------

    def register(self, memory: Memory) -> None:
        """Raises TransportError, also where a call of another thread does not come back. The GIL is released."""
        # One by one: given a list, the binding first asks numpy whether it is an array, and imports it for that.
        on_gpu = memory.kind == "cuda"
        if self._pins and not on_gpu and (refused := why_not_locked(memory.nbytes)):
            raise TransportError(
                f"the engine cannot register {memory.nbytes} bytes: {refused}", hint=MAY_BE_LOCKED, transport="nixl"
            )
        entries = self._nixl.nixlRegDList(self._segment(memory.device if on_gpu else -1), 0)
        entries.addDesc((memory.address, memory.nbytes, memory.device, ""))
        try:
            with self._gate.alone():
                self._agent.registerMem(entries, [self._backend])
        except Held as held:
            raise _held(held) from held
        except Exception as error:
            raise TransportError(
                f"the engine does not register {memory.nbytes} bytes: {error}",
                hint="GPU memory needs a peer-memory module (`modprobe nvidia_peermem`) or DMA-BUF"
                if on_gpu
                else "Over RDMA, pinned memory counts against `ulimit -l`",
                transport="nixl",
            ) from error
        self._memory[memory.address] = (memory, entries)

    def _segment(self, gpu: int) -> Any:
        return self._nixl.DRAM_SEG if gpu < 0 else self._nixl.VRAM_SEG

    def unregister(self, memory: Memory) -> bool:
        """Only what nobody writes to any more: over TCP the engine does not check, and a late write ends the process
        when the pages are gone. False: not now, for a call of another thread does not come back."""
        kept = self._memory.get(memory.address)
        if kept is not None:
            try:
                with self._gate.alone():
                    self._agent.deregisterMem(kept[1], [self._backend])
            except Held as held:
                log.warning("%s stays registered: %s", memory, held)
                return False
            except Exception:
                log.exception("unregistering %s failed", memory)
            self._memory.pop(memory.address, None)
        return True

    def metadata(self) -> bytes:
        """What another agent needs to write to our registered memory. Raises TransportError where a call of another
        thread does not come back. The binding keeps the GIL."""
        try:
            with self._gate.alone():
                return bytes(self._agent.getLocalMD())
        except Held as held:
            raise _held(held) from held

    # ---- peers -------------------------------------------------------------------------------------------

    def learn(self, name: str, metadata: bytes) -> None:
        """Take in a peer's metadata, again when it has new regions. Raises TransportError, and Held where a call of
        another thread does not come back: then nothing has happened."""
        if name == self.name:
            return
        if name.encode() not in metadata:  # not even loaded: the engine would take it for news of whom it names
            raise TransportError(f"the peer's metadata is not that of {name!r}", transport="nixl")
        try:
            with self._gate.alone(patient=True):
                self._forget_owed()
                self._learnt.add(name)
                found = self._agent.loadRemoteMD(metadata)
        except Held:
            raise
        except Exception as error:
            raise TransportError(f"the engine does not take the peer's metadata: {error}", transport="nixl") from error
        found = found.decode(errors="replace") if isinstance(found, bytes) else found
        if found != name:
            if found not in self._learnt:
                self.forget(found)
            raise TransportError(f"the peer's metadata is that of {found!r}, not of {name!r}", transport="nixl")

    def forget(self, name: str) -> None:
        """Drop a peer and the connection to it. What is under way to it cannot be looked at any more. Where a call of
        another thread does not come back it is done later, and before the peer is learnt again."""
        if name == self.name:
            return
        self._learnt.discard(name)
        self._owed.add(name)
        try:
            with self._gate.alone(patient=True):
                self._forget_owed()
        except Held as held:
            log.debug("%s is forgotten later: %s", name, held)

    def _forget_owed(self) -> None:
        """Alone: the binding keeps the GIL."""
        while self._owed:
            name = self._owed.pop()
            try:
                self._agent.invalidateRemoteMD(name)
            except Exception as error:  # noqa: BLE001 - the engine has dropped it itself
                log.debug("forgetting %s: %s", name, error)

    def cut(self, name: str, ports: Collection[int], addresses: Collection[str]) -> None:
        """End the TCP connections to a peer, which nothing else ends."""
        if name != self.name:
            cut_connections(ports, addresses, self._sets)

    def stalled(self, addresses: Collection[str]) -> Stalled:
        """The connections to a peer at these addresses on which nothing goes on."""
        return Stalled(addresses, self._sets)

    def aftermath(self, ports: Collection[int]) -> Aftermath:
        """Of a peer that has ended and accepted connections on these ports."""
        return Aftermath(self.ports, ports, self._sets)

    # ---- writing -----------------------------------------------------------------------------------------

    def prepare(self, name: str, pieces: Sequence[Piece], route: Route = HOST_TO_HOST) -> Request:
        """A request that is not under way yet. Raises what the engine raises where it knows no such memory."""
        nixl = self._nixl
        local, remote = (nixl.nixlXferDList(self._segment(gpu), 0) for gpu in route)
        here, there = (max(0, gpu) for gpu in route)
        for source, target, nbytes in pieces:
            local.addDesc((source, nbytes, here))
            remote.addDesc((target, nbytes, there))
        with self._gate.among():
            number = self._agent.createXferReq(nixl.NIXL_WRITE, local, remote, name, "", [self._backend])
        return Request(self, number)

    def submit(self, request: Request) -> bool:
        """Start it. True: it is done and every byte is placed, which a copy between processes is when this returns.
        Raises what the engine raises: then some of it may have been placed."""
        return self._post(request)

    def knock(self, request: Request) -> bool:
        """The same, with a byte for a peer's doorstep."""
        return self._post(request)

    def look(self, request: Request) -> bool:
        """Is it done? Raises what the engine raises: it has ended, and some of it may have been placed."""
        with self._gate.among():
            return self._over(self._agent.getXferStatus(request.number))

    def _post(self, request: Request) -> bool:
        with self._gate.among():
            return self._over(self._agent.postXferReq(request.number))

    def _over(self, status: Any) -> bool:
        return bool(status == self._nixl.NIXL_SUCCESS)

    def release(self, request: Request) -> None:
        """Only what is over."""
        try:
            with self._gate.among():
                self._agent.releaseXferReq(request.number)
        except Exception as error:  # noqa: BLE001 - nothing depends on it but the engine's memory
            log.debug("releasing a request: %s", error)

    # ---- the end -----------------------------------------------------------------------------------------

    def close(self) -> bool:
        """Destroy the agent: its thread ends, its connections too, whatever is under way (13 ms with 64 MiB on the way
        to a process that is stopped). After it nothing is read and nothing placed. Idempotent. False: it was abandoned
        before, and nothing is done: UCX reads and places on."""
        with _ending:
            if self in _abandoned:
                return False
            _alive.discard(self)
            agent, self._agent = self._agent, None
        del agent
        self._memory.clear()
        return True

    @property
    def ended(self) -> bool:
        """It is destroyed. Not so where it was abandoned, whatever was closed."""
        return self._agent is None

    def abandon(self) -> None:
        """Instead of `close` where a thread does not come back from the engine: it and its memory stay until the
        process ends, also when the thread does come back."""
        with _ending:
            _pin(self._agent)
            _abandoned.append(self)


def _held(held: Held) -> TransportError:
    return TransportError(
        f"{held}, and until then no memory can be registered and no new peer be met",
        hint="A copy into a peer's memory waits for pages that nobody brings, most likely; another transport serves",
        transport="nixl",
    )


class Request:
    """A request of the engine's."""

    __slots__ = ("number",)

    def __init__(self, agent: Agent, number: int) -> None:
        self.number = number


_alive: weakref.WeakSet[Agent] = weakref.WeakSet()
_abandoned: list[Agent] = []
_ending = threading.Lock()
"""An agent is either closed or abandoned: held while it is settled which."""


def _pin(agent: Any) -> None:
    """Its destructor is never run, not at the end of the interpreter either."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(agent))


def _after_fork_in_child() -> None:
    """The engine's threads do not exist there, and its destructor would wait for them for ever. Nor does who held a
    lock."""
    global _loading, _creating
    _loading, _creating = threading.Lock(), threading.Lock()
    for agent in _alive:
        _pin(agent._agent)
        leave_to_parent(agent._sets)


os.register_at_fork(after_in_child=_after_fork_in_child)
