"""The little of CUDA that is needed beside torch, and without it: memory that a network card may write to, the flush
after which a GPU sees what was written there (GPUDirect RDMA), and host memory that a GPU copies from on its own.

Through libcuda.so.1 itself. Nothing of it is called before the first allocation or flush: a process that has called
`cuInit` has children, by fork, that cannot. What can be told before that comes from the kernel's files.

Not run on a GPU by its authors; the calls and numbers are those of cuda.h (the enumerations named beside them).
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tensorferry.core.errors import DeviceError, TooLarge
from tensorferry.core.memory import Memory

log = logging.getLogger("tensorferry.devices")

LIBRARY = "libcuda.so.1"

PEER_MEMORY_MODULES = ("nvidia_peermem", "nv_peer_mem")
"""Kernel modules through which an RDMA card's driver is given GPU memory; the second is the older one."""

GPU_PAGE = 64 << 10
"""What the driver pins and exports GPU memory in: allocations are rounded up to it."""

_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
_SYNC_MEMOPS = 6  # CU_POINTER_ATTRIBUTE_SYNC_MEMOPS
_FLUSH_OPTIONS = 117  # CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS
_FLUSH_BY_HOST = 1  # CU_FLUSH_GPU_DIRECT_RDMA_WRITES_OPTION_HOST
_PORTABLE = 1  # CU_MEMHOSTREGISTER_PORTABLE: for the contexts of all devices
_WRITES_ORDERING = 118  # CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING
_TARGET_CURRENT_CONTEXT = 0  # CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX
_TO_OWNER = 100  # CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER, CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER


# ---- what the kernel shows -----------------------------------------------------------------------------------


def why_no_cuda(root: Path = Path("/")) -> tuple[str, str]:
    """Why this process cannot have CUDA memory, and what helps. ("", "") where nothing that we can see stands against
    it. Calls nothing of CUDA."""
    if not any((root / "dev").glob("nvidia[0-9]*")):
        return "there is no NVIDIA GPU here", "Load the NVIDIA driver; in a container: `--gpus all`, or its equivalent"
    try:
        ctypes.CDLL(LIBRARY)
    except OSError as error:
        return f"{LIBRARY} cannot be loaded ({error})", "It comes with the NVIDIA driver, and into a container with it"
    return "", ""


def peer_memory(root: Path = Path("/")) -> str:
    """The loaded kernel module that gives GPU memory to RDMA cards; "" where there is none (DMA-BUF may do)."""
    return next((name for name in PEER_MEMORY_MODULES if (root / "sys/module" / name).exists()), "")


def carried(cause: str, remedy: str, dma_buf: str, root: Path = Path("/")) -> dict[str, str]:
    """Facts for a probe: whether CUDA memory can be carried. `cause`: why not, "" where it can be. `dma_buf`: how this
    engine is made to use DMA-BUF, the way without a peer-memory module."""
    if cause:
        return {"cuda_memory": f"no: {cause}" + (f". {remedy}" if remedy else "")}
    module = peer_memory(root)
    by = f"through {module}" if module else f"only by DMA-BUF: nvidia_peermem is not loaded (`modprobe`). {dma_buf}"
    return {"cuda_memory": f"yes, {by}"}


# ---- the driver ----------------------------------------------------------------------------------------------


