"""Copies by a GPU: put in line on a stream of their own, over when an event says so, so that nobody who must not wait
ever does. All of torch.cuda that is used stands in `Cuda`, behind names of our own.

Not run on a GPU by its authors (docs/cuda.md).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from itertools import groupby
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from tensorferry.core.copying import Batch, Block, Copying, Device, Reading, View, keep, memory_of
from tensorferry.core.cuda_driver import driver
from tensorferry.core.digest import SAMPLE_BYTES, SAMPLE_PERIOD, Sample, is_sampled
from tensorferry.core.errors import DeviceError, FerryError
from tensorferry.core.memory import HOST, Memory, Place

log = logging.getLogger("tensorferry.devices")


class Event(Protocol):
    def query(self) -> bool: ...


class Cuda:
    """What of torch.cuda is used, behind names of our own."""

    kind = "cuda"

    def why_not(self) -> tuple[str, str]:
        """Why there is none here, and what helps; ("", "") where there is one."""
        if torch.version.cuda is None and torch.version.hip is None:
            return f"torch {torch.__version__} is built without CUDA", "Install the CUDA build of torch"
        if not torch.cuda.is_available():
            return "torch finds no CUDA device", "Check `nvidia-smi`, CUDA_VISIBLE_DEVICES, and the container's GPUs"
        return "", ""

    def count(self) -> int:
        return torch.cuda.device_count()

    def current(self) -> int:
        """The number of the calling thread's device."""
        return torch.cuda.current_device()

    def available(self, device: int) -> int:
        return int(torch.cuda.mem_get_info(device)[0])

    def place_of(self, tensor: torch.Tensor) -> Place | None:
        """Where a tensor lies, if that is here."""
        return Place("cuda", tensor.get_device()) if tensor.is_cuda else None

    def view(self, memory: Memory) -> torch.Tensor:
        """Memory of a device as a flat tensor of bytes."""
        return torch.as_tensor(_Array(memory), device=f"cuda:{memory.device}")

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=f"cuda:{device}")

    def scratch(self, nbytes: int) -> torch.Tensor:
        """Page-locked host memory, of torch's cache of such."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def pin(self, memory: Memory, device: int) -> Memory:
        return driver().pin(memory, device)

    def stream(self, device: int) -> Any:
        return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def using(self, stream: Any) -> AbstractContextManager[Any]:
        """Inside, what is asked of the stream's device goes to this stream."""
        return torch.cuda.stream(stream)

    def event(self, stream: Any) -> Event:
        """Over when all is that was put on the stream so far."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
        return event

    def arrival(self, device: int) -> Event:
        """The same of the stream that the calling thread uses at this moment."""
        return self.event(torch.cuda.current_stream(device))

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def zero(self, target: torch.Tensor) -> None:
        target.zero_()

    def wait(self, stream: Any) -> None:
        stream.synchronize()

    def claim(self, tensor: torch.Tensor) -> None:
        """The stream that the calling thread uses now works on this tensor: its memory is not given to others before
        that is over, whenever the tensor is dropped."""
        tensor.record_stream(torch.cuda.current_stream(tensor.device))


class _Array:
    """Device memory as other libraries are shown it: torch makes a tensor of it that holds this, and this the owner."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.__cuda_array_interface__ = {
            "shape": (memory.nbytes,), "typestr": "|u1", "data": (memory.address, False), "strides": None, "version": 3,
        }  # fmt: skip


class Gpu(Device):
    """One GPU, or two between which is copied, and the host. One thread only (the endpoint's I/O thread)."""

    def __init__(self, runtime: Cuda, devices: Sequence[int]) -> None:
        self._runtime = runtime
        self._devices = tuple(devices)
        try:
            self._streams = [runtime.stream(device) for device in self._devices]
        except RuntimeError as error:
            raise DeviceError(f"the GPU gives no stream: {first_line(error)}") from error

    def view(self, memory: Memory) -> View:
        if not memory.nbytes:  # no rows: neither torch nor CUDA takes an address for that
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        if memory.kind != self._runtime.kind:
            return torch.frombuffer(memory.view(), dtype=torch.uint8)
        try:
            return self._runtime.view(memory)
        except RuntimeError as error:
            raise DeviceError(f"torch does not take {memory}: {first_line(error)}") from error

    def batch(self) -> Batch:
        return _GpuBatch(self._runtime, self._streams)

    def read(self, blocks: Sequence[Block], mode: str) -> Reading:
        return _GpuReading(self._runtime, self._streams, blocks, mode)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, place: Place) -> torch.Tensor:
        """On a GPU: memory of this device's stream, which all of its copies to it are in order with."""
        if place == HOST:
            return super().empty(shape, dtype, place)
        with _on(self._runtime, self._streams):
            return self._runtime.empty(shape, dtype, place.device)

    def pin(self, memory: Memory) -> Memory:
        if memory.kind != "cpu":
            return memory
        try:
            return self._runtime.pin(memory, self._devices[0])
        except FerryError as problem:  # copies are slower then, and the host has a hand in them
            log.warning("%d bytes of host memory cannot be page-locked for the GPU: %s", memory.nbytes, problem)
            return memory

    def available(self, place: Place) -> int:
        if place == HOST:
            return super().available(place)
        try:
            return self._runtime.available(place.device)
        except RuntimeError as error:
            raise DeviceError(f"{place} does not tell how much memory it has: {first_line(error)}") from error

    def fill(self, view: View, content: bytes) -> None:
        with self.batch() as batch:
            batch.copy(view, torch.frombuffer(bytearray(content), dtype=torch.uint8))
        self._wait()

    def content(self, view: View) -> bytes:
        [block] = (reading := self.read([[("", view)]], "full")).blocks
        self._wait()
        assert reading.finished()
        return b"".join(bytes(piece) for _, piece in block if isinstance(piece, memoryview))

    def _wait(self) -> None:
        for stream in self._streams:
            self._runtime.wait(stream)


