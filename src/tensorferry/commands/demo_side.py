"""One side of the demo, in a process of its own: `python -m tensorferry.commands.demo_side`, orders on standard input.

The two sides share nothing but what travels: the embedding side makes the embedding and hashes its own rows; a language
side hashes what arrived; the demo compares the hashes.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from tensorferry.commands.demo_plan import Plan
from tensorferry.commands.demo_wire import LifelineEnded, Line
from tensorferry.core.errors import FerryError, InternalError

if TYPE_CHECKING:
    import torch

    from tensorferry import Receiver, ReceiveTransfer, Round, Sender
    from tensorferry.core.handles import Transfer

log = logging.getLogger(__name__)

TICK_SECONDS = 0.002
"""A language side's event loop looks at its transfers this often, as a scheduler does between two steps."""

SETTLE_SECONDS = 5.0
"""Longest wait, after every room has ended, for the last blocks to come home before they are counted."""


def digest(tensor: torch.Tensor | None) -> str | None:
    """xxh3_128 over a tensor's bytes in row order; None for an absent component."""
    import xxhash

    from tensorferry.core.memory import Memory

    if tensor is None:
        return None
    plain = tensor.detach().cpu().contiguous()
    nbytes = plain.numel() * plain.element_size()
    return xxhash.xxh3_128_hexdigest(Memory(plain.data_ptr(), nbytes, owner=plain).view() if nbytes else b"")


def embedding_side(plan: Plan, line: Line, stack: ExitStack) -> None:
    """Make every room's embedding, offer all of them, and wait until each is delivered."""
    import tensorferry as tf
    from tensorferry.commands import demo_source

    layout = tf.embedding_layout(plan.hidden_size, plan.dtype)
    sender = stack.enter_context(tf.Sender(layout, bind="tcp://127.0.0.1:0", **plan.settings))
    source = demo_source.make(plan)
    rooms = [source.room(k) for k in range(plan.rooms)]
    digests = [
        {
            "input_embeds": digest(room.input_embeds),
            "fill_ids": digest(room.fill_ids),
            "mrope_positions": digest(room.mrope_positions),
            "aux": [plan.tokens, room.mrope_delta],
        }
        for room in rooms
    ]
    transfers = [
        sender.send(
            room=k,
            input_embeds=room.input_embeds,
            fill_ids=room.fill_ids,
            mrope_positions=room.mrope_positions,
            mrope_delta=room.mrope_delta,
        )
        for k, room in enumerate(rooms)
    ]
    line.tell("ready", address=sender.address, digests=digests)
    for transfer in transfers:
        while not transfer.done:
            line.check()
            _tick(transfer)
        transfer.wait()
    line.tell("done", free_blocks=_settled(sender, plan.settings["pool_blocks"], line))
    _until_let_go(line)


def language_side(plan: Plan, rank: int, line: Line, stack: ExitStack) -> None:
    """Receive every room as an event loop would: poll, look, do something else; hash each room as it ends."""
    import tensorferry as tf

    layout = tf.embedding_layout(plan.hidden_size, plan.dtype)
    group = None
    if plan.ranks > 1:
        leader = "tcp://127.0.0.1:0" if rank == 0 else line.order()["leader"]
        group = tf.Group(rank, plan.ranks, leader=leader)
    receiver = stack.enter_context(tf.Receiver(layout, group=group, **plan.settings))
    line.tell("ready", leader=receiver.leader_address if rank == 0 and group else None)
    address = line.order()["sender"]
    started = ended = time.monotonic()
    transfers = {k: receiver.receive(room=k, sender=address) for k in range(plan.rooms)}
    told: dict[int, Counter[Round]] = {k: Counter() for k in transfers}
    while transfers:
        line.check()
        receiver.poll()
        for k, transfer in list(transfers.items()):
            complete = transfer.done  # asked before the rounds are read, so that none of a complete one is missed
            # Windowed grants may end out of order, so that a new one need not be the last of the tuple.
            fresh = list((Counter(transfer.rounds) - told[k]).elements())
            for round_, sent in zip(fresh, transfer.history[told[k].total() :], strict=False):
                told[k][round_] += 1
                about = {"sent_tokens": sent, "transport": transfer.transport}
                line.tell("round", room=k, rank=rank, **about, **_round(round_))
            if complete:
                ended = time.monotonic()
                line.tell("room", room=k, rank=rank, **_arrived(transfer))
                del transfers[k]
        if transfers:
            _tick(next(iter(transfers.values())))
    free = _settled(receiver, receiver.pool_blocks, line)
    line.tell("done", free_blocks=free, started=started, ended=ended)
    _until_let_go(line)


def _arrived(transfer: ReceiveTransfer) -> dict[str, Any]:
    """What a finished transfer has brought. Raises the transfer's error. The rows are let go once they are hashed."""
    result = transfer.result()
    return {
        "transport": transfer.transport,
        "total_tokens": transfer.total_tokens or 0,
        "rounds": [_round(round_) for round_ in transfer.rounds],
        "sent_tokens": list(transfer.history),
        "digests": {
            "input_embeds": digest(result.input_embeds),
            "fill_ids": digest(result.fill_ids),
            "mrope_positions": digest(result.mrope_positions),
            "aux": [int(word) for word in result.aux[:2]],
        },
    }


def _tick(transfer: Transfer) -> None:
    """Let one tick pass, or less where the transfer ends; how it ended is asked elsewhere."""
    with suppress(FerryError):
        transfer.wait(timeout=TICK_SECONDS)


def _round(done: Round) -> dict[str, int]:
    return done._asdict()


def _settled(endpoint: Sender | Receiver, pool_blocks: int, line: Line) -> int:
    """The endpoint's free blocks once nothing is on its way home any more, or what is free after SETTLE_SECONDS."""
    last = time.monotonic() + SETTLE_SECONDS
    while endpoint.free_blocks < pool_blocks and time.monotonic() < last:
        line.check()
        time.sleep(TICK_SECONDS)
    return endpoint.free_blocks


def _until_let_go(line: Line) -> None:
    """Stay until every side has ended well: a peer may still need answers."""
    line.order()


def main() -> int:
    line = Line.of_this_process()
    try:
        order = line.order()
        plan = Plan(**order["plan"])
        if order["debug"]:
            logging.basicConfig(level=logging.DEBUG, format=f"{order['side']} side: %(name)s %(levelname)s %(message)s")
        with ExitStack() as stack:
            try:
                if order["side"] == "embedding":
                    embedding_side(plan, line, stack)
                else:
                    language_side(plan, order["rank"], line, stack)
            except FerryError as error:
                log.debug("ended by an error", exc_info=True)
                _say_why(line, error)
                return 1
            except LifelineEnded:
                raise
            except Exception as error:
                log.exception("a side of the demo failed")
                _say_why(line, InternalError(f"{type(error).__name__}: {error}"))
                return 1
    except LifelineEnded:
        return 1
    return 0


def _say_why(line: Line, error: FerryError) -> None:
    """Say it before the endpoint closes, and stay until the demo ends this side: then the error that the demo hears of
    first is the one that came first, and not what it made of the other side."""
    line.tell("error", error=error.as_dict())
    line.order()


if __name__ == "__main__":
    sys.exit(main())
