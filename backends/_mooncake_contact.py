"""First contact with a peer's engine, and contact after a failure: asked under a watchdog, on a thread of its own.

The engine is not used here. Its own first contact (`openSegment`) waits up to 60 s for a process that is stopped, under
the lock that submits to all other peers need. What remains is the moment between our question and the engine's own:
a peer that stops in it would still hold everybody up, and `Engine.rescue` ends that.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable

from tensorferry.backends._mooncake_wire import Descriptor, ask, dial
from tensorferry.core.errors import FerryError, InternalError, PeerUnreachable, TransportMismatch


class Contact:
    """One attempt. `done` is called from another thread when `error` says how it went (None: the peer is there)."""

    def __init__(self, told: Descriptor, timeout_s: float, done: Callable[[], None]) -> None:
        self.began = time.monotonic()
        self.over = False
        self.error: FerryError | None = None
        self._told = told
        self._timeout_s = timeout_s
        self._done = done
        self._abandoned = False
        self._socket: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="tensorferry-mooncake-contact", daemon=True)
        self._thread.start()

    def join(self, timeout_s: float = 1.0) -> None:
        """Wait for the end of its thread: it comes right after `over`, and soon after `abandon` unless it hangs in the
        resolver."""
        self._thread.join(timeout_s)

    def abandon(self) -> None:
        """End the attempt soon; nothing is told any more. Returns at once."""
        self._abandoned = True
        waiting = self._socket
        if waiting is not None:
            with contextlib.suppress(OSError):
                waiting.shutdown(socket.SHUT_RDWR)

    def _hold(self, connection: socket.socket) -> None:
        self._socket = connection
        if self._abandoned:
            raise ConnectionAbortedError("abandoned")

    def _run(self) -> None:
        try:
            self._try()
        except FerryError as error:
            self.error = error
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the outcome of this attempt
            self.error = InternalError(f"first contact failed: {error!r}", transport="mooncake")
        self.over = True
        if not self._abandoned:
            self._done()

    def _try(self) -> None:
        told = self._told
        answer = ask(told.address, told.port, self._timeout_s, self._hold)
        if (answer.protocol, answer.tcp_data_port) != (told.protocol, told.data_port):
            raise PeerUnreachable(
                f"another engine than the peer's answers at {told.address}:{told.port}",
                hint="Set the option `host` on the peer to an address that means the peer everywhere",
                transport="mooncake",
            )
        if answer.protocol != "tcp":
            return
        try:
            dial(answer.data_host, answer.tcp_data_port, self._timeout_s, self._hold).close()
        except OSError as error:
            raise PeerUnreachable(
                f"the peer answers at {told.address}:{told.port}, and its data port "
                f"{answer.data_host}:{answer.tcp_data_port} cannot be reached: {error}",
                hint="Set the option `host` on the peer, and let its ports MC_MIN_RPC_PORT to MC_MAX_RPC_PORT through",
                transport="mooncake",
            ) from error


def check_protocols(ours: str, theirs: str) -> None:
    """Raises TransportMismatch for two engines that cannot write to each other."""
    if ours != theirs:
        raise TransportMismatch(
            f"this side's engine runs over {ours}, the peer's over {theirs}",
            hint="Set MC_FORCE_TCP=1 on both sides, or give the other side its RDMA device",
            transport="mooncake",
        )
