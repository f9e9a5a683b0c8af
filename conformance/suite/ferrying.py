"""The protocol over the transport: two endpoints of this process, a small pool, and every byte compared.

torch is imported here alone, by the checks themselves: a run of the transport's rules needs none.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from tensorferry.conformance.model import check
from tensorferry.conformance.patience import FACTOR
from tensorferry.conformance.stage import Stage
from tensorferry.core.errors import Cancelled, FerryError

if TYPE_CHECKING:
    from tensorferry.core.allocator import Choose

HIDDEN = 16
BLOCK = 16
PATIENCE_S = 20.0 * FACTOR


def _choosers(seed: int) -> dict[str, Choose | None]:
    """Ways to pick blocks. What arrives does not depend on them."""
    dice = random.Random(seed)

    def free(pieces: list[tuple[int, int]]) -> list[int]:
        return [block for start, stop in pieces for block in range(start, stop)]

    return {
        "the usual blocks": None,
        "the lowest blocks": lambda pieces, n: free(pieces)[:n],
        "the highest blocks, downwards": lambda pieces, n: free(pieces)[: -n - 1 : -1],
        "random blocks": lambda pieces, n: dice.sample(free(pieces), n),
    }


class Ferry:
    """A sender, and one receiver or several ranks, over the transport under test. Closed by `with`."""

    def __init__(
        self, stage: Stage, *, pool: int = 4, ranks: int = 1, choose: Choose | None = None, **settings: Any
    ) -> None:
        from tensorferry.core.allocator import lowest_runs
        from tensorferry.core.group import Group
        from tensorferry.core.layout import embedding_layout
        from tensorferry.core.receiving import Receiver
        from tensorferry.core.sending import Sender
        from tensorferry.core.settings import Settings

        self.stage = stage
        self.layout = embedding_layout(HIDDEN)
        given: dict[str, Any] = {
            "block_size": BLOCK,
            "pool_blocks": pool,
            "first_grant": BLOCK * 2,
            "integrity": "full",
            "destination_budget": 64 << 20,
            "staging_bytes": 1 << 20,
        }
        given |= settings
        self.settings = Settings(**given)
        self.receivers: list[Any] = []
        self.sender: Any = Sender(self.layout, stage.target.open(), self.settings)
        try:
            leader = "tcp://127.0.0.1:0"
            for rank in range(ranks):
                group = Group(rank, ranks, leader) if ranks > 1 else None
                receiver = Receiver(
                    self.layout,
                    stage.target.open(),
                    self.settings,
                    group=group,
                    choose=choose or lowest_runs,
                    poison=True,
                )
                leader = receiver.leader_address
                self.receivers.append(receiver)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for end in [*self.receivers, self.sender]:
            end.close()

    @property
    def receiver(self) -> Any:
        return self.receivers[0]

    def rows(self, total: int, seed: object) -> dict[str, Any]:
        """Random rows of every component."""
        import torch

        dice = torch.Generator().manual_seed(random.Random(f"{self.stage.seed}:{seed}").randrange(1 << 60))
        found = {}
        for component in self.layout.components:
            dtype = getattr(torch, component.dtype)
            like = torch.empty((total, *component.shape), dtype=dtype)
            raw = torch.randint(0, 256, (like.numel() * like.element_size(),), generator=dice, dtype=torch.uint8)
            found[component.name] = raw.view(dtype).view(like.shape) if total else like
        return found

    def same(self, received: Any, sent: dict[str, Any], what: str) -> None:
        """Expect the same bytes in every component."""
        import torch

        for name, tensor in sent.items():
            got = received[name]
            self.stage.expect(got is not None, f"{what}: {name} was sent and is absent")
            shape = tuple(got.shape) == tuple(tensor.shape)
            self.stage.expect(shape, f"{what}: {name} has the shape {tuple(got.shape)}, not {tuple(tensor.shape)}")
            if not tensor.numel():
                continue
            a, b = (t.contiguous().view(-1).view(torch.uint8).view(t.shape[0], -1) for t in (got, tensor))
            if not torch.equal(a, b):
                row = int((a != b).any(dim=1).nonzero()[0])
                self.stage.fail(f"{what}: the row of token {row} of {name} is not what was sent")

    def carry(self, room: int, total: int, what: str = "") -> None:
        """One room to every rank, compared."""
        what = what or f"{total} tokens through a pool of {self.settings.pool_blocks} blocks of {BLOCK}"
        sent = self.rows(total, room)
        receiving = [receiver.receive(room, self.sender.address) for receiver in self.receivers]
        sending = self.sender.send(room, **sent)
        for transfer in receiving:
            self.same(self.result(transfer, what), sent, what)
        sending.wait(PATIENCE_S)

    def result(self, transfer: Any, what: str) -> Any:
        try:
            return transfer.result(PATIENCE_S)
        except FerryError as error:
            self.stage.fail(f"{what}: {type(error).__name__}: {error}")

    def clean(self, what: str) -> None:
        """Expect that nothing is left: each block free, the audit sound, no write where nobody had a grant."""
        for receiver in self.receivers:
            free = self.stage.eventually(partial(_all_free, receiver), PATIENCE_S)
            self.stage.expect(free, f"{what}: {receiver.free_blocks} of {receiver.pool_blocks} blocks are free")
            receiver._call(receiver.machine.pool.audit)
            receiver._call(partial(receiver._check_poison, range(receiver.pool_blocks)))
            stale = receiver.stale_writes
            self.stage.expect(not stale, f"{what}: a block was written to while it was free: {'; '.join(stale[:2])}")


def _all_free(receiver: Any) -> bool:
    return bool(receiver.free_blocks == receiver.pool_blocks)


@check("ID-4", seconds=60)
def any_blocks(stage: Stage) -> None:
    for name, choose in _choosers(stage.seed).items():
        with Ferry(stage, pool=5, choose=choose) as ferry:
            ferry.carry(1, 40 * BLOCK + 3, f"with {name}")


@check("WM-1")
def never_back(stage: Stage) -> None:
    with Ferry(stage, pool=2) as ferry:
        sent = ferry.rows(60 * BLOCK, 1)
        receiving = ferry.receiver.receive(1, ferry.sender.address)
        sending = ferry.sender.send(1, **sent)
        seen = 0
        while not receiving.done:
            ferry.receiver.poll()
            now = receiving.sent_tokens
            stage.expect(now >= seen, f"sent_tokens went from {seen} back to {now}")
            seen = now
        ferry.same(ferry.result(receiving, "60 blocks"), sent, "60 blocks")
        sending.wait(PATIENCE_S)
        stage.expect(receiving.sent_tokens == 60 * BLOCK, f"in the end, sent_tokens is {receiving.sent_tokens}")


@check("WM-4", seconds=90)
def what_was_sent(stage: Stage) -> None:
    """Large rows without a digest: what the transport did is seen here, and not repaired before."""
    for integrity in ("off", "full"):
        with Ferry(stage, pool=6, integrity=integrity, choose=_choosers(stage.seed)["random blocks"]) as ferry:
            for room in range(stage.times(2, 6, 40)):
                ferry.carry(room, stage.random.randrange(1, 300 * BLOCK))


@check("WM-5", seconds=60)
def any_length(stage: Stage) -> None:
    with Ferry(stage, pool=3) as ferry:
        for room, total in enumerate((0, 1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK, 3 * BLOCK + 1, 1000)):
            ferry.carry(room, total)


@check("GR-5", seconds=60)
def last_blocks(stage: Stage) -> None:
    with Ferry(stage, pool=4) as ferry:
        for room, extra in enumerate((0, 1, 7, BLOCK - 1)):
            ferry.carry(room, 9 * BLOCK + extra)


@check("GR-1", seconds=60)
def no_block_is_lost(stage: Stage) -> None:
    with Ferry(stage, pool=7, choose=_choosers(stage.seed)["random blocks"]) as ferry:
        for room in range(stage.times(2, 8, 40)):
            ferry.carry(room, stage.random.randrange(1, 40 * BLOCK))
        ferry.clean("after all rooms have ended")


@check("WS-7", seconds=60)
def poison_stays(stage: Stage) -> None:
    with ExitStack() as ferries:
        used: dict[str, Ferry] = {}
        for name, choose in _choosers(stage.seed).items():
            used[name] = ferry = ferries.enter_context(Ferry(stage, pool=8, choose=choose, integrity="off"))
            for room in range(stage.times(1, 4, 20)):
                ferry.carry(room, stage.random.randrange(1, 60 * BLOCK), f"with {name}")
        stage.settle()
        for name, ferry in used.items():
            ferry.clean(f"with {name}")


@check("MSG-3")
def polls_are_pure(stage: Stage) -> None:
    rounds = []
    for polls in (0, 200):
        with Ferry(stage, pool=4, window="rounds") as ferry:
            sent = ferry.rows(30 * BLOCK, 1)
            receiving = ferry.receiver.receive(1, ferry.sender.address)
            sending = ferry.sender.send(1, **sent)
            for _ in range(polls):
                ferry.receiver.poll()
                ferry.sender.poll()
            ferry.same(ferry.result(receiving, f"with {polls} polls"), sent, f"with {polls} polls")
            sending.wait(PATIENCE_S)
            rounds.append([round_.start for round_ in receiving.rounds][1:])
            stage.note(f"rounds with {polls} polls", rounds[-1])


@check("INT-3", seconds=60)
def flushed_before_it_is_read(stage: Stage) -> None:
    with Ferry(stage, pool=2, integrity="off") as ferry:
        for room in range(stage.times(2, 6, 40)):
            ferry.carry(room, 20 * BLOCK + room)


@check("AL-2", seconds=60)
def one_block_is_enough(stage: Stage) -> None:
    for pool in (1, 2):
        with Ferry(stage, pool=pool) as ferry:
            for room, total in enumerate((1, BLOCK, 5 * BLOCK + 1, stage.times(10, 60, 400) * BLOCK)):
                ferry.carry(room, total)


@check("AL-6", seconds=60)
def more_rooms_than_blocks(stage: Stage) -> None:
    rooms = stage.times(6, 20, 100)
    with Ferry(stage, pool=3) as ferry:
        sent = {room: ferry.rows(stage.random.randrange(1, 12 * BLOCK), room) for room in range(rooms)}
        receiving = {room: ferry.receiver.receive(room, ferry.sender.address) for room in sent}
        sending = [ferry.sender.send(room, **rows) for room, rows in sent.items()]
        what = f"{rooms} rooms at once through 3 blocks"
        for room, transfer in receiving.items():
            ferry.same(ferry.result(transfer, what), sent[room], what)
        for transfer in sending:
            transfer.wait(PATIENCE_S)
        ferry.clean(what)


@check("LV-2", seconds=60)
def nothing_is_left(stage: Stage) -> None:
    with Ferry(stage, pool=4) as ferry:
        for room in range(3):
            ferry.carry(room, 10 * BLOCK + room)
        ferry.clean("after three rooms have ended")
        for end, names in ((ferry.receiver, ("transfers", "rooms")), (ferry.sender, ("slots", "writes"))):
            for name in names:
                left = partial(_empty, end, name)
                stage.expect(stage.eventually(left, PATIENCE_S), f"the {end.name} still has {name} of ended rooms")


def _empty(end: Any, name: str) -> bool:
    return not end._call(lambda: getattr(end.machine, name))


@check("CN-1", seconds=90)
def cancelled_anywhere(stage: Stage) -> None:
    for attempt in range(stage.times(2, 6, 40)):
        with Ferry(stage, pool=2) as ferry:
            receiving = ferry.receiver.receive(1, ferry.sender.address)
            sending = ferry.sender.send(1, **ferry.rows(400 * BLOCK, 1))
            stage.eventually(partial(_has_met, receiving))  # a sender that it has not met does not hear of a cancel
            time.sleep(stage.random.random() * 0.05)
            side = (receiving, sending)[attempt % 2]
            side.cancel()
            side.cancel()
            stage.expect(side.done, "a cancelled transfer is not done on the side that cancelled it")
            for name, transfer in (("receiver", receiving), ("sender", sending)):
                _ends(stage, transfer, f"after a cancel, the {name}")
            ferry.clean("after a cancel")
            ferry.carry(2, 10 * BLOCK, "a room after a cancel")


@check("CN-2", seconds=90)
def one_outcome(stage: Stage) -> None:
    for _ in range(stage.times(3, 10, 100)):
        with Ferry(stage, pool=4) as ferry:
            sent = ferry.rows(4 * BLOCK, 1)
            receiving = ferry.receiver.receive(1, ferry.sender.address)
            sending = ferry.sender.send(1, **sent)
            stage.eventually(partial(_has_some, receiving), 5)
            receiving.cancel()
            if _ends(stage, receiving, "a transfer that was cancelled as it ended"):
                ferry.same(receiving.result(), sent, "cancelled as it ended, and complete")
            _ends(stage, sending, "the sender's side of it")
            ferry.clean("after a cancel at the end")


def _has_met(transfer: Any) -> bool:
    return bool(transfer.status != "BOOTSTRAPPING")


def _has_some(transfer: Any) -> bool:
    return bool(transfer.done or transfer.sent_tokens)


@check("CN-3")
def cancelled_before_the_other_came(stage: Stage) -> None:
    with Ferry(stage, pool=4) as ferry:
        waiting = ferry.receiver.receive(1, ferry.sender.address)
        open_there: Callable[[], bool] = lambda: waiting.status == "WAITING_FOR_INPUT"  # noqa: E731
        stage.expect(stage.eventually(open_there), f"a receiver that waits for its sender is {waiting.status}")
        waiting.cancel()
        told = ferry.sender.send(1, **ferry.rows(10 * BLOCK, 1))  # it comes too late, and hears that
        _ends(stage, told, "a sender whose receiver was cancelled before it came")
        sending = ferry.sender.send(2, **ferry.rows(10 * BLOCK, 2))
        sending.cancel()
        _ends(stage, sending, "a sender that was cancelled before anybody came")
        ferry.clean("after cancels before the other side had come")
        ferry.carry(1, 10 * BLOCK, "a room that was cancelled before and is used again")
        ferry.carry(3, 10 * BLOCK, "another room")


@check("TP-3", seconds=90)
def every_rank(stage: Stage) -> None:
    for ranks in (2, 3):
        with Ferry(stage, pool=3, ranks=ranks) as ferry:
            for room in range(stage.times(1, 3, 20)):
                ferry.carry(room, stage.random.randrange(0, 30 * BLOCK), f"{ranks} ranks")
            ferry.clean(f"{ranks} ranks")


def _ends(stage: Stage, transfer: Any, what: str) -> bool:
    """Whether it succeeded; expects an end, and no error but Cancelled."""
    ended: Callable[[], bool] = lambda: transfer.done  # noqa: E731
    stage.expect(stage.eventually(ended, PATIENCE_S), f"{what} has not ended after {PATIENCE_S:g} s")
    try:
        transfer.wait(0)
    except Cancelled:
        return False
    except FerryError as error:
        stage.fail(f"{what} ended with {type(error).__name__}: {error}")
    return True
