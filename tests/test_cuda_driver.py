"""The calls to libcuda, against a library that is none: which ones are made, in which context, and what their errors
become. And what engines are told of CUDA memory."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tensorferry.backends import _mooncake_environment, _nixl_environment, mooncake, nixl
from tensorferry.backends._hostcopy import HostTransport
from tensorferry.backends._nixl_engine import Agent
from tensorferry.backends._nixl_gate import Gate
from tensorferry.backends.memory import MemoryOptions, MemoryTransport
from tensorferry.core import cuda_driver
from tensorferry.core.cuda_driver import GPU_PAGE, Driver, carried, why_no_cuda
from tensorferry.core.errors import DeviceError, TooLarge, TransportError, Unsupported
from tensorferry.core.memory import Memory, host_memory
from tensorferry.core.transport import Copy, RemoteRegion

ADDRESS = 0x7F00_0000_0000


class Library:
    """libcuda as a recorder. `fails`: code by name; `attributes`: value by number."""

    def __init__(self, *, lacks: str = "") -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fails: dict[str, int] = {}
        self.attributes = {118: 0, 117: 1}
        self.context: list[int] = []
        self.lacks = lacks

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu") or name == self.lacks:
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            plain = [getattr(a, "_obj", a) for a in arguments]  # what byref points to
            if name == "cuGetErrorName":
                plain[1].value = b"CUDA_ERROR_OF_ITS_OWN"
                return 0
            if name in self.fails:
                return self.fails[name]
            match name:
                case "cuDeviceGet":
                    plain[0].value = plain[1] + 100  # a handle is not the number
                case "cuDevicePrimaryCtxRetain":
                    plain[0].value = plain[1].value
                case "cuCtxPushCurrent_v2":
                    self.context.append(plain[0].value)
                case "cuCtxPopCurrent_v2":
                    self.context.pop()
                case "cuMemAlloc_v2":
                    plain[0].value = ADDRESS
                case "cuDeviceGetAttribute":
                    plain[0].value = self.attributes[plain[1]]
            told = [getattr(a, "value", a) for a in plain]
            self.calls.append((name, *told, "in", self.context[-1] if self.context else None))
            return 0

        return call

    def of(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]


@pytest.fixture
def library() -> Library:
    return Library()


@pytest.fixture
def driver(library: Library, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """What the whole process takes for its driver."""
    made = Driver(library)
    monkeypatch.setattr(cuda_driver, "_driver", made)
    return made


# ---- memory --------------------------------------------------------------------------------------------------


def test_memory_of_a_device_is_allocated_in_its_context_and_freed_with_its_last_reference(
    driver: Driver, library: Library
) -> None:
    memory = driver.allocate(1000, 1)
    assert (memory.address, memory.nbytes, memory.kind, memory.device) == (ADDRESS, 1000, "cuda", 1)
    assert library.of("cuMemAlloc_v2") == [(ADDRESS, GPU_PAGE, "in", 101)]
    assert library.of("cuPointerSetAttribute") == [(1, 6, ADDRESS, "in", 101)]
    assert library.of("cuMemFree_v2") == []
    del memory
    gc.collect()
    assert library.of("cuMemFree_v2") == [(ADDRESS, "in", 101)]
    assert library.context == []


def test_a_context_is_retained_once_a_device(driver: Driver, library: Library) -> None:
    kept = [driver.allocate(64, device) for device in (0, 1, 0)]
    assert len(library.of("cuDevicePrimaryCtxRetain")) == 2
    assert library.of("cuInit") == [(0, "in", None)]
    assert len(kept) == 3


def test_no_memory_is_too_large_and_leaves_the_callers_context(driver: Driver, library: Library) -> None:
    library.fails["cuMemAlloc_v2"] = 2
    with pytest.raises(TooLarge, match="cuMemAlloc_v2 failed: CUDA_ERROR_OF_ITS_OWN"):
        driver.allocate(1 << 40, 0)
    assert library.context == []


def test_memory_whose_attribute_cannot_be_set_is_not_left_behind(driver: Driver, library: Library) -> None:
    library.fails["cuPointerSetAttribute"] = 1
    with pytest.raises(DeviceError, match="cuPointerSetAttribute failed"):
        driver.allocate(64, 0)
    gc.collect()
    assert library.of("cuMemFree_v2") == [(ADDRESS, "in", 100)]


def test_host_memory_is_locked_for_as_long_as_what_was_given_lives(driver: Driver, library: Library) -> None:
    memory = host_memory(8192)
    pinned = driver.pin(memory, 0)
    assert (pinned.address, pinned.nbytes, pinned.kind) == (memory.address, 8192, "cpu")
    assert library.of("cuMemHostRegister_v2") == [(memory.address, 8192, 1, "in", 100)]
    view = pinned.view()
    del memory, pinned
    gc.collect()
    assert library.of("cuMemHostUnregister") == []
    view[:] = bytes(8192)  # still there
    del view
    gc.collect()
    assert len(library.of("cuMemHostUnregister")) == 1


def test_a_gpu_that_is_dead_is_not_asked_twice_for_what_goes(
    driver: Driver, library: Library, caplog: pytest.LogCaptureFixture
) -> None:
    memory = driver.allocate(64, 0)
    library.fails["cuMemFree_v2"] = 700
    del memory
    gc.collect()
    assert "memory of cuda:0 is not given back: cuMemFree_v2 failed" in caplog.text
    assert library.context == []


class Cycle:
    """What only the garbage collector sees the end of."""

    def __init__(self, owned: object) -> None:
        self.owned, self.me = owned, self


@pytest.mark.parametrize("device", [0, 1])
def test_a_collection_while_a_context_is_retained_may_free_memory(
    driver: Driver, library: Library, monkeypatch: pytest.MonkeyPatch, device: int
) -> None:
    gc.collect()
    gc.disable()
    try:
        Cycle(driver.allocate(64, 0))
        if device == 0:
            driver._contexts.clear()  # as where the same one is retained
        call, over = driver._call, threading.Event()

        def collecting(name: str, *arguments: Any) -> None:
            if name == "cuDevicePrimaryCtxRetain":
                gc.collect()
            call(name, *arguments)

        monkeypatch.setattr(driver, "_call", collecting)

        def use() -> None:
            with driver._current(device):
                over.set()

        threading.Thread(target=use, daemon=True).start()  # not here: without an RLock it never ends
        assert over.wait(15)
    finally:
        gc.enable()
    assert library.of("cuMemFree_v2") == [(ADDRESS, "in", 100)]
    assert set(driver._contexts) == {0, device}


# ---- flush ---------------------------------------------------------------------------------------------------


def test_what_a_card_wrote_is_flushed_to_the_gpu_that_owns_it(driver: Driver, library: Library) -> None:
    driver.flush(1)
    driver.flush(1)
    assert library.of("cuFlushGPUDirectRDMAWrites") == [(0, 100, "in", 101)] * 2
    assert len(library.of("cuDeviceGetAttribute")) == 2  # asked once


@pytest.mark.parametrize("ordering", [100, 200])
def test_a_gpu_that_orders_writes_itself_needs_no_flush(driver: Driver, library: Library, ordering: int) -> None:
    library.attributes[118] = ordering
    driver.flush(0)
    assert library.of("cuFlushGPUDirectRDMAWrites") == []


def test_a_gpu_that_does_neither_is_refused(driver: Driver, library: Library) -> None:
    library.attributes[117] = 2
    with pytest.raises(DeviceError, match="cuda:0 neither orders what a network card writes") as caught:
        driver.flush(0)
    assert "pool_device" in caught.value.hint


def test_a_driver_that_is_too_old_is_named() -> None:
    with pytest.raises(DeviceError, match="has no cuFlushGPUDirectRDMAWrites") as caught:
        Driver(Library(lacks="cuFlushGPUDirectRDMAWrites")).flush(0)
    assert "CUDA 11.3" in caught.value.hint


# ---- what can be told without it -----------------------------------------------------------------------------


def machine(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


def test_a_machine_without_a_gpu_says_so_and_what_helps(tmp_path: Path) -> None:
    cause, remedy = why_no_cuda(machine(tmp_path, "dev/null", "dev/nvidiactl"))
    assert (cause, "--gpus" in remedy) == ("there is no NVIDIA GPU here", True)


def test_a_gpu_without_its_library_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "LIBRARY", "libcuda-that-is-not-there.so")
    cause, _ = why_no_cuda(machine(tmp_path, "dev/nvidia0"))
    assert cause.startswith("libcuda-that-is-not-there.so cannot be loaded")
    monkeypatch.setattr(cuda_driver, "_driver", None)
    with pytest.raises(DeviceError, match=r"libcuda-that-is-not-there\.so cannot be loaded"):
        cuda_driver.driver()


def test_facts_tell_whether_a_card_is_given_gpu_memory_and_by_what(tmp_path: Path) -> None:
    assert carried("no such thing", "Get one", "", tmp_path) == {"cuda_memory": "no: no such thing. Get one"}
    told = carried("", "", "SET=1 does it", tmp_path)["cuda_memory"]
    assert told == "yes, only by DMA-BUF: nvidia_peermem is not loaded (`modprobe`). SET=1 does it"
    machine(tmp_path, "sys/module/nvidia_peermem/version")
    assert carried("", "", "SET=1 does it", tmp_path) == {"cuda_memory": "yes, through nvidia_peermem"}


# ---- what engines are told -----------------------------------------------------------------------------------


class Taking(MemoryTransport):
    """Any of the built-in transports, as one whose engine moves CUDA memory."""

    def __init__(self) -> None:
        super().__init__(MemoryOptions())
        self._take_cuda()


@pytest.fixture
def taking(driver: Driver) -> Iterator[Taking]:
    transport = Taking()
    yield transport
    transport.close()


def test_an_instance_that_takes_cuda_memory_says_so_and_the_class_does_not(taking: Taking) -> None:
    assert taking.capabilities.memory_kinds == {"cpu", "cuda"}
    assert taking.capabilities.needs_flush
    assert MemoryTransport.capabilities.memory_kinds == {"cpu"}
    assert not MemoryTransport.capabilities.needs_flush


def test_it_allocates_registers_and_flushes_what_lies_on_a_gpu(taking: Taking, library: Library) -> None:
    region = taking.register(taking.allocate(4096, "cuda", 1))
    assert region.memory.place == ("cuda", 1)
    taking.flush(taking.register(taking.allocate(4096)))
    assert library.of("cuFlushGPUDirectRDMAWrites") == []
    taking.flush(region)
    assert library.of("cuFlushGPUDirectRDMAWrites") == [(0, 100, "in", 101)]


def test_one_that_does_not_refuses_all_three() -> None:
    transport = MemoryTransport(MemoryOptions())
    for call in (
        lambda: transport.allocate(64, "cuda", 0),
        lambda: transport.register(Memory(ADDRESS, 64, "cuda")),
        lambda: transport.flush(transport.register(transport.allocate(64))),
    ):
        with pytest.raises(Unsupported):
            call()
    transport.close()


@pytest.mark.parametrize(
    ("cpu_build", "protocol", "cause"),
    [
        (True, "rdma", "this is the engine's build without CUDA"),
        (False, "tcp", "it is taken over RDMA alone"),
        (False, "rdma", ""),
    ],
)
def test_mooncake_takes_cuda_memory_by_its_cuda_build_over_rdma(
    monkeypatch: pytest.MonkeyPatch, cpu_build: bool, protocol: str, cause: str
) -> None:
    monkeypatch.setattr(_mooncake_environment, "is_cpu_build", lambda: cpu_build)
    monkeypatch.setattr(_mooncake_environment, "why_no_cuda", lambda: ("", ""))
    assert _mooncake_environment.why_not_cuda(protocol)[0] == cause


@pytest.mark.parametrize(
    ("backend", "ways", "tls", "cause"),
    [
        ("LIBFABRIC", {"rdma"}, "", "the backend is LIBFABRIC"),
        ("UCX", {"tcp", "memcpy"}, "", "it is taken over RDMA alone"),
        ("UCX", {"rdma"}, "rc", "UCX_TLS=rc leaves CUDA out"),
        ("UCX", {"rdma"}, "rc,cuda_copy", ""),
        ("UCX", {"rdma"}, "", ""),
    ],
)
def test_nixl_takes_cuda_memory_where_ucx_has_rdma_and_cuda(
    monkeypatch: pytest.MonkeyPatch, backend: str, ways: set[str], tls: str, cause: str
) -> None:
    monkeypatch.setenv("UCX_TLS", tls)
    monkeypatch.setattr(_nixl_environment, "why_no_cuda", lambda: ("", ""))
    monkeypatch.setattr(_nixl_environment, "bundled", lambda module, pattern: [Path("libuct_cuda.so")])
    assert _nixl_environment.why_not_cuda("nixl_cu12", backend, ways)[0] == cause


@pytest.mark.parametrize("module", [mooncake, nixl])
def test_an_engine_that_finds_nothing_against_it_takes_cuda_memory(
    module: Any, monkeypatch: pytest.MonkeyPatch, driver: Driver
) -> None:
    cls = module.MooncakeTransport if module is mooncake else module.NixlTransport
    if not (probe := cls.probe()).usable:
        pytest.skip(f"needs {cls.name}: {probe.reason}")
    assert probe.facts["cuda_memory"].startswith(("no: ", "yes, "))
    monkeypatch.setattr(module.environment, "why_not_cuda", lambda *told: ("", ""))
    transport: HostTransport[Any] = cls(cls.options_type())
    try:
        assert transport.capabilities.memory_kinds == {"cpu", "cuda"}
        assert cls.capabilities.memory_kinds == {"cpu"}
        if module is nixl:  # it looks at once, and there is no GPU behind this address
            before = transport.describe()
            with pytest.raises(TransportError) as caught:
                transport.register(transport.allocate(4096, "cuda", 0))
            assert "nvidia_peermem" in caught.value.hint
            assert transport.describe() == before
        assert transport.register(transport.allocate(4096)).memory.kind == "cpu"
    finally:
        transport.close()


class Descriptors:
    """A list of the NIXL binding's."""

    def __init__(self, segment: str, size: int) -> None:
        self.segment, self.entries = segment, []  # type: ignore[var-annotated]

    def addDesc(self, entry: tuple[Any, ...]) -> None:
        self.entries.append(entry)


