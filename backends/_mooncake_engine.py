"""The Mooncake engine behind the few calls of it that are safe: one-entry submits, and their status.

Not used, and why: the sync calls spin a core and return -1 while slices are in flight; of a batch the status call looks
at the first entry alone, and the batch calls return at the first failure while the others go on; notifications can get
lost without a word. The `protocol` that `initialize` takes selects a memory allocator and nothing else.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tensorferry.backends import _mooncake_environment as environment
from tensorferry.backends._mooncake_environment import Unfit
from tensorferry.backends._mooncake_sockets import cut_connections, hasten_listener, stop_listening
from tensorferry.backends._mooncake_wire import ask, session_name
from tensorferry.core.children import nameless_file
from tensorferry.core.errors import BadCall, PeerUnreachable, TransportError
from tensorferry.core.memory import Memory

log = logging.getLogger("tensorferry.backends.mooncake")

OVERLAP = -7
LAST_HANDSHAKE_S = 1.0
"""How long the end waits for a handshake that a peer has begun."""

HANDSHAKE_S = 20.0
"""For our own engine to answer us. It takes a millisecond; under an emulated processor it has taken a second."""

_NOISE = re.compile(rb"^(?:[EWIF]\d{4} .*|WARNING: Logging before InitGoogleLogging.*)$")
_quiet = threading.Lock()


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep the engine's start-up lines off standard error: they go to our log. What others write meanwhile is passed
    on. Milliseconds only, around the import and the start of an engine."""
    sys.stderr.flush()
    with _quiet, nameless_file() as caught:
        real = os.dup(2)
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(real, 2)
            caught.seek(0)
            for line in caught.read().splitlines():
                if _NOISE.match(line):
                    log.debug("engine: %s", line.decode(errors="replace"))
                else:
                    os.write(real, line + b"\n")
            os.close(real)


def load() -> Any:
    """The engine's module. Raises Unfit with what is missing; `environment.prepare` comes first."""
    environment.refuse_dangers()
    environment.check_installed()
    try:
        with _quietly():
            import mooncake.engine as module
    except ImportError as error:
        raise environment.explain_import(error) from error
    return module


