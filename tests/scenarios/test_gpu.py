"""Rows, pools and results on a GPU, by a stand-in whose copies are over when the test says so (gpu_kit.py)."""

from __future__ import annotations

import gc
import time
import weakref
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from gpu_kit import GpuTransport, StandIn
from scenario_kit import LAYOUT, PATIENCE, Quay, assert_clean, assert_same, eventually, rows

import tensorferry as tf
from tensorferry.core import copying
from tensorferry.core.endpoint import BUSY_POLL
from tensorferry.core.errors import BadTensor, ConfigError, DeviceError, TooLarge
from tensorferry.core.memory import Memory
from tensorferry.core.posting import Prepared
from tensorferry.core.receiving import Receiver
from tensorferry.core.settings import Settings
from tensorferry.plugins.registry import open_transport

CARD = {"takes": True, "registers": True}
ENGINE = {"takes": False, "registers": True}
NETWORK = {"takes": False, "registers": False}
IN_PLACE = {"takes": True, "registers": False}


def quay(gpu: StandIn, kind: dict[str, bool] | None = None, **settings: Any) -> Quay:
    """`kind`: what the transport does; the destination is on a GPU unless told otherwise."""
    made = {"destination_device": "cuda", "pool_blocks": 4, "slabs": 2, **settings}
    make = partial(GpuTransport, gpu, **(kind or CARD))
    return Quay(sender_transport=make, receiver_transport=make, **made)


# ---- every combination ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("integrity", ["full", "sampled", "off"])
@pytest.mark.parametrize("pool", ["cpu", "cuda"])
@pytest.mark.parametrize("destination", ["cpu", "cuda:1"])
@pytest.mark.parametrize("on_gpu", [False, True], ids=["host rows", "GPU rows"])
def test_every_byte_arrives_wherever_it_lies(
    gpu: StandIn,
    integrity: str,
    pool: str,
    destination: str,
    on_gpu: bool,
) -> None:
    given = rows(1111)
    with quay(gpu, pool_device=pool, destination_device=destination, integrity=integrity) as here:
        here.sender.send(1, **(gpu.rows(given) if on_gpu else given))
        result = here.receive().result(PATIENCE)
        assert_same(result, given)
        places = {gpu.place_of(result[name]) for name in given}  # type: ignore[arg-type]
        assert places == ({("cuda", 1)} if destination == "cuda:1" else {None})


@pytest.mark.parametrize("kind", [CARD, ENGINE, NETWORK, IN_PLACE], ids=["card", "engine", "network", "in place"])
@pytest.mark.parametrize("mixed", [False, True], ids=["all", "one component"])
def test_rows_on_a_gpu_go_by_any_transport(gpu: StandIn, kind: dict[str, bool], mixed: bool) -> None:
    given = rows(900)
    there = gpu.rows(given)
    with quay(gpu, kind, destination_device="cpu", integrity="full") as here:
        here.sender.send(1, **({**given, "input_embeds": there["input_embeds"]} if mixed else there))
        assert_same(here.receive().result(PATIENCE), given)


def test_staging_is_on_the_gpu_where_the_engine_takes_that_and_on_the_host_otherwise(gpu: StandIn) -> None:
    given = gpu.rows(rows(300), device=1)
    for kind, place in ((CARD, "cuda"), (ENGINE, "cpu")):
        with quay(gpu, kind) as here:
            here.sender.send(1, **given)
            here.receive().result(PATIENCE)
            kinds = {r.memory.kind for r in here.sender.carriers.transports[0]._live.values()}  # type: ignore[attr-defined]
            assert place in kinds
            assert gpu.pinned > 0