class Binding:
    DRAM_SEG, VRAM_SEG, NIXL_WRITE = "DRAM", "VRAM", "write"
    nixlRegDList = nixlXferDList = Descriptors


class Recorder:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def registerMem(self, entries: Descriptors, backends: Any) -> None:
        self.seen.append((entries.segment, entries.entries))

    def createXferReq(self, kind: str, local: Descriptors, remote: Descriptors, *rest: Any) -> int:
        self.seen.append([(d.segment, d.entries) for d in (local, remote)])
        return 1


def test_nixl_is_told_the_segment_and_the_gpu_on_either_side() -> None:
    agent = Agent.__new__(Agent)
    agent._nixl, agent._agent, agent._backend, agent._memory = Binding(), Recorder(), 7, {}
    agent._pins, agent._gate = False, Gate()
    agent.register(Memory(ADDRESS, 64, "cuda", None, 3))
    agent.register(Memory(4096, 64))
    agent.prepare("peer", [(1, 2, 3)], (-1, 2))
    agent.prepare("peer", [(1, 2, 3)], (4, -1))
    assert agent._agent.seen == [
        ("VRAM", [(ADDRESS, 64, 3, "")]),
        ("DRAM", [(4096, 64, 0, "")]),
        [("DRAM", [(1, 3, 0)]), ("VRAM", [(2, 3, 2)])],
        [("VRAM", [(1, 3, 4)]), ("DRAM", [(2, 3, 0)])],
    ]


def test_a_nixl_post_is_cut_by_where_its_bytes_lie() -> None:
    cls = nixl.NixlTransport
    if not (probe := cls.probe()).usable:
        pytest.skip(f"needs nixl: {probe.reason}")
    transport = cls(nixl.NixlOptions(workers=1))
    try:
        jobs: list[Any] = []
        transport._crew.write = jobs.append  # type: ignore[method-assign]
        here = transport.register(transport.allocate(4096))
        peer = transport.connect(transport.describe())
        peer.regions[9, 9], peer.addresses[9, 9] = 4096, (ADDRESS, 1)  # as a peer's descriptor would tell it
        own = RemoteRegion(here.id, here.generation)
        transport.post(peer, [Copy(here, 0, RemoteRegion(9, 9), 64, 100), Copy(here, 200, own, 1000, 100)])
        [job] = jobs
        start = here.memory.address
        assert sorted(job.parts) == [
            ((-1, -1), [(start + 200, start + 1000, 100)]),
            ((-1, 1), [(start, ADDRESS + 64, 100)]),
        ]
    finally:
        transport.close()
