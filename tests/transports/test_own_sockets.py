"""Looking at the process's own sockets changes nothing of them."""

from __future__ import annotations

import fcntl
import os
import socket

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
