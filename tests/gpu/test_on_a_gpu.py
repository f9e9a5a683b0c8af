"""On a real GPU: where memory may lie, streams and events as they are, and the driver's own calls.

What a card writes to GPU memory takes an RDMA device as well; a transport of this file's own stands in for it, which
copies by the driver.
"""

from __future__ import annotations

import ctypes
import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from memory_kit import random_rows, same_bytes

import tensorferry as tf
from tensorferry.backends.memory import MemoryOptions, MemoryTransport
from tensorferry.core.cuda_driver import driver
from tensorferry.core.errors import ConfigError, TooLarge
from tensorferry.core.memory import Memory, host_memory
from tensorferry.core.transport import Status
from tensorferry.plugins.registry import open_transport, probe

LAYOUT = tf.embedding_layout(64)
PATIENCE = 60.0
WAYS = [("memory", "cpu"), ("shm", "cpu"), ("tcp", "cpu"), ("card", "cpu"), ("card", "cuda:0")]
"""(transport, where the pool lies)"""


class Card(MemoryTransport):
    """Writes to GPU memory of this process, by the driver: what a network card would do."""

    def __init__(self) -> None:
        super().__init__(MemoryOptions())
        self.capabilities = replace(self.capabilities, registers_sources=True)
        self._take_cuda()

    def _start(self, peer: Any, batch: Any, plan: Any) -> None:
        library = ctypes.CDLL("libcuda.so.1")
        with driver()._current(0):
            for memory, offset, source, nbytes in plan:
                target = ctypes.c_uint64(memory.address + offset)
                assert library.cuMemcpy(target, ctypes.c_uint64(source), ctypes.c_size_t(nbytes)) == 0
            assert library.cuCtxSynchronize() == 0
        self._copier.finish(batch, Status.DONE)


def opened(kind: str) -> Any:
    return Card() if kind == "card" else open_transport(kind)


