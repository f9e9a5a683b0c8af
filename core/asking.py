"""Asking an embedding side what it has, without being a receiver: one Hello there, one back, and nothing is kept."""

from __future__ import annotations

import os
import random
import time

from tensorferry.core import messages as m
from tensorferry.core.control import Control
from tensorferry.core.errors import PeerUnreachable, VersionMismatch
from tensorferry.core.timing import new_incarnation

AGAIN = 0.5
"""Seconds between questions: the first may go out before anybody listens."""


def ask(address: str, timeout: float) -> m.Hello:
    """The Hello of the sender that listens on control address `address`.

    Raises ConfigError for what is no address, PeerUnreachable where nobody answers within `timeout` seconds, and
    VersionMismatch where a sender of another protocol version does.
    """
    me = new_incarnation(time.time_ns(), random.getrandbits(12))
    question = m.Hello(
        src=me, dst=0, min_live=1, version=m.PROTOCOL_VERSION, name=f"asking-{os.getpid()}-{me:x}", layout=bytes(16),
        block_size=0, pool_blocks=0, slabs=0, generations=b"", offers=(), revision=1, ack=0,
    )  # fmt: skip
    control = Control(f"{me:016x}".encode(), patience=timeout)
    try:
        control.connect(address)
        end, next_question = time.monotonic() + timeout, 0.0
        while (now := time.monotonic()) < end:
            if now >= next_question:
                control.send(address, question)
                next_question = now + AGAIN
            for _, message in control.receive(min(AGAIN, end - now)):
                if isinstance(message, m.Hello) and message.dst == me:
                    if message.version != m.PROTOCOL_VERSION:
                        raise VersionMismatch(
                            f"it speaks protocol {message.version}, this side {m.PROTOCOL_VERSION}", peer=address
                        )
                    return message
        trouble = control.trouble(address)
        raise PeerUnreachable(
            f"nobody answered within {timeout:g} s"
            + (f"; its host is not found: {trouble}" if trouble else "")
            + (f"; dropped: {dict(control.dropped)}" if control.dropped else ""),
            peer=address,
            hint="Is it the control address of a running sender, and is the port open between the hosts?",
        )
    finally:
        control.close()
