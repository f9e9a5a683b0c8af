"""The adapter under event loops of SGLang's shape: the original design's timelines, and what can go wrong in them.

Long because every way in which a request can end is tried in the same loops.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scenario_kit import SMALL, assert_clean, assert_same, eventually, rows
from stub_loop import EncodeLoop, LanguageLoop, as_request

import tensorferry as tf
from tensorferry import errors
from tensorferry.core import handles
from tensorferry.core.transfer import Status
from tensorferry.plugins.sglang import (
    POLL_OF,
    FerryFakeReceiver,
    FerryKVManager,
    FerryKVReceiver,
    FerryKVSender,
    KVPoll,
    MultimodalBuffers,
)

ALIASES = {
    "SGLANG_EMBEDDING_DEFAULT_ALLOCATE_BUFFER_SIZE": ("first_grant", 4096),
    "SGLANG_MULTIMODAL_BLOCK_SIZE": ("block_size", 64),
    "SGLANG_EMBEDDING_CACHE_BUFFER_SIZE": ("pool_blocks", 32),
}


class World:
    """One embedding side and `ranks` of a language side, each with its manager and its loop."""

    def __init__(self, ranks: int = 1, dummies: tuple[int, ...] = (), layout: tf.Layout = SMALL, **settings: object):
        self.settings = {"transport": "memory", "window": "rounds", "staging_bytes": 1 << 20, **settings}
        self.layout = layout
        with ExitStack() as stack:
            self.encoder = stack.enter_context(self.manager("encode"))
            self.managers: list[FerryKVManager] = []
            leader = "tcp://127.0.0.1:0"
            for rank in range(ranks):
                group = tf.Group(rank, ranks, leader) if ranks > 1 else None
                self.managers.append(stack.enter_context(self.manager("language", rank=rank, group=group)))
                leader = self.managers[0].receiver.leader_address
            self._stack = stack.pop_all()
        self.encode = EncodeLoop(self.encoder)
        self.language = LanguageLoop(*self.managers, kinds=dict.fromkeys(dummies, FerryFakeReceiver))
        self.address = self.encoder.address.removeprefix("tcp://")

    def manager(self, mode: str, rank: int = 0, **more: Any) -> FerryKVManager:
        args = SimpleNamespace(engine_rank=rank)
        return FerryKVManager(
            args, SimpleNamespace(value=mode), SimpleNamespace(), layout=self.layout, **self.settings, **more
        )

    def request(self, room: int, total: int) -> dict[str, torch.Tensor]:
        given = rows(total, room, self.layout)
        self.encode.add(room, given)
        self.language.add(room, self.address)
        return given

    def tick(self) -> bool:
        return self.encode.tick() & self.language.tick()

    def run(self) -> None:
        eventually(self.tick)

    def close(self) -> None:
        try:
            for manager in (self.encoder, *self.managers):
                assert manager.buffers.available_size() == manager.settings.max_rooms
            assert_clean(self.encoder.sender, *(manager.receiver for manager in self.managers))
        finally:
            self._stack.close()


@pytest.fixture
def world() -> Iterator[Any]:
    made: list[World] = []

    def make(*arguments: Any, **more: Any) -> World:
        made.append(World(*arguments, **more))
        return made[-1]

    yield make
    for one in made:
        one.close()


def assert_buffers(buffers: tuple[Any, ...] | None, given: dict[str, torch.Tensor], delta: int = -7) -> None:
    assert buffers is not None
    embeds, ids, positions, aux = buffers
    assert positions.shape == (3, len(given["fill_ids"]))
    assert_same({"input_embeds": embeds, "fill_ids": ids, "mrope_positions": positions.t()}, given)
    assert (int(aux[0]), int(aux[1]), aux.dtype, len(aux)) == (len(given["fill_ids"]), delta, torch.int64, 16)


# ---- the timelines of the original design ----------------------------------------------------------------------

IN_ORDER = [KVPoll.Bootstrapping, KVPoll.WaitingForInput, KVPoll.Transferring, KVPoll.Success]


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> dict[handles.Transfer, list[KVPoll]]:
    """What a poll would have said after each change, without repetitions: a loop may look too late to see it all."""
    polls: dict[handles.Transfer, list[KVPoll]] = {}
    publish = handles.Transfer._published

    def record(transfer: handles.Transfer) -> None:
        said = polls.setdefault(transfer, [])
        if said[-1:] != [POLL_OF[transfer.status]]:
            said.append(POLL_OF[transfer.status])
        publish(transfer)

    monkeypatch.setattr(handles.Transfer, "_published", record)
    return polls


@pytest.mark.parametrize("transport", ["memory", "shm", "tcp"])
@pytest.mark.parametrize(
    ("total", "pool", "reached"),
    [(12_000, 64, [8192, 12_000]), (50_000, 400, [8192, 24_576, 50_000])],
)
def test_the_timelines_of_the_original_design(
    world: Any,
    published: dict[handles.Transfer, list[KVPoll]],
    total: int,
    pool: int,
    reached: list[int],
    transport: str,
) -> None:
    w = world(pool_blocks=pool, transport=transport)
    given = w.request(1, total)
    w.run()
    (received,), sent = w.language.over[1], w.encode.over[1]
    assert received.seen == [poll for poll in IN_ORDER if poll in received.seen]
    assert received.seen[:2] == IN_ORDER[:2]
    for said in published.values():  # of either side, once its room was open
        eventually(lambda said=said: KVPoll.Success in said)  # a poll may be ahead of the thread that publishes
        assert said == IN_ORDER[1:]
    assert received.steps == reached
    assert sent.seen[-1] == KVPoll.Success
    assert_buffers(received.buffers, given)


@pytest.mark.parametrize(("total", "pieces"), [(12_000, 4096), (50_000, 8192)])
def test_an_encoder_that_is_not_done_hands_over_what_it_has(world: Any, total: int, pieces: int) -> None:
    w = world(pool_blocks=400)
    given = w.request(1, total)

    def ready(room: int, whole: int) -> int:
        sent = sum(w.encode.inflight[0].steps)
        arrived = w.language.transferring[0][0].lease.transfer.ready_tokens if w.language.transferring else 0
        return min(sent + pieces, whole) if arrived == sent else sent

    w.encode.ready = ready
    w.run()
    (received,), sent = w.language.over[1], w.encode.over[1]
    assert (set(sent.steps[:-1]), sum(sent.steps)) == ({pieces}, total)
    assert received.seen == [poll for poll in IN_ORDER if poll in received.seen]
    assert_buffers(received.buffers, given)


@pytest.mark.parametrize("total", [0, 1, 127, 128, 8192, 8193])
def test_all_rows_at_once_come_in_the_same_rounds(world: Any, total: int) -> None:
    w = world()
    given = w.request(1, total)
    w.run()
    (received,) = w.language.over[1]
    assert received.steps == ([min(8192, total), total] if total > 8192 else [total] if total else received.steps)
    assert [poll for poll in IN_ORDER if poll in received.seen] == received.seen
    assert_buffers(received.buffers, given)


def test_many_requests_in_one_loop_through_a_pool_that_holds_few(world: Any) -> None:
    w = world(pool_blocks=8, first_grant=512, block_size=64)
    given = {room: w.request(room, (room * 397) % 1500) for room in range(30)}
    w.run()
    for room, source in given.items():
        (received,) = w.language.over[room]
        assert received.seen == [poll for poll in IN_ORDER if poll in received.seen]
        assert_buffers(received.buffers, source)


def test_the_default_pool_is_too_small_and_that_is_no_trouble(world: Any) -> None:
    w = world()
    given = w.request(1, 20_000)
    w.run()
    assert_buffers(w.language.over[1][0].buffers, given)


# ---- ranks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "dummies"), [(2, ()), (2, (1,)), (4, (2,)), (4, (1, 2, 3))])
def test_every_rank_has_the_rows_and_a_dummy_rank_has_none(world: Any, ranks: int, dummies: tuple[int, ...]) -> None:
    w = world(ranks, dummies, block_size=16, pool_blocks=8, first_grant=64)
    given = {room: w.request(room, 200 + room) for room in (1, 2)}
    w.run()
    for room, source in given.items():
        for rank, received in enumerate(w.language.over[room]):
            assert received.seen[-1] == KVPoll.Success
            if rank in dummies:
                embeds, _, _, aux = received.buffers
                assert (tuple(embeds.shape), int(aux[0])) == ((0, 8), 200 + room)
            else:
                assert_buffers(received.buffers, source)


def test_a_lease_that_was_allocated_as_fake_is_a_dummy_ranks(world: Any) -> None:
    w = world(2, block_size=16, pool_blocks=8)
    w.encode.add(1, rows(50, 1, SMALL))
    ends = [FerryKVReceiver(manager, w.address, 1) for manager in w.managers]
    leases = [manager.buffers.alloc(64, "r", fake=rank == 1) for rank, manager in enumerate(w.managers)]
    for end, lease in zip(ends, leases, strict=True):
        end.init(0)
        end.send_metadata(lease)
    eventually(lambda: w.encode.tick() and all(end.poll() == KVPoll.Success for end in ends))
    found = [manager.buffers.get_buf(lease)[0] for manager, lease in zip(w.managers, leases, strict=True)]
    assert [len(embeds) for embeds in found] == [50, 0]
    for manager, lease in zip(w.managers, leases, strict=True):
        manager.buffers.free(lease, "r", fake=True)


def test_one_ranks_abort_is_every_ranks_failure(world: Any) -> None:
    w = world(2, block_size=16, pool_blocks=8)
    w.encode.ready = lambda room, total: 40
    w.request(1, 50)
    eventually(lambda: w.tick() or w.language.transferring[0][1].lease.transfer.ready_tokens == 32)
    w.language.transferring[0][1].end.abort()
    w.run()
    assert all(isinstance(t.error, errors.Cancelled) for t in w.language.over[1])
    assert isinstance(w.encode.over[1].error, errors.Cancelled)


# ---- ends that are not successes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["language", "encode"])
def test_an_abort_half_way_ends_both_sides_and_no_other_request(world: Any, who: str) -> None:
    w = world(block_size=16, pool_blocks=8, first_grant=64)
    w.encode.ready = lambda room, total: 100 if room == 1 else total  # it would go on for ever
    w.request(1, 1000)
    other = w.request(2, 300)
    eventually(
        lambda: w.tick() or (2 in w.language.over and w.language.transferring[0][0].look() == KVPoll.Transferring)
    )
    side = w.language.transferring[0][0] if who == "language" else w.encode.inflight[0]
    side.end.abort()
    assert side.end.poll() == KVPoll.Failed
    side.end.abort()
    w.run()
    assert isinstance(w.language.over[1][0].error, errors.Cancelled)
    assert isinstance(w.encode.over[1].error, errors.Cancelled)
    assert_buffers(w.language.over[2][0].buffers, other)


def test_an_abort_before_the_room_is_open_is_told_to_the_other_side(world: Any) -> None:
    """Within the patience of a test, that is, and not after announce_deadline or transfer_deadline. A language side has
    to have met the sender before: what it closes before the two have met, the sender never hears of."""
    w = world()
    w.request(3, 20)
    w.run()
    w.language.add(1, w.address)
    FerryKVSender(w.encoder, "", 1).abort()
    w.encode.ready = lambda room, total: 1  # or the rows might be faster than the abort
    w.encode.add(2, rows(50, 2, SMALL))
    w.encode.tick()
    refused = FerryKVReceiver(w.managers[0], w.address, 2)
    refused.init(0)
    refused.abort()
    assert refused.poll() == KVPoll.Failed
    w.run()
    assert isinstance(w.language.over[1][0].error, errors.Cancelled)
    assert isinstance(w.encode.over[2].error, errors.Cancelled)


def test_an_end_that_never_knew_an_address_is_aborted_alone(world: Any) -> None:
    w = world()
    end = FerryKVReceiver(w.managers[0], w.address, 1)
    assert end.poll() == KVPoll.Bootstrapping
    end.clear()
    assert (end.poll(), end.conclude_state) == (KVPoll.Failed, KVPoll.Failed)
    with pytest.raises(errors.Cancelled, match="aborted"):
        end.failure_exception()


def test_a_sender_that_is_not_there_is_a_failed_request(world: Any) -> None:
    w = world(peer_timeout=0.3, heartbeat=0.1)
    w.language.add(1, "127.0.0.1:9")
    w.run()
    assert isinstance(w.language.over[1][0].error, errors.PeerUnreachable)


def test_an_encoder_that_closes_fails_what_it_had_open(world: Any) -> None:
    w = world(block_size=16, pool_blocks=8, first_grant=64)
    w.encode.ready = lambda room, total: 100
    w.request(1, 1000)
    eventually(lambda: w.tick() or w.language.transferring[0][0].look() == KVPoll.Transferring)
    w.encoder.teardown()
    w.run()
    assert w.encode.over[1].error is not None
    assert w.language.over[1][0].error is not None
    w.encoder = w.manager("encode")
    w._stack.push(w.encoder)


BAD: dict[str, Any] = {
    "another dtype": lambda req: setattr(req, "embedding", req.embedding.float()),
    "another shape": lambda req: setattr(req, "embedding", req.embedding[:, :5]),
    "no tensor": lambda req: setattr(req, "embedding", [[1.0] * 8]),
    "too few ids": lambda req: setattr(req, "fill_ids", req.fill_ids[:-1]),
    "ids that wrap": lambda req: req.fill_ids.__setitem__(0, 1 << 31),
    "ids that are no numbers": lambda req: req.fill_ids.__setitem__(0, "x"),
    "positions as rows": lambda req: setattr(
        req.multimodal_inputs, "mrope_positions", req.multimodal_inputs.mrope_positions.t()
    ),
    "two deltas": lambda req: setattr(req.multimodal_inputs, "mrope_position_delta", torch.tensor([1, 2])),
    "half a delta": lambda req: setattr(req.multimodal_inputs, "mrope_position_delta", torch.tensor([0.5])),
    "an undeclared component": lambda req: setattr(req, "deepstack_embeds", req.embedding),
}


@pytest.mark.parametrize("what", BAD)
def test_rows_that_do_not_fit_are_that_requests_failure_on_both_sides(world: Any, what: str) -> None:
    w = world()
    w.request(1, 50)
    other = w.request(2, 60)
    BAD[what](w.encode.bootstrapping[0].req)
    w.run()
    assert isinstance(w.encode.over[1].error, errors.BadTensor)
    assert isinstance(w.language.over[1][0].error, errors.FerryError)
    assert_buffers(w.language.over[2][0].buffers, other)


def test_a_room_that_is_in_use_is_a_failed_request_and_the_room_goes_on(world: Any) -> None:
    w = world()
    first = w.language.add(1, w.address)
    second = w.language.add(1, w.address)
    w.language.tick()
    assert [t.end.poll() for t in (*first, *second)] == [KVPoll.WaitingForInput, KVPoll.Failed]
    with pytest.raises(errors.RoomInUse):
        second[0].end.failure_exception()
    given = rows(10, 1, SMALL)
    w.encode.add(1, given)
    eventually(lambda: w.tick() or first[0].buffers is not None)
    w.run()
    assert_buffers(first[0].buffers, given)


def failed_elsewhere(end: FerryKVSender | FerryKVReceiver) -> None:
    """What SGLang's loops do where the least of the ranks' polls is Failed: this one call, and no other after it."""
    with pytest.raises(errors.Cancelled, match="another rank") as caught:
        end.failure_exception()
    assert caught.value.is_from_another_rank is True
    assert (end.poll(), end.conclude_state) == (KVPoll.Failed, KVPoll.Failed)
    with pytest.raises(errors.Cancelled, match="another rank"):
        end.failure_exception()


def test_another_ranks_failure_is_an_error_here_too(world: Any) -> None:
    w = world()
    failed_elsewhere(FerryKVSender(w.encoder, "", 1))
    failed_elsewhere(FerryKVReceiver(w.managers[0], w.address, 1))


@pytest.mark.parametrize("who", ["language", "encode"])
def test_another_ranks_failure_ends_the_request_on_both_sides_and_frees_the_room(world: Any, who: str) -> None:
    w = world(block_size=16, pool_blocks=8, first_grant=64)
    w.encode.ready = lambda room, total: 100  # it would go on for ever
    w.request(1, 1000)
    eventually(lambda: w.tick() or w.language.transferring[0][0].look() == KVPoll.Transferring)
    theirs, ours = w.language.transferring[0][0], w.encode.inflight[0]
    failed_elsewhere(theirs.end if who == "language" else ours.end)
    w.run()  # the other side hears of it
    assert isinstance((ours if who == "language" else theirs).error, errors.Cancelled)
    w.encode.ready = lambda room, total: total
    again = w.request(1, 50)  # the router tries again with the same room
    w.run()
    assert_buffers(w.language.over[1][0].buffers, again)


def test_another_ranks_failure_is_one_here_where_every_row_has_arrived(world: Any) -> None:
    w = world()
    w.request(1, 50)
    received, sent = w.language.waiting[0][0], w.encode.bootstrapping[0]
    eventually(lambda: w.tick() or (received.end.poll(), sent.end.poll()) == (KVPoll.Success, KVPoll.Success))
    failed_elsewhere(received.end)
    failed_elsewhere(sent.end)


def test_clearing_a_request_keeps_the_reason_of_its_failure(world: Any) -> None:
    w = world()
    sent = w.encode.add(1, rows(100, 1, SMALL))
    w.encode.ready = lambda room, total: 40
    w.encode.tick()
    w.encode.tick()
    sent.req.embedding = sent.req.embedding.float()
    w.encoder.buffers.set_buf(sent.req)
    sent.end.send(sent.lease)
    for _ in range(2):
        with pytest.raises(errors.BadTensor):
            sent.end.failure_exception()
        sent.end.clear()
    w.encode.tick()
    assert isinstance(sent.error, errors.BadTensor)


def test_freeing_a_lease_cancels_its_room_and_freeing_it_again_does_nothing(world: Any) -> None:
    w = world()
    (tracked,) = w.language.add(1, w.address)
    w.language.tick()
    w.managers[0].buffers.free(tracked.lease)
    w.managers[0].buffers.free(tracked.lease)
    assert tracked.end.poll() == KVPoll.Failed
    with pytest.raises(errors.BadCall, match="nothing was received"):
        w.managers[0].buffers.get_buf(tracked.lease)
    w.run()


# ---- calls ---------------------------------------------------------------------------------------------------------


def test_calls_in_an_impossible_order_are_refused(world: Any) -> None:
    w = world()
    buffers: MultimodalBuffers = w.managers[0].buffers
    lease = buffers.alloc(10)
    receiver = FerryKVReceiver(w.managers[0], w.address, 1)
    sender = FerryKVSender(w.encoder, "", 1)
    calls: list[Any] = [
        lambda: receiver.send_metadata(lease), lambda: receiver.send_metadata([0, 1]), lambda: sender.send(lease),
        lambda: buffers.get_buf(lease), lambda: buffers.get_buf([0]), lambda: buffers.free([0]),
        lambda: buffers.set_buf(SimpleNamespace()), lambda: FerryKVReceiver(w.managers[0], w.address),
        lambda: FerryKVSender(w.encoder, "", -1), lambda: buffers.alloc(-1), lambda: w.encoder.receiver,
        lambda: w.managers[0].sender, lambda: w.managers[0].register_to_bootstrap(),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(errors.BadCall):
            call()
    sender.init(10)
    with pytest.raises(errors.BadCall, match="set_buf"):
        sender.send(lease, None, 5)
    receiver.init(0)
    receiver.send_metadata(lease)
    with pytest.raises(errors.BadCall, match="without a call"):
        receiver.send_metadata(lease)
    receiver.clear()
    buffers.free(lease)
    buffers.free(None)
    with pytest.raises(errors.BadCall, match="freed"):
        receiver.send_metadata(lease)
    sender.abort()


@pytest.mark.parametrize("what", [{"state_indices": [1]}, {"decode_prefix_len": 5}])
def test_what_cannot_be_carried_is_a_failed_request(world: Any, what: dict[str, Any]) -> None:
    w = world()
    end = FerryKVReceiver(w.managers[0], w.address, 1)
    end.init(0)
    lease = w.managers[0].buffers.alloc(10)
    end.send_metadata(lease, **what)
    with pytest.raises(errors.Unsupported):
        end.failure_exception()
    w.managers[0].buffers.free(lease)


def test_a_data_parallel_rank_needs_an_address_of_its_own(world: Any) -> None:
    w = world()
    end = FerryKVReceiver(w.managers[0], w.address, 1)
    end.init(prefill_dp_rank=3)
    assert end.poll() == KVPoll.Failed
    with pytest.raises(errors.ConfigError, match="resolve"):
        end.failure_exception()
    w.managers[0].resolve = lambda addr, rank: {("pool", 3): w.encoder.address}[addr, rank]
    end = FerryKVReceiver(w.managers[0], "pool", 1, prefill_dp_rank=3)
    end.init()
    eventually(lambda: end.poll() == KVPoll.WaitingForInput)


def test_rows_may_be_handed_over_a_number_at_a_time(world: Any) -> None:
    w = world(block_size=16, pool_blocks=4)
    given = rows(100, 1, SMALL)
    sender = FerryKVSender(w.encoder, "", 1)
    sender.init(100)
    req = as_request(given)
    req.embedding_indices = lease = w.encoder.buffers.alloc(100, "r")
    w.encoder.buffers.set_buf(req, content_id=b"0123456789abcdef")
    w.language.add(1, w.address)
    for n in (1, 15, 40, 0, 44):
        sender.send(lease, None, num_kv_tokens=n)
    eventually(lambda: w.language.tick() and sender.poll() == KVPoll.Success)
    assert sender.get_transfer_metric().transfer_total_bytes == 100 * SMALL.token_bytes
    sender.send(lease)
    sender.clear()
    assert (sender.poll(), sender.pop_decode_prefix_len(), sender.get_max_transfer_tokens()) == (4, 0, None)
    w.encoder.buffers.free(lease)
    assert_buffers(w.language.over[1][0].buffers, given)


def test_text_alone_and_deepstack_travel_as_what_they_are(world: Any) -> None:
    w = world(layout=tf.embedding_layout(8, deepstack_layers=3))
    given = rows(40, 1, w.layout)
    whole = w.encode.add(1, given)
    whole.req.deepstack_embeds = given["deepstack_embeds"].reshape(40, 24)
    text = w.encode.add(2, given)
    text.req.multimodal_inputs = None
    for room in (1, 2):
        w.language.add(room, w.address)
    w.run()
    *_, deepstack = w.language.over[1][0].buffers
    assert_same({"deepstack_embeds": deepstack}, {"deepstack_embeds": given["deepstack_embeds"]})
    embeds, ids, positions, aux, deepstack = w.language.over[2][0].buffers
    assert (positions, deepstack, int(aux[1])) == (None, None, 0)
    assert_same({"input_embeds": embeds, "fill_ids": ids}, {n: given[n] for n in ("input_embeds", "fill_ids")})


def test_there_are_as_many_leases_as_rooms(world: Any) -> None:
    w = world(max_rooms=2, first_grant=300, block_size=128)
    buffers = w.managers[0].buffers
    one, two = buffers.alloc(300, "a"), buffers.alloc(99_999, "b")
    assert (len(one), len(two), buffers.alloc(1), buffers.available_size()) == (3, 3, None, 0)
    assert len(w.encoder.buffers.alloc(99_999)) == 782
    for lease in (one, two):
        buffers.free(lease)
    w.encoder.buffers._leases.clear()


# ---- configuration -------------------------------------------------------------------------------------------------


def test_the_names_of_earlier_deployments_are_read(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, (_, value) in ALIASES.items():
        monkeypatch.setenv(variable, str(value))
    w = world()
    for manager in (w.encoder, *w.managers):
        assert {name: getattr(manager.settings, name) for name, _ in ALIASES.values()} == dict(ALIASES.values())
    assert len(w.managers[0].buffers.alloc(8192, "r")) == 32  # 2048 tokens: a wish larger than the pool is clamped
    w.managers[0].buffers._leases.clear()
    given = w.request(1, 5000)
    w.run()
    (received,) = w.language.over[1]
    assert received.steps == [2048, 4096, 5000]
    assert_buffers(received.buffers, given)


@pytest.mark.parametrize("variable", ALIASES)
def test_a_name_of_earlier_deployments_is_checked_like_any(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "-3")
    with pytest.raises(errors.ConfigError, match=variable):
        FerryKVManager(SimpleNamespace(), "decode", SimpleNamespace(), layout=SMALL, transport="memory")


def test_a_manager_that_cannot_be_is_refused() -> None:
    def manager(mode: object, rank: int = 0, **more: Any) -> FerryKVManager:
        return FerryKVManager(
            SimpleNamespace(engine_rank=rank), mode, SimpleNamespace(), layout=SMALL, transport="memory", **more
        )

    for mode in ("null", None, 7):
        with pytest.raises(errors.ConfigError, match="neither sends nor receives"):
            manager(mode)
    with pytest.raises(errors.ConfigError, match="rank 0"):
        manager("decode", 1, group=tf.Group(0, 2))
    with pytest.raises(errors.UnknownOption):
        manager("decode", pool_blokcs=1)


def test_an_embedding_side_binds_the_bootstrap_port_on_loopback(caplog: pytest.LogCaptureFixture) -> None:
    with FerryKVManager(SimpleNamespace(), "prefill", None, layout=SMALL, transport="memory") as manager:
        port = int(manager.address.rsplit(":", 1)[1])
    server_args = SimpleNamespace(disaggregation_bootstrap_port=port)
    with FerryKVManager(SimpleNamespace(), "prefill", server_args, layout=SMALL, transport="memory") as manager:
        assert manager.address == f"tcp://127.0.0.1:{port}"
        with caplog.at_level("INFO", "tensorferry.sglang"):
            manager.register_to_bootstrap()
        assert manager.address in caplog.text
        assert manager.should_verify_kv_checksum("") is False


# ---- what the adapter is --------------------------------------------------------------------------------------------


def test_polls_are_sglangs_numbers_and_every_status_has_one() -> None:
    names = ("Failed", "Bootstrapping", "WaitingForInput", "Transferring", "Success")
    assert [(poll.name, int(poll)) for poll in KVPoll] == list(zip(names, range(5), strict=True))
    assert set(POLL_OF) == set(Status)
    assert torch.tensor([KVPoll.Success, KVPoll.Failed], dtype=torch.uint8).tolist() == [4, 0]


def test_polling_has_no_effect(world: Any) -> None:
    w = world()
    end = FerryKVReceiver(w.managers[0], w.address, 1)
    end.init(0)
    w.managers[0].close()  # no thread is there to answer, and none is asked
    assert [end.poll() for _ in range(1000)] == [KVPoll.WaitingForInput] * 1000
    w.managers[0] = w.manager("decode")
    w._stack.push(w.managers[0])
