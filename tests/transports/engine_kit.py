"""Writes of an engine to another process, that process's descriptor as others would tell it, and how a process ends."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import msgspec
import pytest
from transport_ends import source

from tensorferry.backends import _mooncake_wire, _nixl_wire
from tensorferry.core.memory import Memory
from tensorferry.core.transport import Copy, Region, RemoteRegion, Transport


def post(transport: Transport, peer: Any, region: list[int], local: Region | Memory) -> int:
    """All of `local`, to the beginning of the region."""
    nbytes = local.memory.nbytes if isinstance(local, Region) else local.nbytes
    return transport.post(peer, [Copy(local, 0, RemoteRegion(*region), 0, nbytes)])


def one_byte(transport: Transport, peer: Any, region: list[int]) -> int:
    return post(transport, peer, region, source(transport, b"x"))


def changed(descriptor: bytes, **fields: Any) -> bytes:
    """The descriptor of another instance: the same engine, as somebody else would tell of it."""
    values = msgspec.msgpack.decode(descriptor)
    wire = _mooncake_wire if values[0] == "mooncake" else _nixl_wire
    for name, value in {"instance": os.urandom(16), **fields}.items():
        values[wire.Descriptor.__struct_fields__.index(name)] = value
    return msgspec.msgpack.encode(values)


def abroad(descriptor: bytes) -> bytes:
    """As if the process were on another host: nothing is proved of its end."""
    return changed(descriptor, host=["another boot", 1, 1, 1])


ENDS = {
    "closed": "t.close()",
    "left open": "",
    "dropped": "del t; gc.collect()",
    "forked": "pid = os.fork(); pid and os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])); del t",
}

ends = pytest.mark.parametrize("how", ENDS.values(), ids=ENDS.keys())


def check_quiet_end(opened: str, absent: set[str], how: str, engines: tuple[str, ...], **variables: str) -> None:
    """A process opens a transport `t`, has not imported `absent` by then, and ends by `how` without a sound.

    `engines`: how the names of the engine's variables begin; it is given none but `variables`.
    """
    program = (
        f"import gc, os, sys\n{opened}\nt.register(t.allocate(4096))\nassert not {absent} & set(sys.modules)\n{how}"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(engines)} | variables
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, timeout=60, env=environment, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
