"""How a transfer between two processes compares with a plain copy of the same bytes, measured in turn in one run.

    python benchmarks/transfer_against_copy.py [--transport shm] [--tokens 50000] [--hidden-size 3584] [--runs 9]

Each run times, one after the other: a plain copy into fresh memory (what any receiver pays at least), a transfer with
every digest, and the same with `integrity=off`. Read the ratios; the times are this machine's, in this hour. `spread`
is the slowest plain copy over the fastest: above 1.3 somebody else was using the machine, and the ratios say little.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection

import torch

import tensorferry as tf


def rows_of(tokens: int, hidden: int) -> dict[str, torch.Tensor]:
    values = torch.arange(tokens * hidden, dtype=torch.int16).view(torch.bfloat16)
    positions = torch.arange(tokens, dtype=torch.int32)
    return {
        "input_embeds": values.view(tokens, hidden),
        "fill_ids": positions,
        "mrope_positions": positions[:, None].repeat(1, 3),
    }


def serve(pipe: Connection, tokens: int, hidden: int, settings: dict[str, object]) -> None:
    """The embedding side: one room after the other, for as long as rooms are asked for."""
    rows = rows_of(tokens, hidden)
    with tf.Sender(tf.embedding_layout(hidden), **settings) as sender:
        pipe.send(sender.address)
        while (room := pipe.recv()) is not None:
            transfer = sender.send(room, **rows)
            pipe.send("ready")
            transfer.wait(timeout=120)


class Side:
    """A pair of processes with the settings to compare."""

    def __init__(self, tokens: int, hidden: int, **settings: object) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("spawn").Process(
            target=serve, args=(theirs, tokens, hidden, settings), daemon=True
        )
        self.process.start()
        self.address = self.pipe.recv()
        self.receiver = tf.Receiver(tf.embedding_layout(hidden), **settings)
        self.room = 0

    def seconds(self) -> float:
        self.room += 1
        self.pipe.send(self.room)
        self.pipe.recv()
        start = time.perf_counter()
        self.receiver.receive(self.room, self.address).result(timeout=120)
        return time.perf_counter() - start

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join(30)
        self.receiver.close()


def plain_copy(rows: dict[str, torch.Tensor]) -> float:
    start = time.perf_counter()
    copies = [torch.empty_like(tensor).copy_(tensor) for tensor in rows.values()]
    seconds = time.perf_counter() - start
    del copies
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", default="shm")
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--hidden-size", type=int, default=3584)
    parser.add_argument("--window", default="auto")
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = rows_of(args.tokens, args.hidden_size)
    nbytes = sum(t.numel() * t.element_size() for t in rows.values())
    common = {"transport": args.transport, "window": args.window}
    sides = {
        "transfer": Side(args.tokens, args.hidden_size, **common),
        "transfer, integrity off": Side(args.tokens, args.hidden_size, integrity="off", **common),
    }
    times: dict[str, list[float]] = {"plain copy": [], **{name: [] for name in sides}}
    for run in range(args.runs + 1):
        measured = {"plain copy": plain_copy(rows), **{name: side.seconds() for name, side in sides.items()}}
        if run:  # the first one warms up
            for name, seconds in measured.items():
                times[name].append(seconds)
    for side in sides.values():
        side.close()
    base = times["plain copy"]
    report = {
        "bytes": nbytes,
        "spread": round(max(base) / min(base), 2),
        **{
            name: {
                "median_gb_per_s": round(nbytes / statistics.median(values) / 1e9, 2),
                "of_plain_copy": round(statistics.median(b / v for b, v in zip(base, values, strict=True)), 2),
            }
            for name, values in times.items()
        },
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
