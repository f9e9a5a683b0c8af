"""Looking at the process's own sockets changes nothing of them."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys

import pytest

from tensorferry.backends._own_sockets import own_sockets


def test_a_blocking_socket_stays_blocking_whatever_the_default_time_out():
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as one,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
    ):
        datagrams.bind(("127.0.0.1", 0))
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(5)
        try:
            with own_sockets() as sockets:
                seen = [(s.getsockname(), s.family) for s in sockets]
        finally:
            socket.setdefaulttimeout(before)
        assert (listener.getsockname(), socket.AF_INET) in seen
        assert (one.getsockname(), socket.AF_INET) in seen
        assert (datagrams.getsockname(), socket.AF_INET) not in seen
        assert not fcntl.fcntl(one, fcntl.F_GETFL) & os.O_NONBLOCK
        assert not fcntl.fcntl(listener, fcntl.F_GETFL) & os.O_NONBLOCK


def test_a_socket_of_ipv6_is_seen_as_one():
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener, own_sockets() as sockets:
        assert (listener.getsockname(), socket.AF_INET6) in [(s.getsockname(), s.family) for s in sockets]


AT_THE_LIMIT = """
import os, resource, socket, sys
from tensorferry.backends import _mooncake_sockets, _nixl_sockets
from tensorferry.backends._own_sockets import own_sockets

listener = socket.create_server(("127.0.0.1", 0))
port = listener.getsockname()[1]
if not os.fork():
    socket.create_connection(("127.0.0.1", port)).sendall(b"bytes")
    os._exit(0)
taken, _ = listener.accept()
os.wait()  # its bytes are with us, and nobody has read them
proofs = [_mooncake_sockets.Aftermath(port), _nixl_sockets.Aftermath([port], [])]
print([proof.settled() for proof in proofs])

held, free = [], int(sys.argv[1])
most = max(map(int, os.listdir("/proc/self/fd"))) + 8
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
try:
    while True:
        held.append(os.dup(0))
except OSError:
    pass
for _ in range(free):
    os.close(held.pop())
real = os.listdir

def listdir(path):
    found = real(path)
    while True:  # another thread takes the rest in this moment
        try:
            held.append(os.dup(0))
        except OSError:
            return found

os.listdir = listdir
print([proof.settled() for proof in [_mooncake_sockets.Aftermath(port), _nixl_sockets.Aftermath([port], [])]])
print(_mooncake_sockets.stop_listening(port, 0.01), _mooncake_sockets.cut_connections("127.0.0.1", port))
try:
    with own_sockets() as sockets:
        print(len(list(sockets)))
except OSError as error:
    print(error.strerror)
"""


@pytest.mark.parametrize("free", [0, 1])
def test_without_a_file_descriptor_left_nothing_is_proved(free: int) -> None:
    """That no connection is seen is a proof that frees memory: it has to come from having looked."""
    done = subprocess.run(
        [sys.executable, "-c", AT_THE_LIMIT, str(free)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines() == ["[False, False]", "[False, False]", "False 0", "Too many open files"]