class Driver:
    """libcuda behind the few calls that are needed. Any thread may call anything."""

    def __init__(self, library: Any) -> None:
        self._library = library
        # Reentrant: any allocation in there may run the garbage collector, and what it collects may be memory of a GPU,
        # which is freed in a context of its own.
        self._lock = threading.RLock()
        self._contexts: dict[int, ctypes.c_void_p] = {}  # primary ones, of each device that was used
        self._flushes: dict[int, bool] = {}
        self._pid = os.getpid()
        self._call("cuInit", 0)

    def allocate(self, nbytes: int, device: int) -> Memory:
        """Memory of a device, on a GPU page, whose copies by the synchronous calls of CUDA are in order with what a
        card reads and writes (SYNC_MEMOPS). Freed with its last reference. Raises TooLarge, DeviceError."""
        address = ctypes.c_uint64()
        size = -(-nbytes // GPU_PAGE) * GPU_PAGE
        with self._current(device):
            self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
            owner = _Allocation(self, address.value, device)
            on = ctypes.c_uint(1)
            self._call("cuPointerSetAttribute", ctypes.byref(on), _SYNC_MEMOPS, ctypes.c_uint64(address.value))
        return Memory(address.value, nbytes, "cuda", owner, device)

    def pin(self, memory: Memory, device: int) -> Memory:
        """The same host memory, locked in place for as long as what is returned lives, so that copies from and to it
        need no processor. Raises DeviceError where it cannot be. (The runtime's call for this would leave its error
        behind for the next kernel of the thread; the driver's does not.)"""
        with self._current(device):
            start, size = ctypes.c_void_p(memory.address), ctypes.c_size_t(memory.nbytes)
            self._call("cuMemHostRegister_v2", start, size, _PORTABLE)
        return Memory(memory.address, memory.nbytes, memory.kind, _Pinned(self, memory, device), memory.device)

    def free(self, address: int, device: int) -> None:
        self._undo("cuMemFree_v2", ctypes.c_uint64(address), device)

    def unpin(self, memory: Memory, device: int) -> None:
        self._undo("cuMemHostUnregister", ctypes.c_void_p(memory.address), device)

    def _undo(self, name: str, address: object, device: int) -> None:
        """Called when an object goes: whatever is wrong has nobody left to be told to."""
        if os.getpid() != self._pid:  # a forked child has the numbers and not the memory
            return
        try:
            with self._current(device):
                self._call(name, address)
        except DeviceError as problem:
            log.warning("memory of cuda:%d is not given back: %s", device, problem)

    def flush(self, device: int) -> None:
        """What a card has written to a device's memory is visible to it from here on. Does nothing where the hardware
        sees to it. Raises DeviceError where there is neither."""
        with self._current(device) as handle:
            if device not in self._flushes:
                ordering = self._attribute(_WRITES_ORDERING, handle)
                if ordering < _TO_OWNER and not self._attribute(_FLUSH_OPTIONS, handle) & _FLUSH_BY_HOST:
                    raise DeviceError(
                        f"cuda:{device} neither orders what a network card writes to it nor can be told to "
                        "(cuFlushGPUDirectRDMAWrites)",
                        hint="Leave pool_device at cpu: rows are gathered to the GPU from there",
                    )
                self._flushes[device] = ordering < _TO_OWNER
            if self._flushes[device]:
                self._call("cuFlushGPUDirectRDMAWrites", _TARGET_CURRENT_CONTEXT, _TO_OWNER)

    def _attribute(self, number: int, handle: ctypes.c_int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), number, handle)
        return value.value

    @contextmanager
    def _current(self, device: int) -> Iterator[ctypes.c_int]:
        """The device's primary context, which torch uses as well, is this thread's; and the one of before again."""
        handle = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(handle), device)
        with self._lock:
            if device not in self._contexts:
                context = ctypes.c_void_p()
                self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
                self._contexts[device] = context
        self._call("cuCtxPushCurrent_v2", self._contexts[device])
        try:
            yield handle
        finally:
            left = ctypes.c_void_p()
            self._call("cuCtxPopCurrent_v2", ctypes.byref(left))

    def _call(self, name: str, *arguments: Any) -> None:
        function = getattr(self._library, name, None)
        if function is None:
            raise DeviceError(f"{LIBRARY} has no {name}", hint="The NVIDIA driver is too old: CUDA 11.3 is needed")
        code = function(*arguments)
        if code == 0:
            return
        text = ctypes.c_char_p()
        known = self._library.cuGetErrorName(code, ctypes.byref(text)) == 0 and text.value
        told = f"{name} failed: {text.value.decode() if known and text.value else f'CUDA error {code}'}"
        if code == _OUT_OF_MEMORY:
            raise TooLarge(told, hint="Lower pool_blocks or staging_bytes, or free memory of the GPU")
        raise DeviceError(told)


class _Allocation:
    """Owns memory of a device."""

    __slots__ = ("__weakref__",)

    def __init__(self, driver: Driver, address: int, device: int) -> None:
        # Not at exit: engines may still be reading then, and the process's end frees everything anyway.
        weakref.finalize(self, driver.free, address, device).atexit = False


class _Pinned:
    """Owns the locking of host memory, and what owns that."""

    __slots__ = ("__weakref__",)

    def __init__(self, driver: Driver, memory: Memory, device: int) -> None:
        weakref.finalize(self, driver.unpin, memory, device).atexit = False


_driver: Driver | None = None
_loading = threading.Lock()


def driver() -> Driver:
    """The driver of this process. Raises DeviceError where there is none."""
    global _driver
    with _loading:
        if _driver is None:
            try:
                library = ctypes.CDLL(LIBRARY)
            except OSError as error:
                raise DeviceError(
                    f"{LIBRARY} cannot be loaded: {error}",
                    hint="It comes with the NVIDIA driver, and into a container with it",
                ) from error
            _driver = Driver(library)
        return _driver