class Engine:
    """One engine of this process. Any thread may call `submit` and `status`; `close` comes after all else."""

    def __init__(self, address: str, device: str) -> None:
        """Raises Unfit where the engine does not start."""
        module = load()
        self.protocol = ""
        """What the engine has installed, by its own word to peers: "rdma", "tcp"; "" until it has told."""
        self._memory: dict[int, Memory] = {}  # registered, by address: it must outlive the engine's use of it
        self._sessions: dict[str, list[bytes]] = {}
        self._engine: Any = module.TransferEngine()
        with _quietly(), environment.without_vain_devices():
            failed = self._engine.initialize(address, "P2PHANDSHAKE", "", device)
        if failed:
            why = f" over {', '.join(environment.rdma_ports())}" if environment.rdma_ports() else ""
            raise Unfit(
                f"the Mooncake engine does not start{why} (code {failed})",
                "Its own lines on standard error, with MC_LOG_LEVEL=INFO, say why; MC_FORCE_TCP=1 does without RDMA. "
                "Each engine of this host takes two ports of MC_MIN_RPC_PORT to MC_MAX_RPC_PORT, where they are set",
            )
        _alive.add(self)
        self.port: int = self._engine.get_rpc_port()
        try:
            answer = ask("127.0.0.1" if not _ipv6() else "::1", self.port, HANDSHAKE_S)
        except PeerUnreachable as error:
            self.close()
            raise Unfit(
                f"Mooncake {environment.installed_version()} does not answer its own handshake: {error.cause}",
                f"Loopback has to be up, with an address of {'IPv6' if _ipv6() else 'IPv4 (MC_USE_IPV6=1: of IPv6)'}. "
                "This version of tensorferry knows the handshake of Mooncake 0.3.13",
            ) from error
        self.protocol = answer.protocol
        self.data_port = answer.tcp_data_port

    # ---- memory ------------------------------------------------------------------------------------------

    def register(self, memory: Memory) -> None:
        """Raises BadCall for memory that overlaps what is registered, TransportError for anything else. The GIL is
        released (the engine's single call would hold it while a device pins the pages)."""
        # The engine asks CUDA itself where an address lies (its wildcard location).
        code = self._engine.batch_register_memory([memory.address], [memory.nbytes])
        if code == OVERLAP:
            raise BadCall(f"{memory} overlaps memory that is registered already", transport="mooncake")
        if code:
            raise TransportError(
                f"the engine does not register {memory.nbytes} bytes of {memory.place} memory (code {code})",
                hint="Over RDMA, pinned memory counts against `ulimit -l`"
                if memory.kind == "cpu"
                else f"Load a peer-memory module (`modprobe nvidia_peermem`); {environment.DMA_BUF}",
                transport="mooncake",
            )
        self._memory[memory.address] = memory

    def unregister(self, memory: Memory) -> None:
        """Only what nobody can write to any more: a write under way would find its pages gone."""
        if self._memory.pop(memory.address, None) is not None:
            code = self._engine.batch_unregister_memory([memory.address])
            if code:
                log.error("unregistering %s failed with code %d", memory, code)

    # ---- writing -----------------------------------------------------------------------------------------

    def session(self, address: str, port: int, instance: bytes) -> str:
        """The name by which to submit to this instance.

        The engine keeps what it once heard under a name for ever. A later process can get the port of an earlier one,
        and would be written to at the earlier one's data port: so it gets a name of its own, with a zero more before
        the port, which the engine reads as the same number.
        """
        known = self._sessions.setdefault(session_name(address, port), [])
        if instance not in known:
            known.append(instance)
        name = session_name(address, port)
        host, _, digits = name.rpartition(":")
        return f"{host}:{'0' * known.index(instance)}{digits}"

    def submit(self, session: str, source: int, target: int, nbytes: int) -> int:
        """An id for `status`, or 0: refused. Blocks at the first submit to a session; see `rescue`."""
        return int(self._engine.transfer_submit_write(session, source, target, nbytes))

    def read(self, session: str, into: int, target: int, nbytes: int) -> int:
        """Read of the peer's registered memory: over TCP, the one question that harms nobody and goes by the
        connections by which writes go. An id for `status`, or 0, as from `submit`; it may block as that does. What is
        at `into` has to live until the end, also when nobody waits for it any more.

        An empty write would not do: it is done at once and asks nobody.
        """
        return int(self._engine.batch_transfer_async_read(session, [into], [target], [nbytes]))

    def status(self, batch: int) -> int:
        """1 done and acknowledged by the peer, 0 under way, -1 failed, -2 late (RDMA; not the end). After 1 and -1 the
        id is no more and must not be asked about."""
        return int(self._engine.transfer_check_status(batch))

    @staticmethod
    def rescue(address: str, port: int) -> None:
        """End a handshake of this process with that engine, so that the submit that waits for it returns 0."""
        if cut_connections(address, port):
            log.warning(
                "the engine at %s:%d stopped answering in the middle of its handshake; it was cut", address, port
            )

    # ---- the end -----------------------------------------------------------------------------------------

    def close(self) -> None:
        """Destroy the engine, then let go of its memory. What is under way ends; nothing is read or placed after.

        The destructor keeps the GIL while it waits for a thread that looks up once a second (700 ms measured); with
        `hasten_listener` before it that is 10 ms. Idempotent.
        """
        if self._engine is None:
            return
        if not hasten_listener(self.port):
            log.debug("the engine's listener was not found: its destructor will take up to a second")
        # It answers handshakes until after its devices are gone: a peer's at that moment ends the process (SIGFPE or
        # SIGABRT, from RdmaContext::cq of a context that has no queue any more).
        if self.protocol == "rdma" and not stop_listening(self.port, LAST_HANDSHAKE_S):
            log.warning("a handshake with the engine is under way as it ends")
        self._engine = None
        _alive.discard(self)
        self._memory.clear()

    def abandon(self) -> None:
        """Instead of `close` while submits over RDMA are under way: its destructor would wait for them with the GIL
        held (10 s measured, with a peer that was killed). The engine and its memory stay until the process ends."""
        _pin(self._engine)
        _abandoned.append(self)


def _ipv6() -> bool:
    return bool(os.environ.get("MC_USE_IPV6"))


_alive: weakref.WeakSet[Engine] = weakref.WeakSet()
_abandoned: list[Engine] = []


def _pin(engine: Any) -> None:
    """Its destructor is never run, not at the end of the interpreter either."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))


def _after_fork_in_child() -> None:
    """The engine's threads do not exist there, and its destructor would wait for them for ever. Nor does who held a
    lock."""
    global _quiet
    _quiet = threading.Lock()
    for engine in _alive:
        _pin(engine._engine)


os.register_at_fork(after_in_child=_after_fork_in_child)
