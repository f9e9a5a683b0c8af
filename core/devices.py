"""Which device copies between the places that memory lies in, and where a tensor or a setting says that it lies.

RUNTIMES is where something else is put in CUDA's place, as the tests do: what theirs copies is over when the test says
so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from tensorferry.core.copying import HOST_DEVICE, Copying, Device
from tensorferry.core.errors import ConfigError, DeviceError
from tensorferry.core.gpu import Cuda, Gpu, first_line
from tensorferry.core.memory import HOST, Place

RUNTIMES: dict[str, Cuda] = {"cuda": Cuda()}


def between(*places: Place) -> Device:
    """What copies between these places, each of which is there (see `place`)."""
    kinds = {place.kind for place in places} - {HOST.kind}
    if not kinds:
        return HOST_DEVICE
    [kind] = kinds
    return Gpu(RUNTIMES[kind], list(dict.fromkeys(place.device for place in places if place.kind == kind)))


def place(setting: str, value: str) -> Place:
    """The place that a setting names: "cpu", "cuda" (the calling thread's device), "cuda:1". Raises ConfigError where
    there is no such thing here."""
    kind, _, number = value.partition(":")
    if kind == HOST.kind:
        return HOST
    runtime = RUNTIMES[kind]
    cause, remedy = runtime.why_not()
    if cause:
        raise ConfigError(f"{setting} is {value}, and {cause}", hint=f"{remedy}, or leave {setting} at cpu")
    there = runtime.count()
    device = int(number) if number else runtime.current()
    if device >= there:
        raise ConfigError(
            f"{setting} is {value}, and there {'is' if there == 1 else 'are'} {there} of them, counted from 0",
            hint="CUDA_VISIBLE_DEVICES says which ones this process sees, and in which order",
        )
    return Place(kind, device)


def place_of(tensor: torch.Tensor) -> Place:
    for runtime in RUNTIMES.values():
        if (found := runtime.place_of(tensor)) is not None:
            return found
    return HOST if tensor.device.type == HOST.kind else Place(tensor.device.type, tensor.device.index or 0)


class Arriving(Copying):
    """What the calling thread's streams on these devices compute at this moment."""

    def __init__(self, places: Iterable[Place]) -> None:
        try:
            self._events = [RUNTIMES[place.kind].arrival(place.device) for place in places]
        except RuntimeError as error:
            raise DeviceError(f"the GPU takes no event: {first_line(error)}") from error

    def finished(self) -> bool:
        try:
            while self._events and self._events[-1].query():
                self._events.pop()
        except RuntimeError as error:
            raise DeviceError(f"what computes the rows failed: {first_line(error)}") from error
        return not self._events


def claim(tensors: Mapping[str, torch.Tensor | None]) -> None:
    """The calling thread's streams work on these from now on. Costs nothing for host memory."""
    for tensor in tensors.values():
        if tensor is not None:
            for runtime in RUNTIMES.values():
                if runtime.place_of(tensor) is not None:
                    runtime.claim(tensor)
