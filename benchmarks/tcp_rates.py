"""How fast the tcp transport moves bytes between two processes, beside plain sockets and ZMQ, in one run.

    python benchmarks/tcp_rates.py [--rounds 5] [--seconds 0.3] [--sizes 65536,1048576,16777216,134217728]

Read the ratios: every way takes its turn in every round, so what else the machine does falls on all of them alike; the
rates are this machine's, in this hour. Each way moves one message of the size at a time and waits until the other side
has all of it in one preallocated, touched piece of memory. `copy` is a plain copy within one process. ZMQ hands over
memory of its own, which then has to be copied to where it belongs; it takes frames of 4 MiB, its best size. The
transport takes posts of the size that it prefers, eight of them under way, as an endpoint gives them to it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import statistics
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import zmq

from tensorferry.backends.tcp import TcpOptions, TcpTransport
from tensorferry.core.memory import copy_bytes, host_memory
from tensorferry.core.transport import Copy, RemoteRegion, Status

ZMQ_FRAME = 4 << 20
CONNECTIONS = (1, 2, 4)
MOST_POSTS = 8
Mover = Callable[[int], None]


def split(nbytes: int, parts: int) -> list[tuple[int, int]]:
    step = -(-nbytes // parts)
    return [(start, min(nbytes, start + step)) for start in range(0, nbytes, step)]


# ---- the receiving process -------------------------------------------------------------------------------------


def receive_plain(listener: socket.socket, view: memoryview, connections: int) -> None:
    """A thread a connection: a length, then its share; one byte back when it is in place."""
    for _ in range(connections):
        threading.Thread(target=serve_plain, args=(listener.accept()[0], view), daemon=True).start()


def serve_plain(connection: socket.socket, view: memoryview) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while header := connection.recv(16, socket.MSG_WAITALL):
        start, stop = int.from_bytes(header[:8], "little"), int.from_bytes(header[8:], "little")
        while start < stop:
            start += connection.recv_into(view[start:stop])
        connection.send(b"!")


def receive_zmq(pull: Any, push: Any, view: memoryview) -> None:
    at = 0
    while True:
        frame = pull.recv(copy=False)
        copy_bytes(view[at : at + len(frame.buffer)], frame.buffer)
        at += len(frame.buffer)
        if not frame.more:
            push.send(b"!")
            at = 0


def receiver(line: Connection, most: int) -> None:
    memory = host_memory(most)
    listener = socket.create_server(("127.0.0.1", 0), backlog=16)
    context = zmq.Context()
    pull, push = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    ports = [one.bind_to_random_port("tcp://127.0.0.1") for one in (pull, push)]
    threading.Thread(target=receive_zmq, args=(pull, push, memory.view()), daemon=True).start()
    transport = TcpTransport(TcpOptions(host="127.0.0.1", connections=max(CONNECTIONS)))
    region = transport.register(memory)
    line.send((listener.getsockname(), ports, transport.describe(), (region.id, region.generation)))
    for connections in CONNECTIONS:
        receive_plain(listener, memory.view(), connections)
    line.recv()
    transport.close()


# ---- the sending process ---------------------------------------------------------------------------------------


def plain(address: tuple[str, int], view: memoryview, connections: int) -> Mover:
    links = []
    for _ in range(connections):
        links.append(socket.create_connection(address))
        links[-1].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    barrier = threading.Barrier(connections)
    job: list[tuple[int, int]] = []

    def send(index: int) -> None:
        if index < len(job):
            start, stop = job[index]
            links[index].sendall(start.to_bytes(8, "little") + stop.to_bytes(8, "little"))
            links[index].sendall(view[start:stop])
            links[index].recv(1)

    def helper(index: int) -> None:
        while True:
            barrier.wait()
            send(index)
            barrier.wait()

    for index in range(1, connections):
        threading.Thread(target=helper, args=(index,), daemon=True).start()

    def move(nbytes: int) -> None:
        job[:] = split(nbytes, connections)
        if connections > 1:
            barrier.wait()
        send(0)
        if connections > 1:
            barrier.wait()

    return move


def over_zmq(ports: list[int], view: memoryview) -> Mover:
    context = zmq.Context()
    push, pull = context.socket(zmq.PUSH), context.socket(zmq.PULL)
    push.connect(f"tcp://127.0.0.1:{ports[0]}")
    pull.connect(f"tcp://127.0.0.1:{ports[1]}")

    def move(nbytes: int) -> None:
        push.send_multipart([view[at : min(nbytes, at + ZMQ_FRAME)] for at in range(0, nbytes, ZMQ_FRAME)], copy=False)
        pull.recv()

    return move


def ferry(descriptor: bytes, remote: tuple[int, int], memory: Any, connections: int) -> Mover:
    transport = TcpTransport(TcpOptions(host="127.0.0.1", connections=connections))
    woken = threading.Event()
    transport.on_progress(woken.set)
    peer = transport.connect(descriptor)

    step = transport.capabilities.preferred_post_bytes

    def move(nbytes: int) -> None:
        waiting = [(at, min(step, nbytes - at)) for at in range(0, nbytes, step)][::-1]
        posted: list[int] = []
        while waiting or posted:
            woken.clear()
            while waiting and len(posted) < MOST_POSTS:
                at, length = waiting.pop()
                posted.append(transport.post(peer, [Copy(memory, at, RemoteRegion(*remote), at, length)]))
            for handle in [handle for handle in posted if transport.poll(handle) is not Status.PENDING]:
                assert transport.poll(handle) is Status.DONE
                transport.release(handle)
                posted.remove(handle)
            if len(posted) == MOST_POSTS or not waiting:
                woken.wait(1 if posted else 0)

    return move


def one_turn(move: Mover, nbytes: int, seconds: float) -> float:
    """Bytes per second: the median over the turn."""
    took: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(took) < 3:
        start = time.perf_counter()
        move(nbytes)
        took.append(time.perf_counter() - start)
    return nbytes / statistics.median(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--sizes", default=f"{64 << 10},{1 << 20},{16 << 20},{128 << 20}")
    args = parser.parse_args()
    sizes = [int(size) for size in args.sizes.split(",")]
    line, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=receiver, args=(theirs, max(sizes)), daemon=True)
    process.start()
    address, ports, descriptor, remote = line.recv()
    memory, other = host_memory(max(sizes)), host_memory(max(sizes))
    view, other_view = memory.view(), other.view()
    ways: dict[str, Mover] = {"copy": lambda nbytes: copy_bytes(other_view[:nbytes], view[:nbytes])}
    for connections in CONNECTIONS:
        ways[f"plain sockets, {connections}"] = plain(address, view, connections)
    ways["ZMQ, copied out"] = over_zmq(ports, view)
    for connections in CONNECTIONS:
        ways[f"tcp transport, {connections}"] = ferry(descriptor, remote, memory, connections)
    rates: dict[tuple[str, int], list[float]] = {}
    for _ in range(args.rounds):
        for nbytes in sizes:
            for name, move in ways.items():
                rates.setdefault((name, nbytes), []).append(one_turn(move, nbytes, args.seconds))
    print("GB/s (1e9), best / median of the rounds' medians; in brackets the median of the ratio to plain sockets, 1")
    print(f"{'':20}" + "".join(f"{f'{nbytes >> 10} KiB':>24}" for nbytes in sizes))
    for name in ways:
        cells = []
        for nbytes in sizes:
            found, base = rates[name, nbytes], rates["plain sockets, 1", nbytes]
            ratio = statistics.median(mine / its for mine, its in zip(found, base, strict=True))
            cells.append(f"{max(found) / 1e9:.2f} / {statistics.median(found) / 1e9:.2f} ({ratio:.2f})")
        print(f"{name:20}" + "".join(f"{cell:>24}" for cell in cells))
    line.send("end")
    process.join(10)


if __name__ == "__main__":
    main()