def test_a_card_that_cannot_register_gpu_memory_leaves_staging_to_the_host(
    gpu: StandIn,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with quay(gpu) as here:
        transport: Any = here.sender.carriers.transports[0]
        allocate = transport.allocate

        def refuse(nbytes: int, kind: str = "cpu", device: int = 0) -> Any:
            if kind == "cuda":
                raise DeviceError("no peer memory")
            return allocate(nbytes)

        transport.allocate = refuse
        given = rows(300)
        here.sender.send(1, **gpu.rows(given))
        assert_same(here.receive().result(PATIENCE), given)
    assert "no staging on cuda:0, rows go through the host: no peer memory" in caplog.text


def test_rows_put_in_many_pieces_go_through_the_stage_where_a_post_takes_fewer(gpu: StandIn) -> None:
    given = rows(128, layout=tf.embedding_layout(64, mrope=False))
    layout = tf.embedding_layout(64, mrope=False)
    make = partial(_few_copies, gpu)
    with Quay(layout=layout, sender_transport=make, receiver_transport=make, pool_blocks=2) as here:
        sending = here.sender.announce(1, 128)
        there = gpu.rows(given)
        for start in range(0, 128, 16):
            sending.put(start, **{name: tensor[start : start + 16] for name, tensor in there.items()})
        assert_same(here.receive().result(PATIENCE), given)


def _few_copies(gpu: StandIn) -> GpuTransport:
    transport = GpuTransport(gpu, **IN_PLACE)
    transport.capabilities = replace(transport.capabilities, max_copies=3)
    return transport


@pytest.mark.parametrize("pool", ["cpu", "cuda"])
@pytest.mark.parametrize("destination", ["cpu", "cuda"])
def test_no_rows_at_all_and_a_rank_that_takes_none(gpu: StandIn, pool: str, destination: str) -> None:
    with quay(gpu, pool_device=pool, destination_device=destination, ranks=2) as here:
        for room, given in ((1, rows(0)), (2, rows(300))):
            here.sender.send(room, **given)
            taking, dummy = here.receive(room), here.receive(room, 1, dummy=True)
            assert_same(taking.result(PATIENCE), given)
            result = dummy.result(PATIENCE)
            assert [len(result[name]) for name in given] == [0, 0, 0]  # type: ignore[arg-type]


def test_rows_on_two_gpus_are_refused(gpu: StandIn) -> None:
    given = rows(300)
    there = gpu.rows(given, 1)
    with quay(gpu) as here:
        with pytest.raises(BadTensor, match="rows on cuda:0, cuda:1: one transfer's lie on one GPU"):
            here.sender.send(1, **{**there, **gpu.rows({"fill_ids": given["fill_ids"]}, 0)})
        sending = here.sender.announce(1, 300)
        sending.put(0, **{name: tensor[:100] for name, tensor in there.items()})
        with pytest.raises(BadTensor, match="one transfer's lie on one GPU"):
            sending.put(100, **{name: tensor[100:] for name, tensor in gpu.rows(given, 0).items()})
        sending.put(100, **{name: tensor[100:] for name, tensor in there.items()})
        assert_same(here.receive().result(PATIENCE), given)


# ---- the copy's end, and not its beginning -------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["cpu", "cuda"])
def test_blocks_are_not_free_and_rows_do_not_count_before_the_copy_is_over(gpu: StandIn, pool: str) -> None:
    given = rows(4 * 128)
    with quay(gpu, pool_device=pool, poison=False) as here:
        gpu.held = True
        here.sender.send(1, **given)
        transfer = here.receive()
        gatherer = here.receiver._gatherer
        eventually(
            lambda: len(gatherer._copying) + len(gatherer._verifying) and not here.receiver.machine.transfers[1].out
        )
        assert (transfer.sent_tokens, transfer.ready_tokens, here.receiver.free_blocks) == (0, 0, 0)
        assert here.receiver._call(lambda: here.receiver.machine.pool.grantable) == 0
        gpu.release()
        assert_same(transfer.result(PATIENCE), given)


@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_a_gpu_that_copies_is_asked_again_and_again(gpu: StandIn, side: str) -> None:
    """It wakes nobody, as a transport does that calls back."""
    with quay(gpu, destination_device="cpu" if side == "sender" else "cuda", poison=False) as here:
        end: Any = getattr(here, side)
        assert end.carriers.wakes
        gpu.held = True
        given = rows(300)
        here.sender.send(1, **(gpu.rows(given) if side == "sender" else given))
        transfer = here.receive()
        eventually(lambda: end._copies)
        waits: list[float] = []
        receive = end._control.receive
        end._call(
            lambda: setattr(end._control, "receive", lambda timeout: (waits.append(timeout), receive(timeout))[1])
        )
        eventually(lambda: len(waits) > 3)
        assert set(waits[1:4]) <= {0.0, BUSY_POLL}
        gpu.release()
        assert_same(transfer.result(PATIENCE), given)


def test_rows_can_be_taken_as_they_arrive_and_belong_to_the_stream_that_takes_them(gpu: StandIn) -> None:
    given = rows(1000)
    with quay(gpu) as here:
        here.sender.send(1, **given)
        transfer = here.receive()
        seen = torch.cat([part["input_embeds"].clone() for _, _, part in transfer.rows(PATIENCE)])
        assert torch.equal(seen.view(torch.uint8), given["input_embeds"].view(torch.uint8))
        before = len(gpu.claims)
        assert before
        transfer.result()
        assert len(gpu.claims) == before + len(given)


@pytest.mark.parametrize("kind", [CARD, ENGINE, NETWORK], ids=["card", "engine", "network"])
def test_a_write_is_posted_when_its_rows_are_in_the_stage(gpu: StandIn, kind: dict[str, bool]) -> None:
    given = rows(300)
    with quay(gpu, kind, destination_device="cpu") as here:
        gpu.held = True
        here.sender.send(1, **gpu.rows(given))
        transfer = here.receive()
        poster = here.sender._poster
        gpu.caller[0].run()
        eventually(lambda: poster._preparing)
        transport: Any = here.sender.carriers.transports[0]
        here.sender._call(lambda: None)  # a whole turn of its thread
        assert (transport.posted, len(poster._posted), here.sender.free_blocks) == (0, 0, here.sender.pool_blocks - 3)
        gpu.release()
        assert_same(transfer.result(PATIENCE), given)


def test_rows_that_are_still_computed_are_waited_for(gpu: StandIn) -> None:
    given = rows(300)
    there = gpu.rows({name: torch.zeros_like(tensor) for name, tensor in given.items()})
    with quay(gpu) as here:
        gpu.held = True
        for name, tensor in there.items():  # a kernel that the caller has launched
            gpu.caller[0].add(lambda name=name, tensor=tensor: tensor.copy_(given[name]))
        sending = here.sender.announce(1, 300)
        sending.put(0, **{name: tensor[:200] for name, tensor in there.items()})
        gpu.caller[0].add(lambda: None)
        sending.put(200, **{name: tensor[200:] for name, tensor in there.items()})
        transfer = here.receive()
        eventually(lambda: transfer.total_tokens)
        here.sender._call(lambda: None)
        assert here.sender._call(lambda: [s.offer.ready for s in here.sender.machine.slots.values()]) == [0]
        gpu.caller[0].run(len(there))
        eventually(
            lambda: here.sender._call(lambda: [s.offer.ready for s in here.sender.machine.slots.values()]) == [200]
        )
        gpu.release()
        assert_same(transfer.result(PATIENCE), given)


def test_a_part_that_is_not_wanted_any_more_is_not_posted(gpu: StandIn) -> None:
    with quay(gpu, ENGINE) as here:
        gpu.held = True
        here.sender.send(1, **gpu.rows(rows(300)))
        transfer = here.receive()
        gpu.caller[0].run()
        prepared = eventually(lambda: here.sender._poster._preparing)[0]
        transfer.cancel()
        machine = here.sender.machine
        eventually(lambda: not here.sender._call(lambda: machine.wants(prepared.part.write.write)))
        gpu.release()
        assert_clean(here.sender, here.receiver)
        assert here.sender.carriers.transports[0].posted == 0  # type: ignore[attr-defined]
        here.carry(500, room=2)


# ---- integrity -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "wanted"), [(None, "full"), (0, "sampled")])
def test_what_is_sent_from_a_gpu_is_sampled_unless_told_otherwise(
    gpu: StandIn,
    device: int | None,
    wanted: str,
) -> None:
    given = rows(300)
    with quay(gpu) as here:
        here.sender.send(1, **(given if device is None else gpu.rows(given, device)))
        sources = list(here.sender._poster.sources.values())
        assert [source.integrity for source in sources] == [wanted]
        assert_same(here.receive().result(PATIENCE), given)


@pytest.mark.parametrize("integrity", ["full", "sampled"])
def test_a_block_that_is_damaged_in_gpu_memory_is_sent_again(gpu: StandIn, integrity: str) -> None:
    given = rows(256)
    with quay(gpu, pool_device="cuda", integrity=integrity) as here:
        transport: Any = here.receiver.carriers.transports[0]
        damaged: list[int] = []

        def flush(region: Any) -> None:
            if not damaged:
                memory = region.memory
                torch.frombuffer(host_view(memory), dtype=torch.uint8)[:4096] ^= 0xFF
                damaged.append(1)

        transport.flush = flush
        here.sender.send(1, **given)
        assert_same(here.receive().result(PATIENCE), given)
        assert damaged


def host_view(memory: Memory) -> memoryview:
    """The stand-in's memory is host memory behind."""
    return Memory(memory.address, memory.nbytes, "cpu", memory.owner).view()


# ---- flush ---------------------------------------------------------------------------------------------------


def test_what_a_card_wrote_is_flushed_before_it_is_read(gpu: StandIn) -> None:
    with quay(gpu, pool_device="cuda") as here:
        here.carry(256)
        flushed = here.receiver.carriers.transports[0].flushed  # type: ignore[attr-defined]
        assert {region.memory.kind for region in flushed} == {"cuda"}


def test_blocks_that_a_fence_frees_are_flushed_before_the_next_tenant_has_them(gpu: StandIn) -> None:
    with quay(gpu, pool_device="cuda", poison=False) as here:  # poisoning flushes what is free, for itself
        here.sender.announce(1, 1000)  # a loan goes out, and no rows come
        transfer = here.receive()
        eventually(lambda: here.receiver.free_blocks == 0)
        flushed: list[tuple[int, int]] = []
        transport: Any = here.receiver.carriers.transports[0]
        transport.flush = lambda region: flushed.append((region.id, here.receiver.machine.pool.free_count))
        transfer.cancel()
        eventually(lambda: here.receiver.free_blocks == 4)
        assert {region for region, _ in flushed} == {0, 1}
        assert all(free == 0 for _, free in flushed), flushed


def test_blocks_that_a_dead_sender_was_granted_are_flushed_before_the_next_tenant_has_them(gpu: StandIn) -> None:
    """They come out of quarantine the moment they enter it: after the proof that the sender is gone."""
    with quay(gpu, pool_device="cuda", poison=False, clean=False) as here:
        here.sender.announce(1, 1000)  # a loan goes out, and no rows come
        transfer = here.receive()
        eventually(lambda: here.receiver.free_blocks == 0)
        flushed: list[tuple[int, int]] = []
        transport: Any = here.receiver.carriers.transports[0]
        transport.flush = lambda region: flushed.append((region.id, here.receiver.machine.pool.free_count))
        here.crash(here.sender)
        eventually(lambda: here.receiver.machine.gone)
        transfer.cancel()
        eventually(lambda: here.receiver.free_blocks == 4)
        assert {region for region, _ in flushed} == {0, 1}
        assert all(free == 0 for _, free in flushed), flushed


@pytest.mark.parametrize("dead", [False, True], ids=["fenced", "dead"])
def test_a_gpu_that_never_flushes_costs_fresh_memory_and_a_line_of_the_log(
    gpu: StandIn, caplog: pytest.LogCaptureFixture, dead: bool
) -> None:
    """No proof for the blocks of lost writes is one, then: they are replaced, and what it says is said once."""
    settings = {"peer_timeout": 1.0, "heartbeat": 0.1}
    with quay(gpu, pool_device="cuda", poison=False, clean=False, **settings) as here:
        here.sender.announce(1, 1000)  # a loan goes out, and no rows come
        transfer = here.receive()
        eventually(lambda: here.receiver.free_blocks == 0)
        transport: Any = here.receiver.carriers.transports[0]
        asked: list[int] = []

        def refuse(region: Any) -> None:
            asked.append(region.id)
            raise DeviceError("the flush failed", room=len(asked))

        transport.flush = refuse
        if dead:
            here.crash(here.sender)
        else:
            transfer.cancel()
        eventually(lambda: here.receiver.free_blocks == 4)
        assert len(asked) > 1
        for room in () if dead else (2, 3):
            here.sender.send(room, **rows(300))
            with pytest.raises(DeviceError):
                here.receive(room).result(PATIENCE)
        told = [record.getMessage() for record in caplog.records if "the flush failed" in record.getMessage()]
        assert len(told) == 1, told
        assert "internal error" not in caplog.text


# ---- what goes wrong -----------------------------------------------------------------------------------------


def test_no_memory_for_the_rows_is_that_transfers_error(gpu: StandIn) -> None:
    with quay(gpu) as here:
        gpu.memory_left = 1000
        here.sender.send(1, **rows(300))
        with pytest.raises(TooLarge, match="CUDA out of memory"):
            here.receive().result(PATIENCE)
        gpu.memory_left = None
        here.carry(300, room=2)


def test_no_memory_for_the_pool_is_said_with_the_place(gpu: StandIn) -> None:
    gpu.memory_left = 1000
    with pytest.raises(ConfigError, match=r"takes \d+ bytes, and about 1000 are available on cuda:0"):
        quay(gpu, pool_device="cuda")


@pytest.mark.parametrize("pool", ["cpu", "cuda"])
def test_a_gpu_that_fails_ends_the_transfer_and_leaks_nothing(gpu: StandIn, pool: str) -> None:
    with quay(gpu, pool_device=pool, poison=False) as here:
        gpu.held = True
        here.sender.send(1, **rows(300))
        transfer = here.receive()
        eventually(lambda: here.receiver._gatherer.busy)
        gpu.broken = "CUDA error: an illegal memory access was encountered"
        with pytest.raises(DeviceError, match=r"a copy of the GPU failed: CUDA error: an illegal memory access"):
            transfer.result(PATIENCE)
        gpu.broken = ""
        gpu.release()
        assert_clean(here.sender, here.receiver)
        here.carry(300, room=2)


@pytest.mark.parametrize("pool", ["cpu", "cuda"])
def test_a_gpu_that_takes_no_copies_ends_the_transfer_and_leaks_nothing(gpu: StandIn, pool: str) -> None:
    with quay(gpu, pool_device=pool, poison=False) as here:
        gpu.refuses_copies = "CUDA error: unspecified launch failure"
        here.sender.send(1, **rows(300))
        with pytest.raises(DeviceError, match="the GPU does not copy: CUDA error: unspecified"):
            here.receive().result(PATIENCE)
        gpu.refuses_copies = ""
        assert_clean(here.sender, here.receiver)
        here.carry(300, room=2)


@pytest.mark.parametrize("kind", [CARD, ENGINE], ids=["card", "engine"])
@pytest.mark.parametrize("how", ["at an event", "at a copy", "while it computes"])
def test_a_gpu_that_fails_on_the_embedding_side_ends_the_transfer_on_both(
    gpu: StandIn,
    kind: dict[str, bool],
    how: str,
) -> None:
    with quay(gpu, kind, destination_device="cpu") as here:
        there = gpu.rows(rows(300))
        gpu.held = True
        if how == "at a copy":
            gpu.refuses_copies = "CUDA error: no"
        sending = here.sender.announce(1, 300)
        transfer = here.receive()
        if how == "while it computes":
            gpu.caller[0].add(lambda: None)
        sending.put(0, **there)
        if how == "at an event":
            eventually(lambda: here.sender._poster._preparing)
        if how != "at a copy":
            gpu.broken = "CUDA error: no"
        with pytest.raises(DeviceError, match="CUDA error: no"):
            sending.wait(PATIENCE)
        with pytest.raises(DeviceError):
            transfer.result(PATIENCE)
        gpu.broken = gpu.refuses_copies = ""
        gpu.release()
        assert_clean(here.sender, here.receiver)
        given = rows(300, seed=2)
        here.sender.send(2, **gpu.rows(given))
        assert_same(here.receive(2).result(PATIENCE), given)


@pytest.mark.parametrize("kind", [CARD, ENGINE], ids=["card", "engine"])
@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_an_endpoint_closes_while_a_gpu_copies_and_keeps_its_memory(
    gpu: StandIn,
    side: str,
    kind: dict[str, bool],
) -> None:
    here = quay(gpu, kind, clean=False, poison=False, destination_device="cpu" if side == "sender" else "cuda")
    with here:
        gpu.held = True
        given = gpu.rows(rows(300)) if side == "sender" else rows(300)
        here.sender.send(1, **given)
        here.receive()
        gpu.caller[0].run()
        if side == "sender":
            eventually(lambda: here.sender._poster._preparing)
            prepared: Prepared = here.sender._poster._preparing[0]
            assert prepared.stage is not None
            memory = weakref.ref(prepared.stage.memory.owner)  # type: ignore[arg-type]
            del prepared
        else:
            eventually(lambda: here.receiver._gatherer._copying)
            memory = weakref.ref(here.receiver._gatherer.destinations[1]._tensors["input_embeds"])
        begun = time.monotonic()
        here.close()
        assert time.monotonic() - begun < 30  # it ended; how long it may take is CLOSE_SECONDS and LINGER_SECONDS
        here.ends.clear()
        here.receivers.clear()
        del here.sender, given
        gc.collect()
        kept = memory() is not None and bool(copying._outliving)
        if not kept:  # what is in line would write to what is somebody else's by now
            for line in gpu.lines:
                line.work.clear()
        assert kept, "a copy is under way to memory that was given up"
    gpu.release()
    copying.keep([])
    assert not copying._outliving


# ---- settings ------------------------------------------------------------------------------------------------


def test_a_number_that_no_gpu_has_is_refused(gpu: StandIn) -> None:
    with pytest.raises(ConfigError, match="destination_device is cuda:2, and there are 2 of them") as caught:
        tf.Receiver(LAYOUT, transport="memory", destination_device="cuda:2")
    assert "CUDA_VISIBLE_DEVICES" in caught.value.hint


def test_a_pool_that_no_transport_takes_is_refused_with_every_reason(gpu: StandIn) -> None:
    with pytest.raises(ConfigError, match=r"pool_device is cuda:0, and no transport here takes cuda memory") as caught:
        tf.Receiver(LAYOUT, transport="shm", pool_device="cuda")
    assert "shm: the pool lies on cuda:0, and it takes cpu memory" in caught.value.cause
    assert "destination_device" in caught.value.hint


def test_of_several_transports_those_that_do_not_take_the_pool_are_left_out(gpu: StandIn) -> None:
    transports = [open_transport("shm"), GpuTransport(gpu)]
    with Receiver(LAYOUT, transports, Settings(pool_device="cuda:1")) as receiver:
        assert [t.name for t in receiver.carriers.transports] == ["memory"]
        [verdict] = receiver.carriers.rejected
        assert (verdict.name, verdict.reason) == ("shm", "the pool lies on cuda:1, and it takes cpu memory")
        assert {m.place for m in (receiver._buffers.memory(k) for k in range(8))} == {("cuda", 1)}


@pytest.mark.parametrize("setting", ["pool_device", "destination_device"])
def test_without_cuda_the_cause_and_the_remedy_are_told(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # what torch says on a machine without one
    with pytest.raises(ConfigError, match=rf"{setting} is cuda, and torch .*") as caught:
        tf.Receiver(LAYOUT, transport="memory", **{setting: "cuda"})
    assert f"or leave {setting} at cpu" in caught.value.hint
