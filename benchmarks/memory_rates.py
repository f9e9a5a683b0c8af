"""What the memory part costs: digests, gathers and staging of the standard layout against a plain copy, in one process.

    python benchmarks/memory_rates.py [--tokens 8192] [--hidden-size 3584] [--runs 15]

Twice over: alone, and beside a thread of this process that runs Python without a pause, as a serving loop does. The
second is why copies and digests keep the interpreter lock: `releasing` shows the same work with the lock let go. Read
the ratios; the times are this machine's, in this hour. No transport takes part.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import threading
import time
from collections.abc import Callable

import torch
from xxhash import xxh3_64_intdigest

from tensorferry.backends.memory import MemoryOptions, MemoryTransport
from tensorferry.core.buffers import Destination, PoolBuffers
from tensorferry.core.digest import digest
from tensorferry.core.layout import Geometry, embedding_layout, slab_plan
from tensorferry.core.memory import host_memory
from tensorferry.core.source import Source, write_plan
from tensorferry.core.staging import Staging

RUN = 8


def cases(tokens: int, hidden: int, transport: MemoryTransport) -> dict[str, Callable[[], object]]:
    layout = embedding_layout(hidden)
    names = layout.names
    size = 128
    blocks = -(-tokens // size)
    geometry = Geometry(size, -(-blocks // RUN) * RUN, slabs=max(1, -(-blocks // RUN)))
    pool = PoolBuffers(transport, layout, geometry)
    destination = Destination(layout, tokens, names)
    for name in names:
        destination.view(name)[:] = bytes(len(destination.view(name)))
    source = Source(layout, tokens, names)
    source.put(
        0,
        input_embeds=torch.ones(tokens, hidden, dtype=torch.bfloat16),
        fill_ids=torch.ones(tokens, dtype=torch.int32),
        mrope_positions=torch.ones(tokens, 3, dtype=torch.int32),
    )
    staging, plan = Staging(transport, 1 << 20), slab_plan(layout, geometry, 0)
    one, other = (host_memory(tokens * layout.token_bytes) for _ in range(2))
    one_view, other_view = one.view(), other.view()
    step = size * layout.token_bytes
    pieces = [one_view[start : start + step] for start in range(0, len(one_view), step)]
    runs = [(first, min(RUN, blocks - first)) for first in range(0, blocks, RUN)]

    def digests(mode: str, first: int = 0, count: int = blocks) -> None:
        for block in range(first, first + count):
            pool.digest(block, block, tokens, names, block, mode)

    def gather(target: Destination) -> None:
        for first, count in runs:
            pool.gather_run(first, first, count, tokens, names, target)

    def receive(mode: str) -> None:
        for first, count in runs:
            digests(mode, first, count)
            pool.gather_run(first, first, count, tokens, names, destination)

    def plans() -> None:
        for first, count in runs:
            stage = staging.take(plan.stage_bytes(names, count, rows=False))
            assert stage is not None
            write_plan(source, plan, first, 0, count, stage)
            staging.give(stage)

    def releasing_copy() -> None:
        for start in range(0, len(one_view), step):
            ctypes.memmove(other.address + start, one.address + start, min(step, len(one_view) - start))

    return {
        "plain copy, one slice": lambda: other_view.__setitem__(slice(None), one_view),
        "gather, block by block": lambda: [
            pool.gather(block, block, tokens, names, destination) for block in range(blocks)
        ],
        f"gather, runs of {RUN}": lambda: gather(destination),
        "gather to fresh memory": lambda: gather(Destination(layout, tokens, names)),
        "digest full": lambda: digests("full"),
        "digest sampled": lambda: digests("sampled"),
        "sender's digest full": lambda: [digest(source.block_views(i, size), i, "full") for i in range(blocks)],
        "digest full, then gather": lambda: receive("full"),
        "digest sampled, then gather": lambda: receive("sampled"),
        "write plans (packed rows move)": plans,
        "releasing: copy by block": releasing_copy,
        "releasing: xxh3 by block": lambda: [xxh3_64_intdigest(piece, 1) for piece in pieces],
    }


def rate(work: Callable[[], object], nbytes: int, runs: int, at_most: float) -> tuple[float, float]:
    """(best, median) in GB/s = 1e9 bytes a second."""
    seconds: list[float] = []
    work()
    while len(seconds) < runs and (len(seconds) < 3 or sum(seconds) < at_most):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return nbytes / min(seconds) / 1e9, nbytes / statistics.median(seconds) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden-size", type=int, default=3584)
    parser.add_argument("--runs", type=int, default=15)
    args = parser.parse_args()
    transport = MemoryTransport(MemoryOptions())
    todo = cases(args.tokens, args.hidden_size, transport)
    nbytes = args.tokens * embedding_layout(args.hidden_size).token_bytes
    alone = {name: rate(work, nbytes, args.runs, 5.0) for name, work in todo.items()}
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            sum(range(100))

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        beside = {name: rate(work, nbytes, args.runs, 2.0) for name, work in todo.items()}
    finally:
        stop.set()
        thread.join()
    print(f"{nbytes / 1e6:.0f} MB, GB/s best / median {'alone':>22} {'beside a busy thread':>26}")
    for name in todo:
        (best, median), (busy_best, busy_median) = alone[name], beside[name]
        print(f"{name:<34} {best:8.1f} / {median:8.1f}     {busy_best:8.1f} / {busy_median:8.1f}")
    transport.close()


if __name__ == "__main__":
    main()