def rows(total: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return random_rows(LAYOUT, LAYOUT.names, total, seed)


def assert_same(result: tf.Result, given: dict[str, torch.Tensor], device: torch.device) -> None:
    for name, tensor in given.items():
        received = result[name]
        assert received is not None
        assert received.device == device
        assert same_bytes(received.cpu(), tensor.cpu())


@pytest.mark.parametrize("integrity", ["full", "sampled", "off"])
@pytest.mark.parametrize("on_gpu", [False, True], ids=["host rows", "GPU rows"])
@pytest.mark.parametrize("destination", ["cpu", "cuda:0"])
@pytest.mark.parametrize(("kind", "pool"), WAYS)
def test_every_byte_arrives_wherever_it_lies(
    kind: str, pool: str, destination: str, on_gpu: bool, integrity: str
) -> None:
    given = rows(3000)
    moved = {name: tensor.cuda() for name, tensor in given.items()} if on_gpu else given
    common: dict[str, Any] = {"integrity": integrity, "pool_blocks": 8}
    with (
        tf.Sender(LAYOUT, transport=opened(kind), **common) as sender,
        tf.Receiver(
            LAYOUT, transport=opened(kind), pool_device=pool, destination_device=destination, poison=True, **common
        ) as receiver,
    ):
        for room in (1, 2):  # the second finds staging, streams and scratch as the first left them
            sending = sender.send(room, **moved)
            result = receiver.receive(room, sender.address).result(PATIENCE)
            assert_same(result, given, torch.device(destination))
            sending.wait(PATIENCE)
        assert not receiver.stale_writes


def test_rows_that_a_kernel_still_computes_are_waited_for() -> None:
    given = rows(2000)
    with (
        tf.Sender(LAYOUT, transport="memory") as sender,
        tf.Receiver(LAYOUT, transport="memory", destination_device="cuda") as receiver,
    ):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # about a tenth of a second
            moved = {name: tensor.to("cuda", non_blocking=True).clone() for name, tensor in given.items()}
            sender.send(1, **moved)
        assert_same(receiver.receive(1, sender.address).result(PATIENCE), given, torch.device("cuda", 0))


def test_a_result_can_be_used_on_the_callers_stream_and_dropped_at_once() -> None:
    with (
        tf.Sender(LAYOUT, transport="memory") as sender,
        tf.Receiver(LAYOUT, transport="memory", destination_device="cuda") as receiver,
    ):
        sums = []
        given = [rows(1500, seed) for seed in range(6)]
        stream = torch.cuda.Stream()
        for room, one in enumerate(given):
            sender.send(room, fill_ids=one["fill_ids"], input_embeds=one["input_embeds"])
            with torch.cuda.stream(stream):
                result = receiver.receive(room, sender.address).result(PATIENCE)
                torch.cuda._sleep(20_000_000)
                assert result.fill_ids is not None
                sums.append(result.fill_ids.long().sum())
            del result  # its memory must not be the next room's before the sum is made
        stream.synchronize()
        assert [int(value) for value in sums] == [int(one["fill_ids"].long().sum()) for one in given]


def test_rows_are_handed_out_as_they_arrive() -> None:
    given = rows(3000)
    with (
        tf.Sender(LAYOUT, transport="memory") as sender,
        tf.Receiver(LAYOUT, transport="memory", destination_device="cuda", pool_blocks=4) as receiver,
    ):
        sender.send(1, **given)
        transfer = receiver.receive(1, sender.address)
        parts = [part["fill_ids"].clone() for _, _, part in transfer.rows(PATIENCE)]
        assert torch.equal(torch.cat(parts).cpu(), given["fill_ids"])


def test_more_than_the_gpu_has_is_too_large() -> None:
    free, _ = torch.cuda.mem_get_info()
    layout = tf.embedding_layout(1024, torch.float32, mrope=False)
    total = free // layout.token_bytes + 100_000
    with (
        tf.Sender(layout, transport="memory") as sender,
        tf.Receiver(
            layout, transport="memory", destination_device="cuda", destination_budget=1 << 50, transfer_deadline=60
        ) as receiver,
    ):
        sender.announce(1, total)
        with pytest.raises(TooLarge):
            receiver.receive(1, sender.address).result(PATIENCE)


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="of them, counted from 0"):
        tf.Receiver(LAYOUT, transport="memory", destination_device="cuda:999")


def test_the_drivers_calls() -> None:
    memory = driver().allocate(1 << 20, 0)
    assert memory.address % 256 == 0
    driver().flush(0)
    host = host_memory(1 << 20)
    host.view()[:4] = b"abcd"
    pinned = driver().pin(host, 0)
    target = torch.as_tensor(_Interface(memory), device="cuda:0")
    target[:4].copy_(torch.frombuffer(pinned.view(), dtype=torch.uint8)[:4], non_blocking=True)
    torch.cuda.synchronize()
    assert bytes(target[:4].cpu().tolist()) == b"abcd"
    del target, memory, pinned
    gc.collect()
    assert torch.ones(1, device="cuda").item() == 1  # the context is as it was


class _Interface:
    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.__cuda_array_interface__ = {
            "shape": (memory.nbytes,), "typestr": "|u1", "data": (memory.address, False), "strides": None, "version": 3,
        }  # fmt: skip


@pytest.mark.parametrize("kind", ["mooncake", "nixl"])
def test_an_engine_writes_to_gpu_memory(kind: str) -> None:
    found = probe(kind).facts.get("cuda_memory", "it is not installed")
    if not found.startswith("yes"):
        pytest.skip(f"needs rdma: {kind} takes CUDA memory over RDMA alone ({found})")
    given = rows(3000)
    with (
        tf.Sender(LAYOUT, transport=kind) as sender,
        tf.Receiver(LAYOUT, transport=kind, pool_device="cuda", destination_device="cuda") as receiver,
    ):
        sender.send(1, **{name: tensor.cuda() for name, tensor in given.items()})
        assert_same(receiver.receive(1, sender.address).result(PATIENCE), given, torch.device("cuda", 0))