def _on(runtime: Cuda, streams: Iterable[Any]) -> ExitStack:
    with ExitStack() as opening:
        for stream in streams:
            opening.enter_context(runtime.using(stream))
        return opening.pop_all()


class _Queued(Copying):
    """Work on streams, and what has to live until it is over."""

    def __init__(self, runtime: Cuda, streams: Sequence[Any]) -> None:
        self.keep: list[View] = []
        self._runtime = runtime
        self._streams = streams
        self._events: list[Event] = []
        self._failed: DeviceError | None = None

    def close(self) -> None:
        """All of it is in line: from here on `finished` tells."""
        try:
            self._events = [self._runtime.event(stream) for stream in self._streams]
        except RuntimeError as error:
            self._fail(error)

    def give_up(self, error: RuntimeError) -> DeviceError:
        """The rest cannot be put in line. What was runs all the same, and is kept until it is over."""
        self.close()
        keep([self])
        return DeviceError(f"the GPU does not copy: {first_line(error)}")

    def _fail(self, error: RuntimeError) -> DeviceError:
        self._failed = self._failed or DeviceError(f"a copy of the GPU failed: {first_line(error)}")
        return self._failed

    def finished(self) -> bool:
        if self._failed is not None:
            raise self._failed
        try:
            if not all(event.query() for event in self._events):
                return False
        except RuntimeError as error:
            raise self._fail(error) from error
        self._events, self.keep = [], []
        return True


class _GpuBatch(Batch):
    def __init__(self, runtime: Cuda, streams: Sequence[Any]) -> None:
        self._queued = _Queued(runtime, streams)
        self._runtime, self._streams = runtime, streams
        self._scope = ExitStack()

    def __enter__(self) -> Self:
        self._scope = _on(self._runtime, self._streams)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._scope:
            if error is None:
                self._queued.close()
            elif isinstance(error, RuntimeError):
                raise self._queued.give_up(error) from error
            else:
                self._queued.close()
                keep([self])

    def copy(self, target: View, source: View) -> None:
        if len(target) != len(source):
            raise ValueError(f"{len(source)} bytes do not fit {len(target)}")
        self._queued.keep += (target, source)
        self._runtime.copy(target, source)

    def zero(self, target: View) -> None:
        self._queued.keep.append(target)
        self._runtime.zero(target)

    def finished(self) -> bool:
        return self._queued.finished()


class _GpuReading(Reading):
    """Device bytes go to page-locked memory of the host; of components that are sampled, the samples alone."""

    def __init__(self, runtime: Cuda, streams: Sequence[Any], blocks: Sequence[Block], mode: str) -> None:
        self._queued = _Queued(runtime, streams)
        self._runtime = runtime
        pieces: list[tuple[View, int, int]] = []  # a device view, and which bytes of the scratch it goes to
        cursor = 0
        told: list[list[tuple[str, View, tuple[int, int], int]]] = []
        for block in blocks:
            parts = []
            for name, group in groupby(block if mode != "off" else (), key=lambda part: part[0]):
                views = [view for _, view in group]
                sampled = len(views) == 1 and is_sampled(len(views[0]), mode) and self._is_there(views[0])
                for view in views:
                    start = cursor
                    for piece in _samples(view) if sampled else [view] if self._is_there(view) else []:
                        pieces.append((piece, cursor, cursor + piece.numel()))
                        cursor += piece.numel()
                    parts.append((name, view, (start, cursor), len(view) if sampled else 0))
            told.append(parts)
        scratch = self._fetch(streams, pieces, cursor) if pieces else memoryview(b"")
        super().__init__([[(n, _told(v, scratch, span, size)) for n, v, span, size in parts] for parts in told])

    def _is_there(self, view: View) -> bool:
        return self._runtime.place_of(view) is not None

    def _fetch(self, streams: Sequence[Any], pieces: Sequence[tuple[View, int, int]], nbytes: int) -> memoryview:
        try:
            scratch = self._runtime.scratch(nbytes)
            self._queued.keep += [scratch, *(view for view, _, _ in pieces)]
            with _on(self._runtime, streams):
                for view, start, stop in pieces:
                    self._runtime.copy(scratch[start:stop].view(view.shape), view)
        except RuntimeError as error:
            raise self._queued.give_up(error) from error
        self._queued.close()
        return memory_of(scratch, HOST).view()

    def finished(self) -> bool:
        return self._queued.finished()


def _samples(view: View) -> list[View]:
    """What `sampled` takes of a component: 64 bytes of every whole 4 KiB, and its end."""
    nbytes = len(view)
    whole = nbytes // SAMPLE_PERIOD * SAMPLE_PERIOD
    heads = view[:whole].view(-1, SAMPLE_PERIOD)[:, :SAMPLE_BYTES]
    return [heads, view[min(whole, nbytes - SAMPLE_BYTES) :]]


def _told(view: View, scratch: memoryview, span: tuple[int, int], sampled: int) -> memoryview | Sample:
    start, stop = span
    if start == stop:
        return memory_of(view, HOST).view()  # it is on the host already
    return Sample(sampled, scratch[start:stop]) if sampled else scratch[start:stop]


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
